"""Position bias: whether answers follow the place of a choice more than what it says.

Li and Gao 2024, "Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions"
(https://arxiv.org/abs/2405.03205), names the anchored answer; the spread of the recalls is that of Zheng et al. 2023
(https://arxiv.org/abs/2309.03882). The paper does not write its rate down: the reading of it here is ours.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import List, Value

from hf_logits.metrics import module, tables


Item = TypeVar("Item")


def rotations(choices: Sequence[Item]) -> list[list[Item]]:
    """All K cyclic orders: in rotation r, place p has choice (p + r) mod K, so that each choice is once at each place."""
    count = len(choices)
    return [[choices[(place + turn) % count] for place in range(count)] for turn in range(count)]


def contents(positions: Sequence[int], num_choices: int) -> list[int]:
    """The choices that were picked at these places of the rotations 0, 1, ...; -1, no answer, stays -1."""
    return [(place + turn) % num_choices if place >= 0 else -1 for turn, place in enumerate(positions)]


def position_bias(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    *,
    num_choices: int | Sequence[int],
    anchor: int = 0,
) -> dict[str, Any]:
    """How often each place is picked, against how often it is right.

    Args:
        predictions (`[N]`): the places that were picked, from 0; -1 where nothing was.
        references (`[N]`): the right places.
        num_choices (`int` or `[N]`): K. What speaks of K places is undefined where K differs between rows; see `by_num_choices`.
        anchor (`int`, *optional*, defaults to 0): the place that `anchored` is about.

    Returns:
        `dict`: `accuracy`; `none_rate` (rows without an answer, wrong for the accuracy and the recalls, and left out of the
        frequencies); `frequencies` and `gold_frequencies` (`[K]`); `recall` (`[K]`, accuracy where the right answer is at that
        place) and `rstd` (its population deviation over places that are ever right); `entropy` of the frequencies (over log K, from
        0 to 1); `tv` and `kl` (nats) of the frequencies to those of the right places; `anchored` (the share of rows answered with
        the anchor among those where it is wrong); `by_num_choices` where K differs; `notes`.

    Raises:
        ValueError: different lengths, K below 2, a place that is no choice.
    """
    sizes = _sizes(num_choices, len(predictions))
    if np.size(num_choices) and np.min(num_choices) < 2:
        raise ValueError(f"num_choices is {np.min(num_choices)}; there must be two or more to choose from.")
    if np.size(num_choices) and not 0 <= anchor < np.max(num_choices):
        raise ValueError(f"anchor is {anchor}; it must be a place from 0 to {np.max(num_choices) - 1}.")
    picked = tables.read_labels(predictions, sizes, "predictions", none=True)
    gold = tables.read_labels(references, sizes, "references")
    return _bias(picked, gold, sizes, anchor)


def _sizes(num_choices: int | Sequence[int], rows: int) -> np.ndarray:
    given = np.asarray(num_choices, dtype=int)
    if given.ndim and len(given) != rows:
        raise ValueError(f"{len(given)} numbers of choices for {rows} rows; give one for all or one for each.")
    return np.broadcast_to(given, rows)


def _bias(picked: np.ndarray, gold: np.ndarray, sizes: np.ndarray, anchor: int) -> dict[str, Any]:
    notes: module.Notes = {}
    off = (gold != anchor) & (anchor < sizes)
    found: dict[str, Any] = {
        "accuracy": tables.mean(picked == gold),
        "none_rate": tables.mean(picked < 0),
        "anchored": module.ratio(
            int((picked[off] == anchor).sum()),
            int(off.sum()),
            "anchored",
            "no row has the anchor for a wrong choice",
            notes,
        ),
    }
    counts = np.unique(sizes)
    if len(counts) == 1:
        found |= _places(picked, gold, int(counts[0]), notes)
    else:
        keys = ("frequencies", "gold_frequencies", "recall", "rstd", "entropy", "tv", "kl")
        found |= dict.fromkeys(keys, math.nan)
        notes |= dict.fromkeys(keys, "rows have unequal numbers of choices; see by_num_choices")
        found["by_num_choices"] = {
            int(count): _bias(picked[sizes == count], gold[sizes == count], sizes[sizes == count], anchor)
            for count in counts
        }
    if not len(picked):
        notes = dict.fromkeys(found, "there are no rows")
    return found | {"notes": notes}


def _places(picked: np.ndarray, gold: np.ndarray, count: int, notes: module.Notes) -> dict[str, Any]:
    places = np.arange(count)
    right = np.array(
        [(picked[gold == place] == place).mean() if (gold == place).any() else np.nan for place in places]
    )
    if missing := [int(place) for place in places if not (gold == place).any()]:
        notes["recall"] = f"the places {missing} are never right"
    g = (gold[:, None] == places).mean(0)
    found = {"gold_frequencies": g.tolist(), "recall": right.tolist(), "rstd": float(np.nanstd(right))}
    answered = picked[picked >= 0]
    if not len(answered):
        keys = ("frequencies", "entropy", "tv", "kl")
        notes |= dict.fromkeys(keys, "no row has an answer")
        return found | dict.fromkeys(keys, math.nan)
    f = (answered[:, None] == places).mean(0)
    said = f > 0
    with np.errstate(divide="ignore"):
        kl = float((f[said] * np.log(f[said] / g[said])).sum())
    if math.isinf(kl):
        notes["kl"] = "infinite: a place that is never right was picked"
    return found | {
        "frequencies": f.tolist(),
        "entropy": max(float(-(f[said] * np.log(f[said])).sum()), 0.0) / math.log(count),
        "tv": float(np.abs(f - g).sum() / 2),
        "kl": kl,
    }


def permutation_consistency(
    predictions: Sequence[Sequence[int]],
    references: Sequence[int] | np.ndarray,
    *,
    num_choices: int | Sequence[int] | None = None,
    anchor: int = 0,
) -> dict[str, Any]:
    """Whether the same content is picked in every rotation of the choices.

    Args:
        predictions (`[N][R]`): the choice that was picked in rotations 0, 1, ... of [`rotations`], by its number in the order that
            was not rotated; -1 where nothing was. See [`contents`].
        references (`[N]`): the right choice, by the same numbers.
        num_choices (`int` or `[N]`, *optional*): K; by default as many as a row has rotations.
        anchor (`int`, *optional*, defaults to 0): the place that `anchored` is about.

    Returns:
        `dict`: `consistency` (the share of rows with one and the same answer in all rotations), `majority_share` (the mean share of the
        most frequent answer), `accuracy_per_rotation` with its `accuracy_range`, `delta` (`[K]`, accuracy with the right choice at
        that place, less the mean), and what [`position_bias`] says of all rotations together.

    Raises:
        ValueError: different lengths, a row with fewer than two rotations, more rotations than choices, an unknown choice.
    """
    turns = np.array([len(row) for row in predictions], dtype=int)
    sizes = turns if num_choices is None else _sizes(num_choices, len(turns))
    if len(turns) and turns.min() < 2:
        raise ValueError(f"Row {turns.argmin()} has {turns.min()} rotations; agreement needs two or more.")
    if (turns > sizes).any():
        raise ValueError(f"Row {(turns > sizes).argmax()} has more rotations than choices.")
    gold = tables.read_labels(references, sizes, "references")
    flat, row = (
        np.concatenate([np.zeros(0, int), *map(np.asarray, predictions)]),
        np.repeat(np.arange(len(turns)), turns),
    )
    picked = tables.read_labels(flat if len(flat) else [], sizes[row], "predictions", none=True)
    turn = np.concatenate([np.zeros(0, int), *(np.arange(one) for one in turns)]).astype(int)
    # choice c is at place c - r in rotation r
    place, gold_place = (np.where(one < 0, -1, (one - turn) % sizes[row]) for one in (picked, gold[row]))
    most = np.array(
        [max(np.bincount(own[own >= 0]), default=0) for own in np.split(picked, turns.cumsum()[:-1])][: len(turns)]
    )
    right = picked == gold[row]
    by_turn = [tables.mean(right[turn == one]) for one in range(turns.max(initial=0))]
    found = {
        "consistency": tables.mean(most == turns),
        "majority_share": tables.mean(most / np.maximum(turns, 1)),
        "accuracy_per_rotation": by_turn,
        "accuracy_range": max(by_turn) - min(by_turn) if by_turn else math.nan,
    }
    pooled = position_bias(place, gold_place, num_choices=sizes[row].tolist(), anchor=anchor)
    shares = [tables.mean(right[gold_place == one]) - pooled["accuracy"] for one in range(sizes.max(initial=0))]
    if not len(turns):
        pooled["notes"] |= dict.fromkeys(("consistency", "majority_share", "accuracy_range"), "there are no rows")
    return pooled | found | {"delta": shares}


class PositionBias(module.LogitMetric):
    """Whether answers follow the place of a choice more than what it says.

    ```python
    from hf_logits.metrics import PositionBias

    PositionBias().compute(predictions=[0, 0, 1, 0], references=[0, 1, 1, 0], num_choices=2)["anchored"]
    ```

    Configurations: `"default"` takes places; `"logprobs"` the table of [`~hf_logits.metrics.choice_logprobs`], and adds `tie_rate` and
    `anchor_gap` (the mean log-prob of the anchor less that of the right choice, where these differ); `"permuted"` takes the choices
    that were picked in the cyclic rotations of `hf_logits.metrics.position_bias.rotations`.
    """

    inputs = {
        "default": {"predictions": Value("int64"), "references": Value("int64")},
        "logprobs": {"predictions": List(Value("float64")), "references": Value("int64")},
        "permuted": {"predictions": List(Value("int64")), "references": Value("int64")},
    }
    paper = "Li and Gao 2024, Anchored Answers, https://arxiv.org/abs/2405.03205"

    def measure(
        self,
        predictions: list[Any],
        references: list[int],
        num_choices: int | list[int] | None = None,
        anchor: int = 0,
    ) -> dict[str, Any]:
        """As `position_bias`, or `permutation_consistency`: `predictions` are places or tables or choices, `references` right ones."""
        if self.config_name == "permuted":
            return permutation_consistency(predictions, references, num_choices=num_choices, anchor=anchor)
        if self.config_name == "logprobs":
            return _of_table(predictions, references, anchor)
        if num_choices is None:
            raise ValueError("num_choices is needed: places that were never picked don't show in the predictions.")
        return position_bias(predictions, references, num_choices=num_choices, anchor=anchor)


def _of_table(logprobs: Sequence[Any], references: Sequence[int], anchor: int) -> dict[str, Any]:
    values, real = tables.read_logprobs(logprobs)
    sizes = real.sum(1)
    gold = tables.read_labels(references, sizes, "references")
    found = position_bias(tables.picks(values), gold, num_choices=sizes.tolist(), anchor=anchor)
    off = (gold != anchor) & (anchor < sizes)
    gap = math.nan
    if off.any():
        with np.errstate(invalid="ignore"):
            gap = float((values[off, anchor] - values[off, gold[off]]).mean())
    if math.isnan(gap):
        found["notes"]["anchor_gap"] = "no row where the anchor is wrong, or one where both have no probability"
    return found | {"tie_rate": tables.mean(tables.tied(values)), "anchor_gap": gap}
