"""GeDi's training: numbers worked out by hand, what both ends of lambda are, and a guide that learns and then steers.

Started with `accelerate launch`, this file is also the program that trains in two processes.
"""

import math
import random
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import tiny
from distilling import LargestOf
from hf_logits.control_codes import ControlCodeCollator
from hf_logits.guides import guide_settings
from hf_logits.processors import GeDiLogitsProcessor
from hf_logits.trainers.gedi import (
    GeDiConfig,
    GeDiTrainer,
    gedi_class_logits,
    gedi_discriminative_loss,
    gedi_generative_loss,
    gedi_loss,
    gedi_topics,
)
from launching import LAUNCH, leave, run
from oracles import word_tokenizer
from preferences import Stop, StopAt, arguments, distance, equal, logged, weights


CODES = ["bad", "good", "true", "false", "sport", "news", "food"]
GOOD, BAD = range(12, 36), range(36, 60)
"""The words of either class."""


# --- the formula ---------------------------------------------------------------------------------------------------------


def sums():
    """Of two texts behind two codes, with their lengths and labels."""
    nll = torch.tensor([[[1, 2, 1.5], [1.5, 2.5, 2]], [[2, 1, 0], [0.5, 1, 0]]], dtype=torch.float64)
    return -nll.sum(-1), torch.tensor([3, 2]), torch.tensor([0, 1])


@pytest.mark.parametrize(("scale", "discriminative", "total"), [(1.0, 0.430474, 0.986095), (3.0, 0.150810, 0.930162)])
def test_numbers(scale, discriminative, total):
    assert gedi_generative_loss(*sums()).tolist() == [1.5, 0.75]
    assert gedi_discriminative_loss(*sums(), scale=scale).mean().item() == pytest.approx(discriminative, abs=1e-6)
    assert gedi_loss(*sums(), generative_weight=0.8, scale=scale).item() == pytest.approx(total, abs=1e-6)


def random_sums(texts=5, codes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (texts,), generator=generator)
    log_probs = -3 * torch.rand(texts, codes, dtype=torch.float64, generator=generator) * lengths[:, None]
    return log_probs, lengths, torch.randint(0, codes, (texts,), generator=generator)


@pytest.mark.parametrize("length_normalise", [True, False])
def test_three_classes_equal_a_loop(length_normalise):
    log_probs, lengths, labels = random_sums()
    bias = torch.tensor([0.3, -0.2, 0.1]).double()
    expected = 0.0
    for row, n, own in zip(log_probs.tolist(), lengths.tolist(), labels.tolist(), strict=True):
        logits = [
            1.7 * value / (n if length_normalise else 1) + b for value, b in zip(row, bias.tolist(), strict=True)
        ]
        posterior = math.exp(logits[own]) / sum(map(math.exp, logits))
        expected += (0.3 * -row[own] / n + 0.7 * -math.log(posterior)) / 5
    found = gedi_loss(
        log_probs, lengths, labels, generative_weight=0.3, scale=1.7, bias=bias, length_normalise=length_normalise
    )
    assert found.item() == pytest.approx(expected)


def test_the_ends_of_lambda_are_the_two_losses():
    given = random_sums()
    both = [gedi_loss(*given, generative_weight=weight, scale=2.0) for weight in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(both[0], gedi_discriminative_loss(*given, scale=2.0).mean())
    torch.testing.assert_close(both[2], gedi_generative_loss(*given).mean())
    torch.testing.assert_close(both[1], (both[0] + both[2]) / 2)


def test_the_posterior_is_the_one_that_the_processor_uses():
    from hf_logits.processors.gedi import class_log_posterior

    log_probs, lengths, _ = random_sums(codes=2)
    bias = torch.tensor([0.4, -0.4]).double()
    last = -torch.rand(2, 5, 1, dtype=torch.float64)
    ours = gedi_class_logits(log_probs + last[..., 0].T, lengths + 1, scale=1.3, bias=bias).log_softmax(-1)[:, 0]
    theirs = class_log_posterior(last, log_probs.T, lengths, scale=1.3, bias=bias, length_normalise=True)
    torch.testing.assert_close(ours, theirs[:, 0])


def test_the_generative_loss_reaches_the_own_code_alone():
    log_probs, lengths, labels = random_sums()
    log_probs.requires_grad_()
    gedi_generative_loss(log_probs, lengths, labels).sum().backward()
    expected = torch.zeros(5, 3).double().scatter(1, labels[:, None], -1 / lengths[:, None].double())
    torch.testing.assert_close(log_probs.grad, expected)


@pytest.mark.parametrize("length_normalise", [True, False])
def test_gradients_are_those_of_finite_differences(length_normalise):
    log_probs, lengths, labels = random_sums()

    def loss(x, scale, bias):
        settings = {"generative_weight": 0.4, "length_normalise": length_normalise}
        return gedi_loss(x, lengths, labels, scale=scale, bias=bias, **settings)

    given = log_probs, torch.tensor(1.3).double(), torch.tensor([0.3, 0.0, -0.5]).double()
    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in given])


def test_a_factor_on_all_classes_says_nothing_about_them():
    log_probs, lengths, labels = random_sums()
    shifted = log_probs - 50.0 * lengths[:, None]
    torch.testing.assert_close(
        gedi_discriminative_loss(log_probs, lengths, labels), gedi_discriminative_loss(shifted, lengths, labels)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_log_prob_is_too_large(dtype):
    grid = torch.tensor([-1e5, -1.0, 0.0], dtype=dtype)
    log_probs = torch.cartesian_prod(grid, grid).requires_grad_()
    for normalise in (True, False):
        loss = gedi_loss(
            log_probs,
            torch.arange(9),  # an empty text too
            torch.arange(9) % 2,
            generative_weight=0.5,
            scale=30.0,
            length_normalise=normalise,
        )
        assert loss.dtype == torch.float32 and loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert gradient.isfinite().all()


def test_bad_shapes_and_weights_are_refused():
    log_probs, lengths, labels = random_sums()
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="generative_weight"):
            gedi_loss(log_probs, lengths, labels, generative_weight=weight)
    for given in (
        (log_probs[:, :1], lengths, labels),
        (log_probs, lengths[:2], labels),
        (log_probs, lengths, labels[:2]),
    ):
        with pytest.raises(ValueError, match="codes >= 2"):
            gedi_loss.__wrapped__(*given, generative_weight=0.5)
    with pytest.raises(ValueError, match="lengths"):
        gedi_class_logits.__wrapped__(log_probs, lengths[:2], scale=1.0)


# --- data ----------------------------------------------------------------------------------------------------------------


def words(bos=False):
    """A word is a token: the codes are 4 to 10."""
    return word_tokenizer(CODES, bos=bos)


def sentence(rng, kind, fewest=2, most=6):
    return " ".join(f"w{rng.choice(kind)}" for _ in range(rng.randint(fewest, most)))


def rated(rows=8, seed=0, fewest=2, most=6):
    """Good and bad texts in turns, which have no word in common."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"text": sentence(rng, GOOD if i % 2 else BAD, fewest, most), "label": i % 2} for i in range(rows)]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_by_hand(side):
    tokenizer = words()
    tokenizer.padding_side = side
    batch = ControlCodeCollator(tokenizer, ["bad", "good"])(
        [{"text": "w20 w21 w22", "label": 1}, {"text": "w40", "label": "bad"}]
    )
    assert batch["classes"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [
        [[4, 20, 21, 22, 2], [5, 20, 21, 22, 2]],
        [[4, 40, 2, 0, 0], [5, 40, 2, 0, 0]],
    ]
    assert batch["labels"][:, 0].tolist() == [[-100, 20, 21, 22, 2], [-100, 40, 2, -100, -100]]
    assert torch.equal(batch["labels"][:, 0], batch["labels"][:, 1])
    assert batch["attention_mask"][:, 0].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_bos_secondary_code_and_no_end():
    collator = ControlCodeCollator(words(bos=True), ["true", "false"], append_eos=False)
    batch = collator([{"text": "w20 w21", "label": True, "secondary_code": "sport news"}])
    assert batch["input_ids"].tolist() == [[[1, 6, 8, 9, 20, 21], [1, 7, 8, 9, 20, 21]]]
    assert batch["labels"][0, 0].tolist() == [-100, -100, 8, 9, 20, 21]
    plain = collator([{"text": "w20", "label": 0, "secondary_code": None}])
    assert plain["input_ids"][0, 0].tolist() == [1, 6, 20]


def test_a_text_that_is_cut_has_no_end():
    collator = ControlCodeCollator(words(), ["bad", "good"], max_length=5)
    for count, expected in ((3, [4, 20, 20, 20, 2]), (4, [4, 20, 20, 20, 20]), (9, [4, 20, 20, 20, 20])):
        assert collator([{"text": "w20 " * count, "label": 0}])["input_ids"][0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("codes", "settings", "row", "match"),
    [
        (["bad"], {}, None, "two or more"),
        (["bad", "bad good"], {}, None, "different first tokens"),
        (["bad", ""], {}, None, "no tokens"),
        (["bad", "unheard"], {}, None, "unknown to the tokenizer"),
        (["bad", "good"], {}, {"text": " ", "label": 0}, "no tokens"),
        (["bad", "good"], {}, {"text": "w20", "label": 0, "secondary_code": " "}, "no tokens"),
        (["bad", "good"], {}, {"text": "w20", "label": 0, "secondary_code": "unheard"}, "unknown"),
        (["bad", "good"], {}, {"text": "w20", "label": 2}, "from 0 to 1"),
        (["bad", "good"], {}, {"text": "w20", "label": -1}, "from 0 to 1"),
        (["bad", "good"], {}, {"text": "w20", "label": "sport"}, r"\['bad', 'good'\]"),
        (["bad", "good"], {"max_length": 4}, {"text": "w20", "label": 0, "secondary_code": "w20 w20 w20"}, "no room"),
    ],
)
def test_what_cannot_be_read_is_refused(codes, settings, row, match):
    with pytest.raises(ValueError, match=match):
        ControlCodeCollator(words(), codes, **settings)([row])


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="append_eos=False"):
        ControlCodeCollator(tokenizer, ["bad", "good"])
    ControlCodeCollator(tokenizer, ["bad", "good"], append_eos=False)


def about(rows=12):
    """Texts about three topics, each with a third of the words."""
    rng, topics = random.Random(0), ["sport", "news", "food"]
    return Dataset.from_list(
        [
            {"text": sentence(rng, range(12 + 16 * (i % 3), 28 + 16 * (i % 3))), "topic": topics[i % 3]}
            for i in range(rows)
        ]
    )


def test_topics_are_told_true_from_false():
    rows = about().add_column("other", list(range(12)))
    made = gedi_topics(rows)
    assert made.column_names == ["text", "secondary_code", "label"]
    assert len(made) == 24
    for row, (true, false) in zip(rows, zip(*[iter(made)] * 2, strict=True), strict=True):
        assert true == {"text": row["text"], "secondary_code": row["topic"], "label": "true"}
        assert false["text"] == row["text"] and false["label"] == "false"
        assert false["secondary_code"] in {"sport", "news", "food"} - {row["topic"]}
    assert len(set(made[1::2]["secondary_code"])) == 3
    assert made[:] == gedi_topics(rows)[:]
    assert made[:] != gedi_topics(rows, seed=1)[:]
    stream = gedi_topics(rows.to_iterable_dataset(), topics=["food", "news", "sport"])
    assert list(stream) == list(made)


def test_topics_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="'topic'"):
        gedi_topics(rated())
    with pytest.raises(ValueError, match="two are needed"):
        gedi_topics(about().filter(lambda row: row["topic"] == "sport"))
    with pytest.raises(ValueError, match="Row 2 has the topic 'food'"):
        gedi_topics(about(), topics=["sport", "news"])
    with pytest.raises(ValueError, match="give topics"):
        gedi_topics(about().to_iterable_dataset())


# --- the trainer ---------------------------------------------------------------------------------------------------------


def still_gpt2(seed=0):
    return tiny.gpt2(seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


MODELS = {"llama": tiny.llama, "gpt2": still_gpt2, "tied": tiny.tied_llama}
STEEP = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2, "max_grad_norm": 0.0}


def adapted(model, *, head=False):
    made = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", *(["lm_head"] if head else [])])
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return made


def make(
    folder: Path | str,
    *,
    model: Any = None,
    data: Any = None,
    evaluation: Any = None,
    lora: bool = False,
    tokenizer: Any = None,
    callbacks: Any = None,
    **settings: Any,
) -> Any:
    model = tiny.llama(0) if model is None else model
    return GeDiTrainer(
        adapted(model) if lora else model,
        arguments(GeDiConfig, folder, **({"codes": ["bad", "good"], "learn_bias": True} | settings)),
        train_dataset=rated() if data is None else data,
        eval_dataset=evaluation,
        processing_class=words() if tokenizer is None else tokenizer,
        callbacks=callbacks,
    )


def slow_sums(model, batch):
    """Each text behind each code by itself, without padding, and how long it is."""
    found, lengths = [], []
    for rows, masks, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        for ids, mask, wanted in zip(rows, masks, labels, strict=True):
            ids, wanted = ids[mask.bool()], wanted[mask.bool()]
            said = model(ids[None]).logits[0].log_softmax(-1)
            found.append(sum(said[i, ids[i + 1]] for i in range(len(ids) - 1) if wanted[i + 1] != -100))
        lengths.append(int((wanted != -100).sum()))
    return torch.stack(found).view(len(lengths), -1), torch.tensor(lengths)


@pytest.mark.parametrize(("kind", "lora"), [*((kind, False) for kind in MODELS), ("llama", True)])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
def test_the_loss_and_its_gradient_are_those_of_the_formula(kind, lora, fused, tmp_path):
    trainer = make(
        tmp_path, model=adapted(MODELS[kind](0), head=True) if lora else MODELS[kind](0), fused_head=fused, chunk_size=5, per_device_train_batch_size=6, generative_weight=0.6,
    )  # fmt: skip
    model, head = trainer.model.train(), trainer._extra
    head.scale.data.fill_(1.7)
    head.bias.data.copy_(torch.tensor([0.2, -0.3]))
    (batch, *_) = list(trainer.get_train_dataloader())
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    slow, lengths = slow_sums(model, batch)
    expected = gedi_loss(slow, lengths, batch["classes"], generative_weight=0.6, scale=head.scale, bias=head.bias)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=1e-3)


@contextmanager
def reading(model):
    """The shapes of all that a model's backbone reads."""
    shapes = []

    def note(body, given, named, output):
        if named["input_ids"] is not None:  # the head alone reads none
            shapes.append(named["input_ids"].shape)

    hook = model.model.register_forward_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def test_one_forward_reads_all_codes_and_gives_both_losses(tmp_path):
    trainer = make(tmp_path, codes=["bad", "good", "news"], per_device_train_batch_size=4)
    (batch, *_) = list(trainer.get_train_dataloader())
    trainer.compute_loss(trainer.model.train(), dict(batch))  # tries the head first
    with reading(trainer.model) as shapes:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert [len(shape) for shape in shapes] == [2] and shapes[0][0] == 12


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_made(tmp_path):
    model = tiny.llama(0, vocab_size=1024)
    trainer = make(tmp_path, model=model, data=rated(16), chunk_size=4, per_device_train_batch_size=16)
    (batch,) = list(trainer.get_train_dataloader())
    trainer.compute_loss(trainer.model.train(), dict(batch))
    with LargestOf(1024) as largest:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    # the weight itself has 32 columns, and of each of the 32 rows one position is seen
    assert largest.rows == 32 < (batch["labels"] != -100).sum() / 4


def test_lambda_of_one_is_the_host_on_codes_and_texts(tmp_path):
    """Up to how the host averages, over tokens: so with texts of one length."""
    data, tokenizer = rated(fewest=4, most=4), words()
    ours = make(tmp_path / "ours", data=data, generative_weight=1.0, learn_bias=False, **STEEP)
    start = weights(ours)

    def ids(row):
        body = [*tokenizer(row["text"])["input_ids"], 2]
        return {
            "input_ids": [4 + row["label"], *body],
            "labels": [-100, *body],
            "attention_mask": [1] * (len(body) + 1),
        }

    stock = Trainer(
        tiny.llama(0),
        arguments(TrainingArguments, tmp_path / "stock", **STEEP),
        train_dataset=data.map(ids, remove_columns=["text", "label"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    with reading(ours.model) as shapes:
        ours.train()
    stock.train()
    found = weights(ours)
    assert found.pop("distillation_head.scale").item() == 1.0
    start.pop("distillation_head.scale")
    assert distance(start, found) > 1e-3
    assert distance(found, weights(stock)) < 1e-6
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    assert logged(ours, "gedi/generative") == pytest.approx(logged(ours, "loss"), rel=1e-5)
    assert {shape[0] for shape in shapes} == {2}  # no other code is read


def test_lambda_of_zero_is_classification_alone(tmp_path):
    trainer = make(tmp_path, generative_weight=0.0, per_device_train_batch_size=8)
    (batch,) = list(trainer.get_train_dataloader())
    slow, lengths = slow_sums(trainer.model, batch)
    expected = cross_entropy(slow / lengths[:, None], batch["classes"])
    assert trainer.compute_loss(trainer.model.train(), dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_accumulation_cuts_a_step_as_it_likes(lora, tmp_path):
    found, losses, start = [], [], weights(make(tmp_path, lora=lora, **STEEP))
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make(
            tmp_path, lora=lora, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **STEEP
        )
        trainer.train()
        found.append(weights(trainer))
        losses.append(logged(trainer, "loss"))
    moved = distance(start, found[0])
    assert moved > 1e-3
    assert distance(found[0], found[1]) < 1e-4 * moved
    assert distance(found[0], found[2]) < 1e-4 * moved
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) == losses[2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind, side, tmp_path):
    tokenizer = words()
    tokenizer.padding_side = side
    found = []
    for rows in (1, 8):
        trainer = make(
            tmp_path, model=MODELS[kind](0), tokenizer=tokenizer, evaluation=rated(8, seed=3), per_device_eval_batch_size=rows
        )  # fmt: skip
        found.append(trainer.predict(rated(8, seed=3)))
    torch.testing.assert_close(*(torch.tensor(one.predictions) for one in found), atol=1e-5, rtol=1e-5)
    assert found[0].metrics["test_loss"] == pytest.approx(found[1].metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(lora, tmp_path):
    settings = {"lora": lora, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "lr_scheduler_type": "linear", "scale_learning_rate": 0.1}
    unbroken = make(tmp_path / "unbroken", **settings)
    unbroken.train()
    killed = make(tmp_path / "killed", save_strategy="steps", callbacks=[StopAt(5)], **settings)
    with pytest.raises(Stop):
        killed.train()
    resumed = make(tmp_path / "killed", save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))
    assert logged(unbroken, "loss") == logged(resumed, "loss")
    assert unbroken.guide_record() == resumed.guide_record()
    assert abs(unbroken.guide_record()["scale"] - 1) > 0.01
    assert unbroken.guide_record()["bias"]["good"] != 0
    folder = tmp_path / "killed" / "checkpoint-6"
    assert guide_settings(folder, desired="good") == resumed.guide_settings("good")
    (saved,) = (path for path in folder.glob("*.safetensors") if "gedi" not in path.name)
    assert not any("distillation_head" in name for name in load_file(saved))


def test_bf16_is_near_float32(tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = make(tmp_path, bf16=bf16, learning_rate=0.0, max_steps=1)
        trainer.train()
        losses.append([logged(trainer, f"gedi/{key}")[0] for key in ("generative", "discriminative")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)


def test_gradient_checkpointing_and_evaluation_change_nothing(tmp_path):
    trainers = [
        make(tmp_path / "plain", **STEEP),
        make(tmp_path / "checkpointed", gradient_checkpointing=True, **STEEP),
        make(tmp_path / "watched", evaluation=rated(4, seed=3), eval_strategy="steps", eval_steps=1, **STEEP),
    ]
    for trainer in trainers:
        trainer.train()
    assert distance(*map(weights, trainers[:2])) < 1e-6
    assert equal(weights(trainers[0]), weights(trainers[2]))


def test_evaluation_says_how_often_the_code_is_told(tmp_path):
    data = rated(7, seed=3)
    trainer = make(tmp_path, evaluation=data, per_device_eval_batch_size=3)
    found, said = trainer.evaluate(), trainer.predict(data)
    assert said.predictions.shape == (7, 2)
    assert said.label_ids.tolist() == [0, 1, 0, 1, 0, 1, 0]
    right = (said.predictions.argmax(-1) == said.label_ids).mean()
    assert found["eval_gedi/accuracy"] == pytest.approx(right)
    expected = 0.8 * found["eval_gedi/generative"] + 0.2 * found["eval_gedi/discriminative"]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_gedi/scale"] == 1.0


def test_scale_and_bias_have_a_rate_of_their_own_and_can_be_left(tmp_path):
    moved = []
    for settings in (
        {},
        {"scale_learning_rate": 0.3},
        {"learn_scale": False},
        {"learn_scale": False, "learn_bias": False},
    ):
        trainer = make(tmp_path, max_steps=1, weight_decay=0.1, **settings)
        trainer.train()
        record = trainer.guide_record()
        moved.append((abs(record["scale"] - 1), abs(record["bias"]["good"]) if record["bias"] else None))
    assert moved[0] == pytest.approx((1e-3, 1e-3), rel=1e-2)
    assert moved[1] == pytest.approx((0.3, 0.3), rel=1e-2)
    assert moved[2] == (0.0, pytest.approx(1e-3, rel=1e-2))
    assert moved[3] == (0.0, None)


def test_the_best_checkpoint_comes_back_with_its_scale(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_gedi/generative",
        "greater_is_better": True,
        "scale_learning_rate": 0.5,
    }
    # the less it has learned, the better: the first checkpoint is the best
    trainer = make(tmp_path, evaluation=rated(4, seed=3), **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert trainer.guide_settings("good") == guide_settings(best, desired="good")
    assert guide_settings(best.with_name("checkpoint-3"), desired="good")["scale"] != trainer.guide_record()["scale"]


def test_a_stream_is_data_like_any_other(tmp_path):
    found = []
    for data in (rated(), rated().to_iterable_dataset()):
        trainer = make(tmp_path, data=data, train_sampling_strategy="sequential")
        trainer.train()
        found.append(weights(trainer))
    assert equal(*found)
    with pytest.raises(ValueError, match="Row 1 of the train_dataset dataset: the label"):
        make(tmp_path, data=rated().map(lambda row: {"label": 5 * row["label"]}).to_iterable_dataset()).train()


def test_texts_of_like_length_can_share_a_batch(tmp_path):
    data = rated(64, fewest=2, most=9).map(lambda row: {"length": len(row["text"].split())})
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = make(tmp_path, data=data, train_sampling_strategy=strategy, per_device_train_batch_size=4)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padding[strategy] = sum(int((mask == 0).sum()) for mask in masks)
    assert padding["group_by_length"] < padding["random"] / 2


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_guide_goes_to_the_hub_with_a_card(hub, tmp_path):
    trainer = make(tmp_path / "run", max_steps=1, hub_model_id="tester/guide")
    trainer.train()
    trainer.push_to_hub()
    card = hub.repos["tester/guide"].files["README.md"].decode()
    for part in ("trained with GeDi", "2009.06367", trainer._paper["citation"], *trainer._tag_names):
        assert part in card
    loaded = AutoModelForCausalLM.from_pretrained("tester/guide")
    theirs = {name: value.detach() for name, value in loaded.named_parameters()}
    ours = {name: value for name, value in weights(trainer).items() if "distillation_head" not in name}
    assert equal(ours, theirs)
    assert guide_settings("tester/guide", desired="bad") == trainer.guide_settings("bad")
    assert not hub.unknown


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"codes": []}, "two or more"),
        ({"codes": ["good"]}, "two or more"),
        ({"codes": ["good", "good"]}, "two or more"),
        ({"generative_weight": 1.5}, "generative_weight"),
        ({"scale_learning_rate": -1.0}, "scale_learning_rate"),
        ({"max_length": 3}, "max_length"),
    ],
)
def test_bad_settings_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(GeDiConfig, tmp_path, **({"codes": ["bad", "good"]} | settings))


def test_what_cannot_be_trained_is_refused(tmp_path):
    rows = rated().to_list()
    for fault, match in (
        ({"label": 2}, "1 of the 8 rows .* from 0 to 1"),
        ({"label": None}, "not one of"),
        ({"text": " "}, "the text is empty"),
        ({"text": None}, "the text is empty"),
    ):
        with pytest.raises(ValueError, match=match):
            make(tmp_path, data=Dataset.from_list([*rows[:7], rows[7] | fault]))
        with pytest.raises(ValueError, match=match):
            make(tmp_path, evaluation={"held out": Dataset.from_list([*rows[:7], rows[7] | fault])})
    with pytest.raises(ValueError, match="are good: there is nothing to tell it from"):
        make(tmp_path, data=Dataset.from_list(rows[1::2]))
    with pytest.raises(ValueError, match="'label'"):
        make(tmp_path, data=rated().remove_columns("label"))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        make(tmp_path, model=tiny.llama(0, vocab_size=5))
    with pytest.raises(ValueError, match="causal language model"):
        make(tmp_path, model=tiny.t5(0))
    with pytest.raises(TypeError, match="GeDiConfig"):
        GeDiTrainer(tiny.llama(0), arguments(TrainingArguments, tmp_path), processing_class=words())
    with pytest.raises(ValueError, match="tokenizer"):
        GeDiTrainer(tiny.llama(0), arguments(GeDiConfig, tmp_path, codes=["bad", "good"]))
    with pytest.raises(ValueError, match="learns without a teacher"):
        make(tmp_path, lora=True, disabled_adapter_teacher=True)
    with pytest.raises(ValueError, match="no control code 'sport'"):
        make(tmp_path).guide_settings("sport")


# --- it learns, and it steers --------------------------------------------------------------------------------------------


def share(main, processor, kind):
    """Of the words that follow prompts of both kinds, those of one."""
    prompts = torch.tensor([[14, 40], [41, 15], [20, 50], [55, 30]])
    processors = [] if processor is None else [processor]
    torch.manual_seed(0)
    out = main.generate(
        prompts.repeat(8, 1),
        attention_mask=torch.ones(32, 2, dtype=torch.long),
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
        logits_processor=processors,
    )
    new = out[:, 2:]
    new = new[(new >= GOOD.start) & (new < BAD.stop)]
    return ((new >= kind.start) & (new < kind.stop)).float().mean().item()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_guide_learns_two_classes_and_steers_to_either(lora, tmp_path):
    settings = {
        "max_steps": 70 if lora else 50,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lora": lora,
    }
    trainer = make(tmp_path, data=rated(160), evaluation=rated(40, seed=9), scale_learning_rate=0.05, **settings)
    before = trainer.evaluate()["eval_gedi/accuracy"]
    trainer.train()
    after = trainer.evaluate()
    assert before < 0.8
    assert after["eval_gedi/accuracy"] > 0.97
    assert after["eval_gedi/scale"] > 1.1
    main, tokenizer = tiny.llama(7), words()
    plain = share(main, None, GOOD)
    wanted = [
        share(main, GeDiLogitsProcessor(trainer.model, strength=strength, **trainer.guide_settings("good")), GOOD)
        for strength in (1.0, 30.0)
    ]
    assert plain + 0.1 < wanted[0] < wanted[1]
    assert wanted[1] > plain + 0.25
    unwanted = GeDiLogitsProcessor(trainer.model, **trainer.guide_settings("bad"))
    assert share(main, unwanted, GOOD) < plain - 0.15
    # as somebody else loads it
    trainer.save_model(str(tmp_path / "guide"))
    loaded = tiny.llama(0)
    loaded = (
        PeftModel.from_pretrained(loaded, tmp_path / "guide")
        if lora
        else AutoModelForCausalLM.from_pretrained(tmp_path / "guide")
    )
    settings = guide_settings(tmp_path / "guide", desired="good")
    again = GeDiLogitsProcessor(loaded, strength=30.0, **settings)
    assert settings["scale"] == trainer._extra.scale.item()
    assert share(main, again, GOOD) == wanted[1]
    # and as a recipe
    again.save_pretrained(tmp_path / "recipe")
    recipe = GeDiLogitsProcessor.from_pretrained(tmp_path / "recipe", tokenizer=tokenizer)
    assert share(main, recipe, GOOD) == wanted[1]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length_normalise", [True, False])
def test_the_processor_sees_the_classes_as_training_did(bos, length_normalise, tmp_path):
    """For every candidate, the posterior of the text with it: same codes, tokens, lengths, scale and bias."""
    tokenizer, ends = words(bos=bos), ["w30", "w41", "sport"]
    rows = [{"text": f"w20 w50 w14 {end}", "label": 0, "secondary_code": "news food"} for end in ends]
    codes = ["false", "true", "bad"]
    trainer = make(
        tmp_path, tokenizer=tokenizer, codes=codes, append_eos=False, length_normalise=length_normalise, per_device_eval_batch_size=2
    )  # fmt: skip
    trainer._extra.scale.data.fill_(1.7)
    trainer._extra.bias.data.copy_(torch.tensor([0.2, -0.3, 0.5]))
    expected = torch.tensor(trainer.predict(Dataset.from_list(rows)).predictions).log_softmax(-1)[:, 1]
    settings = {"secondary_code": "news food", "tokenizer": tokenizer, "strength": 1.0, "filter_p": 0.0}
    processor = GeDiLogitsProcessor(trainer.model, **trainer.guide_settings("true"), **settings)
    ids = torch.tensor([tokenizer("w20 w50 w14")["input_ids"]])
    found = processor(ids, torch.zeros(1, tiny.VOCAB))[0, [30, 41, 8]]
    torch.testing.assert_close(found - found[0], expected - expected[0], atol=1e-5, rtol=0)
    assert (expected - expected[0]).abs().max() > 0.01


def test_three_classes_are_learned(tmp_path):
    topics = ["sport", "news", "food"]
    data = about(150).rename_column("topic", "label")
    trainer = make(
        tmp_path, codes=topics, data=data, evaluation=about(30).rename_column("topic", "label"), max_steps=40,
        per_device_train_batch_size=16, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_gedi/accuracy"] > 0.95
    assert len(trainer.guide_settings("news")["undesired"]) == 2


def test_topics_as_secondary_codes_are_learned_and_steer(tmp_path):
    data = gedi_topics(about(240))
    settings = {"max_steps": 80, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "generative_weight": 0.5}
    trainer = make(
        tmp_path, codes=["false", "true"], data=data, evaluation=gedi_topics(about(30), seed=5), scale_learning_rate=0.1, **settings,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_gedi/accuracy"] > 0.9
    main = tiny.llama(7)
    for topic, kind in (("sport", range(12, 28)), ("food", range(44, 60))):
        processor = GeDiLogitsProcessor(
            trainer.model, secondary_code=topic, tokenizer=words(), **trainer.guide_settings("true")
        )
        assert share(main, processor, kind) > share(main, None, kind) + 0.3


# --- two processes -------------------------------------------------------------------------------------------------------

SPREAD = STEEP | {"gradient_accumulation_steps": 2}


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    run(__file__, tmp_path, folder=tmp_path, launch=LAUNCH)
    for index, weight in enumerate((0.6, 1.0)):
        one = make(
            tmp_path, per_device_train_batch_size=2, generative_weight=weight, evaluation=rated(4, seed=3), **SPREAD
        )
        start = weights(one)
        one.train()
        found = load_file(tmp_path / f"{index}.safetensors")
        told = found.pop("told").tolist()
        moved = distance(start, weights(one))
        assert moved > 1e-3
        assert distance(found, weights(one)) < 1e-3 * moved
        assert told == pytest.approx(summary(one), rel=1e-5)


def summary(trainer):
    found = trainer.evaluate()
    return [
        *logged(trainer, "loss"),
        *(found[f"eval_{key}"] for key in ("loss", "gedi/accuracy", "gedi/discriminative")),
    ]


def train_here(folder: str) -> None:
    for index, weight in enumerate((0.6, 1.0)):
        trainer = make(
            Path(folder, f"run{index}"), per_device_train_batch_size=1, per_device_eval_batch_size=2,
            generative_weight=weight, evaluation=rated(4, seed=3), **SPREAD,
        )  # fmt: skip
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        told = torch.tensor(summary(trainer), dtype=torch.float64)
        if trainer.accelerator.is_main_process:
            save_file(weights(trainer) | {"told": told}, str(Path(folder, f"{index}.safetensors")))
    leave()


if __name__ == "__main__":
    train_here(sys.argv[1])
