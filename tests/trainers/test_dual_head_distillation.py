"""Dual-head distillation: the log-cosh loss, the projection, and the head that comes and goes."""

import math

import pytest
import torch

from hf_logits.trainers.dual_head_distillation import binary_kl_norm_loss, project_gradient
from two_rows import gradient, has_right_gradient, random, student, teacher


# --- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.246585987), (2.0, 0.253240140)])
def test_numbers(temperature, expected):
    assert binary_kl_norm_loss(student(), teacher(), temperature=temperature).item() == pytest.approx(
        expected, abs=1e-9
    )


def test_the_gradient():
    found = gradient(lambda s: binary_kl_norm_loss(s, teacher()[:1], temperature=2.0), student()[:1])
    expected = found.new_tensor([[-0.244919, 0.124353, -0.124353, -0.124353]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # of one row: N = 1
    both = gradient(lambda s: binary_kl_norm_loss(s, teacher(), temperature=2.0), student())
    torch.testing.assert_close(
        both[0], found.new_tensor([-0.122459, 0.062177, -0.062177, -0.062177]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_divergence_of_coins(temperature):
    s, t = random(5, 7), random(5, 7, seed=1)
    q = ((s - t) / temperature).sigmoid()
    coins = (0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()).sum(-1).mean()
    found = binary_kl_norm_loss(s, t, temperature=temperature)
    torch.testing.assert_close(found, temperature**2 * coins)
    torch.testing.assert_close(found, binary_kl_norm_loss(t, s, temperature=temperature))


def test_a_large_temperature_is_a_squared_error():
    s, t = random(5, 7).float(), random(5, 7, seed=1).float()
    expected = (s - t).square().sum(-1).mean() / 8
    torch.testing.assert_close(binary_kl_norm_loss(s, t, temperature=1e4), expected, rtol=1e-5, atol=0)


def test_equality_is_zero_and_a_shift_is_not():
    assert binary_kl_norm_loss(student(), student(), temperature=2.0).item() == 0.0
    assert gradient(lambda s: binary_kl_norm_loss(s, student(), temperature=2.0), student()).abs().max() == 0.0
    assert binary_kl_norm_loss(student() + 1, student(), temperature=2.0).item() > 0.1
    assert binary_kl_norm_loss(student() + 1, student(), temperature=2.0, center=True).item() < 1e-12


def test_the_forms_for_language_models():
    s, t = random(3, 6), random(3, 6, seed=1)
    centered = [x - x.mean(-1, keepdim=True) for x in (s, t)]
    found = binary_kl_norm_loss(s, t, temperature=2.0, center=True, mean_over_classes=True)
    torch.testing.assert_close(found, binary_kl_norm_loss(*centered, temperature=2.0) / 6)


@pytest.mark.parametrize("center", [False, True])
def test_gradients_are_those_of_finite_differences_and_none_reaches_the_teacher(center):
    def loss(s):
        return binary_kl_norm_loss(s, 3 * random(4, 5, seed=1), temperature=0.7, center=center)

    assert has_right_gradient(loss, 3 * random(4, 5))
    t = teacher().requires_grad_()
    binary_kl_norm_loss(student().requires_grad_(), t, temperature=1.0, center=center).backward()
    assert t.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [40.0, 1e4])
def test_no_difference_is_too_large(dtype, scale):
    s = torch.tensor([[scale, -scale, 0.0]], dtype=dtype)
    loss = binary_kl_norm_loss(s, torch.zeros_like(s), temperature=1.0)
    assert loss.item() == pytest.approx(2 * (s[0, 0].item() / 2 - math.log(2)), rel=1e-6)
    found = gradient(lambda x: binary_kl_norm_loss(x, torch.zeros_like(x), temperature=1.0), s)
    assert found.tolist() == [[0.5, -0.5, 0.0]]


def test_small_differences_keep_their_digits():
    d = torch.tensor([[1e-3, 3e-2, 0.9, 1.1, 2.1]], dtype=torch.float64)
    for one in d[0]:
        exact = binary_kl_norm_loss(one.view(1, 1), torch.zeros(1, 1).double(), temperature=1.0)
        assert exact.item() == pytest.approx(math.log(math.cosh(one.item() / 2)), rel=1e-6)
        found = binary_kl_norm_loss(one.float().view(1, 1), torch.zeros(1, 1), temperature=1.0)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("center", [False, True])
def test_classes_that_both_have_banned_do_not_count(center):
    banned = torch.tensor([[False, False, True, False]])
    s, t = (x.masked_fill(banned, -math.inf) for x in (student(), teacher()))
    kept = [0, 1, 3]
    torch.testing.assert_close(
        binary_kl_norm_loss(s, t, temperature=1.0, center=center),
        binary_kl_norm_loss(s[:, kept], t[:, kept], temperature=1.0, center=center),
    )
    assert gradient(lambda x: binary_kl_norm_loss(x, t, temperature=1.0), s).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        binary_kl_norm_loss(student(), teacher(), temperature=temperature)


def test_bad_shapes_are_refused():
    for s, t in ((student(), teacher()[:, :3]), (student(), teacher()[:1]), (student()[:0], teacher()[:0])):
        with pytest.raises(ValueError, match="shape"):
            binary_kl_norm_loss.__wrapped__(s, t, temperature=1.0)


# --- the projection ------------------------------------------------------------------------------------------------------


def test_the_projection_by_hand():
    g0, g1 = torch.tensor([1.0, 2, 0]), torch.tensor([-2, 0.5, 3])
    (found,) = project_gradient([g0], [g1])
    torch.testing.assert_close(found, torch.tensor([-1.8, 0.9, 3.0]))
    assert (found @ g0).abs() < 1e-6
    (same,) = project_gradient([g0], [-g1])
    torch.testing.assert_close(same, -g1)


def test_the_projection_is_one_for_all_parameters():
    g0, g1 = random(9), random(9, seed=4)
    if g0 @ g1 > 0:
        g1 = -g1
    (whole,) = project_gradient([g0], [g1])
    pieces = project_gradient([g0[:4], g0[4:].view(5, 1)], [g1[:4], g1[4:].view(5, 1)])
    torch.testing.assert_close(torch.cat([piece.flatten() for piece in pieces]), whole)


def test_parameters_of_one_loss_only_count_as_zeros():
    g0, g1 = torch.tensor([1.0, 2.0]), torch.tensor([-2.0, 0.5])
    head0, head1 = torch.tensor([3.0]), torch.tensor([4.0])
    found = project_gradient([g0, head0, None], [g1, None, head1])
    whole = project_gradient([torch.cat([g0, head0, torch.zeros(1)])], [torch.cat([g1, torch.zeros(1), head1])])[0]
    torch.testing.assert_close(torch.cat(found), whole)


def test_no_gradient_of_the_main_loss_changes_nothing():
    g1 = torch.tensor([-2.0, 0.5])
    assert project_gradient([torch.zeros(2)], [g1])[0].tolist() == g1.tolist()
    assert project_gradient([None], [g1])[0] is g1
    assert project_gradient([g1], [None])[0] is None
