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
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import BATCH_SIZE, continue_prompts, models, parser, table
from matplotlib import pyplot as plt
from small_model import chats, healed
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, set_seed

import hf_logits
from hf_logits.processors import EntropyAdaptiveLogitsProcessor


class RandomSwitching(EntropyAdaptiveLogitsProcessor):
    """The control: as often at work as the entropy would have the large model, and for as long at a time, but whenever it happens."""

    def __init__(self, large_model, *, share: float, run: float, seed: int):
        super().__init__(large_model)
        self.leave = 1.0 / max(run, 1.0)
        self.enter = min(1.0, self.leave * share / max(1.0 - share, 1e-9))
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


def runs(large: torch.Tensor) -> float:
    """How many tokens the large model writes at a time, on average."""
    begins = ((large[:, 1:] == 1) & (large[:, :-1] == 0)).sum() + (large[:, 0] == 1).sum()
    return float((large == 1).sum() / begins.clamp(min=1))


@torch.no_grad()
def judged(model: PreTrainedModel, tokenizer, prompts: list[str], written: list[list[int]]) -> list[tuple[float, int]]:
    """By the large model: each text's loss in nats, and how many of its tokens are the ones that it would have chosen."""
    found = []
    for start in range(0, len(prompts), 16):
        begins = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + 16]]
        rows = [begin + text for begin, text in zip(begins, written[start : start + 16], strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        for row, begin, text in zip(logits, begins, written[start : start + 16], strict=True):
            mine = row[len(begin) - 1 : len(begin) + len(text) - 1]
            wanted = torch.tensor(text, device=model.device)
            loss = cross_entropy(mine, wanted, reduction="sum").item() if text else 0.0
            found.append((loss, int((mine.argmax(-1) == wanted).sum()) if text else 0))
    return found


def measure(judge, tokenizer, prompts, written) -> tuple[float, float]:
    """Perplexity under the large model, and the share of tokens on which it agrees, %."""
    losses, same = zip(*judged(judge, tokenizer, prompts, written), strict=True)
    count = max(1, sum(map(len, written)))
    return math.exp(sum(losses) / count), 100 * sum(same) / count


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    made.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    made.add_argument("--window", type=int, default=1)
    made.add_argument("--min-stay", type=int, default=1)
    made.add_argument("--time", action="store_true")
    options = made.parse_args(arguments)

    large, tokenizer = models(options)
    small = healed(large, options.output / "healed")
    prompts = chats(tokenizer, options.part, options.prompts, seed=1)
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
        options.output, main_model=large, threshold=threshold, window=options.window, min_stay=options.min_stay
    )


def compared(options, large, small, tokenizer, prompts: list[str]) -> str:
    """Quality against the share of the large model's tokens."""

    def row(make) -> dict[str, list[float]]:
        """Sampled with each seed, and once greedily."""
        found: dict[str, list[float]] = {"perplexity": [], "agreement": [], "share": [], "run": []}
        for seed in [*range(options.seeds), None]:
            processor, model = make(seed or 0)
            # one batch at a time: the processor's trace is that of the last one
            shares, lengths, written = [], [], []
            for start in range(0, len(prompts), options.batch_size):
                part = prompts[start : start + options.batch_size]
                set_seed((seed or 0) * 1000 + start)
                sampled = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "temperature": 1.0}
                if processor is not None:
                    sampled["custom_generate"] = hf_logits.generate
                written += continue_prompts(
                    model, tokenizer, part, processor, tokens=options.tokens, batch_size=options.batch_size, **sampled
                )
                if processor is not None:
                    trace = processor.stats.trace["large"]
                    shares.append(float(trace.nanmean()))
                    lengths.append(runs(trace))
            perplexity, agreement = measure(large, tokenizer, prompts, written)
            if seed is None:
                found["agreement"].append(agreement)
            else:
                found["perplexity"].append(perplexity)
                found["share"].append(statistics.fmean(shares) if shares else float(model is large))
                found["run"].append(statistics.fmean(lengths) if lengths else 0.0)
        return found

    lines, points = [], {"entropy": [], "random": []}

    def spread(values: list[float], form: str = ".1f") -> str:
        return f"{statistics.fmean(values):{form}}" + (
            f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        )

    def add(title: str, found: dict[str, list[float]], kind: str | None) -> None:
        share = statistics.fmean(found["share"])
        lines.append([title, f"{100 * share:.0f}", spread(found["perplexity"]), f"{found['agreement'][0]:.1f}"])
        if kind is not None:
            points[kind].append((share, statistics.fmean(found["perplexity"]), found["agreement"][0]))
        print(lines[-1], flush=True)

    alone = row(lambda seed: (None, small))
    add("small model alone", alone, None)
    for threshold in options.thresholds:
        guided = row(lambda seed, threshold=threshold: (entropy_adaptive(options, large, threshold), small))
        add(f"entropy above {threshold:g} bits", guided, "entropy")
        share, run = statistics.fmean(guided["share"]), statistics.fmean(guided["run"])
        control = row(
            lambda seed, share=share, run=run: (RandomSwitching(large, share=share, run=run, seed=seed), small)
        )
        add("at random, as often", control, "random")
    whole = row(lambda seed: (None, large))
    add("large model alone", whole, None)
    if options.part == "test":
        ends = [(0.0, statistics.fmean(alone["perplexity"]), alone["agreement"][0])]
        ends.append((1.0, statistics.fmean(whole["perplexity"]), whole["agreement"][0]))
        draw(points, ends, options.output / "tradeoff.png")
    head = (
        f"{options.prompts} questions and wishes of the {options.part} part, {options.tokens} tokens each. Perplexity under the large model of what was "
        f"sampled at temperature 1, with {options.seeds} seeds (mean ± standard deviation); agreement: of greedily written tokens, those that the large "
        f"model would have chosen there. Window {options.window}, minimum stay {options.min_stay}. The small model has "
        f"{small.config.num_hidden_layers} of {large.config.num_hidden_layers} layers, {small.num_parameters() / large.num_parameters():.0%} of the parameters."
    )
    columns = ["", "tokens of the large model, %", "perplexity", "agreement, %"]
    return f"{head}\n\n{table(columns, lines)}\n"


def timed(options, large, small, tokenizer, prompts: list[str]) -> str:
    """Milliseconds a token, one prompt at a time, all ways in turn; ratios within a turn."""
    ways: dict[str, tuple] = {"large model alone": (large, None), "small model alone": (small, None)}
    for threshold in options.thresholds:
        ways[f"entropy above {threshold:g} bits"] = (small, entropy_adaptive(options, large, threshold))
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
        f"{torch.get_num_threads()} threads; median (least to most) of {options.seeds} turns."
    )
    return f"{head}\n\n{table(['', 'tokens of the large model, %', 'time, of the large model alone'], lines)}\n"


def draw(
    points: dict[str, list[tuple[float, float, float]]], ends: list[tuple[float, float, float]], path: Path
) -> None:
    figure, axes = plt.subplots(ncols=2, figsize=(9, 3.5))
    for axis, place, title in ((axes[0], 1, "perplexity under the large model"), (axes[1], 2, "agrees with it, %")):
        for kind, found in points.items():
            whole = sorted([*found, *ends])
            axis.plot([100 * one[0] for one in whole], [one[place] for one in whole], marker="o", label=f"by {kind}")
        axis.set_xlabel("tokens of the large model, %")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
