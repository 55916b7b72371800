"""What it costs to choose dynamic fusion's weight, against the paper's grid of 21 points computed as it is written.

On the CPU, for four rows of 128 000 tokens in float32, with two threads. No model is needed.
"""

import statistics
from collections.abc import Callable

import torch
from common import PeakMemory, alternate, ratio, row, table, threads
from torch import Tensor

from hf_logits.processors.dynamic_fusion import exact_weight, fusion_targets, grid_weight


GRID = [i / 10 for i in range(21)]
TARGETS = {"exact": 0.15, "grid": None}

Problem = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


def direct_loss(big: Tensor, direction: Tensor, targets: tuple[Tensor, Tensor], weight: float | Tensor) -> Tensor:
    """A softmax and both divergences, token by token."""
    plain, moved = big.log_softmax(-1), (big + weight * direction).log_softmax(-1)
    forward = (moved.exp() * (moved - plain)).sum(-1)
    backward = (plain.exp() * (plain - moved)).sum(-1)
    return (forward - targets[0]) ** 2 + (backward - targets[1]) ** 2


def naive_grid(big: Tensor, direction: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    best, least = torch.zeros_like(big[:, 0]), torch.full_like(big[:, 0], torch.inf)
    for weight in GRID:
        loss = direct_loss(big, direction, targets, weight)
        best, least = torch.where(loss < least, weight, best), torch.minimum(loss, least)
    return best


def problems(rows: int, vocab: int) -> dict[str, Problem]:
    """Big model, direction and targets: of noise, and peaked as language models are."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, vocab, generator=generator)

    def problem(big: Tensor, small: Tensor, change: Tensor) -> Problem:
        big, small, expert = (values.log_softmax(-1) for values in (big, small, small + change))
        return big, expert - small, fusion_targets(small, expert[None])

    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]) + 1.0
    common = -2 * ranks.log()  # the models agree about what is common
    few = torch.where(torch.rand(rows, vocab, generator=generator) < 0.01, noise(3.0), noise(0.5))
    return {
        "random normal": problem(noise(1.0), noise(1.0), noise(1.0)),
        "peaked": problem(common + noise(1.0), common + noise(1.5), few),
    }


def run(quick: bool = False) -> str:
    lines = []
    with threads(2):
        for name, problem in problems(2 if quick else 4, 20_000 if quick else 128_000).items():
            big, direction, targets = problem
            solvers: dict[str, Callable[[], Tensor]] = {
                "naive grid": lambda problem=problem: naive_grid(*problem),
                "grid": lambda problem=problem: grid_weight(*problem, grid=GRID)[0],
                "exact": lambda problem=problem: exact_weight(*problem, max_weight=GRID[-1])[0],
            }
            weights, memory = {}, {}
            for solver, solve in solvers.items():
                with PeakMemory() as meter:
                    meter._known.update(value.untyped_storage().data_ptr() for value in (big, direction, *targets))
                    weights[solver] = solve()
                memory[solver] = meter.peak / big.nbytes
                meter.close()
            # one ruler for all: in double precision
            losses = {
                s: direct_loss(big.double(), direction.double(), targets, w.double()[:, None])
                for s, w in weights.items()
            }
            assert torch.equal(weights["grid"], weights["naive grid"])
            assert (losses["exact"] <= losses["grid"] + 1e-9).all()
            times = alternate(solvers, 2 if quick else 25)
            for solver, seconds in times.items():
                lines.append(
                    row(
                        name,
                        ratio(seconds, times["naive grid"]),
                        TARGETS.get(solver),
                        solver,
                        f"{1e3 * statistics.median(seconds):.1f} ms",
                        f"{memory[solver]:.1f}",
                        f"{losses[solver].mean():.2e}",
                    )
                )
    return table(["logits", "solver", "time", "memory / [rows, V]", "mean loss"], lines)


if __name__ == "__main__":
    print(run())
