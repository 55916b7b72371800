"""Does each of STEER's knobs move its own measure? Sentences that the expert writes, over a grid of both.

    python examples/recipes/steer_reviews/evaluate.py --texts 20       # two hours on two cores
    python examples/recipes/steer_reviews/evaluate.py                  # a few minutes on a GPU

Prints a table and writes `results.md` and `tradeoff.png` into the recipe's folder.
"""

import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import log_likelihoods, mean, models, parser, table
from domains import FILMS, PROMPT, films, judged, texts
from matplotlib import pyplot as plt
from transformers import set_seed

from hf_logits.ngrams import distinct, self_bleu
from hf_logits.processors import NegativePool, SteerLogitsProcessor


SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 10}
"""As the published code samples."""
NEGATIVES = 10


class Stream(NamedTuple):
    """Texts written one after the other at one setting; each stays away from real ones and from those written before it."""

    contrast: float
    repulsion: float
    seed: int


def write(expert, tokenizer, streams: Sequence[Stream], options) -> dict[Stream, list[list[int]]]:
    """The texts of every stream, as ids up to the end of the text.

    A batch holds many streams at once, since both strengths may differ by row; a stream's pool grows after each batch.
    """
    written: dict[Stream, list[list[int]]] = {stream: [] for stream in streams}
    real = films("train")
    pools = {
        stream: NegativePool(real, k=NEGATIVES, seed=stream.seed, tokenizer=tokenizer, max_tokens=512)
        for stream in streams
    }
    prompt = tokenizer(PROMPT, return_tensors="pt").to(expert.device)
    each = max(1, options.batch_size // len(streams))
    begun = time.perf_counter()
    for already in range(0, options.texts, each):
        turn = [stream for stream in streams for _ in range(min(each, options.texts - already))]
        for start in range(0, len(turn), options.batch_size):
            rows = turn[start : start + options.batch_size]
            processor = SteerLogitsProcessor(
                model=expert,
                negatives=[pools[stream].draw() for stream in rows],
                contrast=torch.tensor([stream.contrast for stream in rows], device=expert.device),
                repulsion=torch.tensor([stream.repulsion for stream in rows], device=expert.device),
                protect_ids=[tokenizer.eos_token_id] if options.protect_end else [],
                tokenizer=tokenizer,
            )
            output = expert.generate(
                input_ids=prompt["input_ids"].expand(len(rows), -1),
                attention_mask=prompt["attention_mask"].expand(len(rows), -1),
                max_new_tokens=options.tokens,
                logits_processor=[processor],
                pad_token_id=tokenizer.pad_token_id,
                **SAMPLING,
            )
            for stream, row in zip(rows, output[:, prompt["input_ids"].shape[1] :].tolist(), strict=True):
                ids = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
                written[stream].append(ids)
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if text:
                    pools[stream].add(text)
        done = min(already + each, options.texts)
        print(f"{done} of {options.texts} texts a stream, {time.perf_counter() - begun:.0f} s", flush=True)
    return written


def until(rows: Sequence[list[int]], budget: int) -> list[list[int]]:
    """The first `budget` tokens: the share of distinct n-grams falls with the size of what is looked at."""
    kept = []
    for row in rows:
        kept.append(row[:budget])
        budget -= len(kept[-1])
    return kept


class Scored(NamedTuple):
    """What is known of the texts of one stream."""

    expert: float
    base: float
    tokens: int
    length: float
    judged: float
    distinct: float
    self_bleu: float
    ended: float

    @property
    def log_ratio(self) -> float:
        return (self.expert - self.base) / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.expert / max(1, self.tokens))


def score(expert, tokenizer, rows: Sequence[list[int]], budget: int, options) -> Scored:
    prompts = [PROMPT] * len(rows)
    with_adapter = sum(log_likelihoods(expert, tokenizer, prompts, rows))
    with expert.disable_adapter():
        without = sum(log_likelihoods(expert, tokenizer, prompts, rows))
    kinds = judged([tokenizer.decode(row, skip_special_tokens=True) for row in rows])
    return Scored(
        expert=with_adapter,
        base=without,
        tokens=sum(map(len, rows)),
        length=mean([len(row) for row in rows]),
        judged=mean([float(kind == FILMS) for kind in kinds]),
        distinct=distinct(until(rows, budget), 3),
        self_bleu=mean(self_bleu([row for row in rows if row])),
        ended=mean([float(len(row) < options.tokens) for row in rows]),
    )


COLUMNS = {
    "log-ratio, nats a token": lambda found: found.log_ratio,
    "judged a film review, %": lambda found: 100 * found.judged,
    "distinct-3": lambda found: found.distinct,
    "self-BLEU": lambda found: found.self_bleu,
    "perplexity under the expert": lambda found: found.perplexity,
    "tokens a text": lambda found: found.length,
    "ended, %": lambda found: 100 * found.ended,
}


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--contrasts", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.8])
    made.add_argument("--repulsions", type=float, nargs="+", default=[0.0, 0.3, 0.6, 1.0])
    made.add_argument("--seeds", type=int, default=3, help="streams of each setting")
    made.add_argument("--texts", type=int, default=100, help="of each stream")
    made.add_argument("--tokens", type=int, default=48, help="a text has at most")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--protect-end", action="store_true", help="do not push away from the end of the text")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    model, tokenizer = models(options)
    expert = SteerLogitsProcessor.from_pretrained(options.output, main_model=model).model
    grid = list(itertools.product(options.contrasts, options.repulsions))
    # streams of a seed draw the same real texts at every setting
    streams = [Stream(*setting, options.seed + seed) for setting in grid for seed in range(options.seeds)]
    written = write(expert, tokenizer, streams, options)

    held_out = random.Random(0).sample(films("test"), min(options.texts * options.seeds, len(films("test"))))
    real = [tokenizer(text)["input_ids"][: options.tokens] for text in held_out]
    parts = [real[start :: options.seeds] for start in range(options.seeds)]
    budget = min(sum(map(len, rows)) for rows in [*written.values(), *parts])
    found: dict[tuple[float, float] | str, list[Scored]] = {}
    for setting in grid:
        own = [stream for stream in streams if stream[:2] == setting]
        found[setting] = [score(expert, tokenizer, written[stream], budget, options) for stream in own]
        print(setting, [round(one.log_ratio, 3) for one in found[setting]], flush=True)
    found["real"] = [score(expert, tokenizer, rows, budget, options) for rows in parts]

    lines = []
    for setting, scored in found.items():
        name = "real texts" if setting == "real" else f"{setting[0]:g}, {setting[1]:g}"
        cells = []
        for column, measure in COLUMNS.items():
            values = [measure(one) for one in scored]
            digits = 3 if column in ("distinct-3", "self-BLEU", "log-ratio, nats a token") else 1
            cells.append(
                f"{mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"
            )
        lines.append([name, *cells])

    own, labels = zip(*texts("test"), strict=True)
    kinds = judged(own)
    right = mean([kind == label for kind, label in zip(kinds, labels, strict=True)])
    recognised = mean([kind == FILMS for kind, label in zip(kinds, labels, strict=True) if label == FILMS])
    text = (
        f"{options.texts} texts a stream of at most {options.tokens} tokens, {options.seeds} streams (seeds) a setting: means and standard deviations over "
        f"them. Sampled at temperature 1 from the 10 best tokens, each text against {NEGATIVES} others, drawn anew from the real texts to learn "
        f"from and those written before in its stream{'; the end of the text is not pushed away from' if options.protect_end else ''}. "
        "Log-ratio: how much likelier the expert finds a text than its base does. "
        f"The judge, words and pairs of words learned from sentences of its own, tells {100 * right:.1f} % of {len(own)} held-out sentences of four "
        f"kinds, and {100 * recognised:.1f} % of the film reviews among them. Distinct-3 is taken from the first {budget} tokens of each stream, self-BLEU (to 4-grams) "
        "from all its texts, both over tokens. Ended: before the limit. Real texts are those of the test part, cut to the same limit.\n\n"
        f"{table(['contrast, repulsion', *COLUMNS], lines)}\n"
    )
    print(text)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    draw(found, options.contrasts, options.repulsions, options.output / "tradeoff.png")


def draw(found, contrasts: list[float], repulsions: list[float], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    ratio, variety = (
        {setting: [measure(one) for one in scored] for setting, scored in found.items()}
        for measure in (COLUMNS["log-ratio, nats a token"], COLUMNS["distinct-3"])
    )

    def line(axis, xs: list[float], values: list[list[float]], label: str) -> None:
        spread = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values]
        axis.errorbar(xs, [mean(own) for own in values], yerr=spread, marker="o", capsize=2, label=label)

    for repulsion in repulsions:
        line(axes[0], contrasts, [ratio[contrast, repulsion] for contrast in contrasts], f"repulsion {repulsion:g}")
    for contrast in contrasts:
        line(axes[1], repulsions, [variety[contrast, repulsion] for repulsion in repulsions], f"contrast {contrast:g}")
        settings = [(contrast, repulsion) for repulsion in repulsions]
        xs, ys = ([mean(values[setting]) for setting in settings] for values in (ratio, variety))
        axes[2].plot(xs, ys, marker="o", label=f"contrast {contrast:g}")
        for x, y, repulsion in zip(xs, ys, repulsions, strict=True):
            axes[2].annotate(f"{repulsion:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes[2].plot(mean(ratio["real"]), mean(variety["real"]), "k*", markersize=10, label="real texts")
    names = ("log-ratio, nats a token", "distinct-3")
    for axis, x, y in zip(axes, ("contrast", "repulsion", names[0]), (*names, names[1]), strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
