"""Gradients of single log-probs are autograd's own, and can be scaled on their way."""

import torch

from hf_logits.gradients import gradients, inner_product, scale_gradient


def test_scaling_a_gradient_leaves_the_value():
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).mul(1e5).requires_grad_()
    scaled = scale_gradient(values, torch.tensor([2.0, 0.0]))
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[2.0] * 3, [0.0] * 3]


def test_gradients_are_autograds_own():
    weight, other = (torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in ([1.0, 2.0], [5.0]))
    found = gradients((weight**3).sum(), [weight, other])
    assert [one.tolist() for one in found] == [[3.0, 12.0], [0.0]]
    assert inner_product(found, found).item() == 153.0
    assert weight.grad is None
