"""Tables with one row a question and one number a choice: read once, checked once, ragged rows filled up."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def fill_rows(
    rows: Sequence[Any] | np.ndarray, name: str, *, filler: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as an array `[N, K]` of floats, filled up on the right, and where it is real."""
    sizes = np.array([len(row) for row in rows], dtype=int)
    real = np.arange(sizes.max(initial=0)) < sizes[:, None]
    values = np.full(real.shape, filler)
    if len(rows) and real.any():
        values[real] = np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])
    if np.isnan(values[real]).any():
        row = int(np.isnan(np.where(real, values, 0.0)).any(1).argmax())
        raise ValueError(f"{name} has NaN, first in row {row}: say what a number is, or leave the row out.")
    return values, real


def read_logprobs(rows: Sequence[Any] | np.ndarray, name: str = "predictions") -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of at least two choices a row, -inf where there is no choice, and where there is one."""
    values, real = fill_rows(rows, name)
    few = real.sum(1) < 2
    if few.any():
        raise ValueError(
            f"Row {few.argmax()} of {name} has {real[few.argmax()].sum()} choices; there must be two or more."
        )
    if (values > 1e-6).any():  # a sum of rounded numbers may end just above 0
        row = int((values > 1e-6).any(1).argmax())
        raise ValueError(
            f"{name} must be log-probabilities, at most 0; row {row} has {values[row].max():.6g}. Give logarithms, not "
            "probabilities, and no raw logits."
        )
    return np.minimum(values, 0.0), real


def read_like(rows: Sequence[Any] | np.ndarray, real: np.ndarray, name: str) -> np.ndarray:
    """A second table with the rows of the first."""
    sizes = [len(row) for row in rows]
    if sizes != real.sum(1).tolist():
        raise ValueError(
            f"{name} has {_sizes(sizes)} entries a row, predictions {_sizes(real.sum(1).tolist())}; give as many."
        )
    return fill_rows(rows, name)[0]


def _sizes(sizes: list[int]) -> str:
    return f"{sizes[:5]}{'...' if len(sizes) > 5 else ''}"


def read_labels(values: Sequence[Any] | np.ndarray, sizes: np.ndarray, name: str, *, none: bool = False) -> np.ndarray:
    """Whole numbers from 0 to below the number of choices in their row; -1 too, for no answer, where `none`."""
    if len(values) != len(sizes):
        raise ValueError(f"There are {len(values)} {name} for {len(sizes)} rows; give one for each.")
    if not len(values):
        return np.zeros(0, dtype=int)
    found = np.asarray(values)
    if found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers, the places of choices; got {list(values[:3])!r}.")
    wrong = (found < (-1 if none else 0)) | (found >= sizes)
    if wrong.any():
        row = int(wrong.argmax())
        allowed = f"0 to {sizes[row] - 1}{', or -1 for no answer' if none else ''}"
        raise ValueError(f"{name} has {found[row]} in row {row}, which is no choice there; allowed are {allowed}.")
    return found.astype(int)


def picks(scores: np.ndarray) -> np.ndarray:
    """The first best place of each row; -1 where no choice has any probability."""
    if not len(scores):
        return np.zeros(0, dtype=int)
    return np.where(np.isneginf(scores).all(1), -1, scores.argmax(1))


def tied(scores: np.ndarray) -> np.ndarray:
    """Whether the best choice of each row has an equal, so that its place decided."""
    best = scores.max(1, keepdims=True, initial=-np.inf)
    return ((scores == best) & ~np.isneginf(scores)).sum(1) > 1


def mass(values: np.ndarray, real: np.ndarray, distinct: Sequence[Any] | np.ndarray | None = None) -> np.ndarray:
    """The probability of all choices of a row together, `[N]`.

    Args:
        values, real: of [`read_logprobs`].
        distinct (`[N][K]` of `bool`, *optional*): false for choices whose probability is part of another's.

    Raises:
        ValueError: more than 1, by more than rounding.
    """
    counted = real if distinct is None else read_like(distinct, real, "distinct") == 1
    total = (np.exp(values) * counted).sum(1)
    if (total > 1 + 1e-4).any():
        row = int(total.argmax())
        raise ValueError(
            f"The choices of row {row} have {total[row]:.6g} of probability together: some are equal or begin with another one. "
            "Give distinct=, as choice_logprobs returns it."
        )
    return total


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Of each row, `[N, K] -> [N, K]`; NaN where everything is -inf."""
    with np.errstate(invalid="ignore"):
        apart = scores - scores.max(1, keepdims=True, initial=-np.inf)
        return apart - np.log(np.exp(apart).sum(1, keepdims=True))


def entropy(probabilities: np.ndarray) -> float:
    """In nats."""
    kept = probabilities[probabilities > 0]
    return max(0.0, float(-(kept * np.log(kept)).sum()))


def means(values: np.ndarray) -> np.ndarray:
    """Over the rows, NaN where there are none."""
    return np.asarray(values.mean(0)) if len(values) else np.full(values.shape[1:], np.nan)


def mean(values: np.ndarray) -> float:
    """Of one number a row."""
    return float(means(values))
