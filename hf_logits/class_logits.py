"""Logits of classes as losses want them: checked, wide enough, and the softmax over all classes but the label."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor


def widen(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Float32, or float64 if they are: half precision is too coarse for a softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_logits(
    logits: Tensor, other: Tensor, name: str, *, labels: Tensor | None = None, classes: int = 1, rows: int = 1
) -> None:
    """Refuse logits that are not `[N, C]`, not as many as the other ones or the labels, or of too few classes.

    Args:
        logits: the student's.
        other: logits that must be of the same shape.
        name: of the other ones, for the message.
        labels: class ids `[N]`, or probabilities `[N, C]`.
        classes, rows: the fewest that the loss makes sense for.
    """
    shape = tuple(logits.shape)
    if logits.dim() != 2 or shape != tuple(other.shape):
        raise ValueError(
            f"The student's and the {name} logits must both be of shape [N, C]; got {shape} and {tuple(other.shape)}. Gather the "
            "rows that have a label, and cut both to the classes that they share."
        )
    if shape[0] < rows or shape[1] < classes:
        raise ValueError(f"This loss needs at least {rows} row(s) and {classes} classes; got logits of shape {shape}.")
    if labels is None:
        return
    soft = labels.is_floating_point()
    if tuple(labels.shape) != (shape if soft else shape[:1]):
        raise ValueError(
            f"labels must be class ids of shape [{shape[0]}] or probabilities of shape {list(shape)}; got {labels.dtype} of shape "
            f"{list(labels.shape)}."
        )
    if not soft and labels.numel() and (labels.min() < 0 or labels.max() >= shape[1]):
        raise ValueError(
            f"labels must be in [0, {shape[1]}); got {labels.min().item()} to {labels.max().item()}. Drop the rows without a "
            "label (-100) first."
        )


def label_mask(labels: Num[Tensor, " N"], classes: int) -> Bool[Tensor, "N C"]:
    """Where the label is."""
    return torch.arange(classes, device=labels.device) == labels[:, None]


def log_softmax_without(logits: Float[Tensor, "N C"], dropped: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """`log_softmax` over the classes that are not dropped, `-inf` at those that are.

    Masked, and not worked out from the sum over all classes: that would cancel where nearly all of it is dropped. A row in
    which no class with a finite logit is left is `-inf` throughout.
    """
    left = logits.masked_fill(dropped, -math.inf)
    dead = left.amax(-1, keepdim=True).isneginf()
    return left.masked_fill(dead, 0.0).log_softmax(-1).masked_fill(dead, -math.inf)


def expected(weights: Float[Tensor, "N C"], values: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """`sum_c weights * values`, where a weight of zero counts for nothing even beside an infinite value."""
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)
