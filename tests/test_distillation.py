"""What all distillation trainers share: the teacher, which rows count, normalisation, evaluation, resuming, bad input."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForSeq2Seq,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import tiny
from distilling import (
    CLASSES,
    KINDS,
    LANGUAGE,
    adapted,
    clozes,
    image_classification,
    make,
    sorted_texts,
    texts,
    words,
)
from hf_logits import tasks, teachers
from hf_logits.distillation import DistillationConfig, DistillationTrainer
from hf_logits.tasks import targets, task_of
from oracles import word_tokenizer
from preferences import arguments, distance, equal, logged, tokenizer, weights


class Plain(DistillationTrainer):
    """Forward KL and cross-entropy by autograd; of the second term a fifth more at each step."""

    seen: list

    def terms(self, student, teacher, labels):
        self.__dict__.setdefault("seen", []).append((student.detach(), teacher, labels))
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        return {"kl": kl, "ce": functional.cross_entropy(student, labels, reduction="none")}

    def term_weights(self):
        return {"kl": 1.0, "ce": 0.2 * self.state.global_step}


class Together(Plain):
    """All rows but the first look at each other."""

    between = ("apart",)

    def compared(self, rows):
        return torch.arange(1, rows)

    def terms_between(self, student, teacher, labels):
        self.__dict__.setdefault("together", []).append(labels)
        return {"apart": torch.cdist(student, teacher).mean()}

    def term_weights(self):
        return {**super().term_weights(), "apart": 0.3}


class Alone(Plain):
    needs_teacher = False

    def terms(self, student, teacher, labels):
        assert teacher is None
        return {"ce": functional.cross_entropy(student, labels, reduction="none")}

    def term_weights(self):
        return {"ce": 1.0}


STEEP = {"optim": "sgd", "learning_rate": 1e-2}


def build(folder, trainer=Plain, **settings):
    return make(trainer, DistillationConfig, folder, **settings)


both = pytest.mark.parametrize("fused", [None, False], ids=["fused", "dense"])


# --- the teacher ---------------------------------------------------------------------------------------------------------


@both
def test_the_teacher_is_frozen_apart_and_not_saved(fused, tmp_path):
    teacher = tiny.llama(1).train()
    trainer = build(tmp_path, teacher=teacher, fused_head=fused, save_strategy="steps", save_steps=3, **STEEP)
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    trainer.train()
    assert not teacher.training and not any(value.requires_grad for value in teacher.parameters())
    assert equal(before, dict(teacher.named_parameters()))
    assert not set(teacher.modules()) & set(trainer.model.modules())
    assert teacher not in trainer.accelerator._models
    trained = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert not trained & {id(value) for value in teacher.parameters()}
    saved = type(teacher).from_pretrained(tmp_path / "checkpoint-3")
    assert equal(weights(trainer), dict(saved.named_parameters()))


@both
def test_no_tensor_of_the_teacher_is_an_inference_tensor(fused, tmp_path):
    trainer = build(tmp_path, fused_head=fused, max_steps=1)
    trainer.train()
    assert not any(teacher.is_inference() for _, teacher, _ in trainer.seen)


@both
@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_keeps_its_dtype_under_the_students_autocast(fused, bf16, tmp_path):
    data = texts(2)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = build(tmp_path, data=data, teacher=tiny.llama(1).to(dtype), bf16=bf16, fused_head=fused, max_steps=1)
        trainer.train()
        assert next(trainer.teacher.parameters()).dtype == dtype
        rows = torch.cat([teacher for _, teacher, _ in trainer.seen])
        assert rows.dtype == torch.float32
        found.append(rows)
    batch = trainer.data_collator([data[i] for i in trainer._get_train_sampler()])
    valid = targets(batch.pop("labels"), "causal_lm") != -100
    with torch.no_grad():
        exact = tiny.llama(1)(**batch).logits[valid]
    torch.testing.assert_close(found[0].sort(0).values, exact.sort(0).values, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1].sort(0).values, exact.sort(0).values, rtol=1e-5, atol=1e-5)


@both
def test_the_student_drops_out_and_the_teacher_does_not(fused, tmp_path):
    config = {"attention_dropout": 0.5}
    models = {"model": tiny.llama(0, **config), "teacher": tiny.llama(1, **config).train()}
    trainer = build(tmp_path, **models, data=texts(2), fused_head=fused, max_steps=2, learning_rate=0.0)
    trainer.train()
    half = len(trainer.seen) // 2
    first, second = (trainer.seen[part] for part in (slice(half), slice(half, None)))

    def rows(calls, which):
        return torch.cat([call[which] for call in calls]).sort(0).values

    torch.testing.assert_close(rows(first, 1), rows(second, 1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rows(first, 0), rows(second, 0), rtol=1e-2)


def test_a_teacher_that_was_placed_when_it_was_loaded_stays_there(tmp_path, monkeypatch):
    class Accelerator:
        state = type("State", (), {"deepspeed_plugin": None, "fsdp_plugin": None})()
        _models: list = []

        def prepare_model(self, model, evaluation_mode):
            raise AssertionError("moved")

    placed = tiny.llama(1)
    placed.hf_device_map = {"": "cpu"}
    assert teachers.place(placed, Accelerator()) is placed
    quantised = tiny.llama(1)
    quantised.is_quantized = True
    assert teachers.place(quantised, Accelerator()) is quantised
    with pytest.raises(AssertionError, match="moved"):
        teachers.place(tiny.llama(1), Accelerator())


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_a_sharded_run_places_the_teacher_as_trl_does(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(teachers, f"prepare_{kind}", lambda model, accelerator: calls.append(model) or model)

    class Accelerator:
        state = type("State", (), {"deepspeed_plugin": None, "fsdp_plugin": None, f"{kind}_plugin": object()})()

    teacher = tiny.llama(1)
    assert teachers.place(teacher, Accelerator()) is teacher and calls == [teacher]


@both
@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq", "image_classification"])
def test_the_disabled_adapter_is_a_free_teacher(kind, fused, tmp_path):
    """Of the first kind the head has an adapter too."""
    settings = {"kind": kind, "fused_head": fused if kind in LANGUAGE else None, "chunk_size": 3, **STEEP}
    free = build(tmp_path, lora=True, disabled_adapter_teacher=True, **settings)
    start = weights(free)
    free.train()
    copied = build(tmp_path, lora=True, teacher=KINDS[kind][0](0), **settings)
    copied.train()
    assert free.teacher is None
    moved = distance(start, weights(free))
    assert moved > 1e-5 and distance(weights(free), weights(copied)) < 1e-3 * moved
    assert logged(free, "loss") == pytest.approx(logged(copied, "loss"), rel=1e-5)


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_a_teacher_reads_segments_that_the_student_has_no_word_for(streamed, tmp_path):
    settings = {
        "vocab_size": tiny.VOCAB,
        "dim": 32,
        "n_layers": 1,
        "n_heads": 4,
        "hidden_dim": 64,
        "num_labels": CLASSES,
    }
    student = DistilBertForSequenceClassification(DistilBertConfig(**settings, max_position_embeddings=32))
    data = sorted_texts(4).map(lambda row: {"token_type_ids": [0, 0] + [1] * (len(row["input_ids"]) - 2)})
    read = {"teacher": [], "student": []}
    teacher = KINDS["sequence_classification"][0](1)
    for name, model in (("teacher", teacher), ("student", student)):
        model.register_forward_pre_hook(lambda *given, n=name: read[n].append(given[2]), with_kwargs=True)
    trainer = build(
        tmp_path,
        kind="sequence_classification",
        model=student,
        teacher=teacher,
        data=data.to_iterable_dataset() if streamed else data,
        evaluation=data,
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    trainer.predict(data.remove_columns("labels"))
    assert len(read["teacher"]) == 2 and len(read["student"]) == 3
    assert all(given["token_type_ids"].sum() == given["attention_mask"].sum() - 4 for given in read["teacher"][:1])
    assert not any("token_type_ids" in given for given in read["student"])


def test_a_teacher_in_half_precision_reads_images_in_its_own_dtype(tmp_path):
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
    settings |= {"layer_type": "basic"}
    student, teacher = (ResNetForImageClassification(ResNetConfig(**settings)) for _ in range(2))
    trainer = build(
        tmp_path, kind="image_classification", model=student, teacher=teacher.to(torch.bfloat16), max_steps=1
    )
    trainer.train()
    assert all(math.isfinite(logits.sum()) for logits in trainer.seen[0][:2])


def test_nobody_is_taught_where_no_teacher_is_needed(tmp_path):
    trainer = build(tmp_path, trainer=Alone, max_steps=1)
    trainer.train()
    (entry, *_) = trainer.state.log_history
    assert "distillation/ce" in entry and "distillation/agreement" not in entry
    with pytest.raises(ValueError, match="without a teacher"):
        build(tmp_path, trainer=Alone, teacher=tiny.llama(1))


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_only_causal_language_models_look_ahead():
    labels = torch.tensor([[-100, 5, 6, 2]])
    assert targets(labels, "causal_lm").tolist() == [[5, 6, 2, -100]]
    for task in ("seq2seq", "masked_lm", "token_classification"):
        assert targets(labels, task).equal(labels)


def test_the_task_is_that_of_the_class_or_of_one_above_it():
    expected = {"softcapped": "causal_lm", "gpt2": "causal_lm", "bart": "seq2seq"}
    for kind, (model, _) in KINDS.items():
        assert task_of(model()) == expected.get(kind, kind)
    assert task_of(adapted(tiny.llama(), "causal_lm")) == "causal_lm"
    assert task_of(type("Mine", (type(tiny.llama()),), {})(tiny.llama().config)) == "causal_lm"
    assert task_of(BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))) is None


@both
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_that_predict_something(kind, fused, tmp_path):
    data = KINDS[kind][1](2)
    trainer = build(tmp_path, kind=kind, data=data, fused_head=fused if kind in LANGUAGE else None, max_steps=1)
    trainer.train()
    found = sorted(torch.cat([labels for _, _, labels in trainer.seen]).tolist())
    labels = [row["labels"] if isinstance(row["labels"], list) else [row["labels"]] for row in data]
    assert found == sorted(label for row in labels for label in row if label != -100)


@both
@pytest.mark.parametrize("kind", ["causal_lm", "gpt2"])
def test_the_side_of_the_padding_does_not_matter(kind, fused, tmp_path):
    found = []
    for side in ("left", "right"):
        made = tokenizer()
        made.padding_side = side
        trainer = build(tmp_path, kind=kind, fused_head=fused)
        trainer.data_collator.tokenizer.padding_side = side
        batch = trainer.data_collator(list(texts(4)))
        assert bool((batch["attention_mask"][:, 0] == 0).any()) == (side == "left")
        if kind == "gpt2":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if n != "transformer.wpe"}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert distance(found[0][1], found[1][1]) < 1e-6


@both
def test_packed_rows_pass_through(fused, tmp_path):
    """Two texts in one row, with positions and a mask that part them, are the two texts."""
    trainer = build(tmp_path, fused_head=fused)
    rows = [{**row, "attention_mask": row["attention_mask"]} for row in texts(2)]
    apart = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))
    packed = {
        "input_ids": torch.tensor([sum((row["input_ids"] for row in rows), [])]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": torch.zeros_like(mask).masked_fill(mask == 0, -1e9)[None, None],
        "labels": torch.tensor([sum((row["labels"] for row in rows), [])]),
    }
    torch.testing.assert_close(trainer.compute_loss(trainer.model, packed), apart)
    shifted = {k: v for k, v in packed.items() if k != "labels"}
    shifted["shift_labels"] = targets(packed["labels"], "causal_lm")
    torch.testing.assert_close(trainer.compute_loss(trainer.model, shifted), apart)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_rows_has_zero_gradients_for_every_weight(kind, fused, tmp_path):
    trainer = build(tmp_path, kind=kind, fused_head=fused if kind in LANGUAGE else None)
    batch = trainer.data_collator(list(KINDS[kind][1](2)))
    full = trainer.compute_loss(trainer.model, batch)
    full.backward()
    reached = {name for name, value in trainer.model.named_parameters() if value.grad is not None}
    trainer.model.zero_grad()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if kind in ("seq2seq", "bart"):
        batch["decoder_input_ids"] = torch.ones_like(batch["labels"])
    for items in (None, torch.tensor(0), torch.tensor(7)):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        assert loss.item() == 0.0
    found = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    assert found.keys() == reached and not any(gradient.any() for gradient in found.values())


def test_an_empty_batch_is_no_nan_where_logits_are_excluded(tmp_path):
    trainer = build(tmp_path)
    total, sums = trainer.weigh(torch.full((0, 4), -math.inf, requires_grad=True), None, torch.zeros(0).long())
    assert total.item() == 0.0 and not sums


@both
def test_losses_that_compare_rows_get_all_that_they_choose_at_once(fused, tmp_path):
    trainer = build(tmp_path, trainer=Together, fused_head=fused, chunk_size=1, max_steps=1, data=texts(2))
    trainer.train()
    rows = torch.cat([labels for _, _, labels in trainer.seen])
    assert len(trainer.seen) == (1 if fused is False else len(rows))
    assert len(trainer.together) == 1 and torch.equal(trainer.together[0], rows[1:])
    (loss, kl, apart) = (logged(trainer, name)[0] for name in ("loss", "distillation/kl", "distillation/apart"))
    assert loss == pytest.approx(kl + 0.3 * apart, rel=1e-3) and apart > 0


# --- normalisation and logs ----------------------------------------------------------------------------------------------


@both
def test_the_step_is_divided_by_all_of_its_rows(fused, tmp_path):
    """Ragged micro-batches, one of them empty: the sums, divided once."""
    data = texts(4).add_column("keep", [1, 1, 0, 1])
    data = data.map(lambda row: {"labels": row["labels"] if row["keep"] else [-100] * len(row["labels"])})
    data = data.remove_columns("keep")
    found = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = build(
            tmp_path, data=data, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=2,
            fused_head=fused, chunk_size=3, **STEEP,
        )  # fmt: skip
        start = weights(trainer)
        trainer.train()
        found.append((weights(trainer), logged(trainer, "loss"), logged(trainer, "distillation/kl")))
    moved = distance(start, found[0][0])
    for others in found[1:]:
        assert distance(found[0][0], others[0]) < 1e-4 * moved
        assert others[1] == pytest.approx(found[0][1], rel=1e-5)
        assert others[2] == pytest.approx(found[0][2], rel=1e-5)


@both
def test_evaluation_is_the_same_loss_over_all_rows(fused, tmp_path):
    data = texts(7, seed=3)
    found = []
    for size in (1, 3, 7):
        trainer = build(tmp_path, evaluation=data, per_device_eval_batch_size=size, fused_head=fused)
        trainer.state.global_step = 2
        found.append(trainer.evaluate())
    trainer.seen = []
    trainer.compute_loss(trainer.model.eval(), trainer.data_collator(list(data)))
    student, teacher, labels = (torch.cat(parts) for parts in zip(*trainer.seen, strict=True))
    kl = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    ce = functional.cross_entropy(student, labels)
    expected = {
        "eval_loss": kl.mean() + 0.4 * ce,
        "eval_distillation/kl": kl.mean(),
        "eval_distillation/ce": ce,
        "eval_distillation/cross_entropy": ce,
        "eval_distillation/teacher_cross_entropy": functional.cross_entropy(teacher, labels),
        "eval_distillation/student_entropy": torch.special.entr(student.softmax(-1)).sum(-1).mean(),
        "eval_distillation/agreement": (student.argmax(-1) == teacher.argmax(-1)).float().mean(),
    }
    for one in found:
        assert {key: one[key] for key in expected} == pytest.approx(
            {key: value.item() for key, value in expected.items()}, rel=1e-5
        )


def test_logits_are_gathered_only_for_metrics(tmp_path):
    shapes = []

    def measure(prediction):
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    trainer = build(tmp_path, evaluation=texts(3), rest={"compute_metrics": measure})
    found = trainer.evaluate()
    assert found["eval_rows"] == 3 and shapes[0][-1] == tiny.VOCAB
    quiet = build(tmp_path, evaluation=texts(3))
    assert quiet.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    batch = quiet.data_collator(list(texts(3)))
    loss, logits, labels = quiet.prediction_step(quiet.model, dict(batch), prediction_loss_only=True)
    assert loss.isfinite() and logits is None and labels is None


def test_images_are_predicted_with_their_logits(tmp_path):
    data = KINDS["image_classification"][1](3)
    trainer = build(tmp_path, kind="image_classification", evaluation=data)
    assert trainer.predict(data).predictions.shape == (3, CLASSES)


def test_the_device_is_read_once_a_logging_step(tmp_path, monkeypatch):
    from hf_logits.meters import Meters

    reads = []
    original = Meters.read
    monkeypatch.setattr(Meters, "read", lambda *given: reads.append(1) or original(*given))
    trainer = build(tmp_path, logging_steps=3, max_steps=6, gradient_accumulation_steps=2)
    trainer.train()
    assert len(reads) == 2


# --- resuming ------------------------------------------------------------------------------------------------------------


def test_schedules_go_on_and_another_teacher_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = build(tmp_path, **settings)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    again = build(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=checkpoint)
    assert equal(weights(whole), weights(again))
    assert logged(whole, "loss") == logged(again, "loss")
    for teacher in (tiny.llama(2), tiny.llama(1).bfloat16()):
        other = build(tmp_path / "other", teacher=teacher, **settings)
        with pytest.raises(ValueError, match="another teacher"):
            other.train(resume_from_checkpoint=checkpoint)


def test_the_best_model_is_loaded_whatever_its_weights_are_called(tmp_path):
    kind = "image_classification"
    data = KINDS[kind][1](4, seed=3)
    trainer = build(
        tmp_path, kind=kind, evaluation=data, max_steps=2, save_strategy="steps", save_steps=1, eval_steps=1,
        eval_strategy="steps", load_best_model_at_end=True, learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[0] < losses[1]
    trainer.state.global_step = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


# --- vocabularies and classes --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("ours", "theirs"), [(64, 72), (72, 64), (72, 80), (72, 72)])
def test_padded_vocabularies_are_cut_to_the_tokens_that_there_are(ours, theirs, fused, tmp_path):
    assert len(tokenizer()) == 64
    models = {"model": tiny.llama(0, vocab_size=ours), "teacher": tiny.llama(1, vocab_size=theirs)}
    trainer = build(tmp_path, **models, data=texts(2), fused_head=fused, max_steps=1)
    trainer.train()
    assert {logits.size(1) for call in trainer.seen for logits in call[:2]} == {64}


def test_cutting_is_not_padding_with_zeros(tmp_path):
    models = {"model": tiny.llama(0, vocab_size=3), "teacher": tiny.llama(1, vocab_size=5)}
    trainer = Plain(*models.values(), arguments(DistillationConfig, tmp_path), train_dataset=texts(2))
    assert trainer.classes == 3
    student = torch.tensor([[2.0, 0.0, -1.0]])
    trainer.weigh(student, torch.tensor([[2.0, 0.0, -1.0, 9.0, 9.0]]), torch.tensor([0]))
    ((_, teacher, _),) = trainer.seen
    assert teacher.softmax(-1)[0].tolist() == pytest.approx([0.843795, 0.114195, 0.042010], abs=1e-6)


def test_another_tokenizer_is_refused_by_its_first_differing_token(tmp_path):
    other = word_tokenizer(["zebra"])
    with pytest.raises(ValueError, match="id \\d+ is"):
        build(tmp_path, rest={"teacher_processing_class": other})
    build(tmp_path, rest={"teacher_processing_class": tokenizer()})


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification"])
def test_classifiers_that_read_other_tokens_are_refused_too(kind, tmp_path):
    with pytest.raises(ValueError, match="id \\d+ is"):
        build(tmp_path, kind=kind, rest={"teacher_processing_class": word_tokenizer(["zebra"])})
    build(tmp_path, kind=kind, rest={"teacher_processing_class": words(kind)})


def test_vocabularies_of_two_sizes_whose_tokens_nobody_compared_are_warned_about(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(tasks.logger, "warning_once", said.append)
    models = {"model": tiny.llama(0), "teacher": tiny.llama(1, vocab_size=72)}
    build(tmp_path, **models, rest={"teacher_processing_class": tokenizer()})
    build(tmp_path)
    assert not said
    build(tmp_path, **models)
    assert "The student has 64 tokens and the teacher 72" in said[0]


@pytest.mark.parametrize("labelled", [True, False])
def test_tokens_are_masked_at_random_only_where_no_labels_say_what_is_masked(labelled, tmp_path):
    data = clozes(4) if labelled else clozes(4).remove_columns("labels")
    words_of = words("masked_lm")
    words_of.mask_token = "w6"
    trainer = Plain(
        *(KINDS["masked_lm"][0](seed) for seed in range(2)),
        arguments(DistillationConfig, tmp_path, per_device_train_batch_size=4),
        train_dataset=data,
        processing_class=words_of,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    given = sorted(label for row in clozes(4)["labels"] for label in row if label != -100)
    assert (sorted(batch["labels"][batch["labels"] != -100].tolist()) == given) == labelled


@both
def test_routers_of_a_mixture_of_experts_are_kept_in_balance(fused, tmp_path):
    settings = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "vocab_size": tiny.VOCAB,
    }
    settings |= {**tiny._SMALL, **tiny._IDS}
    losses = {}
    for balanced in (True, False):
        student, teacher = (
            tiny.spread(MixtralForCausalLM(MixtralConfig(**settings, output_router_logits=balanced)), seed)
            for seed in range(2)
        )
        trainer = build(
            tmp_path,
            model=student,
            teacher=teacher,
            data=texts(2),
            fused_head=fused,
            evaluation=texts(2),
        )
        losses[balanced] = trainer.evaluate()
    batch = trainer.data_collator([texts(2)[i] for i in range(2)])
    with torch.no_grad():
        fresh = tiny.spread(MixtralForCausalLM(MixtralConfig(**settings, output_router_logits=True)), 0)
        expected = fresh(**batch).aux_loss.item()
    assert losses[True]["eval_distillation/aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert losses[True]["eval_loss"] - losses[False]["eval_loss"] == pytest.approx(0.5 * expected, rel=1e-4)
    assert "eval_distillation/aux_loss" not in losses[False]


@both
@pytest.mark.parametrize("kind", ["m2m", "marian"])
def test_encoder_decoders_that_shift_their_labels_elsewhere(kind, fused, tmp_path):
    settings = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    settings |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": tiny.VOCAB, **tiny._IDS}
    settings |= {"decoder_start_token_id": 2, "dropout": 0.0, "max_position_embeddings": 32}
    config = {"m2m": M2M100Config, "marian": MarianConfig}[kind](**settings)
    student, teacher = (
        tiny.spread({"m2m": M2M100ForConditionalGeneration, "marian": MarianMTModel}[kind](config), seed)
        for seed in range(2)
    )
    trainer = build(
        tmp_path, Alone, kind="seq2seq", model=student, evaluation=KINDS["seq2seq"][1](2), fused_head=fused
    )
    batch = DataCollatorForSeq2Seq(words("seq2seq"))([KINDS["seq2seq"][1](2)[i] for i in range(2)])
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    build(tmp_path, kind="seq2seq", model=student, teacher=teacher, fused_head=fused, max_steps=1).train()


def test_a_label_beyond_the_shared_vocabulary_is_refused(tmp_path):
    models = {"model": tiny.llama(0, vocab_size=72), "teacher": tiny.llama(1)}
    data = texts(2).map(lambda row: {"labels": [70 if label != -100 else label for label in row["labels"]]})
    with pytest.raises(ValueError, match="below 64"):
        build(tmp_path, **models, data=data).train()


def test_class_names_in_another_order_are_refused(tmp_path):
    names = dict(enumerate(["cat", "dog", "eel", "fox"]))
    turned = names | {1: "eel", 2: "dog"}
    named = [image_classification(i, id2label=n) for i, n in enumerate((names, turned, names))]
    with pytest.raises(ValueError, match="Class 1 is 'cat'|Class 1 is 'dog' for the student and 'eel'"):
        build(tmp_path, kind="image_classification", model=named[0], teacher=named[1])
    build(tmp_path, kind="image_classification", model=named[0], teacher=named[2])
    build(tmp_path, kind="image_classification", model=image_classification(0), teacher=named[2])
    with pytest.raises(ValueError, match="4 classes and the teacher 5"):
        build(tmp_path, kind="image_classification", teacher=image_classification(1, num_labels=5))


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_or_shares_the_student_is_refused(tmp_path):
    student = tiny.llama(0)
    with pytest.raises(ValueError, match="is the student"):
        build(tmp_path, model=student, teacher=student)
    with pytest.raises(ValueError, match="disabled_adapter_teacher=True"):
        build(tmp_path, model=adapted(student, "causal_lm"), teacher=student)


def test_bad_teachers_and_settings(tmp_path):
    small = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        build(tmp_path, teacher=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no logits"):
        build(tmp_path, teacher=tiny.llama(1).model)
    with pytest.raises(ValueError, match="does masked_lm"):
        build(tmp_path, teacher=BertForMaskedLM(small))
    with pytest.raises(ValueError, match="cannot tell what BertModel"):
        build(tmp_path, model=BertModel(small))
    with pytest.raises(ValueError, match="needs a teacher"):
        Plain(tiny.llama(), None, arguments(DistillationConfig, tmp_path), train_dataset=texts(2))
    with pytest.raises(ValueError, match="needs a PeftModel"):
        build(tmp_path, disabled_adapter_teacher=True)
    with pytest.raises(ValueError, match="not both"):
        build(tmp_path, lora=True, teacher=tiny.llama(1), disabled_adapter_teacher=True)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        arguments(DistillationConfig, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="chunk_size"):
        arguments(DistillationConfig, tmp_path, chunk_size=0)
    with pytest.raises(ValueError, match="compute_loss_func"):
        build(tmp_path, rest={"compute_loss_func": print})
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="DistillationConfig"):
        Plain(tiny.llama(), tiny.llama(1), arguments(TrainingArguments, tmp_path))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_heads_without_a_softmax_are_refused(problem, tmp_path):
    model = image_classification(0, problem_type=problem)
    with pytest.raises(ValueError, match=problem):
        build(tmp_path, kind="image_classification", model=model)
    with pytest.raises(ValueError, match="1 label"):
        build(tmp_path, kind="image_classification", model=image_classification(0, num_labels=1))


def test_bad_labels(tmp_path):
    trainer = build(tmp_path)
    batch = trainer.data_collator(list(texts(2)))
    with pytest.raises(ValueError, match="no labels"):
        trainer.compute_loss(trainer.model, {"input_ids": batch["input_ids"]})
    images = build(tmp_path, kind="image_classification")
    batch = images.data_collator(list(KINDS["image_classification"][1](2)))
    with pytest.raises(ValueError, match="class ids of 1 dim"):
        images.compute_loss(images.model, batch | {"labels": torch.rand(2, CLASSES)})


def test_terms_and_weights_must_have_the_same_names(tmp_path):
    class Odd(Plain):
        def term_weights(self):
            return {"kl": 1.0}

    with pytest.raises(ValueError, match="has terms"):
        build(tmp_path, trainer=Odd).train()
