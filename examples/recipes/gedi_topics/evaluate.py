"""Does the guide steer to topics that it never learned? Neutral openings are continued, and judged by words that are typical of each topic.

    python examples/recipes/gedi_topics/evaluate.py                       # an hour on two cores, minutes on a GPU
    python examples/recipes/gedi_topics/evaluate.py --part validation     # what settings were chosen by

Prints tables and writes `results.md` and `tradeoff.png` into the recipe's folder.
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
from topics import TOPICS, judges, pieces, words_of

from hf_logits.ngrams import distinct
from hf_logits.processors import GeDiLogitsProcessor


OPENINGS = (
    "In summary",
    "This essay discusses",
    "Views on",
    "The connection between",
    "Foundational to this is",
    "To review",
    "In brief",
    "An illustration of this is",
    "Furthermore",
    "The central theme is",
    "To conclude",
    "The key aspect is",
    "Prior to this",
    "Emphasised are",
    "To summarise",
    "The relationship between",
    "More importantly",
    "It has been shown",
    "The issue is",
    "This section describes",
)
"""About nothing in particular, as Dathathri et al. 2019 (PPLM) begin texts for topics."""


def says(texts: list[str], words: frozenset[str]) -> list[float]:
    """Whether each text has one of the words."""
    return [float(any(word in words for word in words_of(text))) for text in texts]


def by_opening(values: list[float]) -> list[float]:
    """The mean of each opening's continuations, which follow one another: they are no independent examples."""
    size = len(values) // len(OPENINGS)
    return [mean(values[start : start + size]) for start in range(0, len(values), size)]


def accuracy(processor: GeDiLogitsProcessor, tokenizer, part: str, limit: int, batch_size: int) -> tuple[float, int]:
    """How often the guide itself finds a text's topic among those of the part, all of them new to it."""
    topics, (true, false) = list(TOPICS[part]), processor.codes
    held_out = random.Random(1).sample(pieces(part), min(limit, len(pieces(part))))
    beginnings, texts = [], []
    for text, _ in held_out:
        ids = tokenizer(text, truncation=True, max_length=80)["input_ids"]
        for topic in topics:
            body = tokenizer(f" {topic}", add_special_tokens=False)["input_ids"] + ids
            beginnings += [[true], [false]]
            texts += [body, body]
    found = log_likelihoods_of_ids(processor.guide, beginnings, texts, batch_size=batch_size)
    # by log p(topic, text | true) - log p(topic, text | false), per token as the guide compares them
    margins = [(found[i] - found[i + 1]) / len(texts[i]) for i in range(0, len(found), 2)]
    right = []
    for index, (_, own) in enumerate(held_out):
        row = margins[index * len(topics) : (index + 1) * len(topics)]
        right.append(topics[row.index(max(row))] == own)
    return mean(right), len(right)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--samples", type=int, default=8, help="continuations of an opening")
    made.add_argument("--tokens", type=int, default=32)
    made.add_argument("--strengths", type=float, nargs="+", default=[1.0, 5.0, 30.0], help="beside 0, the plain model")
    made.add_argument("--filter-p", type=float, nargs="+", help="as the recipe has it if left out")
    made.add_argument("--target-p", type=float, nargs="+", help="as the recipe has it if left out")
    made.add_argument("--top-p", type=float, default=0.9, help="of sampling")
    made.add_argument("--repetition-penalty", type=float, default=1.2)
    made.add_argument("--new-words", action="store_true", help="judge by words that no training text has")
    made.add_argument("--texts", type=int, default=400, help="held-out texts on which the guide itself is tried")
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    options = made.parse_args(arguments)

    model, tokenizer = models(options)
    recipe = GeDiLogitsProcessor.from_pretrained(options.output, main_model=model, tokenizer=tokenizer)
    settings = recipe.saved_arguments()
    topics, judge = list(TOPICS[options.part]), judges(options.part, new=options.new_words)
    prompts = [opening for opening in OPENINGS for _ in range(options.samples)]
    chosen = {"do_sample": True, "top_p": options.top_p, "repetition_penalty": options.repetition_penalty}

    def write(processor: GeDiLogitsProcessor | None, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return continue_prompts(
            model,
            tokenizer,
            prompts,
            processor,
            tokens=options.tokens,
            batch_size=options.batch_size,
            top_k=0,
            **chosen,
        )

    def judged(written: dict[str, list[list[int]]]) -> tuple[dict[str, list[float]], ...]:
        """Of each topic, shares by opening: with words of it, with those of another topic (the mean over these), with the topic word."""
        own, other, named = {}, {}, {}
        for topic in topics:
            texts = tokenizer.batch_decode(written[topic], skip_special_tokens=True)
            own[topic] = by_opening(says(texts, judge[topic]))
            others = [by_opening(says(texts, judge[one])) for one in topics if one != topic]
            other[topic] = [mean(values) for values in zip(*others, strict=True)]
            named[topic] = by_opening(says(texts, frozenset([topic])))
        return own, other, named

    def over_topics(found: dict[str, list[float]]) -> list[float]:
        return [mean(values) for values in zip(*found.values(), strict=True)]

    # The plain model writes as much for each topic as the guided one does: other seeds, the same openings.
    grid: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)]
    for strength in options.strengths:
        for filter_p in options.filter_p or [settings["filter_p"]]:
            grid += [(strength, filter_p, target_p) for target_p in options.target_p or [settings["target_p"]]]
    rows, per_topic, points = [], [], []
    plain: dict[str, list[float]] = {}
    plain_surprise = 1.0
    for strength, filter_p, target_p in grid:
        written = {}
        for place, topic in enumerate(topics):
            processor = None
            if strength:
                own_settings = {"strength": strength, "filter_p": filter_p, "target_p": target_p}
                own_settings["secondary_code"] = f" {topic}"
                processor = GeDiLogitsProcessor(**(settings | own_settings), tokenizer=tokenizer)
            written[topic] = write(processor, 1000 * options.seed + place)
        own, other, named = judged(written)
        everything = [ids for topic in topics for ids in written[topic]]
        surprise = perplexity(model, tokenizer, prompts * len(topics), everything, batch_size=options.batch_size)
        if not strength:
            plain, plain_surprise = own, surprise
        name = f"{strength:g}, {filter_p:g}, {target_p:g}" if strength else "plain"
        share = over_topics(own)
        gain = [a - b for a, b in zip(share, over_topics(plain), strict=True)]
        varied = [distinct(written[topic], 3) for topic in topics]
        rows.append(
            [
                name,
                percent(share),
                percent(gain, signed=True) if strength else "",
                f"{100 * mean(over_topics(other)):.0f}",
                f"{100 * mean(over_topics(named)):.0f}",
                f"{surprise:.1f}",
                f"{surprise / plain_surprise:.2f}",
                f"{mean(varied):.3f}",
            ]
        )
        per_topic.append([name, *(percent(own[topic]) for topic in topics)])
        points.append((surprise, 100 * mean(share), name))
        print(rows[-1], flush=True)

    right, count = accuracy(recipe, tokenizer, options.part, options.texts, options.batch_size)
    text = (
        f"{len(topics)} topics of the {options.part} part ({', '.join(topics)}), none of which the guide has learned; {len(OPENINGS)} neutral "
        f"openings with {options.samples} samples each, {options.tokens} tokens, top-p {options.top_p:g}, repetition penalty "
        f"{options.repetition_penalty:g}, seed {options.seed}. On topic is what has one of the {max(map(len, judge.values()))} words that are "
        "most typical of the topic's own texts, which training never saw, "
        f"{'neither the topic word nor a word of any training text' if options.new_words else 'the topic word itself not'} among them. Intervals (95 %) are over "
        f"openings. The guide itself finds the topic of {100 * right:.1f} % of {count} texts (by chance {100 / len(topics):.1f} %). Perplexity "
        "is that under the plain model, of the continuations alone.\n\n"
    )
    columns = [
        "strength, filter_p, target_p",
        "on topic, %",
        "more than plain, points",
        "by other topics' words, %",
        "says the topic word, %",
        "perplexity",
        "of plain",
        "distinct-3",
    ]
    text += f"{table(columns, rows)}\n\nOn topic, %, of each topic:\n\n"
    text += table(["strength, filter_p, target_p", *topics], per_topic)
    text += (
        "\n\nThe judge's words:\n\n"
        + "\n".join(f"- *{one}*: {', '.join(sorted(judge[one]))}" for one in topics)
        + "\n"
    )
    print(text)
    if options.part == "test":
        (options.output / "results.md").write_text(text, encoding="utf-8")
        draw(points, options.output / "tradeoff.png")


def draw(points: list[tuple[float, float, str]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
    for x, y, name in points:
        axis.annotate(name.split(",")[0], (x, y), textcoords="offset points", xytext=(5, 4))
    axis.set_xlabel("perplexity under the plain model")
    axis.set_ylabel("on an unseen topic, %")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
