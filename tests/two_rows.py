"""The two rows of logits that the losses of distillation are worked out on by hand, and gradients by finite differences."""

from collections.abc import Callable

import torch
from torch import Tensor


def student() -> Tensor:
    return torch.tensor([[1, 0.5, -1, 0], [0.2, -0.3, 2, 0.1]], dtype=torch.float64)


def teacher() -> Tensor:
    return torch.tensor([[2, 0, -0.5, 0.5], [-1, 0.5, 1.5, 0]], dtype=torch.float64)


def labels() -> Tensor:
    return torch.tensor([0, 2])


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def has_right_gradient(loss: Callable[[Tensor], Tensor], *inputs: Tensor) -> bool:
    return torch.autograd.gradcheck(loss, [one.clone().requires_grad_() for one in inputs])


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(at), at)
    return found
