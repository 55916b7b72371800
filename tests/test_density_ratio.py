"""A logistic regression is a density ratio."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hf_logits.density_ratio import LogDensityRatio, fit_density_ratio


def samples(above: int = 40, below: int = 25, dim: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(0.3, 1.0, dim)
    return torch.randn(above, dim, generator=generator) + shift, torch.randn(below, dim, generator=generator)


def test_the_solution_is_that_of_an_independent_optimizer():
    above, below = samples()
    points = np.concatenate([above.numpy(), below.numpy()]).astype(float)
    signs = np.array([1.0] * len(above) + [-1.0] * len(below))
    weights = np.where(signs > 0, len(points) / (2 * len(above)), len(points) / (2 * len(below)))

    def balanced_loss(solution: np.ndarray) -> float:
        scores = points @ solution[:-1] + solution[-1]
        return float((weights * np.logaddexp(0, -signs * scores)).sum() + 0.5 * 1.7 * (solution[:-1] ** 2).sum())

    expected = minimize(balanced_loss, np.zeros(4), tol=1e-12).x
    found = fit_density_ratio(above, below, penalty=1.7)
    assert np.allclose([*found.weight.tolist(), found.bias.item()], expected, atol=1e-5)


def test_two_gaussians_have_the_linear_log_ratio_of_the_textbook():
    generator = torch.Generator().manual_seed(1)
    above = torch.randn(20_000, 1, generator=generator) + 1.0
    below = torch.randn(5_000, 1, generator=generator)
    # log N(x; 1, 1) - log N(x; 0, 1) = x - 1/2, although one sample is four times the other
    found = fit_density_ratio(above, below, penalty=1e-3)
    assert math.isclose(found.weight.item(), 1.0, abs_tol=0.05)
    assert math.isclose(found.bias.item(), -0.5, abs_tol=0.05)


def test_equal_populations_have_the_ratio_one():
    above, _ = samples()
    found = fit_density_ratio(above, above.repeat(3, 1), penalty=1.0)
    assert torch.allclose(found(above), torch.zeros(len(above), dtype=torch.float64), atol=1e-6)


def test_swapping_the_populations_inverts_the_ratio():
    above, below = samples()
    one, other = fit_density_ratio(above, below, penalty=1.0), fit_density_ratio(below, above, penalty=1.0)
    assert torch.allclose(one(above), -other(above), atol=1e-5)


def test_what_can_be_separated_stays_finite():
    found = fit_density_ratio(torch.full((3, 1), 1e3), torch.full((3, 1), -1e3), penalty=1.0)
    assert isinstance(found, LogDensityRatio)
    assert found.weight.isfinite().all() and found.weight.item() > 0


@pytest.mark.parametrize(
    ("above", "below", "penalty", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(3, 2), 1.0, "a point at least"),
        (torch.zeros(3, 2), torch.full((3, 2), math.nan), 1.0, "NaN or infinite"),
        (torch.zeros(3, 2), torch.zeros(3, 2), 0.0, "penalty must be positive"),
    ],
)
def test_what_has_no_solution_is_refused(above, below, penalty, message):
    with pytest.raises(ValueError, match=message):
        fit_density_ratio(above, below, penalty=penalty)
