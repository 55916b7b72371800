"""Gradients of single log-probs beside those of training: taken, compared, and scaled on their way."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def gradients(value: Float[Tensor, ""], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of one number, in float32, for each of the parameters; the graph is kept, and nothing is added to `grad`."""
    found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return [gradient.float() for gradient in found]


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Of two gradients over the same parameters."""
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def scale_gradient(values: Float[Tensor, "R T"], factors: Float[Tensor, " R"]) -> Float[Tensor, "R T"]:
    """The same values, to the last bit, whose rows pass on their gradient times a factor."""
    fixed = values.detach()
    return fixed + factors[:, None] * (values - fixed)
