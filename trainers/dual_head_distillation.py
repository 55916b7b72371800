"""Dual-head distillation: a logit-level loss on a head of its own, which shares the backbone and is thrown away."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_logits.checks import check_number
from hf_logits.class_logits import check_logits, widen


class _LogCosh(torch.autograd.Function):
    """`log cosh x`, right to the last digits for small and for large x, and so is its gradient `tanh x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.abs()
        # log cosh x = log(1 + sinh(x)^2) / 2 = |x| + log(1 + exp(-2 |x|)) - log 2
        small = size.clamp(max=1.0).sinh().square().log1p() / 2
        return torch.where(size < 1.0, small, size + (-2 * size).exp().log1p() - math.log(2.0))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.tanh()


def binary_kl_norm(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float,
    center: bool,
    mean_over_classes: bool,
) -> Float[Tensor, " N"]:
    """The rows of [`binary_kl_norm_loss`]."""
    banned = student_logits.isneginf() & teacher_logits.isneginf()  # does not differ
    difference = (student_logits - teacher_logits.detach()).masked_fill(banned, 0.0)
    if center:
        mean = difference.sum(-1, keepdim=True) / (~banned).sum(-1, keepdim=True).clamp(min=1)
        difference = (difference - mean).masked_fill(banned, 0.0)
    # T^2 KL(Bern(1/2) || Bern(sigmoid(d / T))) = T^2 log cosh(d / 2T)
    values: Tensor = _LogCosh.apply(difference / (2 * temperature))
    return temperature**2 * (values.mean(-1) if mean_over_classes else values.sum(-1))


def binary_kl_norm_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float,
    center: bool = False,
    mean_over_classes: bool = False,
) -> Float[Tensor, ""]:
    """`T^2 sum_c KL(Bern(1/2) || Bern(sigmoid((s_c - t_c) / T)))`, averaged over the rows.

    That is `T^2 sum_c log cosh((s_c - t_c) / 2T)`, which is how it is computed: finite wherever the logits are, where the released
    code's clamp gives infinity and NaN from a difference of about 17 T on. A gradient is at most `T / 2N`.

    Args:
        student_logits, teacher_logits: in any floating dtype; computed in float32 at least.
        temperature: the larger, the closer to `(s - t)^2 / 8`.
        center: whether each row's mean is taken off first [ours]. Language models' logits are only defined up to it. Without, the
            loss sees a shift of a row.
        mean_over_classes: whether classes are averaged in place of summed [ours], so that vocabularies do not blow it up.

    Raises:
        ValueError: shapes that do not fit, no rows, `temperature <= 0`.
    """
    check_number("temperature", temperature, minimum=0.0, above=True)
    check_logits(student_logits, teacher_logits, "teacher's")
    rows = binary_kl_norm(
        widen(student_logits),
        widen(teacher_logits),
        temperature=temperature,
        center=center,
        mean_over_classes=mean_over_classes,
    )
    return rows.mean()


def project_gradient(
    main: Sequence[Float[Tensor, "..."] | None], auxiliary: Sequence[Float[Tensor, "..."] | None]
) -> list[Float[Tensor, "..."] | None]:
    """The auxiliary loss's gradient without what works against the main loss: `g1 - min(<g1, g0>, 0) / |g0|^2 g0`.

    One projection for all parameters together, and only of `g1`.

    Args:
        main, auxiliary: gradients of the same parameters, `None` where a loss does not reach one. Such a parameter takes no part
            in the product, and its auxiliary gradient does not change except by that of the main loss.
    """
    pairs = list(zip(main, auxiliary, strict=True))
    both = [(g0, g1) for g0, g1 in pairs if g0 is not None and g1 is not None]
    if not both:
        return list(auxiliary)
    dot = torch.stack([(widen(g0) * widen(g1)).sum() for g0, g1 in both]).sum()
    square = torch.stack([widen(g0).square().sum() for g0 in main if g0 is not None]).sum()
    share = torch.where(square > 0, dot.clamp(max=0.0) / square, 0.0)
    projected: list[Tensor | None] = []
    for g0, g1 in pairs:
        if g0 is None:
            projected.append(g1)
        else:
            projected.append((-share * g0 if g1 is None else g1 - share * g0).to(g0.dtype))
    return projected
