"""Does the guide steer? Continuations of the first words of sentences that nobody has learned, judged by two judges.

    python examples/recipes/gedi_sentiment/evaluate.py                       # ten minutes on two cores
    python examples/recipes/gedi_sentiment/evaluate.py --part validation --filter-p 0 0.4 0.8    # what settings are chosen by

Prints a table, settings with the best first, and, for the test part, writes `results.md` and `tradeoff.png` into the recipe's folder.
"""

import random
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import (
    BATCH_SIZE,
    continue_prompts,
    log_likelihoods_of_ids,
    mean,
    models,
    parser,
    percent,
    perplexity,
    table,
)
from matplotlib import pyplot as plt
from sentiment import judged_by_classifier, judged_by_lexicon, sentences

from hf_logits.ngrams import distinct
from hf_logits.processors import GeDiLogitsProcessor


CODES = ("positive", "negative")
AIMS = {"gain": 25.0, "cost": 1.5}
"""Points more than the plain model, at no more than so many times its perplexity, in both directions."""


def accuracy(processor: GeDiLogitsProcessor, tokenizer, part: str, limit: int, batch_size: int) -> tuple[float, int]:
    """How many whole sentences the guide itself puts into the right class."""
    held_out = random.Random(1).sample(sentences(part), min(limit, len(sentences(part))))
    texts = [tokenizer(text)["input_ids"] for text, _ in held_out]
    behind = [
        log_likelihoods_of_ids(processor.guide, [[code]] * len(texts), texts, batch_size=batch_size)
        for code in processor.codes
    ]
    best = ["positive" if positive > negative else "negative" for positive, negative in zip(*behind, strict=True)]
    return mean([one == label for one, (_, label) in zip(best, held_out, strict=True)]), len(held_out)


def chosen(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Settings with what they do in the worse direction, those within the aimed-at cost first, then by gain."""
    worst = {
        name: (min(gain for gain, _ in two.values()), max(cost for _, cost in two.values()))
        for name, two in found.items()
    }
    ranked = sorted(worst, key=lambda name: (worst[name][1] > AIMS["cost"], -worst[name][0]))
    rows = [[name, f"{100 * worst[name][0]:+.0f}", f"{worst[name][1]:.2f}"] for name in ranked]
    return table(
        ["strength, filter_p, target_p", "gain in the worse direction, points", "perplexity of plain, worse"], rows
    )


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--prompts", type=int, default=100, help="openings; all if there are fewer")
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--strengths", type=float, nargs="+", default=[1.0, 5.0, 30.0], help="beside 0, the plain model")
    made.add_argument("--filter-p", type=float, nargs="+", help="as the recipe has it if left out")
    made.add_argument("--target-p", type=float, nargs="+", help="as the recipe has it if left out")
    made.add_argument("--samples", type=int, default=0, help="continuations of an opening, drawn; 0: one, greedily")
    made.add_argument("--top-p", type=float, default=0.9, help="of sampling")
    made.add_argument("--repetition-penalty", type=float, default=1.2)
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    options = made.parse_args(arguments)

    model, tokenizer = models(options)
    recipe = GeDiLogitsProcessor.from_pretrained(options.output, main_model=model)
    settings, (positive, negative) = recipe.saved_arguments(), recipe.codes
    opened = sorted({" ".join(text.split()[:4]) for text, _ in sentences(options.part) if len(text.split()) >= 8})
    openings = random.Random(0).sample(opened, min(options.prompts, len(opened)))
    each = max(1, options.samples)
    prompts = [opening for opening in openings for _ in range(each)]
    how = {"do_sample": options.samples > 0, "repetition_penalty": options.repetition_penalty}
    if options.samples:
        how |= {"top_p": options.top_p, "top_k": 0}

    def by_opening(hits: list[float]) -> list[float]:
        return [mean(hits[start : start + each]) for start in range(0, len(hits), each)]

    grid = [(0.0, 0.0, 0.0)]
    for strength in options.strengths:
        for filter_p in options.filter_p or [settings["filter_p"]]:
            grid += [
                (strength, filter_p, target_p) for target_p in options.target_p or [settings["target_p"]] if strength
            ]
    rows, points = [], {code: [] for code in CODES}
    plain: dict[str, tuple[list[float], float]] = {}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for strength, filter_p, target_p in grid:
        name = f"{strength:g}, {filter_p:g}, {target_p:g}" if strength else "plain"
        for wanted, codes in zip(CODES, ((positive, negative), (negative, positive)), strict=True):
            own = {"desired": codes[0], "undesired": [codes[1]]}
            own |= {"strength": strength, "filter_p": filter_p, "target_p": target_p}
            processor = GeDiLogitsProcessor(**(settings | own)) if strength else None
            torch.manual_seed(options.seed)
            written = continue_prompts(
                model, tokenizer, prompts, processor, tokens=options.tokens, batch_size=options.batch_size, **how
            )
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            by_lexicon = by_opening([float(label == wanted) for label in judged_by_lexicon(texts)])
            by_classifier = [float(label == wanted) for label in judged_by_classifier(texts)]
            surprise = perplexity(model, tokenizer, prompts, written, batch_size=options.batch_size)
            if not strength:
                plain[wanted] = by_lexicon, surprise
            gain = [a - b for a, b in zip(by_lexicon, plain[wanted][0], strict=True)]
            cost = surprise / plain[wanted][1]
            if strength:
                found.setdefault(name, {})[wanted] = mean(gain), cost
            points[wanted].append((surprise, mean(by_lexicon), name))
            rows.append(
                [
                    f"{wanted}, {name}",
                    percent(by_lexicon),
                    percent(gain, signed=True) if strength else "",
                    f"{100 * mean(by_classifier):.0f}",
                    f"{surprise:.1f}",
                    f"{cost:.2f}",
                    f"{distinct(written, 3):.3f}",
                ]
            )
            print(rows[-1], flush=True)

    right, count = accuracy(recipe, tokenizer, options.part, 400, options.batch_size)
    texts, labels = zip(*sentences(options.part), strict=True)
    judges = {
        "lexicon": mean([a == b for a, b in zip(judged_by_lexicon(texts), labels, strict=True)]),
        "classifier": mean([a == b for a, b in zip(judged_by_classifier(texts), labels, strict=True)]),
    }
    drawn = f"{each} samples each by top-p {options.top_p:g}, seed {options.seed}," if options.samples else "greedy,"
    head = (
        f"{len(openings)} openings of four words from the {options.part} part, {options.tokens} tokens, {drawn} with a repetition penalty of "
        f"{options.repetition_penalty:g}; intervals (95 %) are over openings. The guide itself tells {100 * right:.1f} % of {count} whole "
        f"sentences of that part (bias and scale aside); of all of them the lexicon tells {100 * judges['lexicon']:.1f} %, the classifier "
        f"{100 * judges['classifier']:.1f} %. Perplexity is that under the plain model, of the continuation alone."
    )
    columns = [
        "wanted, strength, filter_p, target_p",
        "wanted by the lexicon, %",
        "more than plain, points",
        "wanted by the classifier, %",
        "perplexity",
        "of plain",
        "distinct-3",
    ]
    text = f"{head}\n\n{table(columns, rows)}\n"
    print(f"{text}\n{chosen(found)}")
    if options.part == "test":
        (options.output / "results.md").write_text(text, encoding="utf-8")
        draw(points, options.output / "tradeoff.png")


def draw(points: dict[str, list[tuple[float, float, str]]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    for wanted, found in points.items():
        axis.plot(*zip(*[(x, 100 * y) for x, y, _ in found], strict=True), marker="o", label=wanted)
        for x, y, name in found:
            axis.annotate(name.split(",")[0], (x, 100 * y), textcoords="offset points", xytext=(5, 4))
    axis.set_xlabel("perplexity under the plain model")
    axis.set_ylabel("wanted sentiment, %")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
