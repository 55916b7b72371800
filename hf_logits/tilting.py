"""How a distribution moves along a direction: `P_a = softmax(base + a * direction)`, for many weights a.

Log-normaliser and moments of the direction under P_a say how far it is from P_0, and where it goes next: they are the
derivatives of each other. The letters in the shapes are those of [`hf_logits.logits`].
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def tilt(
    base: Float[Tensor, "*#R V"], direction: Float[Tensor, "*#R V"], weight: Float[Tensor, "*#R"], moments: int = 1
) -> list[Float[Tensor, "*R"]]:
    """Log-normaliser of `base + weight * direction`, then the first moments of the direction under its softmax.

    One temporary serves them all and is never normalised, so that many weights can be tried.
    """
    part = torch.addcmul(base, weight[..., None], direction)
    top = part.amax(-1)
    total = part.sub_(top[..., None]).exp_().sum(-1)
    return [top + total.log(), *(part.mul_(direction).sum(-1) / total for _ in range(moments))]


def tilt_divergences(
    weight: Float[Tensor, "*#R"], there: Sequence[Tensor], start: Sequence[Tensor]
) -> tuple[Float[Tensor, "*R"], Float[Tensor, "*R"]]:
    """KL(P_a || P) and KL(P || P_a) of `P_a = softmax(base + a * direction)`, from [`tilt`] at a (`there`) and at 0 (`start`).

    Both grow with a >= 0.
    """
    # With the log-normaliser A and the mean E: a E(a) - (A(a) - A(0)) and A(a) - A(0) - a E(0)
    rise = there[0] - start[0]
    return weight * there[1] - rise, rise - weight * start[1]


def condense(
    base: Float[Tensor, "*#R V"],
    direction: Float[Tensor, "*R V"],
    start: Sequence[Float[Tensor, "*R"]],
    max_weight: float,
    *,
    bins: int = 512,
) -> tuple[Float[Tensor, "*R bins"], Float[Tensor, "*R bins"]]:
    """Base and direction of a small vocabulary that [`tilt`] answers nearly like the given one, for weights up to `max_weight`.

    The answers depend on nothing but how the direction is distributed under the base. So tokens of nearly equal direction become
    one token, at their mean. That takes at most `(max_weight * width of a bin)^2 / 32` off the log-normaliser (Hoeffding's lemma).
    `start` is what [`tilt`] says at weight 0, with two moments.
    """
    # One bin is enough for what lies far below: it has next to no mass at the start, and less at any other weight.
    _, mean, square = start
    low = mean - 8 * (square - mean.square()).clamp(min=1e-6 * square).sqrt()
    high = direction.amax(-1)
    scale = bins / (high - low).clamp(min=1e-30)
    place = (direction - low[..., None]).mul_(scale[..., None]).long().clamp_(0, bins - 1)
    # Weighed in the middle, from where neither end is so far that it underflows.
    part = torch.add(base, direction, alpha=max_weight / 2)
    top = part.amax(-1, keepdim=True)
    part.sub_(top).exp_()
    empty = part.new_zeros(*part.shape[:-1], bins)
    mass = empty.scatter_add(-1, place, part)
    mean = empty.scatter_add(-1, place, part.mul_(direction)) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return mass.log() + top - max_weight / 2 * mean, mean
