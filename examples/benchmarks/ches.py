"""CHES of preference pairs: batches through the backbone, against one completion at a time with all logits.

    python examples/benchmarks/ches.py            # SmolLM2-135M, a few minutes on two cores
    python examples/benchmarks/ches.py --quick    # a random model of two layers

Each way runs in a process of its own, in turns. Memory is what the process needs at most beyond the loaded model.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


class Ids:
    """All that the scores ask of a tokenizer when the pairs are tokenized."""

    pad_token_id = eos_token_id = 2


def load(quick: bool) -> PreTrainedModel:
    if quick:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).eval()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from smollm2 import smollm2_folder

    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


LENGTHS = {"sentences": ((8, 24), (8, 40)), "dialogues": ((40, 200), (20, 300))}
"""Fewest and most tokens of the prompts, and of the completions."""


def pairs(kind: str, rows: int) -> Dataset:
    rng = random.Random(0)
    prompt, completion = LENGTHS[kind]

    def ids(fewest: int, most: int) -> list[int]:
        return [rng.randrange(100, 30_000) for _ in range(rng.randint(fewest, most))]

    sizes = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}
    return Dataset.from_list([{name: ids(*size) for name, size in sizes.items()} for _ in range(rows)])


@torch.no_grad()
def slow(model: PreTrainedModel, dataset: Dataset) -> torch.Tensor:
    """The form in which the paper's experiments compute it: every completion alone, all layers kept, logits computed."""
    found = []
    for row in dataset:
        means = []
        for name in ("chosen_ids", "rejected_ids"):
            output = model(input_ids=torch.tensor([row["prompt_ids"] + row[name]]), output_hidden_states=True)
            means.append(output.hidden_states[-1][0, len(row["prompt_ids"]) - 1 : -1].mean(0))
        found.append(means[0] @ (means[1] - means[0]))
    return torch.stack(found)


def fast(model: PreTrainedModel, dataset: Dataset) -> torch.Tensor:
    from hf_logits.trainers.ches import ches_scores

    return ches_scores(model, dataset, Ids())  # type: ignore[arg-type]


def peak(reset: bool = False) -> float:
    """MiB that this process held at most since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def child(way: str, kind: str, quick: bool) -> None:
    score = {"slow": slow, "fast": fast}[way]
    model, dataset = load(quick), pairs(kind, 4 if quick else 48 if kind == "sentences" else 16)
    sum(parameter.sum() for parameter in model.parameters())  # weights are read from disk when they are first used
    score(model, pairs("sentences", 1))
    before = peak(reset=True)
    start = time.perf_counter()
    scores = score(model, dataset)
    print(json.dumps({"seconds": time.perf_counter() - start, "MiB": peak() - before, "scores": scores.tolist()}))


def run(quick: bool = False) -> str:
    """The table, in Markdown."""
    table = [
        "| CHES of pairs of | one at a time: s | batches: s | times faster | one at a time: MiB | batches: MiB | MiB ratio | worst error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in LENGTHS:
        found: dict[str, list[dict]] = {"slow": [], "fast": []}
        for _ in range(1 if quick else 3):
            for way in found:
                command = [sys.executable, __file__, "--child", way, "--kind", kind] + (["--quick"] if quick else [])
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        seconds, memory = (
            [statistics.median(one[key] for one in found[way]) for way in found] for key in ("seconds", "MiB")
        )
        expected, scores = (torch.tensor(found[way][0]["scores"]) for way in found)
        worst = ((scores - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        table.append(
            f"| {kind} | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[0] / seconds[1]:.1f} | {memory[0]:.0f} | {memory[1]:.0f} "
            f"| {memory[1] / max(memory[0], 1e-9):.2f} | {worst:.0e} |"
        )
    return "\n".join(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", choices=["slow", "fast"])
    parser.add_argument("--kind", choices=list(LENGTHS))
    given = parser.parse_args()
    if given.child:
        child(given.child, given.kind, given.quick)
    else:
        print(run(given.quick))
