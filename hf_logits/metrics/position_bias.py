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
        place) and `rstd` (its population deviation over places that are ever right, of which there must be two); `entropy` of the frequencies (over log K, from
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
    given = np.asarray(num_choices)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"num_choices must be whole numbers; got {num_choices!r:.80}.")
    given = given.astype(int)
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
    missing = [int(place) for place in places if not (gold == place).any()]
    if missing:
        notes["recall"] = f"the places {missing} are never right"
    spread = math.nan
    if count - len(missing) < 2:
        notes["rstd"] = "fewer than two places are ever right"
    else:
        spread = float(np.nanstd(right))
    g = (gold[:, None] == places).mean(0)
    found = {"gold_frequencies": g.tolist(), "recall": right.tolist(), "rstd": spread}
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
        "entropy": tables.entropy(f) / math.log(count),
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
        that place, less the mean; NaN where it never was), and what [`position_bias`] says of all rotations together. Rotations and
        places of rows with unequal numbers of choices or rotations don't compare: the last three are then NaN, and where K differs
        `by_num_choices` has all of it for each K.

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
    flat = np.concatenate([np.zeros(0, int), *map(np.asarray, predictions)])
    of_row = np.repeat(sizes, turns)
    picked = tables.read_labels(flat if len(flat) else [], of_row, "predictions", none=True)
    if np.size(sizes) and not 0 <= anchor < sizes.max():
        raise ValueError(f"anchor is {anchor}; it must be a place from 0 to {sizes.max() - 1}.")
    return _permuted(np.split(picked, turns.cumsum()[:-1])[: len(turns)], gold, sizes, anchor)


def _permuted(rows: list[np.ndarray], gold: np.ndarray, sizes: np.ndarray, anchor: int) -> dict[str, Any]:
    """Of the choices of each row, by rotation."""
    turns = np.array([len(row) for row in rows], dtype=int)
    picked, row = np.concatenate([np.zeros(0, int), *rows]), np.repeat(np.arange(len(turns)), turns)
    turn = np.concatenate([np.zeros(0, int), *map(np.arange, turns)]).astype(int)
    # choice c is at place c - r in rotation r
    place, gold_place = (np.where(one < 0, -1, (one - turn) % sizes[row]) for one in (picked, gold[row]))
    most = np.array([max(np.bincount(own[own >= 0]), default=0) for own in rows], dtype=int)
    right = picked == gold[row]
    found = _bias(place, gold_place, sizes[row], anchor)
    notes: module.Notes = found["notes"]
    found["consistency"] = tables.mean(most == turns)
    found["majority_share"] = tables.mean(most / np.maximum(turns, 1))
    keys, counts = ("accuracy_per_rotation", "accuracy_range", "delta"), np.unique(sizes)
    if len(counts) > 1:
        notes |= dict.fromkeys(keys, "rows have unequal numbers of choices; see by_num_choices")
        for count in counts:
            own = sizes == count
            part = [one for one, use in zip(rows, own, strict=True) if use]
            found["by_num_choices"][int(count)] = _permuted(part, gold[own], sizes[own], anchor)
    elif len(np.unique(turns)) > 1:
        notes |= dict.fromkeys(keys, "rows have unequal numbers of rotations")
    if len(counts) != 1 or len(np.unique(turns)) > 1:
        if not len(turns):
            notes |= dict.fromkeys(("consistency", "majority_share", *keys), "there are no rows")
        return found | dict.fromkeys(keys, math.nan)
    by_turn = [tables.mean(right[turn == one]) for one in range(turns[0])]
    shares = [tables.mean(right[gold_place == one]) - found["accuracy"] for one in range(counts[0])]
    if never := [one for one, share in enumerate(shares) if math.isnan(share)]:
        notes["delta"] = f"the right choice was never at the places {never}"
    values = (by_turn, max(by_turn) - min(by_turn), shares)
    return found | dict(zip(keys, values, strict=True))


def bias_of_table(logprobs: Sequence[Any], references: Sequence[int], *, anchor: int = 0) -> dict[str, Any]:
    """What [`position_bias`] says of a table of log-probs, `tie_rate`, and `anchor_gap`: log-prob of the anchor less the right choice's.

    Args:
        logprobs (`[N][K]`): log-probabilities of whole choices, in nats; -inf is allowed.
        references (`[N]`): the right places.
        anchor (`int`, *optional*, defaults to 0): the place that `anchored` and `anchor_gap` are about. The latter is the mean over
            the rows where the anchor is wrong, and both have a probability.
    """
    values, real = tables.read_logprobs(logprobs)
    sizes = real.sum(1)
    gold = tables.read_labels(references, sizes, "references")
    found = position_bias(tables.picks(values), gold, num_choices=sizes.tolist(), anchor=anchor)
    off = (gold != anchor) & (anchor < sizes)
    first, right = values[off][:, anchor : anchor + 1].ravel(), values[off, gold[off]]
    finite = np.isfinite(first) & np.isfinite(right)
    if not off.any():
        found["notes"]["anchor_gap"] = (
            "no row has the anchor for a wrong choice" if len(values) else "there are no rows"
        )
    elif not finite.all():
        found["notes"]["anchor_gap"] = f"{int((~finite).sum())} rows where a choice has no probability are left out"
    if not len(values):
        found["notes"]["tie_rate"] = "there are no rows"
    return found | {
        "tie_rate": tables.mean(tables.tied(values)),
        "anchor_gap": tables.mean(first[finite] - right[finite]),
    }


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
    from_scores = {"default": "classes", "logprobs": "log_probs"}
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
            if num_choices is not None:
                raise ValueError("num_choices is not for log-probs: each row has as many choices as numbers.")
            return bias_of_table(predictions, references, anchor=anchor)
        if num_choices is None:
            raise ValueError("num_choices is needed: places that were never picked don't show in the predictions.")
        return position_bias(predictions, references, num_choices=num_choices, anchor=anchor)
