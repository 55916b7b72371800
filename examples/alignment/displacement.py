"""Likelihood displacement, seen and treated: DPO widens the margin of a pair while both of its sentences become unlikely.

    python examples/alignment/displacement.py

SmolLM2-135M-Instruct first learns to write like the reviewers (SFT). Then four ways to prefer praise to complaint start from there,
with LoRA, on the same pairs: half of them differ in a single word, half are unrelated sentences. Everything is measured on pairs
that are trained on and on pairs that are not. About ten minutes on two cores; leaves a table and a figure.
"""  # the README beside this file shows both

import argparse
import os
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib.pyplot as plt
import torch
from common import near_duplicates, opinions
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_logits.trainers import (
    EntanglementConfig,
    EntanglementTrainer,
    RPOConfig,
    RPOTrainer,
    ches_scores,
    filter_by_ches,
)


LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
FILTERED = "DPO, CHES-filtered"
COLORS = {"DPO": "#c0392b", FILTERED: "#d68910", "normalised gradients": "#2471a3", "RPO": "#1e8449"}
SETS = {"seen": "one-word pairs, trained on", "unseen": "one-word pairs, held out", "unrelated": "unrelated, held out"}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return quiet | more


def supervised(path: Path, pairs: Dataset, folder: Path, steps: int, rate: float) -> Path:
    """The starting point of all methods: the chosen sentences are learned, and the adapter is merged."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=SFTConfig(
            **settings(folder, max_steps=steps, learning_rate=rate, per_device_train_batch_size=8, logging_steps=8)
        ),
        train_dataset=pairs.rename_column("chosen", "completion").remove_columns("rejected"),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    return folder


def prefer(
    trainer_class: type, config: type, start: Path, data: Dataset, held_out: dict[str, Dataset], **more: Any
) -> dict[str, list[dict[str, float]]]:
    """Train, and return by set of pairs what was measured on the way."""
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=config(**more),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(start),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    history: dict[str, list[dict[str, float]]] = {name: [] for name in held_out}
    for entry in trainer.state.log_history:
        for name, rows in history.items():
            if f"eval_{name}_loss" in entry:  # the stock log names the metrics of every set alike
                found = {key: entry[f"eval_{key}"] for key in ("logps/chosen", "logps/rejected", "rewards/accuracies")}
                rows.append(found | {"step": entry["step"], "loss": entry[f"eval_{name}_loss"]})
    return history


def table(results: dict[str, dict[str, list[dict[str, float]]]], set_name: str) -> str:
    lines = [
        f"**{SETS[set_name]}**",
        "",
        "| | log-prob of chosen | rejected | margin | loss | reward accuracy |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    rows = [(name, history[set_name], -1) for name, history in results.items()]
    # Half of the pairs: halfway, each was seen as often as the other methods see theirs in all steps.
    filtered = results[FILTERED][set_name]
    rows.insert(2, (f"{FILTERED}, half the steps", filtered, len(filtered) // 2))
    for name, history, index in rows:
        first, last = history[0], history[index]
        chosen, rejected = (last[key] - first[key] for key in ("logps/chosen", "logps/rejected"))
        lines.append(
            f"| {name} | {chosen:+.1f} | {rejected:+.1f} | {chosen - rejected:+.1f} | "
            f"{first['loss']:.2f} → {last['loss']:.2f} | {last['rewards/accuracies']:.2f} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, (name, title) in zip(axes, SETS.items(), strict=True):
        for method, history in results.items():
            steps = [row["step"] for row in history[name]]
            for key, style in (("logps/chosen", "-"), ("logps/rejected", ":")):
                moved = [row[key] - history[name][0][key] for row in history[name]]
                label = method if style == "-" and axis is axes[0] else None
                axis.plot(steps, moved, style, color=COLORS[method], label=label, linewidth=2 if style == "-" else 1.3)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("change of the log-prob (nats)\nsolid: chosen, dotted: rejected")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output" / "displacement")
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of each method")
    parser.add_argument("--pairs", type=int, default=32, help="training pairs of either kind")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    near, far = near_duplicates(longest=8), opinions(longest=8)
    rows, rest = range(options.pairs), range(options.pairs, options.pairs + 24)
    data = concatenate_datasets([near.select(rows), far.select(rows)]).shuffle(seed=0)
    held_out = {"seen": near.select(rows), "unseen": near.select(rest), "unrelated": far.select(rest)}
    start = supervised(options.model or smollm2_folder(), data, options.output / "sft", steps=options.steps, rate=1e-3)

    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    scores = ches_scores(model, data, AutoTokenizer.from_pretrained(start))
    kept = filter_by_ches(data, scores, keep_fraction=0.5).remove_columns("ches")
    words = {row["chosen"] for row in held_out["seen"]}
    left = sum(row["chosen"] in words for row in kept)
    print(f"CHES keeps {left} of {options.pairs} one-word pairs and {len(kept) - left} of {options.pairs} others")
    del model

    common = settings(options.output) | {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "beta": 0.1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "logging_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": max(options.steps // 4, 1),
        "eval_on_start": True,
        "precompute_ref_log_probs": True,
    }
    results = {
        "DPO": prefer(DPOTrainer, DPOConfig, start, data, held_out, **common),
        FILTERED: prefer(DPOTrainer, DPOConfig, start, kept, held_out, **common),
        "normalised gradients": prefer(EntanglementTrainer, EntanglementConfig, start, data, held_out, **common),
        "RPO": prefer(RPOTrainer, RPOConfig, start, data, held_out, rpo_eta=0.2, rpo_reduction="mean", **common),
    }
    text = "\n\n".join(table(results, name) for name in SETS)
    print(text)
    (options.output / "displacement.md").write_text(text + "\n")
    draw(results, options.output / "displacement.png")
    print(f"figure: {options.output / 'displacement.png'}")


if __name__ == "__main__":
    main()
