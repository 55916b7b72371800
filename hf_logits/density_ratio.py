"""How much more often one population has a point than another: the density-ratio trick with a logistic regression."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


class LogDensityRatio(NamedTuple):
    """`log p(x | numerator) - log p(x | denominator)`, linear in `x`."""

    weight: Float[Tensor, " D"]
    bias: Float[Tensor, ""]

    def __call__(self, points: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        return points.to(self.weight) @ self.weight + self.bias


def fit_density_ratio(
    numerator: Float[Tensor, "N D"], denominator: Float[Tensor, "M D"], *, penalty: float
) -> LogDensityRatio:
    """Tell two samples apart by a logistic regression in which both weigh the same, whatever their sizes.

    With equal weights the classifier's odds are the density ratio itself. `penalty` is that of the squared weights
    (not of the bias), 1 / C of the usual packages; without any, samples that can be separated have no solution.
    """
    if not len(numerator) or not len(denominator):
        raise ValueError("Both samples must have a point at least: a ratio of densities compares two populations.")
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}.")
    above, below = (sample.detach().cpu().double() for sample in (numerator, denominator))
    if not (above.isfinite().all() and below.isfinite().all()):
        raise ValueError(
            "A point is NaN or infinite. Look for empty texts, or for an embedding model in half precision."
        )
    # sum_i s_i log-loss_i + penalty/2 |w|^2 with balanced s_i = n / (2 n_class), divided by n / 2
    strength = penalty / (len(above) + len(below))
    solution = torch.zeros(above.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        weight, bias = solution[:-1], solution[-1]
        fit = softplus(-(above @ weight + bias)).mean() + softplus(below @ weight + bias).mean()
        return fit + strength * weight.square().sum()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(closure)
    return LogDensityRatio(solution[:-1].detach().clone(), solution[-1].detach().clone())
