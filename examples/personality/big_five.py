"""One trait of the Big Five on a dial: from what a person says of themselves to vectors that move SmolLM2, on two cores.

    python examples/personality/big_five.py

A made-up person says sentences for extraversion and none against it. Some pairs of sentences give the vectors, others the strength, and
the rest shows what the strength does; a negative one is the opposite person. It is measured in two ways: which sentence of a pair the
model would rather say of itself, and how it fills in the questionnaire. Table, figure and vectors lie in
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

from hf_logits.processors import answer_probabilities, collect_head_activations, fit_personality  # noqa: E402
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


def beginning(tokenizer: Any) -> str:
    """What stands in front of a sentence that the model says of itself."""
    chat = [{"role": "user", "content": "Describe yourself in one sentence."}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


@torch.no_grad()
def own_words(model: Any, tokenizer: Any, places: list[int]) -> float:
    """How probable the sentence for the trait is, of the two of a pair, by their log-probs per token; the mean over pairs."""
    prompt = tokenizer(beginning(tokenizer), add_special_tokens=False)["input_ids"]
    scores: list[list[float]] = [[], []]
    for kind, found in zip((FOR, AGAINST), scores, strict=True):
        for place in places:
            said = tokenizer(f"I {kind[place]}.", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + said], device=model.device)
            labels = torch.tensor([[-100] * len(prompt) + said], device=model.device)
            found.append(-model(ids, labels=labels).loss.item())
    return float(torch.tensor(scores).softmax(0)[0].mean())


def questionnaire(model: Any, tokenizer: Any, places: list[int]) -> float:
    """The expected answer to the pairs' sentences from 1 to 5, turned round for those against the trait."""
    sentences = [kind[place] for kind in (FOR, AGAINST) for place in places]
    prompts = [[{"role": "user", "content": QUESTION.format(statement=sentence)}] for sentence in sentences]
    answers = answer_probabilities(model, tokenizer, prompts, batch_size=16) @ torch.tensor(SCORES)
    agree, disagree = (float(part.mean()) for part in answers.chunk(2))
    return (agree + 6 - disagree) / 2


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Of ordinary sentences: what the move costs elsewhere."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        losses.append(model(ids, labels=ids).loss.item())
    return float(torch.tensor(losses).mean().exp())


def split(rng: random.Random, sizes: tuple[int, int]) -> list[list[int]]:
    """Places of the pairs to fit on, to choose the strength on, and to report."""
    order = rng.sample(range(len(FOR)), len(FOR))
    return [order[: sizes[0]], order[sizes[0] : sum(sizes)], order[sum(sizes) :]]


def table(curves: dict[str, dict[float, list[float]]]) -> str:
    lines = [f"| strength | {' | '.join(curves)} |", "|--:|" + "--:|" * len(curves)]
    for strength in next(iter(curves.values())):
        cells = []
        for values in (curve[strength] for curve in curves.values()):
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}")
        lines.append(f"| {strength:+g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[float, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.4))
    colors = ("#c0392b", "#2471a3", "#7f8c8d")
    for axis, (name, curve), color in zip(axes, curves.items(), colors, strict=True):
        for run in zip(*curve.values(), strict=True):
            axis.plot(list(curve), run, color=color, linewidth=0.6, alpha=0.5)
        means = [statistics.mean(values) for values in curve.values()]
        axis.plot(list(curve), means, color=color, linewidth=2, marker="o", markersize=3)
        axis.axvline(0, color="0.7", linewidth=0.8)
        axis.set_xlabel("strength")
        axis.set_title(name, fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(1, 5)
    axes[2].set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output" / "personality")
    parser.add_argument("--model", help="a Hub id or a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--splits", type=int, default=3, help="random splits of the statements")
    parser.add_argument("--heads", type=int, default=24, help="heads that are moved")
    parser.add_argument("--strengths", type=float, nargs="+", default=(0.0, 2.0, 4.0, 8.0))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.model)
    model.to(options.device)

    # Once, for whoever says them: each pair as one item that is answered with the one or the other sentence.
    said = [[f"{beginning(tokenizer)}I {sentence}" for sentence in kind] for kind in (FOR, AGAINST)]
    activations = torch.cat(
        [collect_head_activations(model, tokenizer, prompts, answers=(".",), batch_size=16) for prompts in said], 1
    )

    dial = sorted({0.0, *options.strengths, *(-strength for strength in options.strengths)})
    names = ("own words: p(extraverted)", "questionnaire, 1 to 5", "perplexity of ordinary sentences")
    curves: dict[str, dict[float, list[float]]] = {name: {strength: [] for strength in dial} for name in names}
    chosen = []
    for seed in range(options.splits):
        fit, dev, test = split(random.Random(seed), (8, 3))
        vectors = fit_personality(activations[fit], [5.0] * len(fit), num_heads=options.heads, seed=seed)
        on_dev = {}
        for strength in options.strengths:
            with vectors.applied(model, strength=strength):
                on_dev[strength] = own_words(model, tokenizer, dev)
        vectors = vectors.with_strength(max(on_dev, key=lambda strength: on_dev[strength]))
        for strength in dial:
            with vectors.applied(model, strength=strength):
                found = (
                    own_words(model, tokenizer, test),
                    questionnaire(model, tokenizer, test),
                    perplexity(model, tokenizer),
                )
            for curve, value in zip(curves.values(), found, strict=True):
                curve[strength].append(value)
        own = curves[names[0]]
        chosen.append(
            f"split {seed}: strength {vectors.strength:g} chosen, own words from {own[0.0][-1]:.2f} to "
            f"{own[vectors.strength][-1]:.2f} on pairs that were neither fitted nor chosen on"
        )
    vectors.save_pretrained(options.output / "extraverted")
    text = "\n".join([table(curves), "", *(f"- {line}" for line in chosen)])
    print(text)
    (options.output / "big_five.md").write_text(text + "\n")
    draw(curves, options.output / "big_five.png")
    print(f"figure: {options.output / 'big_five.png'}; vectors of the last split: {options.output / 'extraverted'}")


if __name__ == "__main__":
    main()
