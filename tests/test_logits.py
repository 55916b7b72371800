"""The shared arithmetic, by hand and against loops."""

import math

import pytest
import torch

from hf_logits.logits import (
    difference,
    entropy,
    keep,
    kl_divergence,
    leading,
    log_probs,
    normalise,
    plausible,
    row_column,
    top_p,
)
from oracles import ATOL, ENTROPY_BITS, ENTROPY_BITS_BANNED, ENTROPY_LOGITS, ENTROPY_NATS, ENTROPY_SHARE, row


INF = math.inf


def probabilities(*values):
    return row(*values).log()


# --- log_probs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_probs_are_normalised_in_float32_at_least(dtype):
    scores = torch.tensor([[1.0, 3.0, -2.0, 0.5]], dtype=dtype)
    found = log_probs(scores)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, scores.to(found.dtype).log_softmax(-1))
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0, dtype=found.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_smallest_finite_number_is_a_ban(dtype):
    banned = torch.finfo(dtype).min
    scores = torch.tensor([[0.0, banned, 1.0, -INF]], dtype=dtype)
    found = log_probs(scores)
    assert found.isneginf().tolist() == [[False, True, False, True]]
    torch.testing.assert_close(found[:, [0, 2]], torch.tensor([[0.0, 1.0]], dtype=found.dtype).log_softmax(-1))


def test_a_very_low_score_is_no_ban():
    found = log_probs(torch.tensor([[0.0, -1e4]]))
    assert found.isfinite().all()


def test_log_probs_leave_the_scores_alone():
    scores = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    before = scores.clone()
    log_probs(scores)
    assert torch.equal(scores, before)


# --- entropy and divergence ------------------------------------------------------------------------------------------------


def test_entropy_is_in_bits():
    bits = entropy(ENTROPY_LOGITS.log_softmax(-1)).item()
    assert abs(bits - ENTROPY_BITS) < ATOL
    assert abs(bits * math.log(2) - ENTROPY_NATS) < ATOL
    assert abs(bits / math.log2(5) - ENTROPY_SHARE) < ATOL
    torch.testing.assert_close(entropy(torch.zeros(3, 8).log_softmax(-1)), torch.full((3,), 3.0))


def test_banned_tokens_count_as_zero():
    banned = ENTROPY_LOGITS.clone()
    banned[:, 2] = -INF
    assert abs(entropy(banned.log_softmax(-1)).item() - ENTROPY_BITS_BANNED) < ATOL
    assert entropy(probabilities(1, 0, 0)).item() == 0


def test_the_divergence_by_hand():
    p, q = probabilities(0.5, 0.25, 0.25), probabilities(0.25, 0.25, 0.5)
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([expected]).double())
    skewed = probabilities(0.8, 0.1, 0.1)
    expected = 0.8 * math.log(1.6) + 0.1 * math.log(0.4) + 0.1 * math.log(0.4)
    torch.testing.assert_close(kl_divergence(skewed, p), torch.tensor([expected]).double())
    assert kl_divergence(p, skewed) != kl_divergence(skewed, p)
    assert kl_divergence(p, p).item() == 0


def test_the_divergence_with_bans():
    some, all_ = probabilities(0.5, 0.5, 0), probabilities(0.25, 0.25, 0.5)
    torch.testing.assert_close(kl_divergence(some, all_), torch.tensor([math.log(2)]).double())
    assert kl_divergence(all_, some).item() == INF
    assert kl_divergence(some, some).item() == 0


def test_divergences_equal_a_loop_and_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(2, 5, 7, generator=generator).double() for _ in range(2))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    found = kl_divergence(p, q)
    assert found.shape == (2, 5) and (found > 0).all()
    for i in range(2):
        for j in range(5):
            total = sum(math.exp(a) * (a - b) for a, b in zip(p[i, j].tolist(), q[i, j].tolist(), strict=True))
            torch.testing.assert_close(found[i, j].item(), total)


# --- masks -------------------------------------------------------------------------------------------------------------------


def test_plausible_is_relative_to_the_best_token_and_inclusive():
    said = row(0.0, math.log(0.5), math.log(0.5) - 1e-9, -5.0, -INF)
    assert plausible(said, 0.5).tolist() == [[True, True, False, False, False]]
    assert plausible(said - 3.0, 0.4).tolist() == [[True, True, True, False, False]]


def test_a_fraction_of_zero_keeps_all_but_bans_and_one_keeps_the_best():
    said = torch.tensor([[-1.0, -50.0, -INF, -1.0]])
    assert plausible(said, 0.0).tolist() == [[True, True, False, True]]
    assert plausible(said, 1.0).tolist() == [[True, False, False, True]]


def test_a_fraction_for_each_row():
    said = probabilities(0.6, 0.3, 0.1).expand(3, -1)
    found = plausible(said, torch.tensor([[0.1], [0.4], [0.9]]))
    assert found.sum(-1).tolist() == [3, 2, 1]


@pytest.mark.parametrize(("least", "count"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_so_many_tokens_stay_at_least_but_no_banned_one(least, count):
    said = probabilities(0.1, 0.7, 0, 0.2)
    found = plausible(said, 1.0, min_tokens_to_keep=least)
    order = [1, 3, 0]
    assert found[0].nonzero()[:, 0].tolist() == sorted(order[:count])


def test_the_least_count_never_takes_away():
    said = probabilities(0.3, 0.3, 0.3, 0.1)
    assert plausible(said, 0.5, min_tokens_to_keep=2).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("mass", "kept"), [(0.1, [1]), (0.5, [1]), (0.6, [1, 3]), (0.75, [1, 3]), (0.8, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_a_nucleus_is_the_smallest_set_that_holds_the_mass(mass, kept):
    said = probabilities(0.125, 0.5, 0.125, 0.25)
    assert top_p(said, mass)[0].nonzero()[:, 0].tolist() == (kept if mass < 1 else [0, 1, 2, 3])


def test_of_equal_tokens_the_first_is_in_the_nucleus():
    flat = torch.zeros(1, 4).double().log_softmax(-1)
    for mass, count in ((0.2, 1), (0.25, 1), (0.3, 2), (0.75, 3)):
        assert top_p(flat, mass).tolist() == [[i < count for i in range(4)]]


def test_a_tiny_mass_keeps_the_best_token_and_bans_are_outside():
    said = probabilities(0, 0.4, 0.6)
    assert top_p(said, 1e-9).tolist() == [[False, False, True]]
    assert top_p(said, 1.0).tolist() == [[False, True, True]]


def test_the_nucleus_equals_a_loop():
    said = (2 * torch.randn(40, 9, generator=torch.Generator().manual_seed(0))).double().log_softmax(-1)
    found = top_p(said, 0.7)
    for r in range(40):
        total, inside = 0.0, []
        for token in sorted(range(9), key=lambda w: -float(said[r, w])):  # noqa: B023
            inside.append(token)
            total += math.exp(said[r, token])
            if total >= 0.7:
                break
        assert found[r].nonzero()[:, 0].tolist() == sorted(inside)


def sorted_nucleus(log_probs, mass):
    """By a sort, which the filter does without."""
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    kept = (ordered.exp().cumsum(-1) - ordered.exp() < mass) & ~ordered.isneginf()
    return torch.zeros_like(kept).scatter(-1, order, kept)


def sorted_leading(values, mass, bound, inclusive):
    order = values.sort(dim=-1, stable=True).indices
    ordered = mass.gather(-1, order)
    kept = ordered.cumsum(-1) - (0.0 if inclusive else ordered) < bound
    return torch.zeros_like(kept).scatter(-1, order, kept)


def some_values(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 700, generator=generator, dtype=dtype)
    if kind == "ties":
        values = (2 * values).round() / 4
    elif kind == "close":  # they differ in their last bits alone
        values = 1 + torch.finfo(dtype).eps * (8 * values).round()
    elif kind == "wide":
        values = values.sign() * (60 * values).exp().clamp(max=1e30)
    elif kind == "zeros":
        values = torch.where(values > 0.3, 0.0, torch.where(values < -0.3, -0.0, values))
    elif kind == "infinite":
        values = values.masked_fill(values > 1.0, INF).masked_fill(values < -1.0, -INF)
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ties", "close", "wide", "zeros", "infinite"])
@pytest.mark.parametrize("inclusive", [True, False])
def test_the_leading_tokens_are_those_of_a_sort(kind, dtype, inclusive):
    values = some_values(kind, dtype)
    # sums of these are exact, in any order
    mass = torch.randint(0, 64, values.shape, generator=torch.Generator().manual_seed(1)).to(dtype) / 4096
    for bound in (1 / 4096, 0.5, 2.0, 4.0, 5.0):
        falling = leading(-values, mass, bound, descending=True, inclusive=inclusive)
        assert torch.equal(falling, sorted_leading(values, mass, bound, inclusive))
        assert torch.equal(
            leading(values, mass, bound, descending=False, inclusive=inclusive),
            sorted_leading(values, mass, bound, inclusive),
        )


def test_all_the_mass_is_never_below_the_bound():
    values, mass = some_values("random", torch.float32), torch.full((12, 700), 1 / 700)
    found = leading(values, mass * 0.99, 1.0, descending=False, inclusive=True)
    assert torch.equal(found, values < values.amax(-1, keepdim=True))
    assert leading(values, mass, 2.0, descending=False, inclusive=False).all()
    assert not leading(values, mass, 0.0, descending=False, inclusive=False).any()
    assert not leading(values, mass * 0, 1.0, descending=False, inclusive=True).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nucleus_is_that_of_a_sort(dtype):
    said = (3 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0), dtype=dtype)).log_softmax(-1)
    said = said.masked_fill(torch.rand(20, 5000, generator=torch.Generator().manual_seed(1)) < 0.1, -INF)
    for values in (said.log_softmax(-1), (4 * said).round().div(4).log_softmax(-1)):
        for mass in (1e-6, 0.25, 0.9, 0.999):
            apart = top_p(values, mass) ^ sorted_nucleus(values, mass)
            # single precision: sums of thousands of tokens end with an error, and so does the sort's
            assert values.exp()[apart].sum() < 1e-5 if dtype == torch.float32 else not apart.any()


def test_a_dead_row_has_no_nucleus_and_harms_no_other():
    said = torch.tensor([[-INF, -INF], [0.5, 0.5]]).log()
    said[0] = -INF
    assert top_p(said, 0.5).tolist() == [[False, False], [True, False]]


# --- small ones ----------------------------------------------------------------------------------------------------------------


def test_keep_clears_whatever_stood_there():
    scores = torch.tensor([[1.0, math.nan, INF, 2.0]])
    kept = torch.tensor([[True, False, False, True]])
    assert keep(scores, kept).tolist() == [[1.0, -INF, -INF, 2.0]]
    assert scores[0, 2] == INF


def test_a_difference_of_two_bans_is_zero():
    a, b = torch.tensor([[5.0, -INF, -INF, 2.0]]), torch.tensor([[3.0, -INF, 1.0, -INF]])
    assert difference(a, b).tolist() == [[2.0, 0.0, -INF, INF]]


def test_a_number_stays_a_number():
    like = torch.zeros(1)
    assert row_column(0.5, 6, like) == 0.5
    found = row_column(torch.tensor(0.25), 6, like)
    assert isinstance(found, float) and found == 0.25


def test_values_become_a_column_and_repeat_next_to_each_other():
    like = torch.zeros(1, dtype=torch.float64)
    column = row_column(torch.tensor([1, 2]), 6, like)
    assert column.tolist() == [[1.0]] * 3 + [[2.0]] * 3
    assert column.dtype == torch.float64


def test_a_wrong_number_of_values_is_an_error():
    with pytest.raises(
        ValueError, match="3 per-row values, but generation runs 4 rows: pass one number, or one value"
    ):
        row_column(torch.ones(3), 4, torch.zeros(1))


def test_a_row_without_a_live_token_stays_banned():
    scores = torch.tensor([[-math.inf, -math.inf], [0.0, 0.0]])
    assert torch.equal(log_probs(scores)[0], scores[0])
    torch.testing.assert_close(log_probs(scores)[1], torch.tensor([0.5, 0.5]).log())


@pytest.mark.parametrize("size", [300.0, 3e3, 1e5, 1e7])
def test_large_scores_are_normalised_as_exactly_as_small_ones(size):
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) + size
    torch.testing.assert_close(normalise(scores), scores.log_softmax(-1), rtol=0.0, atol=0.0)


def test_kl_is_finite_where_a_ban_meets_no_probability():
    p, q = torch.tensor([[0.0, -150.0]]), torch.tensor([[0.0, -math.inf]])
    assert kl_divergence(p, q).item() == 0.0
    assert kl_divergence(torch.tensor([[-0.1, -2.3]]), q).isposinf().all()
