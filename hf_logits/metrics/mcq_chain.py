"""The chain of scores from the probability of the right answer to accuracy, each a transformation of the one before.

Schaeffer et al. 2024, "Why Has Predicting Downstream Capabilities of Frontier AI Models with Scale Remained Elusive?"
(https://arxiv.org/abs/2406.04391): each step weakens what ties a score to the compute that a model was trained with.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from hf_logits.metrics import module, tables


STAGES = ("log_p_vocab", "p_vocab", "p_choices", "negative_brier", "accuracy")
"""The scores that are correlated with compute; higher is better."""


def chain(
    logprobs: Sequence[Any] | np.ndarray, references: Sequence[int] | np.ndarray, *, reduction: str
) -> dict[str, np.ndarray]:
    """Every score of every question, `[N]` each; arguments and names as in [`mcq_chain`].

    With `a_c` the log-prob of choice c and t the right one:
    log_p_vocab = a_t;  p_vocab = exp(a_t);  p_choices = softmax(a)_t;  brier = sum or mean over c of (softmax(a)_c - [c = t])^2
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'sum' (as in lm-eval) or 'mean' (as in the paper's code)."
        )
    values, real = tables.read_logprobs(logprobs)
    gold = tables.read_labels(references, real.sum(1), "references")
    rows = np.arange(len(values))
    right = values[rows, gold]
    best = values.max(1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):  # a row without any probability has no shares
        shares = np.exp(values - best)
        shares /= shares.sum(1, keepdims=True)
    hit = np.zeros_like(values)
    hit[rows, gold] = 1
    brier = np.square(shares - hit).sum(1)
    total = np.exp(values).sum(1)
    return {
        "log_p_vocab": right,
        "p_vocab": np.exp(right),
        "p_vocab_choices": total,
        "p_vocab_incorrect": total - np.exp(right),
        "p_choices": shares[rows, gold],
        "brier": brier if reduction == "sum" else brier / np.maximum(real.sum(1), 1),
        "accuracy": (tables.picks(values) == gold).astype(float),
    }


def mcq_chain(
    logprobs: Sequence[Any] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    reduction: str = "sum",
    return_samples: bool = False,
) -> dict[str, Any]:
    """The means of the chain over the questions.

    Args:
        logprobs (`[N][K]`): log-probabilities of whole choices, in nats; -inf is allowed.
        references (`[N]`): the place of the right choice.
        reduction (`str`, *optional*, defaults to `"sum"`): of the Brier score over the choices of a question: `"sum"` as in
            lm-eval, or `"mean"` as in the paper's code, which is K times smaller.
        return_samples (`bool`, *optional*, defaults to `False`): also the values of each question.

    Returns:
        `dict`: `log_p_vocab` (nats), `p_vocab`, `p_vocab_choices` (of all choices together), `p_vocab_incorrect`, `p_choices` (of the
        right choice among the choices), `brier`, `accuracy`, `tie_rate`, `notes`, and with `return_samples` the lists `samples`.

    Raises:
        ValueError: different lengths, fewer than two choices, an unknown label, NaN, log-probs above 0, an unknown `reduction`.
    """
    found = chain(logprobs, references, reduction=reduction)
    notes: module.Notes = {}
    if none := int(np.isnan(found["p_choices"]).sum()):
        reason = f"{none} rows have no choice with any probability"
        notes = dict.fromkeys(("p_choices", "brier"), reason) | {"accuracy": f"{reason}; they count as wrong"}
    means: dict[str, Any] = {key: tables.mean(values) for key, values in found.items()}
    means["tie_rate"] = tables.mean(tables.tied(tables.read_logprobs(logprobs)[0]))
    if not len(references):
        notes = dict.fromkeys(means, "there are no rows")
    if return_samples:
        means["samples"] = {key: values.tolist() for key, values in found.items()}
    return means | {"notes": notes}


# --- against compute -------------------------------------------------------------------------------------------------------


def pearson(x: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of `x [M]` with each column of `scores [M, N]`; NaN where one of them is constant or not finite."""
    # a constant column leaves rounding errors when its mean is taken off
    varies = (scores != scores[0]).any(0) & (x != x[0]).any()
    with np.errstate(invalid="ignore", divide="ignore"):
        x, scores = x - x.mean(), scores - scores.mean(0)
        both = np.sqrt(np.square(x).sum() * np.square(scores).sum(0))
        found = x @ scores / both
    return np.where(varies, np.clip(found, -1, 1), np.nan)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks down the first axis, equal values with their mean rank."""
    return np.stack([(values < one).sum(0) + ((values == one).sum(0) + 1) / 2 for one in values])


def kendall(x: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Tau-b of `x [M]` with each column of `scores [M, N]`."""

    def sign(values: np.ndarray, place: int) -> np.ndarray:
        return (values > values[place]).astype(float) - (values < values[place])

    agreement = np.zeros(scores.shape[1])
    pairs_x, pairs_scores = 0.0, np.zeros(scores.shape[1])
    for place in range(len(x)):
        one, other = sign(x, place), sign(scores, place)
        agreement += one @ other
        pairs_x += np.abs(one).sum()
        pairs_scores += np.abs(other).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return agreement / np.sqrt(pairs_x * pairs_scores)


def spread(correlations: np.ndarray) -> dict[str, float]:
    """What there is to say about the correlations of all questions; those that are NaN are left out and counted.

    `auc` is the area under the share of questions above each value from -1 to 1, which is the mean plus 1, and Wasserstein
    distances to perfect correlation are 1 less the mean: they say no more.
    """
    kept = correlations[~np.isnan(correlations)]
    nan = float("nan")
    keys = ("mean", "median", "std", "skewness", "kurtosis", "auc", "energy_distance")
    found = dict.fromkeys(keys, nan)
    if len(kept):
        centred = kept - kept.mean()
        variance = float(np.square(centred).mean())
        moments = [float((centred**power).mean()) for power in (3, 4)]
        count = len(kept)
        # E|X - X'| of sorted values
        apart = 2 * float((2 * np.arange(1, count + 1) - count - 1) @ np.sort(kept)) / count**2
        # to all of them being 1: 2 E|X - 1| - E|X - X'|, under a root
        energy = 2 * float(np.abs(kept - 1).mean()) - apart
        found = {
            "mean": float(kept.mean()),
            "median": float(np.median(kept)),
            "std": math.sqrt(variance),
            "skewness": moments[0] / variance**1.5 if variance > 1e-24 else nan,
            "kurtosis": moments[1] / variance**2 - 3 if variance > 1e-24 else nan,
            "auc": float(kept.mean()) + 1,
            "energy_distance": math.sqrt(max(energy, 0.0)),
        }
    return found | {"frac_nan": float(np.isnan(correlations).mean()) if len(correlations) else nan}


def compute_correlations(
    tables_of_models: Sequence[Any] | np.ndarray,
    references: Sequence[Any],
    compute: Sequence[float] | np.ndarray,
    *,
    reduction: str = "sum",
) -> dict[str, Any]:
    """How the scores of each question follow the compute of the models of a family, or the checkpoints of a run.

    Args:
        tables_of_models (`[M][N][K]`): a table of log-probs for each model.
        references (`[M][N]`): the places of the right choices, the same for all models.
        compute (`[M]`): what training took: FLOPs, about `6 * parameters * tokens`, or tokens seen. Its logarithm is correlated,
            and models without one (nothing was trained) are left out.
        reduction (`str`, *optional*, defaults to `"sum"`): of the Brier score; it matters where questions have unequal numbers
            of choices in no correlation at all.

    Returns:
        `dict`: for each of `log_p_vocab`, `p_vocab`, `p_choices`, `negative_brier` and `accuracy` a `dict` with `pearson`,
        `spearman` and `kendall`, each the `mean`, `median`, `std`, `skewness`, `kurtosis`, `auc`, `energy_distance` (to all being
        1) and `frac_nan` over the questions; and `notes`. Ranks cannot tell the first two apart. A score that is the same for
        all models has no correlation: often accuracy's, and leaving these out, as the paper does, flatters it.
    """
    if not len(tables_of_models) == len(references) == len(compute):
        raise ValueError(
            f"{len(tables_of_models)} tables, {len(references)} lists of references and {len(compute)} numbers of compute; give "
            "one of each for every model."
        )
    if any(list(own) != list(references[0]) for own in references):
        raise ValueError("The references differ between models: all of them must have answered the same questions.")
    given = np.asarray(compute, dtype=np.float64)
    if np.isnan(given).any() or (given < 0).any():
        raise ValueError(f"compute must be numbers of at least 0; got {list(compute)[:5]}.")
    notes: module.Notes = {}
    kept = (given > 0) & np.isfinite(given)
    if not kept.all():
        notes["compute"] = f"{int((~kept).sum())} models without a logarithm of their compute were left out"
    if kept.sum() < 2:
        raise ValueError(f"{int(kept.sum())} models have a finite compute above 0; a correlation needs two or more.")
    chains = [
        chain(table, own, reduction=reduction)
        for table, own, use in zip(tables_of_models, references, kept, strict=True)
        if use
    ]
    x = np.log10(given[kept])
    found: dict[str, Any] = {}
    for stage in STAGES:
        scores = np.stack([-one["brier"] if stage == "negative_brier" else one[stage] for one in chains])
        kinds = {
            "pearson": pearson(x, scores),
            "spearman": pearson(ranks(x), ranks(scores)),
            "kendall": kendall(x, scores),
        }
        if scores.shape[1] and np.isnan(scores).any():
            for values in kinds.values():
                values[np.isnan(scores).any(0)] = np.nan
        found[stage] = {kind: spread(values) for kind, values in kinds.items()}
        missing = found[stage]["kendall"]["frac_nan"]
        if missing > 0:
            notes[stage] = (
                f"a share of {missing:.3f} of the questions has no correlation, since nothing varies; left out"
            )
    if not len(references[0]):
        notes = dict.fromkeys(STAGES, "there are no rows")
    return found | {"notes": notes}


class McqChain(module.LogitMetric):
    """From the log-prob of the right answer to accuracy, step by step, and how each follows compute.

    ```python
    from hf_logits.metrics import McqChain

    McqChain().compute(predictions=[[-2.0, -3.0, -4.0, -4.0]], references=[0])["p_choices"]
    ```

    In the configuration `"family"` a row is a model: `predictions` is its table, `references` the right choices (the same for
    all), and `compute` what its training took. The results are those of `compute_correlations`.
    """

    inputs = {
        "default": {"predictions": List(Value("float64")), "references": Value("int64")},
        "family": {
            "predictions": List(List(Value("float64"))),
            "references": List(Value("int64")),
            "compute": Value("float64"),
        },
    }
    paper = "Schaeffer et al. 2024, Why Has Predicting Downstream Capabilities Remained Elusive?, https://arxiv.org/abs/2406.04391"

    def measure(
        self,
        predictions: list[Any],
        references: list[Any],
        compute: list[float] | None = None,
        reduction: str = "sum",
        return_samples: bool = False,
    ) -> dict[str, Any]:
        """As `mcq_chain`, or `compute_correlations`: `predictions` are log-probs of choices, `references` the right places."""
        if self.config_name == "family":
            return compute_correlations(predictions, references, compute or [], reduction=reduction)
        return mcq_chain(predictions, references, reduction=reduction, return_samples=return_samples)
