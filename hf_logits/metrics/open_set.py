"""Open-set recognition: whether a classifier's own score tells what it knows from what belongs to none of its classes.

Vaze et al. 2022 (https://arxiv.org/abs/2110.06207): the largest logit of a good classifier does.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Value

from hf_logits.checks import check_choice
from hf_logits.metrics import module, tables
from hf_logits.roc import auc, roc_curve


UNKNOWN = -1
"""The reference of a row that belongs to no class."""


def open_set_inputs(logits: Any, *, score: str = "max_logit") -> dict[str, np.ndarray]:
    """Class logits reduced to what [`OpenSet`] takes of each row: the predicted class, and how known it looks.

    Args:
        logits (array of shape `[N, C]`): of a classifier, not of a language model's vocabulary.
        score (`str`, *optional*, defaults to `"max_logit"`):
            Or `"max_probability"`, the largest softmax probability, or `"entropy"`, that of the softmax, negative, in nats.

    Returns:
        `dict`: `predictions` (int64) and `scores` (float64), of shape `[N]`.

    Raises:
        ValueError: logits that are no table or have NaN or +inf, a row of nothing but -inf, or an unknown `score`.
    """
    check_choice("score", score, "max_logit", "max_probability", "entropy")
    table = np.asarray(logits, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"Logits must be of shape [rows, classes], two classes or more; got {table.shape}.")
    if np.isnan(table).any() or np.isposinf(table).any():
        raise ValueError("Logits must be finite, or -inf for a class that is excluded; there is NaN or +inf.")
    best = table.max(1)
    if np.isneginf(best).any():
        raise ValueError("A row of logits has no class that is not excluded (-inf).")
    log_probs = tables.log_softmax(table)
    probs = np.exp(log_probs)
    if score == "max_logit":
        scores = best
    elif score == "max_probability":
        scores = probs.max(1)
    else:
        scores = np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0.0), 0.0).sum(1)
    return {"predictions": table.argmax(1), "scores": scores}


def oscr(scores: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> float:
    """Area below the rate of correct classification against that of unknown rows that are accepted; exact under ties.

    It is the chance that a known row is classified right and has a higher score than an unknown one, a tie counting half.

    Args:
        scores (array of shape `[K]`): of the known rows.
        right (array of `bool`, shape `[K]`): whether they are classified right.
        unknown (array of shape `[U]`): scores of the unknown rows.
    """
    return auc(scores[right], unknown) * float(right.mean()) if right.any() else 0.0


def oscr_as_published(scores: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> float:
    """The area as the code behind published tables has it, to compare with those.

    It counts known rows from one place later than unknown ones, misses the last point, and lets the order of the rows, known ones
    first, decide ties. With few rows it is far off, with thousands in the fifth digit.
    """
    both = np.concatenate([scores, unknown])
    order = np.argsort(both, kind="stable")
    known = np.concatenate([right, np.zeros(len(unknown))])[order]
    strange = np.concatenate([np.zeros(len(scores)), np.ones(len(unknown))])[order]
    # from each place on, how many are right and how many unknown; the last place is left at 0
    ccr = np.append(known[::-1].cumsum()[::-1][1:], [0.0, 0.0, len(scores)]) / len(scores)
    fpr = np.append(strange[::-1].cumsum()[::-1][:-1], [0.0, 0.0, len(unknown)]) / len(unknown)
    points = np.array(sorted(zip(fpr, ccr, strict=True), reverse=True))
    return float(-(np.diff(points[:, 0]) * (points[1:, 1] + points[:-1, 1]) / 2).sum()) + 0.0


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Mean precision at the score of each positive, those with equal scores taken together."""
    curve = roc_curve(positive, negative)
    above, wrong = curve.true_rates * len(positive), curve.false_rates * len(negative)
    precision = above[1:] / (above[1:] + wrong[1:])
    return float((np.diff(curve.true_rates) * precision).sum())


def open_set(
    predictions: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    compat: str | None = None,
) -> dict[str, Any]:
    """How well a score tells known rows from unknown ones, and known ones are classified.

    Args:
        predictions (array of `int`, shape `[N]`): predicted classes.
        scores (array of `float`, shape `[N]`):
            How known each row looks, the largest logit for one; see [`open_set_inputs`]. Infinities are the ends of the order.
        references (array of `int`, shape `[N]`): the classes, -1 for a row that belongs to none.
        compat (`str`, *optional*): `"arpl"` makes `oscr` that of the code behind published tables, errors included.

    Returns:
        `dict`: `acc` (of the known rows), `auroc`, `oscr`, `aupr` (average precision, unknown rows being the positives), `fpr95`
        (the smallest share of the known rows that is taken for unknown while at least 95% of the unknown are found) and `notes`.

    Raises:
        ValueError: different lengths, classes that are no whole numbers, a score that is NaN, negative classes other than the reference -1, an unknown `compat`.
    """
    if compat not in (None, "arpl"):
        raise ValueError(f"compat must be None or 'arpl', got {compat!r}.")
    found, classes, gold = np.asarray(scores, dtype=np.float64), np.asarray(predictions), np.asarray(references)
    if found.ndim != 1 or not found.shape == classes.shape == gold.shape:
        raise ValueError(
            f"{classes.shape} predictions, {found.shape} scores and {gold.shape} references; give one number of each a row."
        )
    for name, column in (("predictions", classes), ("references", gold)):
        if len(column) and column.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers, the numbers of classes; got {column[:3].tolist()!r}.")
    if np.isnan(found).any():
        raise ValueError(f"Scores must be numbers; {int(np.isnan(found).sum())} are NaN.")
    if (gold < UNKNOWN).any() or (classes < 0).any():
        raise ValueError("Classes are numbers from 0 on; -1 is for references of rows that belong to no class.")
    known = gold != UNKNOWN
    right = classes[known] == gold[known]
    notes: module.Notes = {}
    result = {"acc": module.ratio(right.sum(), len(right), "acc", "there is no known row", notes)}
    keys = ("auroc", "oscr", "aupr", "fpr95")
    if known.all() or not known.any():
        reason = "needs known and unknown rows"
        return result | dict.fromkeys(keys, math.nan) | {"notes": notes | dict.fromkeys(keys, reason)}
    # only the order matters: ranks are finite where scores are not
    ranks = np.unique(found, return_inverse=True)[1].astype(np.float64)
    inside, outside = ranks[known], ranks[~known]
    curve = roc_curve(-outside, -inside)
    area = oscr if compat is None else oscr_as_published
    return result | {
        "auroc": curve.auc,
        "oscr": area(inside, right, outside),
        "aupr": average_precision(-outside, -inside),
        "fpr95": float(curve.false_rates[curve.true_rates >= 0.95 - 1e-12].min()),
        "notes": notes,
    }


class OpenSet(module.LogitMetric):
    """Whether a classifier's score tells known rows from those that belong to none of its classes.

    ```python
    from hf_logits.metrics import OpenSet, open_set_inputs

    OpenSet().compute(**open_set_inputs(logits), references=[0, 2, -1])["oscr"]
    ```
    """

    inputs = {"default": {"predictions": Value("int64"), "scores": Value("float64"), "references": Value("int64")}}
    from_scores = {"default": "open_set"}
    paper = (
        "Vaze et al. 2022, Open-Set Recognition: a Good Closed-Set Classifier is All You Need?, "
        "https://arxiv.org/abs/2110.06207"
    )

    def measure(
        self, predictions: list[int], scores: list[float], references: list[int], compat: str | None = None
    ) -> dict[str, Any]:
        """As `open_set`: `scores` say how known a row looks, and the reference -1 is a row that belongs to no class."""
        return open_set(predictions, scores, references, compat=compat)
