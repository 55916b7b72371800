"""The filters that need tokens in order, without a sort: GeDi's (by posterior) and the nucleus (by probability), against one.

On the CPU, in float32, with two threads. No model is needed.
"""

import math
import statistics

import torch
from common import alternate, ratio, row, table, threads
from torch import Tensor

from hf_logits.logits import top_p
from hf_logits.processors.gedi import gedi_filter


TARGET = 1.0
SHAPES = [(1, 50_257), (8, 50_257), (4, 128_000)]


def sorted_filter(scores: Tensor, log_posterior: Tensor) -> Tensor:
    ordered, order = log_posterior.sort(dim=-1, stable=True)
    reached = scores.softmax(-1).gather(-1, order).cumsum(-1)
    removed = (reached < 0.8) & (ordered < math.log(0.8))
    return scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)


def sorted_nucleus(log_probs: Tensor) -> Tensor:
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    kept = ordered.exp().cumsum(-1) - ordered.exp() < 0.9
    return torch.zeros_like(kept).scatter(-1, order, kept)


def run(quick: bool = False) -> str:
    lines = []
    with threads(2):
        for shape in SHAPES[:1] if quick else SHAPES:
            torch.manual_seed(0)
            log_probs = (3 * torch.randn(shape)).log_softmax(-1)
            log_posterior = torch.randn(shape).sigmoid().log()
            scores = log_probs + 30 * log_posterior
            times = alternate(
                {
                    "GeDi's filter": lambda: gedi_filter(scores, log_posterior, filter_p=0.8, target_p=0.8),  # noqa: B023
                    "GeDi's filter, sorted": lambda: sorted_filter(scores, log_posterior),  # noqa: B023
                    "nucleus": lambda: top_p(log_probs, 0.9),  # noqa: B023
                    "nucleus, sorted": lambda: sorted_nucleus(log_probs),  # noqa: B023
                },
                2 if quick else 25,
            )
            for name in ("GeDi's filter", "nucleus"):
                sort = times[f"{name}, sorted"]
                both = (f"{1e3 * statistics.median(seconds):.2f} ms" for seconds in (sort, times[name]))
                lines.append(row(name, ratio(times[name], sort), TARGET, f"{shape[0]} x {shape[1]}", *both))
    return table(["filter", "rows x tokens", "with a sort", "without"], lines)


if __name__ == "__main__":
    print(run())
