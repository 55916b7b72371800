"""A truncated teacher: the card's numbers, the full divergence as the judge, and logits of any size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_logits.sparse_teacher import MODES, log_tail, sparse_kd, sparse_kd_loss, top_log_probs


S4 = torch.tensor([[1, 0.5, -1, 0], [0.2, -0.3, 2, 0.1]], dtype=torch.float64)
T4 = torch.tensor([[2, 0, -0.5, 0.5], [-1, 0.5, 1.5, 0]], dtype=torch.float64)
each_mode = pytest.mark.parametrize("mode", MODES)


def full(student, teacher):
    """KL(t || s), the obvious way."""
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def slow(student, ids, log_probs, mode):
    """The definition, with a vocabulary of k + 1 for the tail."""
    p, q = log_probs.exp(), student.softmax(-1).gather(-1, ids)
    if mode == "tail":
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))
    else:
        p = p / p.sum(-1, keepdim=True)
    if mode == "renorm":
        q = q / q.sum(-1, keepdim=True)
    return (p * (p.log() - q.log())).sum(-1)


def random_pair(rows=5, size=30, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, dtype=torch.float64, generator=generator) * scale for _ in range(2)]


@pytest.mark.parametrize(("mode", "expected"), [("tail", 0.118856), ("renorm", 0.020636), ("zero", 0.453941)])
def test_numbers_of_the_card(mode, expected):
    best, ids = top_log_probs(T4, 2)
    assert sparse_kd(S4, ids, best, mode=mode)[0].item() == pytest.approx(expected, abs=1e-6)
    assert sparse_kd_loss(S4[:1], ids[:1], best[:1], mode=mode).item() == pytest.approx(expected, abs=1e-6)
    assert full(S4, T4)[0].item() == pytest.approx(0.134684600, abs=1e-9)


@each_mode
@pytest.mark.parametrize("k", [1, 3, 29])
def test_it_is_its_definition(mode, k):
    student, teacher = random_pair()
    best, ids = top_log_probs(teacher, k)
    torch.testing.assert_close(sparse_kd(student, ids, best, mode=mode), slow(student, ids, best, mode))


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tokens_give_the_full_divergence(mode, dtype):
    student, teacher = (part.to(dtype) for part in random_pair())
    best, ids = top_log_probs(teacher, 99)
    assert ids.shape == (5, 30)
    torch.testing.assert_close(
        sparse_kd(student, ids, best, mode=mode).double(), full(student, teacher).double(), rtol=1e-5, atol=1e-6
    )


def test_one_token_less_than_all_loses_nothing_in_the_tail():
    student, teacher = random_pair()
    best, ids = top_log_probs(teacher, 29)
    torch.testing.assert_close(sparse_kd(student, ids, best, mode="tail"), full(student, teacher))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), scale=st.floats(0.0, 30.0))
def test_the_tail_never_exceeds_the_full_divergence_and_grows_with_k(seed, k, scale):
    student, teacher = random_pair(4, 12, scale, seed)
    values = [sparse_kd(student, *reversed(top_log_probs(teacher, size)), mode="tail") for size in (k, min(k + 1, 12))]
    judge = full(student, teacher)
    slack = 1e-9 * (1 + judge)
    assert (values[0] >= -1e-9).all()
    assert (values[0] <= values[1] + slack).all()
    assert (values[1] <= judge + slack).all()


@each_mode
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gradients_are_those_of_finite_differences(mode, k):
    best, ids = top_log_probs(T4, k)
    assert torch.autograd.gradcheck(lambda s: sparse_kd(s, ids, best, mode=mode), S4.clone().requires_grad_())


@each_mode
@pytest.mark.parametrize("scale", [1.0, 300.0, 3e4])
def test_no_logits_are_too_large(mode, scale):
    student, teacher = (part.float() for part in random_pair(scale=scale))
    best, ids = top_log_probs(teacher, 4)
    student.requires_grad_()
    loss = sparse_kd(student, ids, best, mode=mode)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all() and (loss >= -1e-4).all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5), atol=1e-4, rtol=0)


def test_a_tail_that_the_kept_tokens_would_round_away_is_exact():
    """1 - sum q is 0 in float32 here: the student's tail is e^-40."""
    student = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    best, ids = top_log_probs(teacher, 1)
    loss = sparse_kd(student, ids, best, mode="tail")
    assert loss.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40 - math.log(2)), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.25, -0.25]]))


@each_mode
def test_banned_tokens_are_no_trouble(mode):
    student, teacher = random_pair(3, 6)
    student[:, 4:] = teacher[:, 4:] = -math.inf
    student.requires_grad_()
    best, ids = top_log_probs(teacher, 5)  # a banned one among them
    loss = sparse_kd(student, ids, best, mode=mode)
    torch.testing.assert_close(loss, full(student[:, :4], teacher[:, :4]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all() and (gradient[:, 4:] == 0).all()


@each_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounded_log_probs_give_no_negative_divergence(mode, dtype):
    """A peaked teacher against itself: the rounded probabilities sum to more than 1."""
    teacher = torch.tensor([[9.0, 1.0, 0.3, 0.1, -1.0], [12.0, 11.9, 0.0, 0.0, 0.0]]).repeat(50, 1)
    teacher = teacher + torch.rand(teacher.shape, generator=torch.Generator().manual_seed(0))
    best, ids = top_log_probs(teacher, 4)
    loss = sparse_kd(teacher, ids, best.to(dtype), mode=mode)
    assert loss.isfinite().all() and (loss >= -1e-6).all()


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(mode, dtype):
    student, teacher = random_pair(50, 200)
    best, ids = top_log_probs(teacher, 8)
    half = student.to(dtype).requires_grad_()
    loss = sparse_kd(half, ids, best, mode=mode)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), sparse_kd(half.detach().double(), ids, best, mode=mode), rtol=1e-4, atol=1e-5
    )
    assert torch.autograd.grad(loss.sum(), half)[0].dtype == dtype


@each_mode
def test_it_moves_with_no_constant_and_is_zero_or_known_at_equality(mode):
    student, teacher = random_pair()
    best, ids = top_log_probs(teacher, 3)
    torch.testing.assert_close(
        sparse_kd(student + 7.0, ids, best, mode=mode), sparse_kd(student, ids, best, mode=mode)
    )
    # "zero" wants more than the teacher itself does
    expected = -best.logsumexp(-1) if mode == "zero" else torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(sparse_kd(teacher, ids, best, mode=mode), expected)


def test_the_tail_is_what_is_left():
    best, _ = top_log_probs(T4, 2)
    torch.testing.assert_close(log_tail(best), (1 - best.exp().sum(-1)).log())
    assert log_tail(torch.tensor([[0.1, -3.0]])).item() == -math.inf


class Largest(TorchDispatchMode):
    """Counts what is made of a given size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor) and value.numel() >= self.size:
                self.made.add(value.untyped_storage().data_ptr())
        return out


@each_mode
def test_one_tensor_of_the_logits_size_and_the_gradient(mode):
    student, teacher = (part.float() for part in random_pair(20, 500))
    best, ids = top_log_probs(teacher, 8)
    student.requires_grad_()
    with Largest(student.numel()) as found:
        loss = sparse_kd_loss(student, ids, best, mode=mode)
        made = found.made - {student.untyped_storage().data_ptr()}
        assert len(made) == (0 if mode == "renorm" else 1)
        loss.backward()


def test_bad_input_is_refused():
    best, ids = top_log_probs(T4, 2)
    with pytest.raises(ValueError, match="'tail', 'renorm' or 'zero', got 'full'"):
        sparse_kd_loss(S4, ids, best, mode="full")
    for mode in MODES:
        with pytest.raises(ValueError, match="temperature=2.0 needs the logits of all"):
            sparse_kd_loss(S4, ids, best, mode=mode, temperature=2.0)
    with pytest.raises(ValueError, match="2 tokens a row and the student only 1"):
        sparse_kd_loss(S4[:, :1], ids, best, mode="tail")
