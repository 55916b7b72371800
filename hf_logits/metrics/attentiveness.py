"""Attentiveness: how much probability falls on the choices at all, and what its lack can have changed.

Wiegreffe et al. 2023, "Increasing Probability Mass on Answer Choices Does Not Always Improve Accuracy"
(https://arxiv.org/abs/2305.14596). All of it is a function of the table of [`~hf_logits.metrics.choice_logprobs`].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from hf_logits.metrics import module, tables


LENGTHS = {"tokens": "accuracy_token", "chars": "accuracy_char", "bytes": "accuracy_byte"}


def attentiveness(
    logprobs: Sequence[Any] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    prior_logprobs: Sequence[Any] | np.ndarray | None = None,
    lengths: Mapping[str, Sequence[Any]] | None = None,
    distinct: Sequence[Any] | None = None,
    return_samples: bool = False,
) -> dict[str, Any]:
    """Probability mass on the choices, the bound on surface-form competition, and accuracy under five scores.

    The mass `m` of a question is the sum of its choices' probabilities. What is missing, `1 - m`, may belong to other forms of the
    runner-up in the worst case: as long as it is smaller than the gap of the two best probabilities, competition of surface forms
    cannot have changed the answer, and the question is resolved.

    Args:
        logprobs (`[N][K]`): log-probabilities of whole choices, in nats; -inf is allowed.
        references (`[N]`): the place of the right choice.
        prior_logprobs (`[N][K]`, *optional*): the same behind a prompt without the question, for PMI. A choice that has no
            probability there has no PMI, and is not picked.
        lengths (`dict[str, [N][K]]`, *optional*): of the choices in `"tokens"`, `"chars"` or `"bytes"`, or several of them.
        distinct (`[N][K]` of `bool`, *optional*): false for choices whose probability is part of another's: equal ones, and ones
            that begin with another. By default every choice adds to the mass.
        return_samples (`bool`, *optional*, defaults to `False`): also the values of each question.

    Returns:
        `dict`: `attentiveness` (the mean mass), `attentiveness_std` (over questions, `N - 1`), `sfc_bound` (the mean of `1 - m`),
        `resolved` (a share), `slack` (the mean of what the gap lacks, 0 where resolved), `accuracy` of the log-probs, and of them
        divided by tokens, characters (lm-eval's `acc_norm`) and bytes (`accuracy_token`, `accuracy_char`, `accuracy_byte`), and less
        the prior's (`accuracy_pmi`), `tie_rate` (questions whose answer was the first of equals), `notes`, and with
        `return_samples` the lists `samples`.

    Raises:
        ValueError: different lengths, fewer than two choices, an unknown label, NaN, log-probs above 0, more mass than 1.
    """
    values, real = tables.read_logprobs(logprobs)
    gold = tables.read_labels(references, real.sum(1), "references")
    mass = tables.mass(values, real, distinct)
    probs = np.exp(values)
    missing = np.maximum(1 - mass, 0.0)
    best = np.sort(probs, axis=1)[:, ::-1]
    gap = best[:, 0] - best[:, 1] if len(best) else np.zeros(0)
    notes: module.Notes = {}
    scores = {"accuracy": values}
    for unit, key in LENGTHS.items():
        if lengths is not None and unit in lengths:
            size = tables.read_like(lengths[unit], real, f"lengths[{unit!r}]")
            if (size[real] <= 0).any():
                raise ValueError(f"lengths[{unit!r}] must be above 0; the smallest is {size[real].min():g}.")
            scores[key] = np.divide(values, size, out=np.full_like(values, -np.inf), where=real)
        else:
            notes[key] = f"lengths in {unit} were not given"
    if lengths is not None and (unknown := set(lengths) - set(LENGTHS)):
        raise ValueError(f"lengths are in {sorted(unknown)}; they may be in {', '.join(LENGTHS)}.")
    if prior_logprobs is None:
        notes["accuracy_pmi"] = "prior_logprobs were not given"
    else:
        prior = np.minimum(tables.read_like(prior_logprobs, real, "prior_logprobs"), 0.0)
        tables.read_logprobs(prior_logprobs, "prior_logprobs")
        known = real & ~np.isneginf(prior)
        scores["accuracy_pmi"] = np.subtract(values, prior, out=np.full_like(values, -np.inf), where=known)
        if dropped := int((real & ~known).sum()):
            notes["accuracy_pmi"] = f"{dropped} choices have no probability behind the prior, and were not picked"
    right = {key: tables.picks(score) == gold for key, score in scores.items()}
    if none := int((tables.picks(values) < 0).sum()):
        notes["accuracy"] = f"{none} rows have no choice with any probability; they count as wrong"
    if len(mass) < 2:
        notes["attentiveness_std"] = "a deviation needs two rows"
    found: dict[str, Any] = {
        "attentiveness": tables.mean(mass),
        "attentiveness_std": float(mass.std(ddof=1)) if len(mass) > 1 else math.nan,
        "sfc_bound": tables.mean(missing),
        "resolved": tables.mean(missing < gap),
        "slack": tables.mean(np.maximum(missing - gap, 0.0)),
    }
    for key in ("accuracy", *LENGTHS.values(), "accuracy_pmi"):
        found[key] = tables.mean(right[key]) if key in right else math.nan
    found["tie_rate"] = tables.mean(tables.tied(values))
    if not len(mass):
        notes = dict.fromkeys(found, "there are no rows")
    if return_samples:
        found["samples"] = {"mass": mass.tolist(), "gap": gap.tolist(), "resolved": (missing < gap).tolist()}
        found["samples"] |= {key: values.tolist() for key, values in right.items()}
    return found | {"notes": notes}


_TABLE = {"predictions": List(Value("float64")), "references": Value("int64")}
_PRIOR = {"prior_logprobs": List(Value("float64"))}
_LENGTHS = {f"{unit}_lengths": List(Value("int64")) for unit in ("token", "char", "byte")}
_DISTINCT = {"distinct": List(Value("bool"))}


class Attentiveness(module.LogitMetric):
    """How much probability falls on the choices at all, and accuracy under five ways to compare them.

    ```python
    from hf_logits.metrics import Attentiveness, choice_logprobs

    table = choice_logprobs(model, tokenizer, prompts, choices, prior="")
    Attentiveness().compute(
        predictions=table.logprobs,
        references=answers,
        prior_logprobs=table.prior_logprobs,
        lengths=table.lengths,
        distinct=table.distinct,
    )
    ```

    What `compute` takes beside predictions and references may come batch by batch (`add_batch`) in the configurations `"prior"`,
    with `prior_logprobs`, and `"full"`, with `prior_logprobs`, `token_lengths`, `char_lengths`, `byte_lengths` and `distinct`.
    """

    inputs = {"default": _TABLE, "prior": _TABLE | _PRIOR, "full": _TABLE | _PRIOR | _LENGTHS | _DISTINCT}
    from_scores = {"default": "log_probs"}
    paper = "Wiegreffe et al. 2023, Increasing Probability Mass on Answer Choices, https://arxiv.org/abs/2305.14596"

    def measure(
        self,
        predictions: list[list[float]],
        references: list[int],
        prior_logprobs: Any = None,
        lengths: Any = None,
        distinct: Any = None,
        token_lengths: Any = None,
        char_lengths: Any = None,
        byte_lengths: Any = None,
        return_samples: bool = False,
    ) -> dict[str, Any]:
        """As `attentiveness`: `predictions` are the log-probs of the choices, `references` the places of the right ones."""
        single = {"tokens": token_lengths, "chars": char_lengths, "bytes": byte_lengths}
        given = dict(lengths or {}) | {unit: value for unit, value in single.items() if value is not None}
        return attentiveness(
            predictions,
            references,
            prior_logprobs=prior_logprobs,
            lengths=given,
            distinct=distinct,
            return_samples=return_samples,
        )
