"""Is a steered model better? SmolLM2 on multiple-choice questions, plain and steered, without and with an example in the prompt.

    python examples/evaluate_a_steered_model.py

The questions are MMLU's own examples (57 subjects), the short ones. The model is steered away from what it says to a question without
content (classifier-free guidance), which it can only answer by habit. Two things are seen that accuracy hides:

- An example in the prompt makes the model attend to the choices: nearly all probability falls on them. It is not more often right.
- Answers follow places: some letters are never given, others nearly always. Which ones moves with the prompt.

Leaves a table and a figure. Minutes on two cores; `--rotations` also asks in all orders of the choices, for four times as long.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib.pyplot as plt
import torch
from exam import LETTERS, Question, exam
from smollm2 import load
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.metrics import choice_logprobs
from hf_logits.metrics.mcq_callback import measure_table
from hf_logits.metrics.position_bias import contents, permutation_consistency, rotations
from hf_logits.metrics.tables import picks, read_logprobs
from hf_logits.processors import MixtureLogitsProcessor


NOTHING = Question("", "N/A", ("N/A",) * 4, 0)
"""Whoever answers this one has only habits to go by."""
COLUMNS = {
    "attentiveness": "mass on the choices",
    "resolved": "resolved",
    "accuracy": "accuracy",
    "accuracy_pmi": "accuracy, PMI",
    "p_choices": "p(right) among the choices",
    "brier": "Brier",
    "anchored": "A where A is wrong",
    "rstd": "RStd of recalls",
    "entropy": "entropy of places",
    "consistency": "same in all orders",
}


def asked(one: Question, choices: Sequence[str] | None = None) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices or one.choices, strict=True)]
    return "\n".join([f"Question: {one.question}", *lines, "Answer:"])


def prompt(one: Question, example: Question | None, choices: Sequence[str] | None = None) -> str:
    shown = "" if example is None else f"{asked(example)} {LETTERS[example.answer]}\n\n"
    return shown + asked(one, choices)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    example: Question | None,
    processors: Sequence[LogitsProcessor],
    *,
    batch_size: int,
    rotated: bool,
) -> dict[str, Any]:
    """Everything that can be said about one model with one kind of prompt."""
    options: dict[str, Any] = {"logits_processor": processors, "batch_size": batch_size}
    letters, answers = list(LETTERS), [one.answer for one in questions]
    texts = [prompt(one, example) for one in questions]
    table = choice_logprobs(model, tokenizer, texts, letters, prior=prompt(NOTHING, example), **options)
    found = measure_table(table, answers)
    if rotated:
        turned = [prompt(one, example, own) for one in questions for own in rotations(one.choices)]
        scored = choice_logprobs(model, tokenizer, turned, letters, **options).logprobs
        picked = picks(read_logprobs(scored)[0]).reshape(-1, 4).tolist()
        found["consistency"] = permutation_consistency([contents(row, 4) for row in picked], answers)["consistency"]
    return found


def report(results: dict[str, dict[str, Any]], rows: int) -> str:
    names = [name for name in COLUMNS if all(name in found for found in results.values())]
    lines = [f"| {rows} questions | {' | '.join(COLUMNS[name] for name in names)} | {' | '.join(LETTERS)} |"]
    lines.append("|---|" + "--:|" * (len(names) + 4))
    for label, found in results.items():
        cells = [f"{found[name]:.3f}" for name in names] + [f"{share:.1%}" for share in found["frequencies"]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    right = next(iter(results.values()))["gold_frequencies"]
    lines.append(
        f"| where the right answers are |{' |' * len(names)} {' | '.join(f'{share:.1%}' for share in right)} |"
    )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """What falls on the choices beside what is right, and which letters are given."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels, width = list(results), 0.8 / len(results)
    for shift, key in ((-0.2, "attentiveness"), (0.2, "accuracy")):
        bars = left.bar(
            [i + shift for i in range(len(labels))], [results[one][key] for one in labels], 0.38, label=COLUMNS[key]
        )
        left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.axhline(0.25, color="grey", linestyle=":", linewidth=1)
    left.set_xticks(range(len(labels)), labels, fontsize=8)
    left.set_ylim(0, 1.05)
    left.legend(loc="upper left", frameon=False)
    for index, one in enumerate(labels):
        right.bar([i + (index - 1.5) * width for i in range(4)], results[one]["frequencies"], width, label=one)
    gold = results[labels[0]]["gold_frequencies"]
    right.plot(range(4), gold, "k_", markersize=40, label="right answers")
    right.set_xticks(range(4), list(LETTERS))
    right.set_ylabel("share of the answers")
    right.legend(frameon=False, fontsize=8, markerscale=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a folder, in place of SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=int, default=100, help="how many, the shortest ones")
    parser.add_argument("--scale", type=float, default=2.0, help="of the guidance; 1 is the plain model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rotations", action="store_true", help="also ask in all orders of the choices")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "evaluation", help="a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    model, tokenizer = load(given.model)
    model.to(given.device)
    shortest = sorted(exam(), key=lambda one: (len(asked(one)), one.question))
    example = next(one for one in shortest if one.answer == 1)
    questions = [one for one in shortest if one is not example][: given.questions]
    results = {}
    for shots, shown in ((0, None), (1, example)):
        habit = MixtureLogitsProcessor.cfg(model, prompt(NOTHING, shown), scale=given.scale, tokenizer=tokenizer)
        for kind, processors in (("plain", []), ("steered", [habit])):
            start = time.perf_counter()
            label = f"{shots}-shot, {kind}"
            results[label] = measure(
                model, tokenizer, questions, shown, processors, batch_size=given.batch_size, rotated=given.rotations
            )
            print(f"{label}: {time.perf_counter() - start:.0f} s", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    text = report(results, len(questions))
    print(f"\n{text}\n")
    (given.output / "results.md").write_text(
        f"# A steered model on multiple-choice questions\n\n`python examples/evaluate_a_steered_model.py`\n\n{text}\n\n"
        "![mass and accuracy, and the letters that are given](results.png)\n"
    )
    draw(results, given.output / "results.png")
    print(f"table and figure: {given.output}")


if __name__ == "__main__":
    main()
