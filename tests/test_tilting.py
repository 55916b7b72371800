"""A distribution that moves along a direction: moments against sums by hand, the condensed vocabulary against the whole."""

import pytest
import torch

from hf_logits.logits import kl_divergence
from hf_logits.tilting import condense, tilt, tilt_divergences


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def curve(base, direction, weights):
    """Log-normaliser and mean at weights `[N, R]`, one by one."""
    return [torch.stack(values) for values in zip(*(tilt(base, direction, weight) for weight in weights), strict=True)]


def test_the_moments_are_those_of_the_softmax():
    base, direction, weight = noise(5, 9), 2 * noise(5, 9, seed=1), noise(5, seed=2)
    moved = base + weight[:, None] * direction
    normaliser, *moments = tilt(base, direction, weight, moments=3)
    torch.testing.assert_close(normaliser, moved.logsumexp(-1))
    for power, moment in enumerate(moments, start=1):
        torch.testing.assert_close(moment, (moved.softmax(-1) * direction**power).sum(-1))


def test_many_directions_and_weights_share_a_base():
    base, directions, weights = noise(2, 7), noise(3, 2, 7, seed=1), noise(5, 3, 2, seed=2)
    found = tilt(base, directions, weights, moments=2)
    for i in range(5):
        for t in range(3):
            alone = tilt(base, directions[t], weights[i, t], moments=2)
            torch.testing.assert_close([value[i, t] for value in found], alone)


def test_the_divergences_are_sums_over_tokens():
    base, direction = noise(6, 8).log_softmax(-1), 3 * noise(6, 8, seed=1)
    weight = torch.linspace(0, 2, 6).double()
    moved = (base + weight[:, None] * direction).log_softmax(-1)
    start = tilt(base, direction, torch.zeros(6).double())
    there, back = tilt_divergences(weight, tilt(base, direction, weight), start)
    torch.testing.assert_close(there, kl_divergence(moved, base))
    torch.testing.assert_close(back, kl_divergence(base, moved))


def test_banned_tokens_take_no_part_and_nothing_is_written_in_place():
    base, direction = noise(3, 6), noise(3, 6, seed=1)
    base[:, 2], direction[:, 2] = -torch.inf, 0.0
    before = base.clone(), direction.clone()
    found = tilt(base, direction, torch.ones(3).double(), moments=2)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found, tilt(base[:, others], direction[:, others], torch.ones(3).double(), moments=2))
    condense(base, direction, tilt(base, direction, torch.zeros(3).double(), moments=2), 2.0)
    assert torch.equal(base, before[0]) and torch.equal(direction, before[1])


def few_and_whole(base, direction, max_weight=2.0):
    """The curve at 50 weights, by the whole vocabulary and by the small one."""
    zero = torch.zeros_like(base[:, 0])
    few = condense(base, direction, tilt(base, direction, zero, moments=2), max_weight)
    weights = torch.linspace(0, max_weight, 50, dtype=base.dtype)[:, None].expand(50, len(base))
    return curve(base, direction, weights), tilt(*few, weights)


def test_tokens_of_few_directions_lose_nothing():
    base = noise(4, 3000)
    direction = torch.randint(-3, 4, (4, 3000), generator=torch.Generator().manual_seed(0)).double()
    whole, few = few_and_whole(base, direction)
    torch.testing.assert_close(few, whole)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 3.0, 10.0])
def test_what_is_lost_stays_within_the_bound(scale):
    base, direction = 3 * noise(4, 5000), scale * noise(4, 5000, seed=1)
    whole, few = few_and_whole(base, direction)
    mean, square = tilt(base, direction, torch.zeros(4).double(), moments=2)[1:]
    width = (direction.amax(-1) - mean + 8 * (square - mean**2).sqrt()) / 512
    lost = whole[0] - few[0]
    assert (lost > -1e-9).all()
    assert (lost <= (2 * width) ** 2 / 32 + 1e-9).all()


@pytest.mark.parametrize("depth", [-60.0, -1e4, -1e8])
def test_what_lies_far_below_takes_no_bins(depth):
    base, direction = 3 * noise(2, 2000), 0.3 * noise(2, 2000, seed=1)
    base[:, ::50], direction[:, ::50] = -70.0, depth
    rest = torch.arange(2000) % 50 > 0
    whole, _ = few_and_whole(base[:, rest], direction[:, rest])
    _, few = few_and_whole(base, direction)
    torch.testing.assert_close(few, whole, atol=1e-4, rtol=1e-4)


def test_neither_end_of_a_wide_range_underflows():
    """At weight 0 the mass is at one end of the directions, at weight 2 at the other, 100 nats of probability away."""
    direction = torch.linspace(-50, 50, 4000)[None]
    base = -2 * direction + 3 * noise(1, 4000).float()
    base = base - direction**2 / 100
    whole, few = few_and_whole(base, direction)
    torch.testing.assert_close(few, whole, atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, -3.0])
def test_a_direction_that_moves_nothing(constant):
    base = noise(2, 300)
    whole, few = few_and_whole(base, torch.full_like(base, constant))
    torch.testing.assert_close(few, whole)


def test_a_broken_direction_breaks_its_own_row_alone():
    base, direction = noise(3, 300), noise(3, 300, seed=1)
    whole, _ = few_and_whole(base, direction)
    direction[1, 7] = torch.nan
    _, few = few_and_whole(base, direction)
    assert few[0][:, 1].isnan().all()
    torch.testing.assert_close(few[0][:, [0, 2]], whole[0][:, [0, 2]], atol=1e-3, rtol=1e-3)
