"""Steering cost: what it takes to let a large model choose some of a small model's tokens.

The cost as in entropy-adaptive decoding (Simonds 2025, https://arxiv.org/abs/2502.06833) is one active model a token. A model
that takes over must first read what it has missed, which the paper leaves out and which is counted here beside it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value
from jaxtyping import Bool, Float64
from numpy import ndarray

from hf_logits.checks import check_choice, check_number
from hf_logits.costs import relative_cost
from hf_logits.metrics import module


def chosen_by(rows: Sequence[Sequence[int | float]]) -> Float64[ndarray, "B T"]:
    """The rows as an array: 1 where the large model chose, 0 where the small one did, NaN behind the end."""
    given = [np.asarray(row, dtype=np.float64) for row in rows]
    found = np.full((len(given), max(map(len, given), default=0)), np.nan)
    for place, row in enumerate(given):
        if row.ndim != 1 or not (np.isin(row, (0, 1)) | np.isnan(row)).all():
            raise ValueError(f"Row {place} has values other than 0, 1, and NaN behind its end: {rows[place]!r:.80}.")
        found[place, : len(row)] = row
    there = ~np.isnan(found)
    gaps = (there[:, 1:] & ~there[:, :-1]).any(1)
    if gaps.any():
        raise ValueError(f"Row {int(gaps.argmax())} goes on behind a NaN, which stands for tokens behind the end.")
    return found[:, : int(there.sum(1).max(initial=0))]


def readings(
    chosen: Float64[ndarray, "B T"], *, timing: str = "now", start: str = "small"
) -> tuple[Bool[ndarray, "B T"], Bool[ndarray, "B T"]]:
    """Where the small and where the large model is needed: to choose the token, or, with `"now"`, to find that the other has to."""
    alive = ~np.isnan(chosen)
    large = chosen == 1
    before = np.concatenate([np.full((len(chosen), 1), start == "large"), large], axis=1)[:, :-1]
    before = before if timing == "now" else large
    return alive & ~(large & before), alive & (large | before)


def steering_cost(
    rows: Sequence[Sequence[int | float]],
    *,
    small: int | float,
    large: int | float,
    prompt_tokens: int | Sequence[int] = 0,
    runs: str = "both",
    together: bool = True,
    timing: str = "now",
    start: str = "small",
) -> dict[str, Any]:
    """Forwards, tokens and FLOPs of a small and a large model that take turns, from who chose which token.

    Args:
        rows (list of lists): for each generation, 1 for a token that the large model chose and 0 for one of the small model's; NaN
            behind the end, as in the trace `"large"` of [`~hf_logits.processors.EntropyAdaptiveLogitsProcessor`].
        small, large (`float`): the models' parameters, in any unit; FLOPs are then in twice that unit.
        prompt_tokens (`int` or list of `int`, *optional*, defaults to 0): of each generation.
        runs (`str`, *optional*, defaults to `"both"`): whether the small model reads every token, as beside `generate`, or only
            the `"active"` model runs, as in [`hf_logits.generate`].
        together (`bool`, *optional*, defaults to `True`): whether the rows were one batch. A model is then read for all rows as
            soon as one needs it, and to the end of the longest. `False`: each was a batch of its own.
        timing (`str`, *optional*, defaults to `"now"`): as the processor's. With `"now"` both models read at a change; with
            `"next"`, or where the small model's entropy decides, the large one reads where it chooses.
        start (`str`, *optional*, defaults to `"small"`): the model to begin with, or `"large"`.

    Returns:
        `dict`:

        - `share`: of the tokens, those that the large model chose; `tokens`, their number; `switches`, in all rows.
        - `relative_cost`: the paper's, and `saved`, 1 less it. `relative_cost_here`: as it was run, in parameters a token; the
          small model's forwards, and the large one's for each row that it chose (`"both"`) or in sequence (`"active"`).
        - `small_forwards`, `large_forwards`: one after the other; `small_tokens`, `large_tokens`: read, prompts included.
        - `flops`: 2 a parameter and token read, catch-up and prompts included; `relative_flops`: against the large model alone.
        - `flops_without_catch_up`, `relative_flops_without_catch_up`: 2 a parameter and token chosen. The latter is
          `relative_cost`.
        - `notes`: why a value is NaN.

    Raises:
        ValueError: a row with other values, or that goes on behind a NaN; sizes that are not above 0; prompts that are not one a
            row or below 0; an unknown `runs`, `timing` or `start`.
    """
    small, large = float(small), float(large)
    check_number("small", small, minimum=0.0, above=True)
    check_number("large", large, minimum=0.0, above=True)
    check_choice("runs", runs, "both", "active")
    check_choice("timing", timing, "now", "next")
    check_choice("start", start, "small", "large")
    chosen = chosen_by(rows)
    prompts = np.broadcast_to(prompt_tokens, len(chosen)) if np.ndim(prompt_tokens) == 0 else np.asarray(prompt_tokens)
    if prompts.shape != (len(chosen),) or (prompts < 0).any() or (prompts != np.floor(prompts)).any():
        raise ValueError(
            f"prompt_tokens must be whole numbers from 0, one for each of {len(chosen)} rows; got {prompt_tokens!r:.80}."
        )
    needed = dict(zip(("small", "large"), readings(chosen, timing=timing, start=start), strict=True))
    batches = [np.arange(len(chosen))] if together else list(np.arange(len(chosen))[:, None])
    forwards, read, steps, alone = {"small": 0, "large": 0}, {"small": 0, "large": 0}, 0, 0
    for batch in batches:
        length = int((~np.isnan(chosen[batch])).any(0).sum())
        steps += length
        if length:
            alone += int(prompts[batch].sum()) + len(batch) * (length - 1)
        for model, wanted in needed.items():
            at = np.flatnonzero(wanted[batch].any(0))
            if model == "small" and runs == "both":
                at = np.arange(length)
            if len(at):
                forwards[model] += len(at)
                # For the token at t, the prompt and t tokens.
                read[model] += int(prompts[batch].sum()) + len(batch) * int(at[-1])
    tokens, by_large = int((~np.isnan(chosen)).sum()), int((chosen == 1).sum())
    notes: module.Notes = {}
    if not tokens:
        paper = ("share", "relative_cost", "saved", "relative_cost_here", "relative_flops_without_catch_up")
        notes |= dict.fromkeys(paper, "there are no tokens")
    share = by_large / tokens if tokens else math.nan
    cost = relative_cost(share, small=small, large=large)
    here = small / large + share
    if runs == "active" and tokens:
        here = (small / large * forwards["small"] + forwards["large"]) / steps
    unread = "nothing was read: each row has one token at most, and no prompt"
    flops = 2.0 * (small * read["small"] + large * read["large"])
    return {
        "share": share,
        "tokens": tokens,
        "switches": int((np.abs(np.diff(chosen, axis=1)) == 1).sum()),
        "relative_cost": cost,
        "saved": 1 - cost,
        "relative_cost_here": here,
        "small_forwards": forwards["small"],
        "large_forwards": forwards["large"],
        "small_tokens": read["small"],
        "large_tokens": read["large"],
        "flops": flops,
        "relative_flops": module.ratio(flops, 2.0 * large * alone, "relative_flops", unread, notes),
        "flops_without_catch_up": 2.0 * (small * (tokens - by_large) + large * by_large),
        "relative_flops_without_catch_up": cost,
        "notes": notes,
    }


class SteeringCost(module.LogitMetric):
    """What it costs to let a large model choose some of a small model's tokens, with and without catching up.

    ```python
    from hf_logits.metrics import SteeringCost

    SteeringCost().compute(predictions=processor.stats.trace["large"], small=135e6, large=1.7e9)["relative_flops"]
    ```

    `SteeringCost("prompts")` takes the lengths of the prompts as `references`.
    """

    inputs = {
        "rows": {"predictions": List(Value("float64"))},
        "prompts": {"predictions": List(Value("float64")), "references": Value("int64")},
    }
    paper = "Simonds 2025, Entropy Adaptive Decoding, https://arxiv.org/abs/2502.06833"

    def measure(
        self,
        predictions: list[list[int | float]],
        small: int | float,
        large: int | float,
        references: list[int] | None = None,
        prompt_tokens: int = 0,
        runs: str = "both",
        together: bool = True,
        timing: str = "now",
        start: str = "small",
    ) -> dict[str, Any]:
        """As `steering_cost`: `predictions` are its rows, `references` their prompts' lengths in tokens."""
        if references is not None and np.any(prompt_tokens):
            raise ValueError("references and prompt_tokens are both lengths of prompts; give one of them.")
        return steering_cost(
            predictions,
            small=small,
            large=large,
            prompt_tokens=prompt_tokens if references is None else references,
            runs=runs,
            together=together,
            timing=timing,
            start=start,
        )
