"""Sinkhorn's iterations with their gradient, against the same iterations left to autograd.

On the CPU, for the cost of 256 rows against 256, 50 iterations, in float32, with two threads. No model is needed.
"""

import statistics
from collections.abc import Callable

import torch
from common import PeakMemory, alternate, ratio, row, table, threads
from torch import Tensor

from hf_logits.trainers.sinkhorn_distillation import sinkhorn_distance, unrolled_sinkhorn


EPSILON = 0.1
TARGETS = {"hand-written gradient": 0.5, "constant plan": None}


def gradient(cost: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = cost.detach().requires_grad_()
    distance(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def run(quick: bool = False) -> str:
    size, iterations = (64, 20) if quick else (256, 50)
    settings = {"epsilon": EPSILON, "iterations": iterations}
    cost = 2 * torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "autograd": lambda x: unrolled_sinkhorn(x, **settings)[0],
        "hand-written gradient": lambda x: sinkhorn_distance(x, **settings),
        "constant plan": lambda x: sinkhorn_distance(x, **settings, stop_plan_grad=True),
    }
    exact = gradient(cost.double(), ways["autograd"])
    lines = []
    with threads(2):
        errors, memory = {}, {}
        for name, way in ways.items():
            with PeakMemory() as meter:
                meter._known.add(cost.untyped_storage().data_ptr())
                found = gradient(cost, way)
            memory[name] = meter.peak / cost.nbytes
            meter.close()
            errors[name] = ((found - exact).abs().max() / exact.abs().max()).item()
        assert errors["hand-written gradient"] < 1e-4
        times = alternate(
            {name: lambda way=way: gradient(cost, way) for name, way in ways.items()}, 2 if quick else 25
        )
        for name, taken in times.items():
            lines.append(
                row(
                    name,
                    ratio(taken, times["autograd"]),
                    TARGETS.get(name),
                    f"{1e3 * statistics.median(taken):.1f} ms",
                    f"{memory[name]:.1f}",
                    f"{errors[name]:.1e}",
                )
            )
    return table(["forward and backward", "time", "memory / [N, N]", "error of the gradient"], lines)


if __name__ == "__main__":
    print(run())
