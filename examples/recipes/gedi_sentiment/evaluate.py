"""Does the guide steer? Continuations of the first words of sentences that nobody has learned, judged by two judges.

    python examples/recipes/gedi_sentiment/evaluate.py                       # ten minutes on two cores
    python examples/recipes/gedi_sentiment/evaluate.py --part validation     # what settings were chosen by

Prints a table and writes `results.md` and `tradeoff.png` into the recipe's folder.
"""

import random
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import continue_prompts, interval, mean, parser, perplexity, table
from matplotlib import pyplot as plt
from sentiment import judged_by_classifier, judged_by_lexicon, sentences
from smollm2 import load

from hf_logits.ngrams import distinct
from hf_logits.processors import GeDiLogitsProcessor


CODES = ("positive", "negative")
GREEDY = {"do_sample": False, "repetition_penalty": 1.2}
"""As the paper decodes."""


def accuracy(processor: GeDiLogitsProcessor, model, tokenizer, part: str, limit: int) -> tuple[float, int]:
    """How many whole sentences the guide itself puts into the right class."""
    held_out = random.Random(1).sample(sentences(part), min(limit, len(sentences(part))))
    found = []
    with torch.no_grad():
        for text, label in held_out:
            ids = tokenizer(text)["input_ids"]
            means = []
            for code in processor.codes:
                logits = processor.guide(input_ids=torch.tensor([[code, *ids]])).logits[0, :-1].float()
                means.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].mean().item())
            best = "positive" if means[0] > means[1] else "negative"
            found.append(best == label)
    return mean(found), len(found)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--prompts", type=int, default=100)
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0, 5.0, 30.0])
    options = made.parse_args(arguments)

    model, tokenizer = load(options.model)
    plain_guide = GeDiLogitsProcessor.from_pretrained(options.output, main_model=model)
    positive, negative = plain_guide.codes
    opened = [" ".join(text.split()[:4]) for text, _ in sentences(options.part) if len(text.split()) >= 8]
    prompts = random.Random(0).sample(sorted(set(opened)), options.prompts)

    rows, points = [], {code: [] for code in CODES}
    plain: dict[str, float] = {}
    for strength in options.strengths:
        for wanted, codes in zip(CODES, ((positive, negative), (negative, positive)), strict=True):
            processor = GeDiLogitsProcessor.from_pretrained(
                options.output, main_model=model, desired=codes[0], undesired=[codes[1]], strength=strength,
                **({} if strength else {"filter_p": 0.0}),
            )  # fmt: skip
            written = continue_prompts(model, tokenizer, prompts, processor, tokens=options.tokens, **GREEDY)
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
            by_lexicon = [float(label == wanted) for label in judged_by_lexicon(texts)]
            by_classifier = [float(label == wanted) for label in judged_by_classifier(texts)]
            surprise = perplexity(model, tokenizer, prompts, written)
            if not strength:
                plain[wanted] = surprise
            low, high = interval(by_lexicon, mean)
            points[wanted].append((surprise, mean(by_lexicon), strength))
            ratio = f"{surprise / plain[wanted]:.2f}" if wanted in plain else ""
            rows.append(
                [
                    f"{wanted}, {strength:g}",
                    f"{100 * mean(by_lexicon):.0f} ({100 * low:.0f} to {100 * high:.0f})",
                    f"{100 * mean(by_classifier):.0f}",
                    f"{surprise:.1f}",
                    ratio,
                    f"{distinct(written, 3):.3f}",
                ]
            )
            print(rows[-1], flush=True)

    right, count = accuracy(plain_guide, model, tokenizer, options.part, 400)
    texts, labels = zip(*sentences(options.part), strict=True)
    judges = {
        "lexicon": mean([a == b for a, b in zip(judged_by_lexicon(texts), labels, strict=True)]),
        "classifier": mean([a == b for a, b in zip(judged_by_classifier(texts), labels, strict=True)]),
    }
    head = (
        f"{options.prompts} openings of four words from the {options.part} part, {options.tokens} tokens, greedy with a repetition penalty of "
        f"1.2. The guide itself tells {100 * right:.1f} % of {count} whole sentences of that part (bias and scale aside); of all of them the "
        f"lexicon tells {100 * judges['lexicon']:.1f} %, the classifier {100 * judges['classifier']:.1f} %. Perplexity is that under the plain "
        "model, of the continuation alone."
    )
    columns = [
        "wanted, strength",
        "wanted by the lexicon, % (95 %)",
        "wanted by the classifier, %",
        "perplexity",
        "of plain",
        "distinct-3",
    ]
    text = f"{head}\n\n{table(columns, rows)}\n"
    print(text)
    if options.part == "test":
        (options.output / "results.md").write_text(text, encoding="utf-8")
        draw(points, options.output / "tradeoff.png")


def draw(points: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    for wanted, found in points.items():
        axis.plot(*zip(*[(x, 100 * y) for x, y, _ in found], strict=True), marker="o", label=wanted)
        for x, y, strength in found:
            axis.annotate(f"{strength:g}", (x, 100 * y), textcoords="offset points", xytext=(5, 4))
    axis.set_xlabel("perplexity under the plain model")
    axis.set_ylabel("wanted sentiment, %")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
