"""Sinkhorn distillation: numbers worked out by hand, autograd through all iterations as the judge, and exact transport."""

import itertools
import math

import pytest
import torch

import distilling
from hf_logits.tasks import valid_rows
from hf_logits.trainers.logit_distillation import LogitDistillationConfig, LogitDistillationTrainer
from hf_logits.trainers.sinkhorn_distillation import (
    SinkhornDistillationConfig,
    SinkhornDistillationTrainer,
    probability_distance,
    shortlist,
    sinkhorn_distance,
    sinkhorn_kd_loss,
    unrolled_sinkhorn,
)
from preferences import arguments, equal, logged, weights
from two_rows import gradient, has_right_gradient, random, student, teacher


def three_students():
    return torch.cat([student(), torch.zeros(1, 4, dtype=torch.float64)])


def three_teachers():
    return torch.cat([teacher(), torch.tensor([[1.0, 1, -1, -1]], dtype=torch.float64)])


def cost():
    return probability_distance((three_students() / 2).softmax(-1), (three_teachers() / 2).softmax(-1))


def random_cost(*shape, seed=0):
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- numbers -------------------------------------------------------------------------------------------------------------


def test_the_cost():
    expected = [[0.219786, 0.578286, 0.171657], [0.678461, 0.245506, 0.776596], [0.440402, 0.358357, 0.462117]]
    torch.testing.assert_close(cost(), cost().new_tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("epsilon", "iterations", "expected"),
    [
        (1.0, 20, 1.227338),
        (0.1, 20, 0.935396),
        (0.1, 1000, 0.935431),
        (0.05, 20, 0.885314),
        (0.05, 1000, 0.889540),
        (0.01, 20, 0.853034),
        (0.01, 1000, 0.859617),
        (0.001, 20, 0.693480),
        (0.001, 1000, 0.857454),
    ],
)
def test_distances(epsilon, iterations, expected):
    """Times 3: these were worked out for rows of mass 1."""
    found = 3 * sinkhorn_distance(cost(), epsilon=epsilon, iterations=iterations)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    judge = 3 * unrolled_sinkhorn(cost(), epsilon=epsilon, iterations=iterations)[0]
    assert judge.item() == pytest.approx(expected, abs=1e-6)


def test_the_plan():
    distance, plan = unrolled_sinkhorn(cost(), epsilon=0.1, iterations=20)
    expected = [[0.4018, 0.0013, 0.5970], [0.0986, 0.8673, 0.0339], [0.4995, 0.1314, 0.3691]]
    torch.testing.assert_close(3 * plan, plan.new_tensor(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full_like(plan[0], 1 / 3))
    frozen = gradient(lambda x: sinkhorn_distance(x, epsilon=0.1, iterations=20, stop_plan_grad=True), cost())
    torch.testing.assert_close(frozen, plan)


def loss(s, t, **settings):
    return 3 * sinkhorn_kd_loss(s, t, **{"temperature": 2.0, "epsilon": 0.1, "iterations": 20} | settings)


def test_losses():
    s, t = three_students(), three_teachers()
    assert loss(s, t, debiased=False).item() == pytest.approx(0.935396, abs=1e-6)
    assert loss(s, t).item() == pytest.approx(0.905897, abs=1e-6)
    assert loss(s, t, iterations=1000).item() == pytest.approx(0.905932, abs=1e-6)
    assert loss(t, t, debiased=False).item() == pytest.approx(0.018080, abs=1e-6)
    assert loss(s, s, debiased=False).item() == pytest.approx(0.040919, abs=1e-6)
    assert loss(t, t, debiased=False, epsilon=0.01).item() < 1e-6
    official = sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.1, iterations=20, debiased=False, official_scale=True)
    assert official.item() == pytest.approx(0.935396e-3, abs=1e-9)


def test_limits():
    exact = min(sum(cost()[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(3)))
    assert exact == pytest.approx(0.857565, abs=1e-6)
    # the gap to exact transport closes with epsilon, once it has converged
    assert 3 * sinkhorn_distance(cost(), epsilon=2e-3, iterations=3000).item() == pytest.approx(exact, abs=1e-4)
    assert sinkhorn_distance(cost(), epsilon=1e6, iterations=5).item() == pytest.approx(cost().mean().item(), abs=1e-6)
    assert 3 * cost().mean().item() == pytest.approx(1.310390, abs=1e-6)


def test_one_row_is_the_distance_of_its_probabilities():
    s, t = student()[:1], teacher()[:1]
    expected = ((s / 2).softmax(-1) - (t / 2).softmax(-1)).abs().sum()
    for debiased in (False, True):
        found = sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.1, iterations=20, debiased=debiased)
        torch.testing.assert_close(found, expected)


# --- the gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("shape", [(3, 3), (5, 8), (40, 40), (1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("iterations", [1, 2, 7, 60])
def test_gradients_are_those_of_autograd_through_all_iterations(epsilon, shape, iterations):
    settings = {"epsilon": epsilon, "iterations": iterations}
    at = random_cost(*shape)
    torch.testing.assert_close(sinkhorn_distance(at, **settings), unrolled_sinkhorn(at, **settings)[0])
    judge = gradient(lambda x: unrolled_sinkhorn(x, **settings)[0], at)
    found = gradient(lambda x: sinkhorn_distance(x, **settings), at)
    assert (found - judge).abs().max() <= 1e-9 * judge.abs().max()
    # float32 keeps up with what autograd makes of float32
    judge32 = gradient(lambda x: unrolled_sinkhorn(x, **settings)[0], at.float())
    found32 = gradient(lambda x: sinkhorn_distance(x, **settings), at.float())
    size = judge.abs().max()
    assert (found32 - judge).abs().max() <= 20 * (judge32 - judge).abs().max() + (1e-5 + 1e-6 / epsilon) * size


@pytest.mark.parametrize("iterations", [1, 3, 30])
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)])
def test_gradients_are_those_of_finite_differences(iterations, shape):
    assert has_right_gradient(lambda x: sinkhorn_distance(x, epsilon=0.3, iterations=iterations), random_cost(*shape))


@pytest.mark.parametrize("debiased", [False, True])
def test_gradients_of_the_loss_and_none_reaches_the_teacher(debiased):
    t = random(3, 4, seed=1).requires_grad_()

    def of(s):
        return sinkhorn_kd_loss(s, t.detach(), temperature=2.0, epsilon=0.3, iterations=5, debiased=debiased)

    # the diagonal of a distance to itself has a kink
    assert debiased or has_right_gradient(of, random(3, 4))
    s = random(3, 4).requires_grad_()
    sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.3, iterations=5, debiased=debiased).backward()
    assert t.grad is None and s.grad.isfinite().all()


def test_debiased_gradients_by_differences_in_one_direction():
    s, t, step = random(4, 5), random(4, 5, seed=1), random(4, 5, seed=2)

    def of(s):
        return sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.3, iterations=50)

    expected = (of(s + 1e-5 * step) - of(s - 1e-5 * step)) / 2e-5
    assert (gradient(of, s) * step).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_equality():
    s = random(6, 5)
    settings = {"temperature": 2.0, "epsilon": 0.1, "iterations": 500}
    assert sinkhorn_kd_loss(s, s, **settings).abs().item() < 1e-12
    assert gradient(lambda x: sinkhorn_kd_loss(x, s, **settings), s).abs().max() < 1e-7
    assert sinkhorn_kd_loss(s, s, debiased=False, **settings).item() > 1e-3
    assert gradient(lambda x: sinkhorn_kd_loss(x, s, debiased=False, **settings), s).abs().max() > 1e-5


@pytest.mark.parametrize("debiased", [False, True])
def test_the_order_of_the_teacher_does_not_matter(debiased):
    s, t = random(5, 4), random(5, 4, seed=1)
    settings = {"temperature": 2.0, "epsilon": 0.1, "iterations": 20, "debiased": debiased}
    torch.testing.assert_close(sinkhorn_kd_loss(s, t[[3, 1, 0, 4, 2]], **settings), sinkhorn_kd_loss(s, t, **settings))


# --- extremes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1e3])
@pytest.mark.parametrize("size", [2, 30, 256])
def test_no_epsilon_underflows_in_float32(epsilon, size):
    at = random_cost(size, size).float()
    at[0] = 2.0  # a row and a column far from all
    at[:, 0] = 2.0
    found = sinkhorn_distance(at, epsilon=epsilon, iterations=50)
    expected, _ = unrolled_sinkhorn(at.double(), epsilon=epsilon, iterations=50)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert gradient(lambda x: sinkhorn_distance(x, epsilon=epsilon, iterations=50), at).isfinite().all()


def test_certain_logits_and_half_precision():
    s = torch.tensor([[1e4, 0, -1e4], [0, -1e4, 1e4]], dtype=torch.float16)
    t = s.flip(0).flip(1)
    loss = sinkhorn_kd_loss(s, t, temperature=1.0, epsilon=0.01, iterations=20)
    assert loss.dtype == torch.float32 and loss.isfinite()
    at = gradient(lambda x: sinkhorn_kd_loss(x, t, temperature=1.0, epsilon=0.01, iterations=20), s)
    assert at.isfinite().all()
    banned = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    assert (
        gradient(lambda x: sinkhorn_kd_loss(x, banned.flip(0), temperature=1.0, epsilon=0.1, iterations=5), banned)
        .isfinite()
        .all()
    )


def test_autocast_is_kept_out():
    at = random_cost(20, 20).float()
    outside = sinkhorn_distance(at, epsilon=0.1, iterations=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn_distance(at, epsilon=0.1, iterations=20)
        slope = gradient(lambda x: sinkhorn_distance(x, epsilon=0.1, iterations=20), at)
    assert torch.equal(inside, outside)
    assert torch.equal(slope, gradient(lambda x: sinkhorn_distance(x, epsilon=0.1, iterations=20), at))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon"),
        ({"epsilon": math.inf}, ValueError, "epsilon"),
        ({"iterations": 0}, ValueError, "iterations"),
        ({"iterations": 2.5}, TypeError, "iterations"),
        ({"cost": torch.zeros(0, 3)}, ValueError, "shape"),
        ({"cost": torch.zeros(3)}, ValueError, "matrix"),
    ],
)
def test_bad_distances_are_refused(change, error, match):
    with pytest.raises(error, match=match):
        sinkhorn_distance.__wrapped__(**{"cost": cost(), "epsilon": 0.1, "iterations": 5} | change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -2.0}, "temperature"),
        ({"teacher_logits": teacher()[:1]}, "shape"),
        ({"student_logits": student()[:0], "teacher_logits": teacher()[:0]}, "row"),
    ],
)
def test_bad_losses_are_refused(change, match):
    given = {"student_logits": student(), "teacher_logits": teacher(), "temperature": 2.0, "epsilon": 0.1}
    with pytest.raises(ValueError, match=match):
        sinkhorn_kd_loss.__wrapped__(**given | {"iterations": 5} | change)


# --- the trainer ---------------------------------------------------------------------------------------------------------


def batch_of(trainer):
    (batch,) = list(trainer.get_train_dataloader())
    inputs, wanted, _ = trainer._split(dict(batch))
    with torch.no_grad():
        (s, y), (t, _) = (
            valid_rows(model(**inputs).logits, wanted) for model in (trainer.model.eval(), trainer.teacher)
        )
    return batch, s, t, y


def make(folder, kind="sequence_classification", **settings):
    settings = {"per_device_train_batch_size": 8, "fused_head": False} | settings
    return distilling.make(SinkhornDistillationTrainer, SinkhornDistillationConfig, folder, kind=kind, **settings)


@pytest.mark.parametrize("kind", ["sequence_classification", "image_classification", "token_classification"])
def test_the_loss_is_that_of_the_formula(kind, tmp_path):
    trainer = make(tmp_path, kind, kd_temperature=3.0)
    batch, s, t, y = batch_of(trainer)
    distance = sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.1, iterations=20)
    soft = -((t / 3).softmax(-1) * (s / 3).log_softmax(-1)).sum(-1).mean()
    expected = 0.1 * torch.nn.functional.cross_entropy(s, y) + 0.9 * soft + 0.8 * distance
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
    official = make(tmp_path, kind, kd_weight=0.0, ce_weight=0.0, sinkhorn_weight=1.0, official_scale=True)
    expected = distance * len(y) * 1e-3
    assert official.compute_loss(official.model.eval(), dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_language_models_compare_the_teachers_best_tokens(kind, tmp_path):
    only = {"kd_weight": 0.0, "ce_weight": 0.0, "sinkhorn_weight": 1.0}
    whole = make(tmp_path, kind, top_k=64, **only)
    batch, s, t, _ = batch_of(whole)
    expected = sinkhorn_kd_loss(s, t, temperature=2.0, epsilon=0.1, iterations=20)
    assert whole.compute_loss(whole.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-4)
    few = make(tmp_path, kind, top_k=1, max_tokens=5, **only)
    found = few.compute_loss(few.model.eval(), dict(batch))
    assert torch.equal(found, few.compute_loss(few.model, dict(batch)))  # the same tokens in the same step
    few.state.global_step = 1
    assert not torch.equal(found, few.compute_loss(few.model, dict(batch)))


def test_lumping_tokens_shortens_distances():
    s, t = random(6, 20).softmax(-1), random(6, 20, seed=1).softmax(-1)
    short = shortlist(s, t, top_k=2)
    assert (probability_distance(*short) <= probability_distance(s, t) + 1e-12).all()
    assert short[0].shape == short[1].shape and short[0].size(-1) <= 13
    torch.testing.assert_close(short[0].sum(-1), torch.ones_like(s[:, 0]))
    torch.testing.assert_close(probability_distance(*shortlist(s, t, top_k=20)), probability_distance(s, t))


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_a_weight_of_zero_leaves_the_cross_entropies_bit_for_bit(kind, tmp_path):
    found = []
    for trainer, config, settings in (
        (SinkhornDistillationTrainer, SinkhornDistillationConfig, {"sinkhorn_weight": 0.0, "kd_weight": 0.0, "ce_weight": 1.0}),
        (LogitDistillationTrainer, LogitDistillationConfig, {"kd_weight": 0.0, "ce_weight": 1.0}),
    ):  # fmt: skip
        made = distilling.make(trainer, config, tmp_path, kind=kind, fused_head=False, **settings)
        made.train()
        found.append(weights(made))
    assert equal(*found)


def test_it_learns(tmp_path):
    trainer = make(tmp_path, max_steps=20, learning_rate=3e-3)
    trainer.train()
    distances = logged(trainer, "distillation/sinkhorn")
    assert distances[-1] < distances[0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"kd_temperature": -1.0}, "kd_temperature"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"iterations": 0}, "iterations"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"sinkhorn_weight": -1.0}, "sinkhorn_weight"),
    ],
)
def test_bad_settings_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(SinkhornDistillationConfig, tmp_path, **settings)
