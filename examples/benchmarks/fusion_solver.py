"""What choosing the weight of dynamic fusion costs, against the paper's grid computed naively. `python fusion_solver.py`

Everything runs on the CPU, [4, 128000] in float32, on two threads, the candidates in turn. No model is needed.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_logits.processors.dynamic_fusion import exact_weight, fusion_targets, grid_weight


GRID = [i / 10 for i in range(21)]
TARGETS = {"exact": 0.15, "grid": None}  # of the naive grid's time


def naive_grid(big: Tensor, direction: Tensor, targets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The paper's search as it is written: at each point a softmax and both divergences, token by token."""
    plain = big.log_softmax(-1)
    best, least = torch.zeros_like(big[:, 0]), torch.full_like(big[:, 0], torch.inf)
    for weight in GRID:
        moved = (big + weight * direction).log_softmax(-1)
        forward = (moved.exp() * (moved - plain)).sum(-1)
        backward = (plain.exp() * (plain - moved)).sum(-1)
        loss = (forward - targets[0]) ** 2 + (backward - targets[1]) ** 2
        better = loss < least
        best, least = torch.where(better, weight, best), torch.where(better, loss, least)
    return best, least


def problems(rows: int, vocab: int) -> dict[str, tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Big model, direction and targets: of noise, and of logits peaked as a language model's are."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, vocab, generator=generator)

    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]) + 1.0
    common = 10 - 2 * ranks.log()  # the likelier a token, the more both models agree about it
    moved = torch.where(torch.rand(rows, vocab, generator=generator) < 0.01, noise(3.0), noise(0.5))
    logits = {
        "random normal": (noise(1.0), small := noise(1.0), small + noise(1.0)),
        "peaked": (common + noise(1.0), small := common + noise(1.5), small + moved),
    }
    found = {}
    for name, values in logits.items():
        big, small, expert = (value.log_softmax(-1) for value in values)
        found[name] = big, expert - small, fusion_targets(small, expert[None])
    return found


def alternate(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other and over again, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def run(quick: bool = False) -> str:
    """A Markdown table: medians, the middle half of the measurements, the ratio to the naive grid, losses."""
    torch.set_num_threads(2)
    lines = [
        "| logits | solver | median ms | quartiles | time / naive | target | loss, mean of rows | verdict |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, (big, direction, targets) in problems(*(2, 8000) if quick else (4, 128_000)).items():
        solvers = {
            "naive grid": lambda: naive_grid(big, direction, targets),  # noqa: B023
            "grid": lambda: grid_weight(big, direction, targets, grid=GRID),  # noqa: B023
            "exact": lambda: exact_weight(big, direction, targets, max_weight=GRID[-1]),  # noqa: B023
        }
        weights = {solver: solve()[0] for solver, solve in solvers.items()}
        # all losses by one ruler, in double precision
        whole = big.double(), direction.double()
        losses = {solver: _loss(*whole, weight.double(), targets) for solver, weight in weights.items()}
        seconds = alternate(solvers, 3 if quick else 21)
        naive = statistics.median(seconds["naive grid"])
        for solver, times in seconds.items():
            median, (low, _, high) = statistics.median(times), statistics.quantiles(times, n=4)
            good = bool((losses[solver] <= losses["naive grid"] * (1 + 1e-5) + 1e-12).all())
            if solver == "grid":
                good = good and torch.equal(weights["grid"], weights["naive grid"])
            target = TARGETS.get(solver)
            met = good and (target is None or median / naive <= target)
            lines.append(
                f"| {name} | {solver} | {median * 1e3:.2f} | {low * 1e3:.2f} - {high * 1e3:.2f} | {median / naive:.3f} "
                f"| {'' if target is None else f'<= {target}'} | {losses[solver].mean():.3e} | {'met' if met else 'missed'} |"
            )
    return "\n".join(lines)


def _loss(big: Tensor, direction: Tensor, weight: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    plain, moved = big.log_softmax(-1), (big + weight[:, None] * direction).log_softmax(-1)
    forward, backward = (moved.exp() * (moved - plain)).sum(-1), (plain.exp() * (plain - moved)).sum(-1)
    return (forward - targets[0]) ** 2 + (backward - targets[1]) ** 2


if __name__ == "__main__":
    print(run())
