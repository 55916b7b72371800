"""The chain of scores from the probability of the right answer to accuracy, each a transformation of the one before.

Schaeffer et al. 2024, "Why Has Predicting Downstream Capabilities of Frontier AI Models with Scale Remained Elusive?"
(https://arxiv.org/abs/2406.04391): each step weakens what ties a score to the compute that a model was trained with.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from hf_logits.correlation import kendall, pearson, spearman
from hf_logits.metrics import module, tables


STAGES = ("log_p_vocab", "p_vocab", "p_choices", "negative_brier", "accuracy")
"""The scores that are correlated with compute; higher is better."""

KINDS = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def chain(
    logprobs: Sequence[Any] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    reduction: str,
    distinct: Sequence[Any] | None = None,
) -> dict[str, np.ndarray]:
    """Every score of every question, `[N]` each; arguments and names as in [`mcq_chain`].

    With `a_c` the log-prob of choice c and t the right one:
    log_p_vocab = a_t;  p_vocab = exp(a_t);  p_choices = softmax(a)_t;  brier = sum or mean over c of (softmax(a)_c - [c = t])^2
    There is also log_p_choices, which has no smallest number.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'sum' (as in lm-eval) or 'mean' (as in the paper's code)."
        )
    values, real = tables.read_logprobs(logprobs)
    gold = tables.read_labels(references, real.sum(1), "references")
    rows = np.arange(len(values))
    right = values[rows, gold]
    log_shares = tables.log_softmax(values)
    hit = np.zeros_like(values)
    hit[rows, gold] = 1
    brier = np.square(np.exp(log_shares) - hit).sum(1)
    total = tables.mass(values, real, distinct)
    return {
        "log_p_vocab": right,
        "p_vocab": np.exp(right),
        "p_vocab_choices": total,
        "p_vocab_incorrect": np.maximum(total - np.exp(right), 0.0),
        "log_p_choices": log_shares[rows, gold],
        "p_choices": np.exp(log_shares[rows, gold]),
        "brier": brier if reduction == "sum" else brier / np.maximum(real.sum(1), 1),
        "accuracy": (tables.picks(values) == gold).astype(float),
    }


def mcq_chain(
    logprobs: Sequence[Any] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    reduction: str = "sum",
    distinct: Sequence[Any] | None = None,
    return_samples: bool = False,
) -> dict[str, Any]:
    """The means of the chain over the questions.

    Args:
        logprobs (`[N][K]`): log-probabilities of whole choices, in nats; -inf is allowed.
        references (`[N]`): the place of the right choice.
        reduction (`str`, *optional*, defaults to `"sum"`): of the Brier score over the choices of a question: `"sum"` as in
            lm-eval, or `"mean"` as in the paper's code, which is K times smaller.
        distinct (`[N][K]` of `bool`, *optional*): false for choices whose probability is part of another's, which
            `p_vocab_choices` then leaves out. By default every choice adds to it.
        return_samples (`bool`, *optional*, defaults to `False`): also the values of each question.

    Returns:
        `dict`: `log_p_vocab` (nats), `p_vocab`, `p_vocab_choices` (of all choices together), `p_vocab_incorrect`, `p_choices` (of the
        right choice among the choices), `brier`, `accuracy`, `tie_rate`, `notes`, and with `return_samples` the lists `samples`.

    Raises:
        ValueError: different lengths, fewer than two choices, an unknown label, NaN, log-probs above 0, choices with a probability
            above 1 together, an unknown `reduction`.
    """
    found = chain(logprobs, references, reduction=reduction, distinct=distinct)
    del found["log_p_choices"]
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


def correlations(x: np.ndarray, scores: np.ndarray, kind: str) -> np.ndarray:
    """Of `x [M]` with each column of `scores [M, N]`; NaN where one of them is constant, or a score is NaN.

    Pearson's is NaN where a score is infinite, too.
    """
    usable = np.isfinite(scores) if kind == "pearson" else ~np.isnan(scores)
    found = np.full(scores.shape[1], np.nan)
    for place in np.flatnonzero(usable.all(0)):
        own = np.ascontiguousarray(scores[:, place])
        # what differs in the last bits only does not vary
        if np.isfinite(own).all() and np.ptp(own) <= 1e-12 * np.abs(own).max():
            continue
        found[place] = KINDS[kind](x, own)
    return found


def spread(found: np.ndarray) -> dict[str, float]:
    """What there is to say about the correlations of all questions; those that are NaN are left out and counted.

    `auc` is the area under the share of questions above each value from -1 to 1, which is the mean plus 1, and Wasserstein
    distances to perfect correlation are 1 less the mean: they say no more. Of Kolmogorov and Smirnov, `ks`, the largest distance of
    the distribution to all being 1, is the share that is below 1.
    """
    kept = found[~np.isnan(found)]
    nan = float("nan")
    keys = ("mean", "median", "std", "skewness", "kurtosis", "auc", "energy_distance", "ks")
    said = dict.fromkeys(keys, nan)
    if len(kept):
        centred = kept - kept.mean()
        variance = float(np.square(centred).mean())
        moments = [float((centred**power).mean()) for power in (3, 4)]
        count = len(kept)
        # E|X - X'| of sorted values
        apart = 2 * float((2 * np.arange(1, count + 1) - count - 1) @ np.sort(kept)) / count**2
        # to all of them being 1: 2 E|X - 1| - E|X - X'|, under a root
        energy = 2 * float(np.abs(kept - 1).mean()) - apart
        said = {
            "mean": float(kept.mean()),
            "median": float(np.median(kept)),
            "std": math.sqrt(variance),
            "skewness": moments[0] / variance**1.5 if variance > 1e-24 else nan,
            "kurtosis": moments[1] / variance**2 - 3 if variance > 1e-24 else nan,
            "auc": float(kept.mean()) + 1,
            "energy_distance": math.sqrt(max(energy, 0.0)),
            "ks": float((kept < 1 - 1e-12).mean()),
        }
    return said | {"frac_nan": float(np.isnan(found).mean()) if len(found) else nan}


def compute_correlations(
    tables_of_models: Sequence[Any] | np.ndarray,
    references: Sequence[Any],
    compute: Sequence[float] | np.ndarray,
    *,
    reduction: str = "sum",
    distinct: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """How the scores of each question follow the compute of the models of a family, or the checkpoints of a run.

    Args:
        tables_of_models (`[M][N][K]`): a table of log-probs for each model.
        references (`[M][N]`): the places of the right choices, the same for all models.
        compute (`[M]`): what training took: FLOPs, about `6 * parameters * tokens`, or tokens seen. Its logarithm is correlated,
            and models without one (nothing was trained) are left out.
        reduction (`str`, *optional*, defaults to `"sum"`): of the Brier score; it matters where questions have unequal numbers
            of choices in no correlation at all.
        distinct (`[N][K]` of `bool`, *optional*): as in [`mcq_chain`], the same for all models.

    Returns:
        `dict`: for each of `log_p_vocab`, `p_vocab`, `p_choices`, `negative_brier` and `accuracy` a `dict` with `pearson`,
        `spearman` and `kendall`, each the `mean`, `median`, `std`, `skewness`, `kurtosis`, `auc`, `energy_distance` and `ks`
        (both to all being 1) and `frac_nan` over the questions; and `notes`, by `stage.kind`. Ranks cannot tell the first two apart. A
        score that is the same for all models has no correlation: often accuracy's, and leaving these out, as the paper does,
        flatters it. Probabilities of a question are scaled by the largest of its models before they are correlated, which changes
        nothing but that answers may be as improbable as they like.

    Raises:
        ValueError: unequal numbers of models, references or numbers of choices that differ between models, compute that is no
            number of at least 0, or fewer than two models with a finite one above 0; and what [`mcq_chain`] raises.
    """
    if not len(tables_of_models) == len(references) == len(compute):
        raise ValueError(
            f"{len(tables_of_models)} tables, {len(references)} lists of references and {len(compute)} numbers of compute; give "
            "one of each for every model."
        )
    if any(list(own) != list(references[0]) for own in references):
        raise ValueError("The references differ between models: all of them must have answered the same questions.")
    if not len(references) or not len(references[0]):
        keys = [f"{stage}.{kind}" for stage in STAGES for kind in KINDS]
        none = {stage: {kind: spread(np.zeros(0)) for kind in KINDS} for stage in STAGES}
        return none | {"notes": dict.fromkeys(keys, "there are no rows")}
    widths = [[len(row) for row in table] for table in tables_of_models]
    if any(own != widths[0] for own in widths):
        raise ValueError(
            "The numbers of choices differ between models: all of them must have answered the same questions."
        )
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
        chain(table, own, reduction=reduction, distinct=distinct)
        for table, own, use in zip(tables_of_models, references, kept, strict=True)
        if use
    ]
    scores = {key: np.stack([one[key] for one in chains]) for key in chains[0]}
    scores["negative_brier"] = -scores["brier"]
    x = np.log10(given[kept])
    found: dict[str, Any] = {}
    for stage in STAGES:
        logs = scores.get({"p_vocab": "log_p_vocab", "p_choices": "log_p_choices"}.get(stage, ""))
        # neither ranks nor scaled values need what is too small for a float
        ranked = scores[stage] if logs is None else logs
        values = {"pearson": scores[stage] if logs is None else _scaled(logs), "spearman": ranked, "kendall": ranked}
        found[stage] = {}
        for kind, own in values.items():
            measured = correlations(x, own, kind)
            found[stage][kind] = spread(measured)
            _note(f"{stage}.{kind}", measured, own, found[stage][kind], notes)
    return found | {"notes": notes}


def _scaled(logs: np.ndarray) -> np.ndarray:
    """Probabilities as shares of the largest in their column, from their logarithms."""
    best = logs.max(0, initial=-np.inf)
    return np.exp(logs - np.where(np.isfinite(best), best, 0.0))


def _note(key: str, measured: np.ndarray, scores: np.ndarray, said: dict[str, float], notes: module.Notes) -> None:
    """Why some questions, and what is said of them all, are NaN."""
    missing = np.isnan(measured)
    if missing.any():
        lost = np.isnan(scores).any(0) & missing
        infinite = np.isinf(scores).any(0) & missing & ~lost if key.endswith("pearson") else np.zeros_like(missing)
        reasons = {
            "a model gives no choice any probability": lost,
            "a score is infinite": infinite,
            "nothing varies": missing & ~lost & ~infinite,
        }
        said_of = "; ".join(f"{reason} in {int(own.sum())}" for reason, own in reasons.items() if own.any())
        notes[key] = (
            f"a share of {missing.mean():.3f} of the questions has no correlation and is left out, since {said_of}"
        )
    if not missing.all() and math.isnan(said["skewness"]):
        notes |= dict.fromkeys((f"{key}.skewness", f"{key}.kurtosis"), "all correlations are the same")


class McqChain(module.LogitMetric):
    """From the log-prob of the right answer to accuracy, step by step, and how each follows compute.

    ```python
    from hf_logits.metrics import McqChain

    McqChain().compute(predictions=[[-2.0, -3.0, -4.0, -4.0]], references=[0])["p_choices"]
    ```

    In the configuration `"family"` a row is a model: `predictions` is its table, `references` the right choices (the same for
    all), and `compute` what its training took. The results are those of `compute_correlations`. `"distinct"` takes `distinct`, too.
    """

    inputs = {
        "default": {"predictions": List(Value("float64")), "references": Value("int64")},
        "distinct": {
            "predictions": List(Value("float64")),
            "references": Value("int64"),
            "distinct": List(Value("bool")),
        },
        "family": {
            "predictions": List(List(Value("float64"))),
            "references": List(Value("int64")),
            "compute": Value("float64"),
        },
    }
    from_scores = {"default": "log_probs"}
    paper = "Schaeffer et al. 2024, Why Has Predicting Downstream Capabilities Remained Elusive?, https://arxiv.org/abs/2406.04391"

    def measure(
        self,
        predictions: list[Any],
        references: list[Any],
        compute: list[float] | None = None,
        distinct: list[list[bool]] | None = None,
        reduction: str = "sum",
        return_samples: bool = False,
    ) -> dict[str, Any]:
        """As `mcq_chain`, or `compute_correlations`: `predictions` are log-probs of choices, `references` the right places."""
        if self.config_name == "family":
            return compute_correlations(predictions, references, compute or [], reduction=reduction, distinct=distinct)
        return mcq_chain(
            predictions, references, reduction=reduction, distinct=distinct, return_samples=return_samples
        )
