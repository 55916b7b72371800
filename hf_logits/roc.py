"""How well a score tells positives from negatives, and the threshold for a wanted rate. A score at its threshold counts as above."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from hf_logits.checks import check_count, check_number


NEVER = 2.0
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class ROC:
    """Rates for every threshold that makes a difference, from the highest down.

    Args:
        thresholds (`[K]` float64 array): infinity, then every score that occurs.
        true_rates, false_rates (`[K]` float64 arrays): shares of the positives and of the negatives at or above it.
        auc (`float`): the area below, which is how often a positive has a higher score than a negative; a tie is half.
    """

    thresholds: Float64[ndarray, " K"]
    true_rates: Float64[ndarray, " K"]
    false_rates: Float64[ndarray, " K"]
    auc: float


def _check_scores(positive: Float64[ndarray, " P"], negative: Float64[ndarray, " N"]) -> None:
    for what, scores in (("positive", positive), ("negative", negative)):
        if not len(scores):
            raise ValueError(f"There is no {what} score: both kinds are needed.")
        if not np.isfinite(scores).all():
            raise ValueError(f"The {what} scores must be finite; {(~np.isfinite(scores)).sum()} are not.")


def auc(positive: Float64[ndarray, " P"], negative: Float64[ndarray, " N"]) -> float:
    """Share of the pairs with the positive above the negative, ties counted half; exact, in whole numbers."""
    _check_scores(positive, negative)
    ordered = np.sort(negative)
    # twice the pairs that are won: those below, and those below or equal
    won = np.searchsorted(ordered, positive, "left").sum() + np.searchsorted(ordered, positive, "right").sum()
    return float(int(won) / (2 * len(positive) * len(negative)))


def rate(scores: Float64[ndarray, " N"], threshold: float) -> float:
    """Share of the scores at or above the threshold."""
    return float((scores >= threshold).mean())


def roc_curve(positive: Float64[ndarray, " P"], negative: Float64[ndarray, " N"]) -> ROC:
    """The receiver operating characteristic of a score; equal scores are one point."""
    area = auc(positive, negative)
    distinct = np.unique(np.concatenate([positive, negative]))[::-1]
    above = [len(scores) - np.searchsorted(np.sort(scores), distinct, "left") for scores in (positive, negative)]
    true_rates, false_rates = (
        np.concatenate([[0.0], count / len(scores)]) for count, scores in zip(above, (positive, negative), strict=True)
    )
    return ROC(np.concatenate([[np.inf], distinct]), true_rates, false_rates, area)


def _between(low: float, high: float) -> float:
    """Half-way, where rounding of either score does no harm, in float32 and if possible above `low`."""
    middle = float(np.float32((low + high) / 2))
    return middle if low < middle <= high else high


def threshold_for_true_rate(
    positive: Float64[ndarray, " P"], negative: Float64[ndarray, " N"], wanted: float
) -> float:
    """The highest threshold at which at least the wanted share of the positives is at or above it.

    Scores are probabilities; a negative score is one that no threshold reaches. Where too few can be reached, 0.
    """
    check_number("wanted", wanted, minimum=0.0, maximum=1.0)
    _check_scores(positive, negative)
    count = int(np.ceil(wanted * len(positive) - 1e-9))
    if count == 0:
        return NEVER
    last = np.sort(positive)[::-1][count - 1]
    if last <= 0:
        return 0.0
    both = np.concatenate([positive, negative, [0.0]])
    return _between(max(0.0, float(both[both < last].max())), float(last))


def threshold_for_false_rate(
    positive: Float64[ndarray, " P"], negative: Float64[ndarray, " N"], wanted: float
) -> float:
    """The lowest threshold at which at most the wanted share of the negatives is at or above it.

    Scores are probabilities; a negative score is one that no threshold reaches.
    """
    check_number("wanted", wanted, minimum=0.0, maximum=1.0)
    _check_scores(positive, negative)
    count = int(np.floor(wanted * len(negative) + 1e-9))
    if count == len(negative):
        return 0.0
    first = float(np.sort(negative)[::-1][count])  # the best that must stay below
    both = np.concatenate([positive, negative, [NEVER if first >= 1 else 1.0]])
    return _between(max(0.0, first), float(both[(both > first) & (both >= 0)].min()))


def auc_interval(
    positive: Float64[ndarray, " P"],
    negative: Float64[ndarray, " N"],
    *,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the area: positives and negatives are drawn again, each among themselves."""
    check_count("resamples", resamples, minimum=1)
    check_number("level", level, minimum=0.0, maximum=1.0)
    generator = np.random.default_rng(seed)
    areas = [
        auc(generator.choice(positive, len(positive)), generator.choice(negative, len(negative)))
        for _ in range(resamples)
    ]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
