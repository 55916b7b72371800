"""One trait of the Big Five on a dial: from answers to a questionnaire to vectors that move SmolLM2, some minutes on two cores.

    python examples/personality/big_five.py

A made-up person is as extraverted as can be. Their answers to some statements give the vectors, those to others the strength, and
the rest shows what the strength does. A negative strength is the opposite person. Statements that speak for the trait and against
it are reported apart: a model that merely agrees more would raise both. Table, figure and vectors lie in
examples/output/personality/ afterwards.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2 import load  # noqa: E402

from hf_logits.processors import (  # noqa: E402
    answer_probabilities,
    collect_head_activations,
    fit_personality,
    search_strength,
)
from hf_logits.processors.personality_alignment import QUESTION, SCORES  # noqa: E402


FOR = (
    "make new friends wherever I go",
    "love to be at large parties",
    "talk to strangers with ease",
    "like to be the center of attention",
    "start most of the conversations",
    "feel full of energy among people",
    "enjoy leading a group",
    "am the first to dance at a wedding",
    "laugh loudly and often",
    "seek adventure and excitement",
    "like to speak in front of an audience",
    "get bored when I am alone",
    "invite people to my home every week",
    "say what I think in a large group",
    "cheer everybody up",
    "love busy places full of people",
)
AGAINST = (
    "prefer to spend evenings alone",
    "avoid crowds whenever I can",
    "have little to say in a group",
    "stay in the background at parties",
    "find it hard to approach strangers",
    "need quiet after meeting people",
    "keep my feelings to myself",
    "let others speak first",
    "dislike being looked at by many people",
    "feel tired after a long conversation",
    "am glad when a visit is cancelled",
    "like to work in silence and alone",
    "rarely call anybody on the phone",
    "keep a distance to other people",
    "speak quietly and seldom",
    "would rather read than go out",
)
TEXTS = (
    "The library opens at nine in the morning and closes at six in the evening.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "To bake bread you need flour, water, salt and a little yeast.",
    "The train to the coast leaves from the second platform every hour.",
    "A triangle has three sides, and its angles add up to half a turn.",
    "Many birds fly south in autumn and come back in spring.",
)


def question(statement: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION.format(statement=statement)}]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Of ordinary sentences: what the move costs elsewhere."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        losses.append(model(ids, labels=ids).loss.item())
    return float(torch.tensor(losses).mean().exp())


def split(rng: random.Random, sizes: tuple[int, int]) -> list[list[int]]:
    """Places of the statements to fit on, to choose the strength on, and to report; each with as many of either kind."""
    orders = [rng.sample(range(len(kind)), len(kind)) for kind in (FOR, AGAINST)]
    bounds = [0, sizes[0], sum(sizes), len(FOR)]
    return [
        [*orders[0][a:b], *(len(FOR) + place for place in orders[1][a:b])]
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def table(curves: dict[str, dict[float, list[float]]]) -> str:
    lines = [f"| strength | {' | '.join(curves)} |", "|--:|" + "--:|" * len(curves)]
    for strength in next(iter(curves.values())):
        cells = []
        for values in (curve[strength] for curve in curves.values()):
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}")
        lines.append(f"| {strength:+g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[float, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    colors = ("#c0392b", "#2471a3", "#7f8c8d", "#117a65")
    for (name, curve), color in zip(curves.items(), colors, strict=True):
        axis = axes[1] if "perplexity" in name else axes[0]
        means = [statistics.mean(values) for values in curve.values()]
        for run in zip(*curve.values(), strict=True):
            axis.plot(list(curve), run, color=color, linewidth=0.6, alpha=0.5)
        axis.plot(list(curve), means, color=color, linewidth=2, marker="o", markersize=3, label=name)
    axes[0].set_ylabel("expected answer, 1 to 5")
    axes[1].set_ylabel("perplexity of ordinary sentences")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.axvline(0, color="0.7", linewidth=0.8)
        axis.set_xlabel("strength")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output" / "personality")
    parser.add_argument("--model", help="a Hub id or a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--splits", type=int, default=3, help="random splits of the statements")
    parser.add_argument("--heads", type=int, default=24, help="heads that are moved")
    parser.add_argument("--strengths", type=float, nargs="+", default=(0.0, 2.0, 4.0, 8.0))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.model)

    prompts = [question(statement) for statement in (*FOR, *AGAINST)]
    values = [5.0] * len(FOR) + [1.0] * len(AGAINST)
    activations = collect_head_activations(model, tokenizer, prompts)  # once, for whoever answers

    dial = sorted({sign * strength for strength in options.strengths for sign in (-1.0, 1.0)} | {0.0})
    names = ("statements for the trait", "statements against it", "the trait", "perplexity")
    curves: dict[str, dict[float, list[float]]] = {name: {strength: [] for strength in dial} for name in names}
    chosen = []
    for seed in range(options.splits):
        fit, dev, test = split(random.Random(seed), (8, 4))
        vectors = fit_personality(activations[fit], [values[i] for i in fit], num_heads=options.heads, seed=seed)
        vectors, _ = search_strength(
            model,
            tokenizer,
            vectors,
            [prompts[i] for i in dev],
            [values[i] for i in dev],
            strengths=options.strengths,
            batch_size=16,
        )
        for strength in dial:
            with vectors.applied(model, strength=strength):
                probs = answer_probabilities(model, tokenizer, [prompts[i] for i in test], batch_size=16)
                cost = perplexity(model, tokenizer)
            answers = probs @ torch.tensor(SCORES)
            agree, disagree = (float(part.mean()) for part in answers.chunk(2))
            found = (agree, disagree, (agree + 6 - disagree) / 2, cost)
            for curve, value in zip(curves.values(), found, strict=True):
                curve[strength].append(value)
        trait = curves["the trait"]
        chosen.append(
            f"split {seed}: strength {vectors.strength:g} chosen, the trait from {trait[0.0][-1]:.2f} to "
            f"{trait[vectors.strength][-1]:.2f} on statements that were neither fitted nor chosen on"
        )
    vectors.save_pretrained(options.output / "extraverted")
    text = "\n".join([table(curves), "", *(f"- {line}" for line in chosen)])
    print(text)
    (options.output / "big_five.md").write_text(text + "\n")
    draw(curves, options.output / "big_five.png")
    print(f"figure: {options.output / 'big_five.png'}; vectors of the last split: {options.output / 'extraverted'}")


if __name__ == "__main__":
    main()
