"""Many logistic regressions at once, against scikit-learn's one at a time."""

import pytest
import torch
from sklearn import linear_model

from hf_logits.logistic import fit_logistic


def problem(groups: int, rows: int, width: int, *, apart: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    labels = torch.rand(rows, generator=generator) > 0.4
    features = torch.randn(groups, rows, width, generator=generator, dtype=torch.float64)
    return features + apart * labels[:, None], labels


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 12, 2), (5, 40, 3), (4, 10, 16)])
@pytest.mark.parametrize("apart", [0.0, 1.0, 50.0])
def test_each_is_what_a_library_finds(shape, penalty, apart):
    features, labels = problem(*shape, apart=apart)
    weights, bias = fit_logistic(features, labels, penalty=penalty)
    for own, rows, b in zip(weights, features, bias, strict=True):
        judge = linear_model.LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20_000)
        judge.fit(rows.numpy(), labels.numpy())
        assert own.tolist() == pytest.approx(judge.coef_[0].tolist(), abs=2e-4, rel=2e-4)
        assert b.item() == pytest.approx(judge.intercept_[0], abs=2e-3, rel=2e-3)


def test_the_gradient_vanishes():
    features, labels = problem(3, 30, 4)
    weights, bias = (found.requires_grad_() for found in fit_logistic(features, labels, penalty=0.5))
    sign = labels.double() * 2 - 1
    logits = (features * weights[:, None]).sum(-1) + bias[:, None]
    loss = torch.nn.functional.softplus(-sign * logits).sum() + 0.25 * weights.square().sum()
    assert all(gradient.abs().max() < 1e-6 for gradient in torch.autograd.grad(loss, (weights, bias)))


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="All labels are the same"):
        fit_logistic(torch.zeros(1, 3, 2), torch.ones(3, dtype=torch.bool), penalty=1.0)
