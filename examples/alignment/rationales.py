"""TRICE on sums with rationales in free text: only the answer is checked, and the variance of the gradient with and without the control variate.

    python examples/alignment/rationales.py

A tiny model, made here, first learns to add three digits in words from rationales of which many are wrong, so that about a third of the
answers is right. TRICE then learns from the answers alone: without the control variate, with it, and with it on half of the rows.
At some points of the way the same samples give both gradient estimates, often enough to see their variance. A quarter of an hour on
two cores; leaves two tables and a figure.
"""  # the README beside this file shows them

import argparse
import itertools
import os
import random
import statistics
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.utils import logging

from hf_logits.trainers import TRICEConfig, TRICETrainer, trice_weights


LARGEST = 6
NUMBERS = [str(number) for number in range(3 * LARGEST + 1)]
LEADS, ADDS, GIVES = ["start with", "take", "first comes"], ["add", "then add", "plus"], ["makes", "gives", "is"]
LONGEST = 18
"""Tokens of the longest rationale."""
METHODS: dict[str, dict[str, Any]] = {
    "without control variate": {"control_variate": False},
    "with control variate": {},
    "with it, half of the rows": {"subsample_size": 0.5},
}
COLORS = dict(zip(METHODS, ("#c0392b", "#2471a3", "#1e8449"), strict=True))


# --- sums ----------------------------------------------------------------------------------------------------------------


def rationale(digits: list[int], rng: random.Random, noise: float) -> str:
    """The digits in any order, added in words; each addition goes wrong by up to three with a chance of `noise`."""
    total, *rest = rng.sample(digits, 3)
    words = [rng.choice(LEADS), str(total)]
    for digit in rest:
        total += digit + (rng.choice([-3, -2, -1, 1, 2, 3]) if rng.random() < noise else 0)
        total = min(max(total, 0), 3 * LARGEST)
        words += [rng.choice(ADDS), str(digit), rng.choice(GIVES), str(total)]
    return " ".join([*words, "so", str(total)])


def prompt(digits: list[int], hint: int | None = None) -> str:
    return " ".join(map(str, digits)) + (" ?" if hint is None else f" answer {hint} ?")


def sums(seed: int) -> list[list[int]]:
    every = [list(digits) for digits in itertools.product(range(LARGEST + 1), repeat=3)]
    random.Random(seed).shuffle(every)
    return every


def questions(digits: list[list[int]]) -> Dataset:
    return Dataset.from_list([{"id": str(d), "prompt": prompt(d), "answer": str(sum(d))} for d in digits])


def verifier(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether the last word is the sum. What stands before it is free."""
    return [float(text.split()[-1:] == [right]) for text, right in zip(completions, answer, strict=True)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    phrases = " ".join([*LEADS, *ADDS, *GIVES, "so answer ?"]).split()
    words = ["<pad>", "<eos>", *NUMBERS, *dict.fromkeys(phrases)]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


# --- the start -----------------------------------------------------------------------------------------------------------


def imitator(tokenizer: PreTrainedTokenizerFast, steps: int, noise: float) -> LlamaForCausalLM:
    """A model that writes as the noisy rationales do; behind a prompt with the answer, as those that lead there."""
    set_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng, every = random.Random(0), sums(0)
    for step in range(steps):
        rows = []
        for digits in rng.choices(every, k=64):
            guided = rng.random() < 0.3
            text = rationale(digits, rng, 0.0 if guided else noise)
            asked = tokenizer(prompt(digits, sum(digits) if guided else None))["input_ids"]
            rows.append((asked, [*tokenizer(text)["input_ids"], 1]))
        width = max(len(asked) + len(said) for asked, said in rows)
        ids_ = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(ids_, -100)
        for row, (asked, said) in enumerate(rows):
            ids_[row, : len(asked) + len(said)] = torch.tensor(asked + said)
            labels[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        model(input_ids=ids_, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- variance ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: LlamaForCausalLM, asked: torch.Tensor) -> torch.Tensor:
    """Completions filled up with 0 behind the end."""
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": LONGEST, "pad_token_id": 0}
    said = model.generate(asked, attention_mask=torch.ones_like(asked), **settings)[:, asked.shape[1] :]
    return torch.nn.functional.pad(said, (0, LONGEST - said.shape[1]))


def gradient(model: LlamaForCausalLM, asked: torch.Tensor, said: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of the weighted sum of the completions' log-probs, as one vector."""
    logits = model(torch.cat([asked, said], 1)).logits[:, asked.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, said[..., None])[..., 0] * (said != 0)
    return torch.cat([g.flatten() for g in torch.autograd.grad(weights @ log_probs.sum(1), list(model.parameters()))])


def variances(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, digits: list[list[int]], draws: int
) -> dict[str, float]:
    """P(right), and the variance of both estimates summed over all weights: the same samples, memories from the posterior."""
    torch.manual_seed(0)
    examples = [one for one in digits for _ in range(draws)]
    asked = tokenizer([prompt(one) for one in examples], return_tensors="pt")["input_ids"]
    answers = [str(sum(one)) for one in examples]

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        said = sample(model, asked)
        right = verifier(tokenizer.batch_decode(said, skip_special_tokens=True), answers)
        return said, torch.tensor(right) > 0

    proposals, right = draw()
    memories, kept = draw()
    for _ in range(50):  # what is right and drawn from the model is drawn from the posterior
        if kept.all():
            break
        again, passes = draw()
        memories, kept = torch.where((passes & ~kept)[:, None], again, memories), kept | passes
    estimates: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for place in range(draws):
        own = slice(place, None, draws)
        for control_variate, found in estimates.items():
            weights = torch.cat(trice_weights(right[own], kept[own], control_variate=control_variate))
            said = torch.cat([proposals[own], memories[own]])
            found.append(gradient(model, asked[own].repeat(2, 1), said, weights / (right[own] | kept[own]).sum()))
    measured = {name: torch.stack(found).var(0).sum().item() for name, found in estimates.items()}
    return {"right": right.float().mean().item(), "without": measured[False], "with": measured[True]}


# --- training ------------------------------------------------------------------------------------------------------------


class Snapshots(TrainerCallback):
    """Keeps the model at some steps."""

    def __init__(self, steps: list[int]):
        self.steps, self.found = steps, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps:
            self.found[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


def train(start: LlamaForCausalLM, tokenizer: Any, method: str, seed: int, options: Any) -> dict[str, Any]:
    """One run; returns what was logged on the way."""
    model = LlamaForCausalLM(start.config)
    model.load_state_dict(start.state_dict())
    settings, rows = dict(METHODS[method]), 2 * options.batch
    if "subsample_size" in settings:
        settings["subsample_size"] = int(settings["subsample_size"] * rows)
    every = sums(1)
    trainer = TRICETrainer(
        model,
        verifier,
        args=TRICEConfig(
            str(options.output / "runs"),
            **settings,
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=256,
            max_completion_length=LONGEST,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=options.every,
            eval_on_start=True,
            logging_steps=options.every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
        ),
        train_dataset=questions(every[: options.examples]),
        eval_dataset=questions(every[-256:]),
        processing_class=tokenizer,
        callbacks=[snapshots := Snapshots([options.steps // 4, options.steps // 2, options.steps])],
    )
    guided = trainer.init_memory(lambda row: row["prompt"].replace("?", f"answer {row['answer']} ?"), batch_size=256)
    trainer.train()
    log = trainer.state.log_history
    return {
        "guided": guided,
        "steps": [entry["step"] for entry in log if "eval_reward" in entry],
        "right": [entry["eval_reward"] for entry in log if "eval_reward" in entry],
        "rows": statistics.mean(entry["trice/rows"] for entry in log if "trice/rows" in entry) * rows,
        "seconds": statistics.mean(entry["step_time"] for entry in log if "step_time" in entry),
        "snapshots": snapshots.found,
    }


# --- what is left --------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(runs: dict[str, list[dict[str, Any]]], measured: list[dict[str, float]], options: Any) -> str:
    guided = [run["guided"] for own in runs.values() for run in own]
    lines = [
        f"Share of right answers to {256} sums that were not trained on, {options.seeds} seeds; {options.steps} steps of {options.batch} "
        f"examples, {options.examples} in all. The guide, which tells the answer, fills {statistics.mean(guided):.0%} of the memories.",
        "",
        "| TRICE | at the start | halfway | at the end | rows a step | seconds a step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, own in runs.items():
        cells = [spread([run["right"][place] for run in own]) for place in (0, len(own[0]["right"]) // 2, -1)]
        costs = [statistics.mean(run[key] for run in own) for key in ("rows", "seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} | {costs[0]:.0f} | {costs[1]:.3f} |")
    lines += [
        "",
        f"Variance of the gradient estimate of {options.batch} examples, summed over all weights, {options.draws} draws:",
        "",
        "| share of right proposals | without control variate | with | ratio |",
        "|--:|--:|--:|--:|",
    ]
    for one in measured:
        cells = [
            f"{one['right']:.3f}",
            f"{one['without']:.3g}",
            f"{one['with']:.3g}",
            f"{one['with'] / one['without']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list[dict[str, Any]]], measured: list[dict[str, float]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, own in runs.items():
        for run in own:
            left.plot(run["steps"], run["right"], color=COLORS[name], alpha=0.25, linewidth=1)
        means = [statistics.mean(values) for values in zip(*(run["right"] for run in own), strict=True)]
        left.plot(own[0]["steps"], means, color=COLORS[name], label=name)
    left.set(xlabel="step", ylabel="right answers, sums not trained on", title="Learning from the answer alone")
    places = sorted(measured, key=lambda one: one["right"])
    for key, name in (("without", "without control variate"), ("with", "with control variate")):
        right.plot([o["right"] for o in places], [o[key] for o in places], "o-", color=COLORS[name], label=name)
    right.set(
        xlabel="share of right proposals", ylabel="total variance of the gradient", title="Same samples", yscale="log"
    )
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("examples/output/rationales"), help="folder of tables and figure"
    )
    parser.add_argument(
        "--imitation-steps", type=int, default=600, help="steps in which the model learns to write rationales"
    )
    parser.add_argument("--noise", type=float, default=0.4, help="share of additions in these that are wrong")
    parser.add_argument("--steps", type=int, default=320, help="steps of each run")
    parser.add_argument("--every", type=int, default=40, help="steps between two evaluations")
    parser.add_argument("--examples", type=int, default=256, help="sums to train on")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--draws", type=int, default=40, help="gradient estimates for a variance")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()

    tokenizer = word_tokenizer()
    start = imitator(tokenizer, options.imitation_steps, options.noise)
    runs: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        runs[method] = []
        for seed in range(options.seeds):
            runs[method].append(train(start, tokenizer, method, seed, options))
            print(
                f"{method}, seed {seed}: {runs[method][-1]['right'][0]:.3f} to {runs[method][-1]['right'][-1]:.3f} right",
                flush=True,
            )
    model, measured = start.eval(), []
    states = [start.state_dict(), *runs["with control variate"][0]["snapshots"].values()]
    for state in states:
        model.load_state_dict({name: value.clone() for name, value in state.items()})
        measured.append(variances(model, tokenizer, sums(1)[: options.batch], options.draws))
    report = tables(runs, measured, options)
    (options.output / "rationales.md").write_text(report)
    draw(runs, measured, options.output / "rationales.png")
    print(report)


if __name__ == "__main__":
    main()
