"""Does it help to ask the large model where the small one is unsure? Against asking it at random, equally often, and against the clock.

    python examples/recipes/entropy_adaptive/evaluate.py                       # a quarter of an hour on two cores
    python examples/recipes/entropy_adaptive/evaluate.py --part validation     # what the threshold was chosen by
    python examples/recipes/entropy_adaptive/evaluate.py --time                # wall-clock time, one answer after the other

Prints a table and writes `results.md` and `tradeoff.png`, or `time.md`, into the recipe's folder.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import BATCH_SIZE, continue_prompts, interval, models, parser, read_continuations, table
from conversations import chats
from healed import healed
from matplotlib import pyplot as plt
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, set_seed

import hf_logits
from hf_logits.processors import EntropyAdaptiveLogitsProcessor


class RandomSwitching(EntropyAdaptiveLogitsProcessor):
    """The control: as often at work as the entropy would have the large model, and for as long at a time, but whenever it happens."""

    def __init__(self, large_model, *, share: float, run: float, seed: int):
        super().__init__(large_model)
        self.leave = 1.0 / max(run, 1.0)
        self.enter = self.leave * share / max(1.0 - share, 1e-9)
        if self.enter > 1.0:  # runs so short are never so frequent: longer ones then
            self.enter, self.leave = 1.0, (1.0 - share) / share
        self.share, self.generator = share, torch.Generator().manual_seed(seed)

    def _decide(self, step, small, large):
        rows = len(step.input_ids)
        before = self._histories.get("large")
        last = before.before(step)[:, -1].cpu() if before is not None and before.before(step).shape[1] else None
        drawn = torch.rand(rows, generator=self.generator)
        chance = torch.full((rows,), self.share)
        if last is not None:
            chance = torch.where(last > 0, 1.0 - self.leave, self.enter)
        asks = (drawn < chance).to(step.input_ids.device)
        self.record(step, large=asks.float().masked_fill(self._finished(step), math.nan))
        return torch.where(asks[:, None], large(), small())


def begun(large: torch.Tensor) -> int:
    """How often the large model takes over."""
    return int(((large[:, 1:] == 1) & (large[:, :-1] == 0)).sum() + (large[:, 0] == 1).sum())


def ratio_interval(hits: Sequence[int], sizes: Sequence[int]) -> tuple[float, float, float]:
    """A share over all tokens with its bootstrap interval over texts."""
    pairs = list(zip(hits, sizes, strict=True))

    def share(drawn: list[tuple[int, int]]) -> float:
        return sum(hit for hit, _ in drawn) / max(1, sum(size for _, size in drawn))

    return share(pairs), *interval(pairs, share)


def judged(
    model: PreTrainedModel, tokenizer, prompts: list[str], written: list[list[int]], batch_size: int
) -> tuple[list[float], list[int]]:
    """By the large model: each text's loss in nats, and how many of its tokens are the ones that it would have chosen."""
    losses, same = [0.0] * len(written), [0] * len(written)
    begins = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, logits, wanted in read_continuations(model, begins, written, batch_size=batch_size):
        losses[index] = cross_entropy(logits, wanted, reduction="sum").item()
        same[index] = int((logits.argmax(-1) == wanted).sum())
    return losses, same


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--longest", type=int, default=60, help="words of a sentence or question, at most")
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    made.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    made.add_argument("--window", type=int, default=1)
    made.add_argument("--min-stay", type=int, default=1)
    made.add_argument("--timing", choices=["now", "next"], default="now", help="the token that a switch acts on first")
    made.add_argument("--time", action="store_true")
    options = made.parse_args(arguments)

    large, tokenizer = models(options)
    small = healed(large, options.output / "healed")
    prompts = chats(tokenizer, options.part, options.prompts, seed=1, longest=options.longest)
    text = (
        timed(options, large, small, tokenizer, prompts)
        if options.time
        else compared(options, large, small, tokenizer, prompts)
    )
    print(text)
    if options.part == "test":
        (options.output / ("time.md" if options.time else "results.md")).write_text(text, encoding="utf-8")


def entropy_adaptive(options, large, threshold: float) -> EntropyAdaptiveLogitsProcessor:
    return EntropyAdaptiveLogitsProcessor.from_pretrained(
        options.output,
        main_model=large,
        threshold=threshold,
        window=options.window,
        min_stay=options.min_stay,
        timing=options.timing,
    )


def compared(options, large, small, tokenizer, prompts: list[str]) -> str:
    """Quality against the share of the large model's tokens."""

    def write(processor, model, seed: int | None) -> tuple[list[list[int]], float, float]:
        """What is written, the share of the large model's tokens, and how many it writes at a time. `None`: greedily."""
        sampled = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "temperature": 1.0}
        if processor is not None:
            sampled["custom_generate"] = hf_logits.generate
        written, traces = [], []
        for start in range(0, len(prompts), options.batch_size):
            # one batch at a time: the processor's trace is that of the last one
            part = prompts[start : start + options.batch_size]
            set_seed((seed or 0) * 1000 + start)
            written += continue_prompts(
                model, tokenizer, part, processor, tokens=options.tokens, batch_size=options.batch_size, **sampled
            )
            if processor is not None:
                traces.append(processor.stats.trace["large"])
        if not traces:
            return written, float(model is large), 0.0
        chosen = sum(float(trace.nansum()) for trace in traces)
        share = chosen / sum(int((~trace.isnan()).sum()) for trace in traces)
        return written, share, chosen / max(1, sum(begun(trace) for trace in traces))

    seeds = [*range(options.seeds), None]
    lines = []
    points: dict[str, list[tuple[float, float, float, float]]] = {"entropy": [], "random": []}

    def measure_all(title: str, kind: str | None, make) -> dict[int | None, tuple[float, float]]:
        """Sampled with each seed, and once greedily; the shares and runs of all of them."""
        found, perplexities, shares = {}, [], []
        for seed in seeds:
            written, share, run = write(*make(seed), seed)
            found[seed] = share, run
            losses, same = judged(large, tokenizer, prompts, written, options.batch_size)
            sizes = [len(text) for text in written]
            if seed is None:
                agreement = ratio_interval(same, sizes)
                greedy_share = share
            else:
                perplexities.append(math.exp(sum(losses) / max(1, sum(sizes))))
                shares.append(share)
        spread = f" ± {statistics.stdev(perplexities):.1f}" if len(perplexities) > 1 else ""
        mine = statistics.fmean(shares), statistics.fmean(perplexities), greedy_share, 100 * agreement[0]
        low, high = (100 * value for value in agreement[1:])
        lines.append(
            [
                title,
                f"{100 * mine[0]:.0f}",
                f"{mine[1]:.1f}{spread}",
                f"{100 * mine[2]:.0f}",
                f"{mine[3]:.1f} ({low:.1f} to {high:.1f})",
            ]
        )
        if kind is not None:
            points[kind].append(mine)
        else:
            ends.append(mine)
        print(lines[-1], flush=True)
        return found

    ends: list[tuple[float, float, float, float]] = []
    measure_all("small model alone", None, lambda seed: (None, small))
    for threshold in options.thresholds:
        guided = measure_all(
            f"entropy above {threshold:g} bits",
            "entropy",
            lambda seed, threshold=threshold: (entropy_adaptive(options, large, threshold), small),
        )
        measure_all(
            "at random, as often",
            "random",
            lambda seed, guided=guided: (
                RandomSwitching(large, share=guided[seed][0], run=guided[seed][1], seed=seed or 0),
                small,
            ),
        )
    measure_all("large model alone", None, lambda seed: (None, large))
    if options.part == "test":
        draw(points, ends, options.output / "tradeoff.png")
    head = (
        f"{options.prompts} questions and wishes of the {options.part} part, about at most {options.longest} words, {options.tokens} tokens each. Perplexity under the large model of what was "
        f"sampled at temperature 1, with {options.seeds} seeds (mean ± standard deviation); agreement: of greedily written tokens, those that the large "
        f"model would have chosen there (95 % over prompts). Window {options.window}, minimum stay {options.min_stay}, timing {options.timing!r}. The small model has "
        f"{small.config.num_hidden_layers} of {large.config.num_hidden_layers} layers, {small.num_parameters() / large.num_parameters():.0%} of the parameters."
    )
    columns = ["", "large model's tokens, sampled, %", "perplexity", "large model's tokens, greedy, %", "agreement, %"]
    return f"{head}\n\n{table(columns, lines)}\n"


def timed(options, large, small, tokenizer, prompts: list[str]) -> str:
    """Milliseconds a token, one prompt at a time, all ways in turn; ratios within a turn."""
    ways: dict[str, tuple] = {"large model alone": (large, None), "small model alone": (small, None)}
    for threshold in options.thresholds:
        ways[f"entropy above {threshold:g} bits"] = small, entropy_adaptive(options, large, threshold)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.seeds + 1):  # the first one warms up
        spent = {}
        for name, (model, processor) in ways.items():
            extra = {} if processor is None else {"custom_generate": hf_logits.generate}
            start = time.perf_counter()
            for prompt in prompts:
                continue_prompts(
                    model, tokenizer, [prompt], processor, tokens=options.tokens, do_sample=False,
                    min_new_tokens=options.tokens, **extra,
                )  # fmt: skip
                if processor is not None:
                    shares[name].append(float(processor.stats.trace["large"].nanmean()))
            spent[name] = time.perf_counter() - start
        for name in ways:
            if turn:
                ratios[name].append(spent[name] / spent["large model alone"])
        print({name: round(value, 1) for name, value in spent.items()}, flush=True)
    lines = [
        [
            name,
            f"{100 * statistics.fmean(shares[name]):.0f}" if shares[name] else "",
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})",
        ]
        for name, values in ratios.items()
    ]
    head = (
        f"{len(prompts)} prompts of the {options.part} part, one at a time, {options.tokens} tokens each, greedy, on {options.device} with "
        f"{torch.get_num_threads()} threads; median (least to most) of {options.seeds} turns. Window {options.window}, minimum stay "
        f"{options.min_stay}, timing {options.timing!r}."
    )
    return f"{head}\n\n{table(['', 'tokens of the large model, %', 'time, of the large model alone'], lines)}\n"


def draw(points: dict[str, list[tuple]], ends: list[tuple], path: Path) -> None:
    figure, axes = plt.subplots(ncols=2, figsize=(9, 3.5))
    titles = "perplexity under the large model, sampled", "agrees with it, greedy, %"
    for axis, place, title in zip(axes, (0, 2), titles, strict=True):
        for kind, found in points.items():
            whole = sorted([*found, *ends], key=lambda one: one[place])
            axis.plot(
                [100 * one[place] for one in whole], [one[place + 1] for one in whole], marker="o", label=f"by {kind}"
            )
        axis.set_xlabel("tokens of the large model, %")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
