"""Logit distillation: the card's numbers, the identities, autograd as the judge, and the trainer against the formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilling import KINDS, collator, make
from hf_logits.trainers import LogitDistillationConfig, LogitDistillationTrainer, kd_loss
from preferences import arguments, distance, equal, logged, weights


S = torch.tensor([[1.0, 0.5, -1.0, 0.0], [0.2, -0.3, 2.0, 0.1]], dtype=torch.float64)
T = torch.tensor([[2.0, 0.0, -0.5, 0.5], [-1.0, 0.5, 1.5, 0.0]], dtype=torch.float64)
ALL = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9), ("tvd", 0.5)]
each = pytest.mark.parametrize(("divergence", "beta"), ALL, ids=lambda value: str(value))


def build(folder, **settings):
    return make(LogitDistillationTrainer, LogitDistillationConfig, folder, **settings)


# --- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "beta", "temperature", "expected"),
    [
        ("forward_kl", 0.5, 1.0, 0.134684600),
        ("reverse_kl", 0.5, 1.0, 0.168952580),
        ("jsd", 0.5, 1.0, 0.036563507),
        ("jsd", 0.1, 1.0, 0.012283215),
        ("jsd", 0.9, 1.0, 0.014656327),
        ("tvd", 0.5, 1.0, 0.220188247),
        ("forward_kl", 0.5, 2.0, 0.156936235),
        ("forward_kl", 0.5, 4.0, 0.156155273),
        ("forward_kl", 0.5, 100.0, 0.148844425),
        ("jsd", 0.0, 1.0, 0.134684600),
        ("jsd", 1.0, 1.0, 0.168952580),
    ],
)
def test_numbers_of_the_card(divergence, beta, temperature, expected):
    found = kd_loss(S[:1], T[:1], divergence=divergence, temperature=temperature, beta=beta)
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_the_limit_of_high_temperatures():
    centred = (S - T) - (S - T).mean(-1, keepdim=True)
    expected = centred.square().sum(-1).mean() / (2 * S.size(1))
    assert kd_loss(S, T, divergence="forward_kl", temperature=1e5).item() == pytest.approx(expected.item(), abs=1e-5)


@each
def test_it_is_the_formula_by_autograd_and_the_mean_over_the_rows(divergence, beta):
    student = S.clone().requires_grad_()
    p, q = (T / 2).softmax(-1), (student / 2).softmax(-1)
    mixture = (1 - beta) * q + beta * p
    rows = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": beta * (p * (p / mixture).log()).sum(-1) + (1 - beta) * (q * (q / mixture).log()).sum(-1),
        "tvd": (p - q).abs().sum(-1) / 2,
    }[divergence]
    (expected,) = torch.autograd.grad(4 * rows.mean(), student)
    found = kd_loss(student, T, divergence=divergence, temperature=2.0, beta=beta)
    torch.testing.assert_close(found, 4 * rows.mean().detach())
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected)


@each
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradients_are_those_of_finite_differences(divergence, beta, temperature):
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, T, divergence=divergence, temperature=temperature, beta=beta),
        [S.clone().requires_grad_()],
    )


@each
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_it_is_zero_at_equality_positive_else_and_blind_to_shifts(divergence, beta, seed, shift):
    s, t = 3 * torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    named = {"divergence": divergence, "temperature": 1.5, "beta": beta, "scale_by_temperature_squared": False}
    assert kd_loss(s + shift, s, **named).item() == pytest.approx(0.0, abs=1e-12)
    found = kd_loss(s, t, **named).item()
    assert found > 0
    assert kd_loss(s + shift, t - shift, **named).item() == pytest.approx(found, rel=1e-9)
    if divergence == "jsd" and beta == 0.5:
        assert found <= math.log(2)


@each
def test_the_switch_is_a_factor_of_the_squared_temperature(divergence, beta):
    both = [
        kd_loss(S, T, divergence=divergence, temperature=3.0, beta=beta, scale_by_temperature_squared=on).item()
        for on in (True, False)
    ]
    assert both[0] == pytest.approx(9 * both[1])


@each
def test_what_both_exclude_changes_nothing(divergence, beta):
    banned = torch.full((2, 2), -math.inf, dtype=torch.float64)
    student = torch.cat([S, banned], 1).requires_grad_()
    named = {"divergence": divergence, "temperature": 2.0, "beta": beta}
    found = kd_loss(student, torch.cat([T, banned], 1), **named)
    assert found.item() == pytest.approx(kd_loss(S, T, **named).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.isfinite().all() and not gradient[:, 4:].any()


def test_a_teacher_that_excludes_what_the_student_does_not():
    teacher = torch.tensor([[1.0, 0.0, -math.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    for divergence in ("forward_kl", "jsd", "tvd"):
        found = kd_loss(student, teacher, divergence=divergence, temperature=1.0)
        assert found.isfinite() and torch.autograd.grad(found, student)[0].isfinite().all()
    assert kd_loss(student, teacher, divergence="reverse_kl", temperature=1.0).item() == math.inf


@each
def test_no_logits_are_too_large(divergence, beta):
    grid = torch.tensor([-1e4, 0.0, 1e4])
    student, teacher = (part.reshape(-1, 3) for part in torch.meshgrid(*[grid] * 6, indexing="ij")[:1] * 2)
    rows = torch.cartesian_prod(grid, grid, grid)
    student = rows.repeat_interleave(27, 0).requires_grad_()
    teacher = rows.repeat(27, 1)
    found = kd_loss(student, teacher, divergence=divergence, temperature=1.0, beta=beta)
    assert found.isfinite() and torch.autograd.grad(found, student)[0].isfinite().all()


@each
def test_half_precision_is_only_how_the_logits_are_stored(divergence, beta):
    generator = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(4, 4096, generator=generator)
    t = s + 0.3 * torch.randn(4, 4096, generator=generator)
    s, t = s.bfloat16(), t.bfloat16()
    named = {"divergence": divergence, "temperature": 1.0, "beta": beta}
    found = kd_loss(s, t, **named)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(kd_loss(s.double(), t.double(), **named).item(), rel=1e-4)


def test_the_end_points_of_jsd_are_no_limits(caplog):
    values = [kd_loss(S, T, divergence="jsd", temperature=1.0, beta=beta).item() for beta in (1e-6, 1 - 1e-6)]
    kl = [kd_loss(S, T, divergence=name, temperature=1.0).item() for name in ("forward_kl", "reverse_kl")]
    assert values == pytest.approx([1e-6 * value for value in kl], rel=1e-4)


def test_a_small_beta_is_warned_about(monkeypatch):
    from hf_logits.trainers import logit_distillation

    said = []
    monkeypatch.setattr(logit_distillation.logger, "warning_once", said.append)
    for beta in (0.0, 0.04, 0.05, 1.0):
        kd_loss(S, T, divergence="jsd", temperature=1.0, beta=beta)
    assert len(said) == 1 and "beta=0.04" in said[0]


def test_bad_input_of_the_formula():
    for named, match in (
        ({"divergence": "kl"}, "divergence must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"beta": 1.5}, "beta must be"),
    ):
        with pytest.raises(ValueError, match=match):
            kd_loss(S, T, **({"divergence": "forward_kl", "temperature": 1.0} | named))
    with pytest.raises(ValueError, match="one shape"):
        kd_loss(S, T[:, :3], divergence="forward_kl", temperature=1.0)


@pytest.mark.parametrize("setting", ["temperature", "beta", "kd_weight", "ce_weight"])
def test_bad_settings(setting, tmp_path):
    with pytest.raises(ValueError, match=setting):
        arguments(LogitDistillationConfig, tmp_path, **{setting: -1.0})
    with pytest.raises(ValueError, match="divergence"):
        arguments(LogitDistillationConfig, tmp_path, divergence="kl")


# --- the trainer ---------------------------------------------------------------------------------------------------------


def expected_loss(trainer, kind, data, *, temperature, ce_weight):
    """Row by row, from each model's logits of the whole batch."""
    batch = trainer.data_collator(list(data))
    found, count = 0.0, 0
    labels = batch["labels"]
    with torch.no_grad():
        student, teacher = (model.eval()(**batch).logits.double() for model in (trainer.model, trainer.teacher))
    for i in range(len(labels)):
        for j in range(labels[i].numel()):
            if labels.dim() == 1:
                label, place = int(labels[i]), (i,)
            elif kind in ("causal_lm", "softcapped", "gpt2"):
                if j + 1 == labels.size(1):
                    continue
                label, place = int(labels[i, j + 1]), (i, j)
            else:
                label, place = int(labels[i, j]), (i, j)
            if label == -100:
                continue
            s, t = student[place], teacher[place]
            p = (t / temperature).softmax(-1)
            kl = (p * (p.log() - (s / temperature).log_softmax(-1))).sum() * temperature**2
            found += kl.item() - ce_weight * s.log_softmax(-1)[label].item()
            count += 1
    return found / count


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_what_is_predicted(kind, tmp_path):
    data = KINDS[kind][1](5, seed=4)
    trainer = build(
        tmp_path, kind=kind, data=data, evaluation=data, temperature=2.0, ce_weight=0.5, per_device_eval_batch_size=5,
        per_device_train_batch_size=5, learning_rate=0.0, max_steps=1,
    )  # fmt: skip
    expected = expected_loss(trainer, kind, data, temperature=2.0, ce_weight=0.5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["causal_lm", "image_classification"])
def test_a_weight_of_zero_is_training_on_labels(kind, tmp_path):
    from transformers import Trainer, TrainingArguments

    build_model, dataset = KINDS[kind]
    common = {"optim": "sgd", "learning_rate": 1e-2}
    ours = build(tmp_path, kind=kind, kd_weight=0.0, ce_weight=1.0, fused_head=False, **common)
    stock = Trainer(
        build_model(0), arguments(TrainingArguments, tmp_path, **common), train_dataset=dataset(),
        data_collator=collator(kind) or ours.data_collator,
    )  # fmt: skip
    ours.train()
    stock.train()
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    assert distance(weights(ours), weights(stock)) < 1e-6


def test_a_student_that_is_its_teacher_stays(tmp_path):
    build_model = KINDS["causal_lm"][0]
    trainer = build(tmp_path, teacher=build_model(0), optim="sgd", learning_rate=1.0, max_steps=1)
    start = weights(trainer)
    trainer.train()
    assert distance(start, weights(trainer)) < 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_the_student_comes_nearer(divergence, tmp_path):
    trainer = build(tmp_path, divergence=divergence, temperature=2.0, learning_rate=1e-2, max_steps=20)
    trainer.train()
    found = logged(trainer, "distillation/divergence")
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    assert not equal(weights(trainer), dict(trainer.teacher.named_parameters()))
