"""Losses through heads that see a few rows at a time: all logits at once are the judge."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

import tiny
from distilling import KINDS, LANGUAGE, LargestOf, adapted, make, texts
from hf_logits.fused_head import Head, fused_log_probs, fused_loss, inside
from hf_logits.trainers import LogitDistillationConfig, LogitDistillationTrainer
from hf_logits.trainers.logit_distillation import kd_rows
from preferences import distance, logged, weights


def build(folder, **settings):
    return make(LogitDistillationTrainer, LogitDistillationConfig, folder, **settings)


def inputs(kind, data=None):
    """Of a model, with what is to be predicted."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, kind=kind)
    batch = trainer.data_collator(list(KINDS[kind][1](4)))
    return trainer._split(batch)[:2]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", LANGUAGE)
def test_the_head_alone_gives_the_models_logits(kind, lora):
    model = KINDS[kind][0](0)
    model = adapted(model, kind) if lora else model
    given, _ = inputs(kind)
    head = Head(model)
    with torch.no_grad():
        expected = model(**given).logits
        with head.spared() as seen:
            short = model(**given).logits
        (hidden,) = seen
        found = head(hidden.flatten(0, 1)).view_as(expected)
        again = model(**given).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(short, expected[:, :1])
    assert torch.equal(again, expected)
    assert head.has_adapter() == (lora and kind == "causal_lm")


def loss(student, teacher, labels):
    kl = kd_rows(student, teacher, divergence="forward_kl", temperature=2.0).sum()
    ce = functional.cross_entropy(student, labels, reduction="sum")
    return kl + 0.5 * ce, {"kl": kl.detach()}


def problem(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=bias, dtype=dtype)
    teacher = torch.nn.Linear(7, 11, dtype=dtype).requires_grad_(False)
    for parameter in (*head.parameters(), *teacher.parameters()):
        parameter.data.normal_(generator=generator)
    hidden, taught = (torch.randn(10, size, dtype=dtype, generator=generator) for size in (5, 7))
    return hidden.requires_grad_(), head, torch.arange(10), taught, teacher


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 100])
def test_gradients_are_those_of_all_logits_at_once(chunk_size):
    hidden, head, labels, taught, teacher = problem()
    wanted = [hidden, *head.parameters()]
    expected, sums = loss(head(hidden), teacher(taught), labels)
    gradients = torch.autograd.grad(3 * expected, wanted)
    found, logged_sums = fused_loss(
        hidden, head, labels, loss, chunk_size=chunk_size, teacher_hidden=taught, teacher_head=teacher
    )
    torch.testing.assert_close(found.double(), expected.detach())
    torch.testing.assert_close(logged_sums, sums)
    for one, other in zip(torch.autograd.grad(3 * found, wanted), gradients, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_float32_is_near_double_precision():
    """A vocabulary of SmolLM2's size."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"student": 48, "teacher": 64}
    weights = {name: torch.randn(49_152, size, generator=generator) / size**0.5 for name, size in sizes.items()}
    given = {name: 2 * torch.randn(40, size, generator=generator) for name, size in sizes.items()}
    labels = torch.randint(49_152, (40,), generator=generator)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        hidden, weight = (one["student"].to(dtype).requires_grad_() for one in (given, weights))
        taught, teacher = (one["teacher"].to(dtype) for one in (given, weights))
        if dtype == torch.float64:
            value = loss(hidden @ weight.T, taught @ teacher.T, labels)[0]
        else:
            value, _ = fused_loss(
                hidden, lambda rows, weight=weight: rows @ weight.T, labels, loss,
                chunk_size=16, teacher_hidden=taught, teacher_head=lambda rows, teacher=teacher: rows @ teacher.T,
            )  # fmt: skip
        gradients.append(torch.autograd.grad(value, [hidden, weight]))
    for exact, found in zip(*gradients, strict=True):
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()


def test_gradients_are_those_of_finite_differences():
    """`gradcheck` differentiates a graph more than once, which this one does not allow."""
    hidden, head, labels, taught, teacher = problem()
    inputs = [hidden, *head.parameters()]
    directions = [torch.randn_like(one) for one in inputs]

    def value(step):
        moved = [(one + step * way).detach().requires_grad_() for one, way in zip(inputs, directions, strict=True)]

        def call(rows):
            return functional.linear(rows, *moved[1:])

        found, _ = fused_loss(moved[0], call, labels, loss, chunk_size=4, teacher_hidden=taught, teacher_head=teacher)
        return found, moved

    slope = (value(1e-6)[0] - value(-1e-6)[0]).item() / 2e-6
    found, leaves = value(0.0)
    gradients = torch.autograd.grad(found, leaves)
    assert sum((g * way).sum().item() for g, way in zip(gradients, directions, strict=True)) == pytest.approx(slope)


class FourBit(torch.nn.Module):
    """A weight of sixteen levels, two in a byte. Like bitsandbytes' on some CPUs, it forgets how to backpropagate when it is read
    while evaluating."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.abs().amax(-1, keepdim=True) / 7
        levels = (weight / scale).round().clamp(-7, 7).add(8).to(torch.uint8)
        self.register_buffer("packed", levels[:, ::2] * 16 + levels[:, 1::2])
        self.register_buffer("scale", scale)
        self.lost = False

    def forward(self, hidden):
        self.lost |= not self.training and not hidden.requires_grad
        levels = torch.stack([self.packed // 16, self.packed % 16], -1).flatten(1).float() - 8
        logits = functional.linear(hidden, levels * self.scale)
        return logits.detach() if self.lost else logits


def test_a_model_that_goes_past_its_backbone_says_so(tmp_path):
    settings = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, **tiny._IDS}
    config = OPTConfig(num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32, dropout=0.0, **settings)
    trainer = build(tmp_path, model=OPTForCausalLM(config), fused_head=True, max_steps=1)
    with pytest.raises(ValueError, match="OPTForCausalLM does not call its OPTModel as a whole"):
        trainer.train()
    build(tmp_path, model=OPTForCausalLM(config), fused_head=False, max_steps=1).train()


def test_a_4_bit_head_is_right(tmp_path):
    found, settings = [], {"chunk_size": 3, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    for fused in (True, False):
        student, teacher = tiny.llama(0), tiny.llama(1)
        for model in (student, teacher):
            model.lm_head = FourBit(model.lm_head.weight.detach())
        lora = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.1, generator=generator)
        trainer = build(tmp_path, model=lora, teacher=teacher, fused_head=fused, **settings)
        start = weights(trainer)
        trainer.train()
        found.append((weights(trainer), logged(trainer, "loss")))
    assert distance(start, found[1][0]) > 1e-3
    assert distance(*(one for one, _ in found)) < 1e-6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_what_is_frozen_gets_no_gradient_and_no_room():
    hidden, head, labels, taught, teacher = problem()
    head.weight.requires_grad_(False)
    found, _ = fused_loss(hidden, head, labels, loss, chunk_size=4, teacher_hidden=taught, teacher_head=teacher)
    found.backward()
    assert head.weight.grad is None and head.bias.grad is not None and hidden.grad is not None
    hidden, head, labels, taught, teacher = problem()
    found, _ = fused_loss(
        hidden.detach(), head, labels, loss, chunk_size=4, teacher_hidden=taught, teacher_head=teacher
    )
    found.backward()
    assert hidden.grad is None and head.weight.grad is not None


def test_without_gradients_it_is_a_number():
    hidden, head, labels, taught, teacher = problem()
    with torch.no_grad():
        found, _ = fused_loss(hidden, head, labels, loss, chunk_size=4, teacher_hidden=taught, teacher_head=teacher)
    assert not found.requires_grad


def test_it_can_be_differentiated_once():
    hidden, head, labels, taught, teacher = problem()
    found, _ = fused_loss(hidden, head, labels, loss, chunk_size=4, teacher_hidden=taught, teacher_head=teacher)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        found.backward()


def test_gradients_of_many_chunks_add_up_in_float32():
    hidden, head, labels, taught, teacher = problem()
    exact, _ = loss(head(hidden), teacher(taught), labels)
    exact.backward()
    low = torch.nn.Linear(5, 11, dtype=torch.bfloat16)
    low.load_state_dict(head.state_dict())
    small = hidden.detach().bfloat16().requires_grad_()
    found, _ = fused_loss(
        small, low, labels, loss, chunk_size=1, teacher_hidden=taught.bfloat16(), teacher_head=teacher.bfloat16()
    )
    found.backward()
    assert low.weight.grad.dtype == torch.bfloat16
    assert (low.weight.grad - head.weight.grad).norm() < 0.02 * head.weight.grad.norm()


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 100])
def test_log_probs_of_chunks_are_those_of_all_logits(chunk_size):
    """Under a loss that looks at several rows at once."""
    hidden, head, labels, _, _ = problem()
    wanted, formed = [hidden, *head.parameters()], []

    def counted(rows):
        formed.append(len(rows))
        return head(rows)

    dense = -functional.cross_entropy(head(hidden), labels, reduction="none")
    found = fused_log_probs(hidden, counted, labels, chunk_size=chunk_size)
    torch.testing.assert_close(found, dense)
    one, other = (torch.autograd.grad(x.view(2, 5).sum(1).softmax(0)[0], wanted) for x in (found, dense))
    torch.testing.assert_close(one, other)
    assert max(formed) <= chunk_size and sum(formed) == 20  # formed again on the way back
    with torch.no_grad():
        assert torch.equal(fused_log_probs(hidden, counted, labels, chunk_size=chunk_size), found)
    nothing = fused_log_probs(hidden[:0], head, labels[:0], chunk_size=chunk_size)
    assert nothing.shape == (0,)


def test_log_probs_of_half_precision_are_in_float32():
    hidden, head, labels, _, _ = problem()
    low = torch.nn.Linear(5, 11, dtype=torch.bfloat16)
    low.load_state_dict(head.state_dict())
    found = fused_log_probs(hidden.detach().bfloat16(), low, labels, chunk_size=3)
    assert found.dtype == torch.float32
    exact = fused_log_probs(hidden, head, labels, chunk_size=3)
    torch.testing.assert_close(found.double(), exact, atol=0.1, rtol=0.02)


def test_no_tensor_of_all_rows_times_the_vocabulary_is_made(tmp_path):
    models = {"model": tiny.llama(0, vocab_size=1024), "teacher": tiny.llama(1, vocab_size=1024)}
    trainer = build(tmp_path, **models, data=texts(16), chunk_size=4, max_steps=1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    rows = int((batch["labels"][:, 1:] != -100).sum())
    trainer.compute_loss(trainer.model, batch)  # the first call tries the heads out
    with LargestOf(1024) as largest:
        trainer.compute_loss(trainer.model.train(), batch).backward()
    # the weight itself has 32 columns, and of each of the 16 sequences one position is seen
    assert 16 <= largest.rows <= 32 < rows


def test_a_call_in_the_place_of_a_forward():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args) + 1

    linear = torch.nn.Linear(2, 2)
    value = torch.ones(2)
    assert inside(Wrapper(linear), linear, lambda x: linear(x), value).equal(linear(value) + 1)
    assert "forward" not in linear.__dict__
    linear.forward = lambda x: 2 * x
    assert inside(Wrapper(linear), linear, lambda x: linear(x), value).equal(2 * value + 1)
    assert linear(value).equal(2 * value)


# --- in training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_fused_and_dense_training_are_the_same(divergence, kind, lora, tmp_path):
    settings = {"ce_weight": 0.5, "temperature": 2.0, "optim": "sgd", "learning_rate": 1e-2, "chunk_size": 3}
    settings |= {"kind": kind, "lora": lora, "divergence": divergence, "evaluation": KINDS[kind][1](5, seed=2)}
    fused, dense = (build(tmp_path, fused_head=on, **settings) for on in (True, False))
    start = weights(fused)
    before = [trainer.evaluate() for trainer in (fused, dense)]
    fused.train()
    dense.train()
    moved = distance(start, weights(fused))
    assert moved > 1e-5 and distance(weights(fused), weights(dense)) < 1e-3 * moved
    assert logged(fused, "loss") == pytest.approx(logged(dense, "loss"), rel=1e-5)
    for key in ("loss", *(f"distillation/{name}" for name in ("divergence", "agreement", "student_entropy"))):
        assert before[0][f"eval_{key}"] == pytest.approx(before[1][f"eval_{key}"], rel=1e-5)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda s: next(iter(s)))
def test_fused_under_autocast_and_checkpointing(settings, tmp_path):
    common = {"optim": "sgd", "learning_rate": 1e-2, "chunk_size": 3, "ce_weight": 0.5} | settings
    fused, dense = (build(tmp_path, fused_head=on, **common) for on in (True, False))
    start = weights(fused)
    fused.train()
    dense.train()
    assert distance(weights(fused), weights(dense)) < 2e-2 * distance(start, weights(fused))


def test_a_head_that_does_not_stand_alone_is_found_out(tmp_path):
    class Neighbourly(type(tiny.llama())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            output.logits = output.logits + output.logits.mean(dim=(0, 1), keepdim=True) * output.logits.size(0)
            return output

    student = tiny.llama(0)
    student.__class__ = Neighbourly
    trainer = build(tmp_path, model=student, max_steps=1)
    trainer.train()
    assert not trainer._fused
    with pytest.raises(ValueError, match="more than the hidden state"):
        build(tmp_path, model=student, fused_head=True, max_steps=1).train()


def test_what_has_no_fused_head_says_so(tmp_path):
    with pytest.raises(ValueError, match="few classes"):
        build(tmp_path, kind="image_classification", fused_head=True)
