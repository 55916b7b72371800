"""Ridge regression from sums that are streamed, where some targets lack labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)


class RidgeStatistics:
    """What a ridge regression without intercept needs to know of its data, whatever their number.

    A Gram matrix is kept for each pattern of missing labels that occurs: data sets that were rated for different targets
    have one each. Sums are in float64.

    Args:
        num_features (`int`): D.
        num_targets (`int`): K.
    """

    def __init__(self, num_features: int, num_targets: int):
        self.grams: dict[tuple[bool, ...], Tensor] = {}  # by which targets have a label
        self.moments = torch.zeros(num_targets, num_features, dtype=torch.float64)  # sum of y_k h
        self.squares = torch.zeros(num_targets, dtype=torch.float64)  # sum of y_k^2
        self.counts = torch.zeros(num_targets, dtype=torch.long)

    def add(self, features: Float[Tensor, "N D"], targets: Float[Tensor, "N K"]) -> None:
        """Add rows. A target of NaN has no label."""
        features, targets = features.detach().cpu().double(), targets.detach().cpu().double()
        if features.shape[1] != self.moments.shape[1] or targets.shape[1] != len(self.counts):
            raise ValueError(
                f"Expected {self.moments.shape[1]} features and {len(self.counts)} targets a row; got {features.shape[1]} and "
                f"{targets.shape[1]}."
            )
        if not features.isfinite().all() or targets.isinf().any():
            raise ValueError("A feature is NaN or infinite, or a target infinite. (A target of NaN has no label.)")
        given = ~targets.isnan()
        for pattern in given.unique(dim=0):
            rows = features[(given == pattern).all(-1)]
            key = tuple(pattern.tolist())
            gram = rows.T @ rows
            self.grams[key] = self.grams[key] + gram if key in self.grams else gram
        filled = targets.nan_to_num()
        self.moments = self.moments + filled.T @ features
        self.squares = self.squares + filled.square().sum(0)
        self.counts = self.counts + given.sum(0)

    def solve(self, penalties: list[float]) -> Float[Tensor, "A K D"]:
        """The weights for each penalty: `argmin_w sum (y - w h)^2 + penalty |w|^2`. One eigendecomposition serves them all."""
        # w = Q (q + penalty)^-1 Q^T b, with A = Q q Q^T
        weights = torch.zeros(len(penalties), *self.moments.shape, dtype=torch.float64)
        for patterns, targets in self._groups().items():
            values, vectors = torch.linalg.eigh(sum(self.grams[pattern] for pattern in patterns))
            rotated = self.moments[targets] @ vectors
            for index, penalty in enumerate(penalties):
                weights[index, targets] = rotated / (values.clamp(min=0) + penalty) @ vectors.T
        return weights

    def mean_squared_error(self, weights: Float[Tensor, "A K D"]) -> Float[Tensor, "A K"]:
        """Of each target, over the rows that have it. NaN without any."""
        # sum (y - w h)^2 = w A w - 2 w b + sum y^2
        errors = self.squares - 2 * (weights * self.moments).sum(-1)
        for patterns, targets in self._groups().items():
            gram = sum(self.grams[pattern] for pattern in patterns)
            errors[:, targets] += (weights[:, targets] @ gram * weights[:, targets]).sum(-1)
        return errors.clamp(min=0) / self.counts.where(self.counts > 0, torch.nan)

    def _groups(self) -> dict[tuple[tuple[bool, ...], ...], list[int]]:
        """Targets that share their rows, and so their Gram matrix, by the patterns of these rows."""
        groups: dict[tuple[tuple[bool, ...], ...], list[int]] = {}
        for target in range(len(self.counts)):
            patterns = tuple(pattern for pattern in self.grams if pattern[target])
            if patterns:
                groups.setdefault(patterns, []).append(target)
        return groups


@dataclass
class RidgeFit:
    """`weights` [K, D], and for each target the penalty that was chosen and the squared error on held-out rows."""

    weights: Tensor
    penalties: Tensor
    errors: Tensor


def fit_ridge(
    batches: Iterable[tuple[Float[Tensor, "N D"], Float[Tensor, "N K"]]],
    *,
    names: Sequence[str],
    penalties: Sequence[float] = PENALTIES,
    validation_fraction: float = 0.2,
    seed: int = 42,
) -> RidgeFit:
    """A ridge regression without intercept for each target, in closed form from one pass over the data.

    The penalty is chosen on held-out rows; the weights are those of the other rows.

    Args:
        batches: features and targets, NaN where a target has no label. They may come from a generator.
        names: of the targets, in their order.
        penalties: to choose from.
        validation_fraction: the chance of a row to be held out.
        seed: of the rows' choice.
    """
    if not 0 < validation_fraction < 1 or min(penalties) <= 0:
        raise ValueError(
            f"validation_fraction must be between 0 and 1 and every penalty above 0; got {validation_fraction}, {penalties}."
        )
    generator = torch.Generator().manual_seed(seed)
    sums: list[RidgeStatistics] = []
    for features, targets in batches:
        sums = sums or [RidgeStatistics(features.shape[1], len(names)) for _ in range(2)]
        held_out = torch.rand(len(features), generator=generator) < validation_fraction
        for statistics, rows in zip(sums, (~held_out, held_out), strict=True):
            statistics.add(features.cpu()[rows], targets.cpu()[rows])
    if not sums:
        raise ValueError("There are no batches to fit on.")
    train, validation = sums
    for name, fitted, checked in zip(names, train.counts.tolist(), validation.counts.tolist(), strict=True):
        if fitted == 0 or checked == 0:
            raise ValueError(
                f"{name!r} has {fitted} labels to fit on and {checked} to choose a penalty on; both need some. Leave it out, or "
                "add rows that have it."
            )
    candidates = train.solve(list(penalties))
    errors = validation.mean_squared_error(candidates)
    best = errors.argmin(0)
    columns = torch.arange(len(names))
    chosen = torch.tensor(list(penalties), dtype=torch.float64)[best]
    return RidgeFit(candidates[best, columns].float(), chosen, errors[best, columns])
