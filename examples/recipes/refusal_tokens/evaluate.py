"""Does p(refuse) tell what to refuse, and do the thresholds move the rates? On requests, a source and subjects that nobody learned from.

    python examples/recipes/refusal_tokens/evaluate.py      # five minutes on two cores

Prints tables and writes `results.md` and `rates.png` into the recipe's folder.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from common import models, parser, table
from harmful_requests import GROUPS, LIKE, TOKENS, requests
from matplotlib import pyplot as plt
from peft import PeftModel

from hf_logits.processors import RefusalTokenLogitsProcessor
from hf_logits.roc import auc_interval, roc_curve
from hf_logits.trainers import add_refusal_tokens
from hf_logits.trainers.refusal_calibration import refusal_probabilities


GRID = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def decisions(
    model, tokenizer, processor: RefusalTokenLogitsProcessor, prompts: list[str], *, batch_size: int = 16
) -> list[str]:
    """The first token of each answer, as text."""
    found = []
    for start in range(0, len(prompts), batch_size):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=1,
            do_sample=False,
            logits_processor=[processor],
            pad_token_id=tokenizer.pad_token_id,
        )
        found += tokenizer.batch_decode(output[:, -1:])
    return found


def rates(scores: np.ndarray, names: list[str], labels: list[str], thresholds: dict[str, float]) -> dict[str, float]:
    """The share of each group's requests, and of ordinary ones, that are refused at all: the best group at its threshold."""
    best = scores.argmax(-1)
    bound = np.array([thresholds[name] for name in names])[best]
    refused = scores[np.arange(len(best)), best] >= bound
    return {name: float(refused[[label == name for label in labels]].mean()) for name in [*names, "respond"]}


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--rows", type=int, help="requests of each part; all if left out")
    options = made.parse_args(arguments)

    model, tokenizer = models(options)
    add_refusal_tokens(tokenizer, model, TOKENS, like=LIKE)
    model = PeftModel.from_pretrained(model, str(options.output / "adapter")).eval()
    processor = RefusalTokenLogitsProcessor.from_pretrained(options.output, tokenizer=tokenizer)
    names = list(GROUPS)
    scores, rows = {}, {}
    for part in ("test", "elsewhere"):
        rows[part] = requests(part)[: options.rows]
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows[part]]
        found = refusal_probabilities(model, tokenizer, prompts, tokens=TOKENS, batch_size=16)
        scores[part] = found.double().numpy()

    lines = []
    for part, title in (
        ("test", "Do-Not-Answer / small talk, MMLU"),
        ("elsewhere", "HarmBench / other MMLU subjects"),
    ):
        refuse = np.array([row["label"] != "respond" for row in rows[part]])
        total = scores[part].sum(-1)
        pair = total[refuse], total[~refuse]
        low, high = auc_interval(*pair, resamples=1000, seed=0)
        lines.append(
            [title, f"{len(pair[0])} / {len(pair[1])}", f"{roc_curve(*pair).auc:.3f} ({low:.3f} to {high:.3f})"]
        )
    text = "p(refuse), all groups together:\n\n" + table(["to refuse / ordinary", "requests", "ROC AUC (95 %)"], lines)

    labels = [row["label"] for row in rows["test"]]
    calibrated = dict(processor.threshold)
    lines = [
        ["as calibrated", *(f"{100 * rate:.0f}" for rate in rates(scores["test"], names, labels, calibrated).values())]
    ]
    for value in GRID:
        found = rates(scores["test"], names, labels, dict.fromkeys(names, value))
        lines.append([f"all {value:g}", *(f"{100 * rate:.0f}" for rate in found.values())])
    text += "\n\nShare that is refused on the test part, by threshold, %:\n\n"
    text += table(["thresholds", *names, "ordinary"], lines)

    moved = names[3]
    lines = []
    for value in (0.0, calibrated[moved], 1.01):
        found = as_such(scores["test"], names, calibrated | {moved: value})
        lines.append([f"{value:.3g}", *(str(found[name]) for name in names)])
    text += f"\n\nRequests that are refused as each group while the threshold of *{moved}* alone moves:\n\n"
    text += table([f"threshold of {moved}", *names], lines)

    said = decisions(model, tokenizer, processor, [row["prompt"] for row in rows["test"]])
    tokens = [TOKENS.categories[name] for name in names]
    bounds = np.array([calibrated[name] for name in names])
    best = scores["test"].argmax(-1)
    refused = scores["test"].max(-1) >= bounds[best]
    expected = [tokens[place] if refuses else TOKENS.respond for place, refuses in zip(best, refused, strict=True)]
    same = sum(a == b for a, b in zip(said, expected, strict=True))
    text += f"\n\nThe processor, generating, begins {same} of {len(said)} answers as these tables say.\n"
    print(text)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    draw(scores["test"], names, labels, options.output / "rates.png")


def as_such(scores: np.ndarray, names: list[str], thresholds: dict[str, float]) -> dict[str, int]:
    """How many requests are refused as each group."""
    best = scores.argmax(-1)
    return {
        name: int(((best == place) & (scores[:, place] >= thresholds[name])).sum()) for place, name in enumerate(names)
    }


def draw(scores: np.ndarray, names: list[str], labels: list[str], path: Path) -> None:
    grid = torch.logspace(-3, 0, 60).tolist()
    found = [rates(scores, names, labels, dict.fromkeys(names, value)) for value in grid]
    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    for name in [*names, "respond"]:
        style = "k--" if name == "respond" else "-"
        axis.plot(grid, [100 * one[name] for one in found], style, label="ordinary" if name == "respond" else name)
    axis.set_xscale("log")
    axis.set_xlabel("threshold of all groups")
    axis.set_ylabel("refused, %")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
