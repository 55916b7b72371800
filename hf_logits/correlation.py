"""How two lists of numbers go together: in size, in rank, and pair by pair. Exact under ties; NaN where either is constant."""

from bisect import bisect_right, insort

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray


def constant(values: Float64[ndarray, " N"]) -> bool:
    """Whether there is nothing that could go together with anything."""
    return len(values) < 2 or bool((values == values[0]).all())


def average_ranks(values: Float64[ndarray, " N"]) -> Float64[ndarray, " N"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _centered(values: Float64[ndarray, " N"]) -> Float64[ndarray, " N"]:
    """With mean 0 and length 1."""
    # Scaled by a power of two, which is exact, so that squares neither overflow nor vanish.
    values = np.ldexp(values, -np.frexp(np.abs(values).max())[1])
    values = values - values.mean()
    values = values / np.abs(values).max()
    return values / np.linalg.norm(values)


def pearson(first: Float64[ndarray, " N"], second: Float64[ndarray, " N"]) -> float:
    """Correlation of the values themselves."""
    if constant(first) or constant(second):
        return float("nan")
    found = float(_centered(first) @ _centered(second))
    return min(1.0, max(-1.0, found))


def spearman(first: Float64[ndarray, " N"], second: Float64[ndarray, " N"]) -> float:
    """Correlation of the ranks."""
    return pearson(average_ranks(first), average_ranks(second))


def _pairs(*lists: Float64[ndarray, " N"]) -> int:
    """Pairs of places that are equal in all lists."""
    counts: Int64[ndarray, " K"] = np.unique(np.stack(lists), axis=1, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def kendall(first: Float64[ndarray, " N"], second: Float64[ndarray, " N"]) -> float:
    """tau-b: pairs in the same order less pairs in the other, over the geometric mean of the pairs that either list orders."""
    if constant(first) or constant(second):
        return float("nan")
    swapped, seen = 0, list[float]()
    # Equal ones of the first list are sorted by the second, and so never count as swapped.
    for value in second[np.lexsort((second, first))].tolist():
        swapped += len(seen) - bisect_right(seen, value)
        insort(seen, value)
    pairs = len(first) * (len(first) - 1) // 2
    ordered = [pairs - _pairs(one) for one in (first, second)]
    same = pairs - _pairs(first) - _pairs(second) + _pairs(first, second) - swapped
    return float((same - swapped) / np.sqrt(float(ordered[0]) * ordered[1]))
