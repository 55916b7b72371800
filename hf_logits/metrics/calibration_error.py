"""Calibration: whether a model is right as often as it is confident.

Expected calibration error as in Guo et al. 2017 (https://arxiv.org/abs/1706.04599); f-DPO (Wang et al. 2023,
https://arxiv.org/abs/2309.16240) reports it after alignment.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from hf_logits.checks import check_choice, check_count
from hf_logits.metrics import module, tables


def bins_of(confidences: np.ndarray, n_bins: int, scheme: str) -> np.ndarray:
    """The bin of each confidence, from 0. Bins are closed on the right; a confidence of 0 is in the first."""
    if scheme == "equal_width":
        edges = np.arange(1, n_bins) / n_bins
    else:
        edges = np.quantile(confidences, np.arange(1, n_bins) / n_bins, method="inverted_cdf")
    return np.searchsorted(edges, confidences, side="left")


def calibration_error(
    confidences: Sequence[float] | np.ndarray,
    correct: Sequence[int] | np.ndarray,
    *,
    n_bins: int = 10,
    scheme: str = "equal_width",
) -> dict[str, Any]:
    """Expected and maximum calibration error, and the bins of a reliability diagram.

    Args:
        confidences (array of `float`, shape `[N]`): probabilities of the answers that were given, from 0 to 1. For a
            preference model, the sigmoid of the reward margin.
        correct (array of `int` or `bool`, shape `[N]`): 1 where the answer was right, or the chosen one preferred.
        n_bins (`int`, *optional*, defaults to 10): M. More bins make the expected error larger.
        scheme (`str`, *optional*, defaults to `"equal_width"`): or `"equal_mass"`, bins of about the same number.

    Returns:
        `dict`: `ece`, `mce`, `brier`, `nll` (nats, infinite where a certain answer was wrong), `gap` (mean confidence
        less accuracy: over-confidence), `accuracy`, `confidence`, `bins` (a list of `count`, `confidence` and `accuracy` of
        those that are not empty) and `notes`.

    Raises:
        ValueError: different lengths, a confidence that is no probability, an answer that is neither right nor wrong,
            `n_bins` below 1, or an unknown `scheme`.
    """
    check_count("n_bins", n_bins, minimum=1)
    check_choice("scheme", scheme, "equal_width", "equal_mass")
    found, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if found.ndim != 1 or found.shape != right.shape:
        raise ValueError(f"{found.shape} confidences and {right.shape} outcomes; give one number of each a row.")
    if not ((found >= 0) & (found <= 1)).all():  # false for NaN too
        raise ValueError(f"Confidences must be probabilities; {found[~((found >= 0) & (found <= 1))][:5]} are not.")
    if not np.isin(right, (0, 1)).all():
        raise ValueError(f"Outcomes must be 0 or 1; there are {np.unique(right)[:5]}.")
    place = bins_of(found, n_bins, scheme) if len(found) else np.zeros(0, dtype=int)
    if not len(found):
        keys = ("ece", "mce", "brier", "nll", "gap", "accuracy", "confidence")
        return dict.fromkeys(keys, float("nan")) | {"bins": [], "notes": dict.fromkeys(keys, "there are no rows")}
    bins = []
    for index in np.unique(place):
        inside = place == index
        bins.append(
            {
                "count": int(inside.sum()),
                "confidence": float(found[inside].mean()),
                "accuracy": float(right[inside].mean()),
            }
        )
    gaps = np.array([abs(one["accuracy"] - one["confidence"]) for one in bins])
    shares = np.array([one["count"] for one in bins]) / len(found)
    with np.errstate(divide="ignore"):
        surprise = -np.log(np.where(right == 1, found, 1 - found))
    return {
        "ece": float(shares @ gaps),
        "mce": float(gaps.max()),
        "brier": float(np.square(found - right).mean()),
        "nll": float(surprise.mean()),
        "gap": float(found.mean() - right.mean()),
        "accuracy": float(right.mean()),
        "confidence": float(found.mean()),
        "bins": bins,
        "notes": {},
    }


def best_choices(
    probabilities: Sequence[Any] | np.ndarray, references: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the most probable choice of each row, the first of equal ones, and whether it is right.

    Args:
        probabilities (`[N][K]`): of all choices of a row, 1 together.
        references (`[N]`): the place of the right choice.

    Raises:
        ValueError: fewer than two choices, numbers that are no probabilities or not 1 together, an unknown label, different lengths.
    """
    values, real = tables.fill_rows(probabilities, "predictions")
    sizes = real.sum(1)
    total = np.where(real, values, 0.0).sum(1)
    wrong = (sizes < 2) | (np.where(real, values, 0.0) < 0).any(1) | (np.abs(total - 1) > 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"Row {row} of predictions must be probabilities of two choices or more, 1 together; got {values[row][real[row]][:5]}. "
            "Log-probs become such by softmax."
        )
    picked = tables.picks(values)
    gold = tables.read_labels(references, sizes, "references")
    return np.minimum(values[np.arange(len(values)), picked], 1.0), picked == gold


class CalibrationError(module.LogitMetric):
    """Whether a model is right as often as it is confident: expected and maximum calibration error.

    ```python
    from hf_logits.metrics import CalibrationError

    CalibrationError().compute(predictions=[0.9, 0.6, 0.8], references=[1, 0, 1])["ece"]
    CalibrationError("choices").compute(predictions=[[0.9, 0.1], [0.4, 0.6]], references=[0, 0])["ece"]
    ```

    In the configuration `"choices"`, `predictions` are the probabilities of all choices or classes, and `references` the right ones.
    """

    inputs = {
        "default": {"predictions": Value("float64"), "references": Value("int64")},
        "choices": {"predictions": List(Value("float64")), "references": Value("int64")},
    }
    from_scores = {"choices": "probabilities"}
    paper = "Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599"

    def measure(
        self, predictions: list[Any], references: list[int], n_bins: int = 10, scheme: str = "equal_width"
    ) -> dict[str, Any]:
        """As `calibration_error`: `predictions` are the confidences, `references` are 1 where the answer was right."""
        if self.config_name == "choices":
            confidences, hits = best_choices(predictions, references)
            return calibration_error(confidences, hits, n_bins=n_bins, scheme=scheme)
        return calibration_error(predictions, references, n_bins=n_bins, scheme=scheme)
