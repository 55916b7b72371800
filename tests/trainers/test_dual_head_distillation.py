"""Dual-head distillation: the log-cosh loss, the projection, and the head that comes and goes."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

import distilling
import tiny
from hf_logits.tasks import valid_rows
from hf_logits.trainers.dual_head_distillation import (
    DualHeadDistillationConfig,
    DualHeadDistillationTrainer,
    binary_kl_norm_loss,
    project_gradient,
)
from hf_logits.trainers.logit_distillation import LogitDistillationConfig, LogitDistillationTrainer
from preferences import arguments, distance, equal, logged, weights
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


# --- the trainer ---------------------------------------------------------------------------------------------------------


def decoder(seed=0):
    """Reads every token with its head, and takes the last."""
    made = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=tiny.VOCAB, num_labels=distilling.CLASSES, **tiny._SMALL, **tiny._IDS)
    )
    return distilling._spread(made, seed)


def make(folder, kind="sequence_classification", **settings):
    settings = {"per_device_train_batch_size": 8} | settings
    if kind in distilling.LANGUAGE:
        settings = {"fused_head": False} | settings
    return distilling.make(DualHeadDistillationTrainer, DualHeadDistillationConfig, folder, kind=kind, **settings)


def features(trainer, inputs, kind):
    model = trainer.model
    if kind == "sequence_classification":
        return model.bert(**inputs).pooler_output
    if kind == "image_classification":
        return model.vit(**inputs).last_hidden_state[:, 0]
    if kind == "token_classification":
        return model.bert(**inputs).last_hidden_state
    return model.model(**inputs).last_hidden_state


@pytest.mark.parametrize(
    "kind", ["sequence_classification", "token_classification", "image_classification", "causal_lm"]
)
def test_the_loss_is_cross_entropy_and_that_of_the_second_head(kind, tmp_path):
    trainer = make(tmp_path, kind, auxiliary_weight=0.3)
    (batch,) = list(trainer.get_train_dataloader())
    inputs, wanted, _ = trainer._split(dict(batch))
    model = trainer.model.eval()
    (s, y), (t, _) = (valid_rows(one(**inputs).logits, wanted) for one in (model, trainer.teacher))
    auxiliary, _ = valid_rows(model.distillation_head(features(trainer, inputs, kind)), wanted)
    language = kind == "causal_lm"
    second = binary_kl_norm_loss(auxiliary, t, temperature=2.0, center=language, mean_over_classes=language)
    expected = torch.nn.functional.cross_entropy(s, y) + 0.3 * second
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_decoder_reads_what_its_classifier_read_at_the_token_that_counts(tmp_path):
    trainer = make(tmp_path, model=decoder(), teacher=decoder(1), ce_weight=0.0)
    (batch,) = list(trainer.get_train_dataloader())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model = trainer.model.eval()
    hidden, mask = model.model(**inputs).last_hidden_state, inputs["attention_mask"]
    ends = (torch.arange(mask.size(1)) * mask).argmax(-1)  # whichever side is padded
    last = hidden[torch.arange(len(hidden)), ends]
    expected = binary_kl_norm_loss(model.distillation_head(last), trainer.teacher(**inputs).logits, temperature=2.0)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layers", [["query", "classifier"], "all-linear"], ids=["named", "all"])
def test_the_head_beside_an_adapted_classifier_reads_what_that_reads(layers, tmp_path):
    student = get_peft_model(distilling.sequence_classification(0), LoraConfig(r=4, target_modules=layers))
    trainer = make(tmp_path, model=student)
    assert trainer._extra.in_features == 32
    trainer.train()


def test_a_decoder_whose_classifier_is_adapted_reads_the_token_that_counts(tmp_path):
    student = get_peft_model(decoder(), LoraConfig(r=4, target_modules=["q_proj", "score"]))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    trainer = make(tmp_path, model=student, teacher=decoder(1), ce_weight=0.0)
    (batch,) = list(trainer.get_train_dataloader())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model, mask = trainer.model.eval().get_base_model(), inputs["attention_mask"]
    ends = (torch.arange(mask.size(1)) * mask).argmax(-1)
    last = model.model(**inputs).last_hidden_state[torch.arange(len(mask)), ends]
    expected = binary_kl_norm_loss(model.distillation_head(last), trainer.teacher(**inputs).logits, temperature=2.0)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
@pytest.mark.parametrize("alignment", [False, True], ids=["plain", "aligned"])
def test_a_weight_of_zero_is_the_cross_entropy_bit_for_bit(kind, alignment, tmp_path):
    ours = make(tmp_path, kind, auxiliary_weight=0.0, gradient_alignment=alignment)
    ours.train()
    stock = distilling.make(
        LogitDistillationTrainer, LogitDistillationConfig, tmp_path, kind=kind, kd_weight=0.0, ce_weight=1.0,
        per_device_train_batch_size=8, **({"fused_head": False} if kind == "causal_lm" else {}),
    )  # fmt: skip
    stock.train()
    assert equal(weights(ours), weights(stock))


def test_the_second_head_takes_no_random_numbers(tmp_path):
    """With a vanishing weight, and dropout in the student, the trajectory is that of the cross-entropy."""
    ours = make(tmp_path, auxiliary_weight=1e-30, optim="sgd", max_grad_norm=0.0)
    ours.train()
    stock = make(tmp_path, auxiliary_weight=0.0, optim="sgd", max_grad_norm=0.0)
    stock.train()
    kept = {name: value for name, value in weights(ours).items() if "distillation_head" not in name}
    assert equal(kept, weights(stock))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_head_is_trained_resumed_with_its_statistics_and_not_saved(lora, tmp_path):
    settings = {"head": "nonlinear", "head_width": 6, "save_strategy": "steps", "save_steps": 2, "lora": lora}
    unbroken = make(tmp_path / "a", max_steps=4, **settings)
    start = [parameter.detach().clone() for parameter in unbroken._extra.parameters()]
    unbroken.train()
    assert not any(map(torch.equal, start, unbroken._extra.parameters()))
    broken = make(tmp_path / "b", max_steps=2, **settings)
    broken.train()
    resumed = make(tmp_path / "b", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))
    assert all(torch.equal(a, b) for a, b in zip(unbroken._extra.buffers(), resumed._extra.buffers(), strict=True))
    resumed.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "b" / "checkpoint-4"):
        (saved,) = (path for path in folder.glob("*.safetensors") if "teacher" not in path.name)
        assert not any("distillation_head" in name for name in load_file(saved))
    kept = load_file(tmp_path / "b" / "checkpoint-4" / "teacher.safetensors")
    assert any("distillation_head" in name for name in kept)


def test_the_auxiliary_loss_stops(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4}
    trainer = make(tmp_path, auxiliary_epochs=1.0, max_steps=4, **settings)
    trainer.train()
    found = logged(trainer, "distillation/auxiliary")
    assert min(found[:2]) > 0 and found[2:] == [0.0, 0.0]
    assert logged(trainer, "loss")[3] == pytest.approx(logged(trainer, "distillation/cross_entropy")[3], rel=1e-3)
    stopped = make(tmp_path, auxiliary_epochs=0.0, **settings)
    stopped.train()
    plain = make(tmp_path, auxiliary_weight=0.0, **settings)
    plain.train()
    kept = {name: value for name, value in weights(stopped).items() if "distillation_head" not in name}
    assert equal(kept, weights(plain))


def aligned_by_hand(trainer, batch):
    """Both gradients of a step, and what a step down their aligned sum changes."""
    inputs, wanted, _ = trainer._split(dict(batch))
    model = trainer.model.train()
    s, y = valid_rows(model(**inputs).logits, wanted)
    with torch.no_grad():
        t = trainer.teacher(**inputs).logits
    auxiliary = model.distillation_head(model.bert(**inputs).pooler_output)
    losses = torch.nn.functional.cross_entropy(s, y), 5.0 * binary_kl_norm_loss(auxiliary, t, temperature=2.0)
    found = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True) for one in losses
    ]
    return [
        [torch.zeros_like(p) if g is None else g for g, p in zip(gs, model.parameters(), strict=True)] for gs in found
    ]


def still(seed=0):
    return distilling.sequence_classification(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


ALIGNED = {
    "gradient_alignment": True,
    "auxiliary_weight": 5.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
}


def test_aligned_gradients_by_hand(tmp_path):
    trainer = make(tmp_path, model=still(), max_steps=1, **ALIGNED)
    (batch,) = list(trainer.get_train_dataloader())
    g0, g1 = (torch.cat([g.flatten() for g in gs]) for gs in aligned_by_hand(trainer, batch))
    dot = (g0 * g1).sum()
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    expected = g0 + g1 - dot.clamp(max=0) / g0.square().sum() * g0
    assert ((before - after) / 0.1 - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-5


def test_alignment_changes_the_step_only_where_gradients_disagree(tmp_path):
    found = []
    for alignment in (False, True):
        trainer = make(tmp_path, model=still(), max_steps=1, **ALIGNED | {"gradient_alignment": alignment})
        (batch,) = list(trainer.get_train_dataloader())
        g0, g1 = aligned_by_hand(trainer, batch)
        dot = sum((a * b).sum() for a, b in zip(g0, g1, strict=True))
        trainer.train()
        found.append(weights(trainer))
    assert (distance(*found) > 1e-5) == (dot.item() < 0)


def test_half_a_step_of_a_run_that_broke_off_is_forgotten(tmp_path):
    class Breaks(DualHeadDistillationTrainer):
        left = 3

        def training_step(self, *given):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().training_step(*given)

    found = []
    for broken in (True, False):
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | ALIGNED
        trainer = distilling.make(
            Breaks, DualHeadDistillationConfig, tmp_path, kind="sequence_classification", model=still(), **settings
        )
        if broken:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.left = -1
        trainer.train()
        found.append(weights(trainer))
    assert equal(*found)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"head": "deep"}, "nonlinear"),
        ({"head_width": 0}, "head_width"),
        ({"auxiliary_epochs": -1.0}, "auxiliary_epochs"),
    ],
)
def test_bad_settings_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(DualHeadDistillationConfig, tmp_path, **settings)


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two rows"):
        make(tmp_path, head="nonlinear", per_device_train_batch_size=1).train()
    with pytest.raises(ValueError, match="turn torch_compile off"):
        make(tmp_path, torch_compile=True, torch_compile_backend="eager")
    student = distilling.sequence_classification()
    with pytest.raises(ValueError, match="does not know"):
        make(tmp_path, model=student, rest={"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)})
    with pytest.raises(ValueError, match="have a third"):
        settings = {"output_router_logits": True, "num_local_experts": 2, "vocab_size": tiny.VOCAB, **tiny._SMALL}
        mixtures = [MixtralForCausalLM(MixtralConfig(**settings)) for _ in range(2)]
        make(tmp_path, "causal_lm", model=mixtures[0], teacher=mixtures[1], gradient_alignment=True)
    with pytest.raises(ValueError, match="all tokens of a batch"):
        make(tmp_path, "causal_lm", fused_head=True, head="nonlinear")
