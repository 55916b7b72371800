"""Judges whose verdict depends on which answer they see first: how often, what is left on average, and which rows need a person.

FairEval (Wang et al. 2024, https://arxiv.org/abs/2305.17926): several samples an order (MEC), both orders (BPC), and the entropy
of the single verdicts (BPDE).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from hf_logits.checks import check_choice, check_number
from hf_logits.metrics import module, tables


VERDICTS = ("win", "tie", "lose")
"""Of the first candidate against the second."""

TOLERANCE = 1e-9
"""Means of thirds that should be equal differ in their last bits."""

Scores = Sequence[Sequence[Sequence[float]]]
"""By row and sample, what the two candidates were given."""


def verdicts(scores: np.ndarray) -> np.ndarray:
    """The place in `VERDICTS` of each pair of scores: `[k, 2] -> [k]`."""
    lead = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(lead) <= TOLERANCE, 1, np.where(lead > 0, 0, 2))


def shares(found: np.ndarray) -> np.ndarray:
    """How often each verdict was given, as shares: `[k] -> [3]`; NaN of none."""
    return np.bincount(found, minlength=3) / len(found) if len(found) else np.full(3, math.nan)


def cohen_kappa(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Agreement beyond chance of two raters; NaN where both say the same one thing throughout, or nothing."""
    labels = sorted({*first, *second})
    if len(labels) < 2:
        return math.nan
    table = np.zeros((len(labels), len(labels)))
    np.add.at(table, ([labels.index(one) for one in first], [labels.index(one) for one in second]), 1 / len(first))
    observed, expected = float(np.trace(table)), float(table.sum(1) @ table.sum(0))
    return (observed - expected) / (1 - expected)


def judge_position(
    first_order: Scores,
    second_order: Scores,
    references: Sequence[str] | None = None,
    *,
    swapped_back: bool,
    review: float = 0.2,
    unbalanced: str = "error",
) -> dict[str, Any]:
    """How a judge's verdicts on pairs of candidates depend on the order, and what they are with both orders.

    Each order is averaged over its samples, then the two orders over each other. A row without any sample is an abstention.

    Args:
        first_order (`list` of `[k, 2]` scores): of candidates A and B, shown as A, B. Larger is better.
        second_order (`list` of `[k, 2]` scores): of the same pairs, shown as B, A.
        references (`list` of `"win"`, `"tie"` or `"lose"`, *optional*): what people say of A against B.
        swapped_back (`bool`):
            Whether the scores in `second_order` are those of A and B. Otherwise they are in the order shown: B and A.
        review (`float`, *optional*, defaults to 0.2): share of the judged rows that people shall look at, rounded up.
        unbalanced (`str`, *optional*, defaults to `"error"`):
            What a row is that has more samples in one order than in the other: an error, with `"abstain"` an abstention, or with
            `"average"` judged all the same. Since the orders are averaged over each other, lost samples then don't bring the
            position back in, but one order's are noisier. With samples in one order only it is an abstention.

    Returns:
        `dict`: `win`, `tie`, `lose` (shares of the judged rows, for A), `conflict_rate` (share of the rows whose verdict turns with
        the order), `bpde` (mean entropy of the single verdicts, nats; both orders weigh the same), `review_indices` (the rows with the
        most entropy, in their order; of equal ones the earlier), `abstained` (rows), `verdicts` (by row, `None` where abstained),
        `by_order` (the shares of the verdicts with one order alone), `by_position` (share of the single verdicts for what was shown
        `first`, `second`, or a `tie`) and `notes`. With references `accuracy`, `kappa` (Cohen's), and both `_after_review`, which takes the word of people there.

    Raises:
        ValueError: different lengths, scores that are not pairs or not finite, an unbalanced row, an unknown label.
    """
    check_number("review", review, minimum=0.0, maximum=1.0)
    check_choice("unbalanced", unbalanced, "error", "abstain", "average")
    if len(first_order) != len(second_order):
        raise ValueError(f"{len(first_order)} rows in the first order and {len(second_order)} in the second.")
    if references is not None and len(references) != len(first_order):
        raise ValueError(f"{len(references)} references for {len(first_order)} rows; give one a row.")
    if unknown := set(references or ()) - set(VERDICTS):
        raise ValueError(
            f"References are 'win', 'tie' or 'lose' of the first candidate, not {sorted(map(repr, unknown))}."
        )
    judged, means, votes = _read(first_order, second_order, swapped_back, unbalanced)
    alone = [verdicts(means[:, order]) for order in (0, 1)]
    final = [VERDICTS[one] for one in verdicts(means.mean(1))]
    # rounded, so that equal ones are equal
    doubts = np.array([round(tables.entropy(row.mean(0)), 12) for row in votes])
    most = set(np.argsort(-doubts, kind="stable")[: math.ceil(review * len(judged) - 1e-9)].tolist())
    # the candidate that is shown first wins: A in the first order, B in the second
    shown = (votes[:, 0] + votes[:, 1, ::-1]) / 2
    named = dict(zip(judged, final, strict=True))
    result: dict[str, Any] = _by_name(VERDICTS, shares(verdicts(means.mean(1)))) | {
        "conflict_rate": tables.mean(alone[0] != alone[1]),
        "bpde": tables.mean(doubts),
        "review_indices": [judged[place] for place in sorted(most)],
        "abstained": [row for row in range(len(first_order)) if row not in named],
        "verdicts": [named.get(row) for row in range(len(first_order))],
        "by_order": {name: _by_name(VERDICTS, shares(alone[place])) for place, name in enumerate(("first", "second"))},
        "by_position": _by_name(("first", "tie", "second"), tables.means(shown)),
    }
    notes: module.Notes = {}
    counts = zip(first_order, second_order, strict=True)
    if lost := [row for row, (one, other) in enumerate(counts) if len(one) != len(other)]:
        done = "count as abstentions" if unbalanced == "abstain" else "are averaged, or abstentions without any in one"
        notes["unbalanced"] = f"{len(lost)} rows with more samples in one order {done}: {lost[:5]}"
    if references is not None:
        said = [references[row] for row in judged]
        reviewed = [said[place] if place in most else one for place, one in enumerate(final)]
        result |= _agreement(final, said, "", notes) | _agreement(reviewed, said, "_after_review", notes)
    if not judged:
        undefined = [key for key, value in result.items() if isinstance(value, float | dict)]
        notes |= dict.fromkeys(undefined, "no row was judged")
    return result | {"notes": notes}


def _read(
    first_order: Scores, second_order: Scores, swapped_back: bool, unbalanced: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The rows that were judged, their mean scores `[rows, order, candidate]` and shares of verdicts `[rows, order, verdict]`."""
    judged: list[int] = []
    means, votes = np.zeros((len(first_order), 2, 2)), np.zeros((len(first_order), 2, 3))
    for row, given in enumerate(zip(first_order, second_order, strict=True)):
        orders = [_pairs(scores, row) for scores in given]
        unequal = len(orders[0]) != len(orders[1])
        if unequal and unbalanced == "error":
            raise ValueError(
                f"Row {row} has {len(orders[0])} samples in one order and {len(orders[1])} in the other. Judge it again, count it as "
                "an abstention (unbalanced='abstain'), or average over what each order has (unbalanced='average')."
            )
        if not all(map(len, orders)) or (unequal and unbalanced == "abstain"):
            continue
        if not swapped_back:
            orders[1] = orders[1][:, ::-1]
        means[len(judged)] = [scores.mean(0) for scores in orders]
        votes[len(judged)] = [shares(verdicts(scores)) for scores in orders]
        judged.append(row)
    return judged, means[: len(judged)], votes[: len(judged)]


def _pairs(scores: Sequence[Sequence[float]], row: int) -> np.ndarray:
    if any(len(sample) != 2 for sample in scores):
        raise ValueError(f"Each sample is a pair of scores, one a candidate; row {row} has {scores}.")
    pairs = np.array(scores, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(pairs).all():
        raise ValueError(f"Scores must be finite; row {row} has {scores}. Leave out samples that could not be read.")
    return pairs


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _agreement(given: list[str], said: list[str], suffix: str, notes: module.Notes) -> dict[str, float]:
    accuracy = tables.mean(np.array([one == other for one, other in zip(given, said, strict=True)], dtype=bool))
    kappa = cohen_kappa(given, said)
    if math.isnan(kappa):
        notes[f"kappa{suffix}"] = "judge and references say the same one thing throughout"
    return {f"accuracy{suffix}": accuracy, f"kappa{suffix}": kappa}


class JudgePosition(module.LogitMetric):
    """How a judge's verdicts on pairs of answers depend on the order in which it sees them.

    ```python
    from hf_logits.metrics import JudgePosition, judge_by_log_probs

    scores = judge_by_log_probs(model, tokenizer, questions, first_answers, second_answers)
    JudgePosition().compute(**scores)["conflict_rate"]
    ```

    With what people say (`"win"`, `"tie"` or `"lose"` of the first answers):
    `JudgePosition("references").compute(**scores, references=...)`.
    """

    inputs = {
        "default": {"predictions1": List(List(Value("float64"))), "predictions2": List(List(Value("float64")))},
        "references": {
            "predictions1": List(List(Value("float64"))),
            "predictions2": List(List(Value("float64"))),
            "references": Value("string"),
        },
    }
    paper = "Wang et al. 2024, Large Language Models are not Fair Evaluators, https://arxiv.org/abs/2305.17926"

    def measure(
        self,
        predictions1: Scores,
        predictions2: Scores,
        references: list[str] | None = None,
        *,
        swapped_back: bool,
        review: float = 0.2,
        unbalanced: str = "error",
    ) -> dict[str, Any]:
        """As `judge_position`: `predictions1` are the scores of the order A, B, and `predictions2` those of B, A."""
        return judge_position(
            predictions1,
            predictions2,
            references,
            swapped_back=swapped_back,
            review=review,
            unbalanced=unbalanced,
        )
