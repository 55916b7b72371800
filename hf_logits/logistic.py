"""Many logistic regressions at once, each on its own features of the same rows."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def fit_logistic(
    features: Float[Tensor, "G N D"], labels: Bool[Tensor, " N"], *, penalty: float, steps: int = 100
) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"]]:
    """Weights and intercepts of `argmin sum_n log(1 + exp(-y_n (w x_n + b))) + penalty / 2 |w|^2`, with y = 1 or -1.

    Newton's method in float64. The intercept has no penalty, so both labels must occur.

    Args:
        features: `G` regressions, each with its own features of the `N` rows.
        labels: whether a row is positive; the same for all regressions.
        penalty: above 0; scikit-learn's `1 / C`.
        steps: at most.
    """
    if labels.all() or not labels.any():
        raise ValueError("All labels are the same: a logistic regression needs both.")
    rows = functional.pad(features.double(), (0, 1), value=1.0)  # the last weight is the intercept
    sign = labels.double() * 2 - 1
    shrink = torch.full((rows.shape[-1],), penalty, dtype=torch.float64)
    shrink[-1] = 0.0
    weights = torch.zeros(len(rows), rows.shape[-1], dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        return functional.softplus(-sign * scores(weights)).sum(-1) + (shrink * weights.square()).sum(-1) / 2

    def scores(weights: Tensor) -> Tensor:
        return (rows @ weights[:, :, None])[:, :, 0]

    now = loss(weights)
    for _ in range(steps):
        probs = scores(weights).sigmoid()
        gradient = (rows.mT @ (probs - labels.double())[:, :, None])[:, :, 0] + shrink * weights
        if gradient.abs().max() < 1e-9 * len(labels):
            break
        curvature = rows.mT @ ((probs * (1 - probs))[:, :, None] * rows) + torch.diag(shrink + 1e-12)
        step = torch.linalg.solve(curvature, gradient)
        decrease, size = (gradient * step).sum(-1), torch.ones(len(rows), dtype=torch.float64)
        for _ in range(40):  # shorter where a whole step would go too far
            there = weights - size[:, None] * step
            after = loss(there)
            worse = after > now - 1e-4 * size * decrease
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        weights, now = torch.where((after <= now)[:, None], there, weights), torch.minimum(after, now)
    return weights[:, :-1], weights[:, -1]
