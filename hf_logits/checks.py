"""Hyper-parameters that are out of range are refused, with what was given, what is allowed, and under which name."""

import math
from typing import Any

import torch
from torch import Tensor


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: bool = False,
    infinite: bool = False,
) -> float:
    """A number within its bounds.

    Args:
        above (`bool`): whether `minimum` itself is excluded.
        infinite (`bool`): whether infinity is allowed.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be one number for all rows; got a tensor of shape {tuple(value.shape)}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    _check_bounds(name, [value], value, minimum, maximum, above, infinite)
    return value


def check_choice(name: str, value: Any, *allowed: str) -> None:
    """One of some words."""
    if value not in allowed:
        words = [repr(word) for word in allowed]
        raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}.")


def _check_bounds(
    name: str, numbers: list[float], given: Any, minimum: float, maximum: float, above: bool, infinite: bool
) -> None:
    for number in numbers:
        low = number <= minimum if above else number < minimum
        if math.isnan(number) or low or number > maximum or (math.isinf(number) and not infinite):
            bounds = f"{'(' if above else '['}{minimum}, {maximum}{']' if maximum < math.inf else ')'}"
            raise ValueError(f"{name} must be in {bounds}, not NaN{'' if infinite else ' and finite'}; got {given!r}.")


def check_per_row(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    infinite: bool = False,
) -> float | Tensor:
    """A number, or a `[B]` tensor with one for each item of the batch, each within the bounds; see [`check_number`]."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return check_number(name, value, minimum=minimum, maximum=maximum, infinite=infinite)
    if value.dim() != 1 or value.numel() == 0 or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must be a number or a tensor of shape [batch]; got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}."
        )
    _check_bounds(name, value.tolist(), value, minimum, maximum, False, infinite)
    return value


def check_count(name: str, value: Any, *, minimum: int) -> int:
    """A whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value}.")
    return value
