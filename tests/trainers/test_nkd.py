"""NKD: numbers worked out by hand, the cross-entropy that it takes apart, and extreme logits."""

import math

import pytest
import torch

import distilling
from hf_logits.tasks import valid_rows
from hf_logits.trainers.logit_distillation import LogitDistillationConfig, LogitDistillationTrainer
from hf_logits.trainers.nkd import NKDConfig, NKDTrainer, nkd_loss, nkd_non_target, nkd_target
from preferences import arguments, equal, weights
from two_rows import gradient, has_right_gradient, labels, random, student, teacher


@pytest.mark.parametrize(
    ("gamma", "temperature", "expected"),
    [(1.5, 1.0, 2.135973), (3.5, 3.0, 35.266046), (0.0, 1.0, 0.362891), (0.0, 3.0, 0.362891)],
)
def test_numbers(gamma, temperature, expected):
    loss = nkd_loss(student(), teacher(), labels(), gamma=gamma, temperature=temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "gamma", "expected"), [(1.0, 1.5, 1.773081), (3.0, 3.5, 34.903155)])
def test_numbers_of_both_parts(temperature, gamma, expected):
    s, t, y = student(), teacher(), labels()
    p_t, p_s = (x.softmax(-1).gather(-1, y[:, None])[:, 0] for x in (t, s))
    assert p_t.tolist() == pytest.approx([0.694179, 0.597695], abs=1e-6)
    assert p_s.tolist() == pytest.approx([0.473991, 0.706651], abs=1e-6)
    assert nkd_target(s, t, y).mean().item() == pytest.approx(0.362891, abs=1e-6)
    rest = nkd_non_target(s, t, y, temperature=temperature)
    assert gamma * rest.mean().item() == pytest.approx(expected, abs=1e-6)
    whole = nkd_target(s, t, y) + (1 - p_t) * (nkd_non_target(s, t, y, temperature=1.0) - (1 - p_s).log())
    assert whole.tolist() == pytest.approx([1.062396, 1.194644], abs=1e-6)


def test_at_equality_it_still_pulls_the_label_up():
    one, label = teacher()[:1], labels()[:1]
    assert nkd_target(one, one, label).item() == pytest.approx(0.253393, abs=1e-6)
    assert 1.5 * nkd_non_target(one, one, label, temperature=1.0).item() == pytest.approx(1.530287, abs=1e-6)
    found = gradient(lambda s: nkd_target(s, one, label).sum(), one)
    torch.testing.assert_close(found, one.new_tensor([[-0.212294, 0.065216, 0.039555, 0.107523]]), atol=1e-6, rtol=0)
    rest = gradient(lambda s: nkd_non_target(s, one, label, temperature=2.0).sum(), one)
    torch.testing.assert_close(rest, torch.zeros_like(rest))


@pytest.mark.parametrize("classes", [2, 3, 50])
def test_it_is_a_part_of_the_cross_entropy(classes):
    """CE(p_t, p_s) = target part - (1 - p_t(y)) (log(1 - p_s(y)) + sum q_t log q_s)."""
    s, t, y = random(6, classes), random(6, classes, seed=1), torch.arange(6) % classes
    whole = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    p_s, p_t = (x.softmax(-1).gather(-1, y[:, None])[:, 0] for x in (s, t))
    rest = nkd_non_target(s, t, y, temperature=1.0) - (1 - p_s).log()
    torch.testing.assert_close(nkd_target(s, t, y) + (1 - p_t) * rest, whole)


def test_the_other_classes_are_a_softmax_of_their_own():
    s, t, y = random(4, 5), random(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    expected = []
    for row, label in enumerate(y.tolist()):
        others = [i for i in range(5) if i != label]
        q_t, q_s = (t[row, others] / 3).softmax(-1), (s[row, others] / 3).log_softmax(-1)
        expected.append(-9 * (q_t * q_s).sum())
    torch.testing.assert_close(nkd_non_target(s, t, y, temperature=3.0), torch.stack(expected))


def test_gradients_are_those_of_finite_differences_and_none_reaches_the_teacher():
    t = teacher().requires_grad_()
    assert has_right_gradient(lambda s: nkd_loss(s, teacher(), labels(), gamma=1.5, temperature=2.0), student())
    nkd_loss(student().requires_grad_(), t, labels(), gamma=1.5, temperature=2.0).backward()
    assert t.grad is None


def test_the_gradient_in_closed_form():
    """p_t(y) (p_s - onehot) + gamma T (q_s - q_t), with 0 at the label."""
    s, t, y = student(), teacher(), labels()
    onehot = torch.nn.functional.one_hot(y, 4)
    q_s, q_t = ((x / 3).masked_fill(onehot.bool(), -math.inf).softmax(-1) for x in (s, t))
    p = t.softmax(-1).gather(-1, y[:, None])
    expected = (p * (s.softmax(-1) - onehot) + 1.5 * 3 * (q_s - q_t)) / 2
    torch.testing.assert_close(gradient(lambda x: nkd_loss(x, t, y, gamma=1.5, temperature=3.0), s), expected)


def test_shifting_a_row_changes_nothing():
    shift = student().new_tensor([[7.0], [-3.0]])
    losses = [
        nkd_loss(s, t, labels(), gamma=1.5, temperature=2.0)
        for s, t in ((student(), teacher()), (student() + shift, teacher() - shift))
    ]
    torch.testing.assert_close(*losses)


def test_soft_labels_are_their_largest_one():
    soft = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    hard = nkd_loss(student(), teacher(), labels(), gamma=1.5, temperature=1.0)
    torch.testing.assert_close(nkd_loss(student(), teacher(), soft, gamma=1.5, temperature=1.0), hard)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    s, t = student().to(dtype), teacher().to(dtype)
    loss = nkd_loss(s, t, labels(), gamma=1.5, temperature=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nkd_loss(s.float(), t.float(), labels(), gamma=1.5, temperature=1.0))


def test_a_certain_label_does_not_cancel_the_others():
    """In float32, p(y) is 1 here: what is left of the sum over all classes without the label would be nothing."""
    s = student().index_put((torch.arange(2), labels()), torch.tensor(60.0, dtype=torch.float64))
    exact = nkd_non_target(s, s, labels(), temperature=1.0)
    torch.testing.assert_close(nkd_non_target(s.float(), s.float(), labels(), temperature=1.0), exact.float())


def test_no_logit_is_too_large():
    grid = torch.tensor([-1e4, 0.0, 1e4])
    s = torch.cartesian_prod(grid, grid, grid)
    t = s.flip(0)
    loss = nkd_loss(s, t, torch.arange(27) % 3, gamma=1.5, temperature=4.0)
    assert loss.isfinite()
    assert gradient(lambda x: nkd_loss(x, t, torch.arange(27) % 3, gamma=1.5, temperature=4.0), s).isfinite().all()


def test_banned_classes():
    banned = torch.tensor([[False, False, True, False]])
    s, t = student().masked_fill(banned, -math.inf), teacher().masked_fill(banned, -math.inf)
    y = torch.tensor([0, 1])
    kept = [0, 1, 3]
    expected = nkd_loss(s[:, kept], t[:, kept], y, gamma=1.5, temperature=2.0)
    torch.testing.assert_close(nkd_loss(s, t, y, gamma=1.5, temperature=2.0), expected)
    assert gradient(lambda x: nkd_loss(x, t, y, gamma=1.5, temperature=2.0), s).isfinite().all()
    alone = torch.full((1, 4), -math.inf).index_fill(1, torch.tensor([1]), 0.0)
    assert nkd_non_target(student()[:1], alone.double(), y[1:], temperature=1.0).item() == 0.0


def test_two_classes_leave_nothing_to_compare():
    s, t = student()[:, :2], teacher()[:, :2]
    assert nkd_non_target(s, t, torch.tensor([0, 1]), temperature=2.0).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"gamma": -0.5}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"labels": torch.tensor([0, -100])}, "-100"),
        ({"labels": torch.tensor([0, 4])}, r"\[0, 4\)"),
        ({"labels": torch.tensor([0])}, "shape"),
        ({"teacher_logits": teacher()[:, :3]}, "shape"),
        ({"student_logits": student()[:, :1], "teacher_logits": teacher()[:, :1]}, "2 classes"),
        ({"student_logits": student()[:0], "teacher_logits": teacher()[:0], "labels": labels()[:0]}, "1 row"),
    ],
)
def test_bad_input_is_refused(change, match):
    given = {"student_logits": student(), "teacher_logits": teacher(), "labels": labels(), "gamma": 1.0}
    with pytest.raises(ValueError, match=match):
        nkd_loss.__wrapped__(**given | {"temperature": 1.0} | change)


# --- the trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm", "seq2seq"])
def test_the_loss_is_cross_entropy_and_the_formula(kind, tmp_path):
    settings = {"gamma": 0.7, "temperature": 2.0, "learning_rate": 0.0, "max_steps": 1}
    trainer = distilling.make(NKDTrainer, NKDConfig, tmp_path, kind=kind, per_device_train_batch_size=8, **settings)
    (batch,) = list(trainer.get_train_dataloader())
    inputs, wanted, _ = trainer._split(dict(batch))
    with torch.no_grad():
        (s, y), (t, _) = (
            valid_rows(model(**inputs).logits, wanted) for model in (trainer.model.eval(), trainer.teacher)
        )
    expected = torch.nn.functional.cross_entropy(s, y) + nkd_loss(s, t, y, gamma=0.7, temperature=2.0)
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    dense = distilling.make(
        NKDTrainer, NKDConfig, tmp_path, kind=kind, per_device_train_batch_size=8, fused_head=False, **settings
    )
    assert dense.compute_loss(dense.model.eval(), dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_a_weight_of_zero_is_the_cross_entropy_bit_for_bit(kind, tmp_path):
    found = []
    for trainer, config, settings in (
        (NKDTrainer, NKDConfig, {"nkd_weight": 0.0}),
        (LogitDistillationTrainer, LogitDistillationConfig, {"kd_weight": 0.0, "ce_weight": 1.0}),
    ):
        made = distilling.make(trainer, config, tmp_path, kind=kind, **settings)
        made.train()
        found.append(weights(made))
    assert equal(*found)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"temperature": 0.0}, "temperature"), ({"gamma": -1.0}, "gamma"), ({"nkd_weight": -1.0}, "nkd_weight")],
)
def test_bad_settings_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(NKDConfig, tmp_path, **settings)
