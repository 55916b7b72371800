"""Methods that look at more than one row's logits, through heads that see a few rows at a time: all logits at once are the judge.

Started with `accelerate launch`, this file is also the program that trains every method in two processes.
"""

import math
import os
import sys
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import distilling
import hf_logits.trainers
import tiny
from distilling import KINDS, LargestOf
from hf_logits.fused_head import fused_loss
from hf_logits.trainers import binary_kl_norm_loss
from launching import LAUNCH, leave, run
from preferences import distance, logged, weights
from two_rows import gradient, has_right_gradient, random


METHODS = {
    "dual": ("DualHeadDistillation", {"auxiliary_weight": 0.7, "ce_weight": 0.5}),
    "low_rank": ("DualHeadDistillation", {"head": "low_rank", "head_width": 3, "normalise": True}),
    "sinkhorn": ("SinkhornDistillation", {"max_tokens": 7, "top_k": 3}),
    "sinkhorn_of_all": ("SinkhornDistillation", {"sinkhorn_weight": 2.0, "official_scale": True}),
    "uskd": ("USKD", {"mu": 0.5, "beta": 0.5, "rank_limit": 9}),
    "uskd_official": ("USKD", {"alpha": 3.0, "ranking": "official", "weak_layer": 0}),
}
STEEP = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}
TAUGHT = ("dual", "low_rank", "sinkhorn")
MODELS = [("causal_lm", False), ("causal_lm", True), ("seq2seq", False), ("bart", True), ("masked_lm", False)]

methods = pytest.mark.parametrize("method", METHODS)


@cache
def rows_of(kind, rows=8, seed=0):
    return KINDS[kind][1](rows, seed)


def make(method, folder, kind="causal_lm", **settings):
    name, own = METHODS[method]
    trainer, config = (getattr(hf_logits.trainers, f"{name}{part}") for part in ("Trainer", "Config"))
    settings = {"chunk_size": 3, "data": rows_of(kind), **own, **settings}
    return distilling.make(trainer, config, folder, kind=kind, **settings)


def both(method, folder, **settings):
    """Through the fused head, which must do, and with all logits at once."""
    return [make(method, folder, fused_head=fused, **settings) for fused in (True, False)]


def slopes(trainer, batch):
    """Of a batch in float64: the loss, and the gradient of each weight."""
    trainer.model.double().zero_grad()
    if trainer.teacher is not None:
        trainer.teacher.double()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    return loss.item(), found


def check_same(fused, dense, kind="causal_lm"):
    batch = fused.data_collator(list(rows_of(kind, 6, seed=5)))
    (loss, found), (expected, exact) = slopes(fused, batch), slopes(dense, batch)
    assert fused._fused and not dense._fused
    assert loss == pytest.approx(expected, rel=1e-6) and loss != 0
    assert found.keys() == exact.keys()
    for name, one in exact.items():
        # T5's keys have no bias: what is left of such a gradient is rounding
        assert (found[name] - one).norm() <= 1e-6 * one.norm() + 1e-12, name
    assert all(one.dtype == torch.float64 for one in exact.values())
    return exact


@pytest.mark.parametrize(
    ("method", "kind", "lora"),
    [(method, *model) for method in METHODS for model in MODELS if "_o" not in method or model == ("causal_lm", True)],
)
def test_losses_and_gradients_are_those_of_all_logits_at_once(method, kind, lora, tmp_path):
    pair = both(method, tmp_path, kind=kind, lora=lora)
    exact = check_same(*pair, kind)
    if method in ("dual", "low_rank"):
        assert any("distillation_head" in name and one.abs().max() > 0 for name, one in exact.items())
    if lora and kind == "causal_lm":
        assert any("lm_head.lora_A" in name and one.abs().max() > 0 for name, one in exact.items())


@pytest.mark.parametrize("method", TAUGHT)
def test_the_disabled_adapter_teaches(method, tmp_path):
    """Its head has an adapter too, and is read before the student's."""
    pair = both(method, tmp_path, lora=True, disabled_adapter_teacher=True)
    check_same(*pair)


@pytest.mark.parametrize("method", TAUGHT)
@pytest.mark.parametrize("sizes", [(64, 72), (72, 64)], ids=str)
def test_padding_of_a_vocabulary_is_no_token(method, sizes, tmp_path):
    pair = [
        make(
            method, tmp_path, fused_head=fused, model=tiny.llama(0, vocab_size=sizes[0]),
            teacher=tiny.llama(1, vocab_size=sizes[1]),
        )
        for fused in (True, False)
    ]  # fmt: skip
    check_same(*pair)
    assert pair[0].classes == 64


@pytest.mark.parametrize("method", ["dual", "sinkhorn", "uskd"])
@pytest.mark.parametrize("free", [{}, {"disabled_adapter_teacher": True}], ids=["model", "adapter"])
def test_a_head_that_peft_has_copied(method, free, tmp_path):
    pair = []
    for fused in (True, False):
        copied = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        student = get_peft_model(tiny.llama(0), copied)
        student.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
        free = free if method in TAUGHT else {}
        pair.append(make(method, tmp_path, fused_head=fused, model=student, **free))
    exact = check_same(*pair)
    assert any("modules_to_save" in name and one.abs().max() > 0 for name, one in exact.items())


@pytest.mark.parametrize("method", ["dual", "sinkhorn", "uskd"])
@pytest.mark.parametrize(("kind", "lora"), [("causal_lm", True), ("seq2seq", False), ("masked_lm", False)])
def test_training_and_evaluation_are_those_of_all_logits_at_once(method, kind, lora, tmp_path):
    settings = STEEP | {"gradient_accumulation_steps": 2, "kind": kind, "lora": lora}
    fused, dense = both(method, tmp_path, evaluation=rows_of(kind, 5, seed=2), **settings)
    start, before = weights(fused), [trainer.evaluate() for trainer in (fused, dense)]
    fused.train()
    dense.train()
    moved = distance(start, weights(fused))
    assert moved > 1e-5 and distance(weights(fused), weights(dense)) < 1e-3 * moved
    for key in ("loss", *(f"distillation/{name}" for name in fused.meter_names())):
        assert logged(fused, key) == pytest.approx(logged(dense, key), rel=1e-4), key
        if f"eval_{key}" in before[1]:
            assert before[0][f"eval_{key}"] == pytest.approx(before[1][f"eval_{key}"], rel=1e-4), key


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_are_asked_for_come_with_the_same_loss(method, tmp_path):
    trainer = make(method, tmp_path, fused_head=True)
    batch = trainer.data_collator(list(rows_of("causal_lm", 4)))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert outputs.logits.shape[:2] == batch["labels"].shape
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["dual", "sinkhorn", "uskd"])
def test_autocast_is_near(method, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = make(method, tmp_path, learning_rate=0.0, max_steps=1, bf16=bf16)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@methods
def test_a_batch_without_rows_has_zero_gradients_for_every_weight(method, tmp_path):
    for trainer in both(method, tmp_path):
        batch = trainer.data_collator(list(rows_of("causal_lm", 2)))
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        reached = {name for name, value in trainer.model.named_parameters() if value.grad is not None}
        trainer.model.zero_grad()
        batch["labels"] = torch.full_like(batch["labels"], -100)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
        assert loss.item() == 0.0 and found.keys() == reached and not any(one.any() for one in found.values())


@pytest.mark.parametrize("method", ["dual", "low_rank"])
def test_an_auxiliary_loss_that_has_stopped_leaves_zeros_for_its_head(method, tmp_path):
    for trainer in both(method, tmp_path, auxiliary_epochs=0.0):
        batch = trainer.data_collator(list(rows_of("causal_lm", 4)))
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        assert all(not one.grad.any() for one in trainer._extra.parameters())
        assert trainer.model.lm_head.weight.grad.any()


@methods
def test_no_tensor_of_all_rows_times_the_vocabulary_is_made(method, tmp_path):
    settings = {"model": tiny.llama(0, vocab_size=1024), "chunk_size": 4, "max_steps": 1}
    if method in TAUGHT or "sinkhorn" in method:
        settings["teacher"] = tiny.llama(1, vocab_size=1024)
    if "sinkhorn" in method:
        settings["max_tokens"] = 20
    trainer = make(method, tmp_path, fused_head=True, **settings)
    batch = trainer.data_collator(list(rows_of("causal_lm", 32)))
    rows = int((batch["labels"][:, 1:] != -100).sum())
    trainer.compute_loss(trainer.model, dict(batch))  # the first call tries the heads out
    with LargestOf(1024) as fused:
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    # the weights have 32 columns, and of each of the 32 sequences one position is seen
    assert 32 <= fused.rows <= 33 and rows > 100
    trainer._fused = False
    with LargestOf(1024) as dense:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert dense.rows >= rows


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"head": "nonlinear"}, "all tokens of a batch"), ({"gradient_alignment": True}, "two losses apart")],
)
def test_what_needs_all_tokens_at_once_says_so(settings, reason, tmp_path, caplog):
    with pytest.raises(ValueError, match=reason):
        make("dual", tmp_path, fused_head=True, **settings)
    trainer = make("dual", tmp_path, max_steps=1, **settings)
    assert not trainer._fused
    trainer.train()
    assert make("dual", tmp_path, fused_head=True, auxiliary_weight=0.0, **settings)._fused


def test_a_low_rank_head_is_small_and_trained(tmp_path):
    trainer = make("low_rank", tmp_path, fused_head=True)
    before = [one.detach().clone() for one in trainer._extra.parameters()]
    assert [tuple(one.shape) for one in before] == [(3, 32), (tiny.VOCAB, 3), (tiny.VOCAB,)]
    trainer.train()
    assert not any(map(torch.equal, before, trainer._extra.parameters()))


def test_rows_that_are_compared_get_their_gradient_beside_the_others():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, 11, dtype=torch.float64)
    hidden, labels = torch.randn(10, 5, dtype=torch.float64, generator=generator).requires_grad_(), torch.arange(10)
    chosen = torch.tensor([7, 0, 4])

    def rowwise(student, teacher, labels):
        loss = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
        return loss, {"ce": loss.detach()}

    def compare(student, teacher, labels):
        loss = torch.cdist(student, student).square().sum() * labels[0]
        return loss, {"apart": loss.detach()}

    wanted = [hidden, *head.parameters()]
    logits = head(hidden)
    expected = rowwise(logits, None, labels)[0] + compare(logits[chosen], None, labels[chosen])[0]
    exact = torch.autograd.grad(expected, wanted)
    found, sums = fused_loss(hidden, head, labels, rowwise, chunk_size=4, between=(chosen, compare))
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(sums["ce"] + sums["apart"], expected.detach())
    torch.testing.assert_close(torch.autograd.grad(found, wanted), exact)


def test_leaves_whose_gradient_is_one_tensor_are_added_up_apart():
    hidden, labels = random(6, 3), torch.arange(6) % 3
    first, second = (random(3, seed=seed).requires_grad_() for seed in (1, 2))

    def loss(student, teacher, labels):
        return torch.nn.functional.cross_entropy(student, labels, reduction="sum"), {}

    def head(rows):
        return rows + (first + second)

    exact = torch.autograd.grad(loss(head(hidden), None, labels)[0], [first, second])
    found, _ = fused_loss(hidden, head, labels, loss, chunk_size=2)
    torch.testing.assert_close(torch.autograd.grad(found, [first, second]), exact)


@pytest.mark.parametrize("method", ["dual", "sinkhorn", "uskd"])
def test_gradient_checkpointing_changes_nothing(method, tmp_path):
    pair = [make(method, tmp_path, fused_head=True, gradient_checkpointing=on, **STEEP) for on in (False, True)]
    start = weights(pair[0])
    for trainer in pair:
        trainer.train()
    assert distance(*map(weights, pair)) < 1e-4 * distance(start, weights(pair[0]))


# --- logits on one scale -------------------------------------------------------------------------------------------------


def test_normalised_rows_have_neither_shift_nor_scale():
    s, t = random(4, 7), random(4, 7, seed=1)
    loss = binary_kl_norm_loss(s, t, temperature=2.0, normalise=True)
    for other in (
        binary_kl_norm_loss(3 * s + 1, t - 4, temperature=2.0, normalise=True),
        binary_kl_norm_loss(s, 10 * t, temperature=2.0, normalise=True, center=True),
        binary_kl_norm_loss(
            *((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) for x in (s, t)),
            temperature=2.0,
        ),
    ):
        torch.testing.assert_close(other, loss)
    assert binary_kl_norm_loss(2 * t, t, temperature=2.0, normalise=True).item() < 1e-12
    assert not torch.allclose(loss, binary_kl_norm_loss(s, t, temperature=2.0))


def test_normalised_gradients_are_those_of_finite_differences():
    def loss(s):
        return binary_kl_norm_loss(s, 9 * random(4, 5, seed=1), temperature=0.7, normalise=True)

    assert has_right_gradient(loss, 3 * random(4, 5))
    # orthogonal to shifts and to the row itself, neither of which it sees
    at = random(4, 5)
    slope = gradient(loss, at)
    assert slope.sum(-1).abs().max() < 1e-9 and (slope * at).sum(-1).abs().max() < 1e-9


def test_normalised_rows_without_a_scale_are_finite():
    t = random(2, 4, seed=1)
    flat = torch.zeros(2, 4, dtype=torch.float64)
    slope = gradient(lambda s: binary_kl_norm_loss(s, t, temperature=1.0, normalise=True), flat)
    assert slope.isfinite().all() and slope.abs().max() > 0
    assert binary_kl_norm_loss(flat, flat, temperature=1.0, normalise=True).item() == 0.0


def test_banned_classes_are_no_part_of_the_scale():
    s, t = (
        x.masked_fill(torch.tensor([False, True, False, False, False]), -math.inf)
        for x in (random(3, 5), random(3, 5, seed=1))
    )
    kept = [0, 2, 3, 4]

    def loss(s, t):
        return binary_kl_norm_loss(s, t, temperature=1.0, normalise=True)

    torch.testing.assert_close(loss(s, t), loss(s[:, kept], t[:, kept]))
    assert gradient(lambda x: loss(x, t), s).isfinite().all()


# --- two processes -------------------------------------------------------------------------------------------------------

SPREAD = STEEP | {"gradient_accumulation_steps": 2}
"""Of a batch of one each: some methods compare the rows of a process, so that only the head may differ."""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(__file__, folder, folder=folder, launch=LAUNCH)
    return folder


@pytest.mark.parametrize("method", ["dual", "sinkhorn", "uskd"])
def test_two_processes_do_the_same_with_either_head(method, two_processes, tmp_path):
    fused, dense = (load_file(two_processes / f"{method}-{on}.safetensors") for on in (True, False))
    start = weights(make(method, tmp_path))
    losses = [found.pop("losses").tolist() for found in (fused, dense)]
    moved = distance(start, dense)
    assert moved > 1e-5 and distance(fused, dense) < 1e-3 * moved
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_second_head_learns_in_two_processes_what_it_learns_in_one(two_processes, tmp_path):
    one = make("dual", tmp_path, per_device_train_batch_size=2, **SPREAD)
    start = weights(one)
    one.train()
    found = load_file(two_processes / "dual-True.safetensors")
    assert found.pop("losses").tolist() == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert distance(found, weights(one)) < 1e-3 * distance(start, weights(one))


def train_in_two(folder: str) -> None:
    for method in ("dual", "sinkhorn", "uskd"):
        for trainer, on in zip(
            both(method, os.path.join(folder, "run"), per_device_train_batch_size=1, **SPREAD),
            (True, False),
            strict=True,
        ):
            assert trainer.accelerator.num_processes == 2
            trainer.train()
            losses = torch.tensor(logged(trainer, "loss"))
            if trainer.accelerator.is_main_process:
                save_file(weights(trainer) | {"losses": losses}, os.path.join(folder, f"{method}-{on}.safetensors"))
    leave()


if __name__ == "__main__":
    train_in_two(sys.argv[1])
