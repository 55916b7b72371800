"""Storing what a teacher thinks: against the teacher itself, through kills, damage, and every other folder."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    ResNetConfig,
    ResNetForImageClassification,
    default_data_collator,
)

import tiny
from distilling import KINDS, adapted, collator
from hf_logits.distillation import DistillationTrainer
from hf_logits.sparse_teacher import MODES, top_log_probs
from hf_logits.stored_teacher import IDS, LOG_PROBS, MANIFEST, stored_manifest
from hf_logits.tasks import targets, valid_rows
from hf_logits.trainers import (
    LogitDistillationConfig,
    LogitDistillationTrainer,
    TeacherLogitsCollator,
    load_teacher_logits,
    store_teacher_logits,
)
from oracles import word_tokenizer
from preferences import Stop, StopAt, arguments, distance, equal, logged, tokenizer, weights


K = 5


def texts(rows=10, seed=0, empty=True):
    """Prompts that are not learned, and answers that are; the third row has none."""
    rng = random.Random(seed)
    found = []
    for row in range(rows):
        ids = [rng.randint(3, tiny.VOCAB - 1) for _ in range(rng.randint(4, 9))]
        start = len(ids) if empty and row == 2 else 2
        labels = [-100] * start + ids[start:]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "name": f"row {row}"})
    return Dataset.from_list(found)


def sentences(rows=10, seed=0):
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"input_ids": [rng.randint(3, 63) for _ in range(rng.randint(3, 8))], "label": rng.randint(0, 3)}
            for _ in range(rows)
        ]
    )


def bert(kind, seed=0, **config):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(seed)
    model = kind(BertConfig(vocab_size=tiny.VOCAB, initializer_range=0.2, **settings, **config))
    return model.eval()


def padding(side="right"):
    made = tokenizer()
    made.padding_side = side
    return made


def pad(side="right"):
    return DataCollatorForSeq2Seq(padding(side))


def store(folder, teacher=None, data=None, **settings):
    given = {"k": K, "data_collator": pad(), "batch_size": 2, "rows_per_shard": 4} | settings
    teacher = tiny.llama(1) if teacher is None else teacher
    return store_teacher_logits(teacher, texts() if data is None else data, folder, **given)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("stored") / "teacher"
    store(folder)
    return folder


@torch.no_grad()
def expected(teacher, row, labels, k=K):
    """Of one row alone, without padding."""
    logits = teacher(**{key: torch.tensor([value]) for key, value in row.items()}).logits[0].float().log_softmax(-1)
    best, ids = logits[[i for i in range(len(labels)) if labels[i] != -100]].topk(k)
    return best, ids


# --- what is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.tied_llama])
def test_a_causal_teacher_is_stored_at_the_positions_that_predict(make, side, tmp_path):
    teacher, data = make(1), texts()
    found = store(tmp_path / "new", teacher, data, data_collator=pad(side), dtype="float32")
    assert found.column_names == [*data.column_names, IDS, LOG_PROBS]
    assert found.features[IDS].feature.dtype == "uint16"
    for row, kept in zip(data, found, strict=True):
        assert {name: kept[name] for name in data.column_names} == row
        best, ids = expected(teacher, {"input_ids": row["input_ids"]}, [*row["labels"][1:], -100])
        assert kept[IDS].reshape(-1, K).tolist() == ids.tolist()
        np.testing.assert_allclose(kept[LOG_PROBS].reshape(-1, K), best, atol=2e-5)
    assert len(found[2][IDS]) == 0


def test_an_encoder_decoder(tmp_path):
    teacher, data = tiny.t5(1), texts(empty=False)
    collator = DataCollatorForSeq2Seq(padding(), teacher)
    found = store(tmp_path / "new", teacher, data, data_collator=collator, dtype="float32")
    for row, kept in zip(data, found, strict=True):
        given = {"input_ids": row["input_ids"], "decoder_input_ids": teacher.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]]))[0].tolist()}  # fmt: skip
        best, ids = expected(teacher, given, row["labels"])
        assert kept[IDS].reshape(-1, K).tolist() == ids.tolist()
        np.testing.assert_allclose(kept[LOG_PROBS].reshape(-1, K), best, atol=2e-5)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_positions_that_predict_themselves(kind, tmp_path):
    teacher = bert(kind, num_labels=4)
    data = texts().map(lambda row: {"labels": [x if x < 0 else x % 4 for x in row["labels"]]})
    found = store(tmp_path / "new", teacher, data, k=3, data_collator=DataCollatorForTokenClassification(padding()))
    for row, kept in zip(data, found, strict=True):
        _, ids = expected(teacher, {"input_ids": row["input_ids"]}, row["labels"], k=3)
        assert kept[IDS].reshape(-1, 3).tolist() == ids.tolist()


def test_a_classifier_keeps_all_classes_if_asked_for_more(tmp_path):
    teacher, data = bert(BertForSequenceClassification, num_labels=4), sentences()
    found = store(tmp_path / "new", teacher, data, k=9, data_collator=DataCollatorWithPadding(padding()))
    manifest = stored_manifest(found)
    assert manifest["k"] == 4 and manifest["task"] == "sequence_classification"
    with torch.no_grad():
        for row, kept in zip(data, found, strict=True):
            judge = teacher(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            np.testing.assert_allclose(kept[LOG_PROBS], judge[torch.tensor(kept[IDS]).long()], atol=5e-3)
            assert sorted(kept[IDS]) == [0, 1, 2, 3]


def test_only_rows_that_predict_go_through_the_head(tmp_path):
    teacher, seen = tiny.llama(1), []
    teacher.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape[:-1].numel()))
    data = texts()
    store(tmp_path / "new", teacher, data)
    assert sum(seen) == sum(label != -100 for labels in data["labels"] for label in labels)


def test_padding_of_the_vocabulary_has_no_probability(tmp_path):
    plain, padded = tiny.llama(1), tiny.llama(1, vocab_size=80)
    padded.load_state_dict(plain.state_dict() | {
        name: torch.cat([plain.state_dict()[name], torch.full((16, 32), 3.0)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    })  # fmt: skip
    found = [
        store(tmp_path / name, model, processing_class=tokenizer(), dtype="float32")
        for name, model in (("plain", plain), ("padded", padded))
    ]
    assert stored_manifest(found[1])["classes"] == len(tokenizer()) == 64
    for one, other in zip(*found, strict=True):
        assert one[IDS].tolist() == other[IDS].tolist()
        np.testing.assert_allclose(one[LOG_PROBS], other[LOG_PROBS], atol=1e-6)


def test_the_teacher_comes_back_as_it_was(tmp_path):
    teacher = tiny.llama(1, attention_dropout=0.5).train()
    teacher.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    store(tmp_path / "new", teacher)
    assert teacher.training and teacher.lm_head.training
    assert {name: parameter.requires_grad for name, parameter in teacher.named_parameters()} == before
    assert files(tmp_path / "new") == files_of(tmp_path, tiny.llama(1, attention_dropout=0.5))


def files_of(tmp_path, teacher):
    teacher.lm_head.weight.requires_grad_(False)
    store(tmp_path / "again", teacher)
    return files(tmp_path / "again")


def test_float16_is_float32_rounded_once(stored, tmp_path):
    wide, narrow = store(tmp_path / "new", dtype="float32"), load_teacher_logits(stored)
    for one, other in zip(wide, narrow, strict=True):
        assert one[IDS].tolist() == other[IDS].tolist()
        assert one[LOG_PROBS].astype(np.float16).tolist() == other[LOG_PROBS].astype(np.float16).tolist()


def test_a_stream_is_stored_alike(stored, tmp_path):
    store(tmp_path / "new", data=texts().to_iterable_dataset())
    assert files(tmp_path / "new") == files(stored)


def test_the_shards_are_data_that_datasets_reads_alone(stored, tmp_path):
    shards = [str(path) for path in sorted(stored.glob("*.arrow"))]
    found = load_dataset("arrow", data_files=shards, cache_dir=str(tmp_path), split="train")
    assert found["name"] == [f"row {i}" for i in range(10)]
    assert found[0][IDS] == load_teacher_logits(stored)[0][IDS].tolist()


# --- kills ---------------------------------------------------------------------------------------------------------------


class Kill(Exception):
    pass


def counting(teacher, kill_at=None):
    """Counts the forwards of a teacher, and ends everything in one of them."""
    count = []

    def hook(*_):
        if len(count) == kill_at:
            raise Kill
        count.append(1)

    teacher.model.register_forward_hook(hook)
    return count


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(kill_at, stream, stored, tmp_path):
    """Ten rows, two in a forward, four in a shard: forwards 0 and 1, 2 and 3, 4."""
    folder = tmp_path / "new"
    data = texts().to_iterable_dataset() if stream else texts()
    killed, second = tiny.llama(1), tiny.llama(1)
    counting(killed, kill_at)
    with pytest.raises(Kill):
        store(folder, killed, data)
    finished = files(folder)
    assert len(finished) == 1 + kill_at // 2
    with pytest.raises(ValueError, match=f"unfinished, {kill_at // 2} shards"):
        load_teacher_logits(folder)
    count = counting(second)
    store(folder, second, data)
    assert len(count) == 5 - 2 * (kill_at // 2)
    after = files(folder)
    assert all(after[name] == data for name, data in finished.items() if name != MANIFEST)
    assert after == files(stored)


def test_what_a_kill_in_the_middle_of_a_file_leaves_is_cleared_away(stored, tmp_path):
    folder = tmp_path / "new"
    shutil.copytree(stored, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shards": manifest["shards"][:1], "rows": None}))
    (folder / ".shard-00002.arrow.77").write_bytes(b"half")
    (folder / "shard-00001.arrow").write_bytes(b"renamed, but the manifest never heard of it")
    (folder / "shard-00002.arrow").unlink()
    store(folder)
    assert files(folder) == files(stored)


def test_a_finished_folder_is_not_stored_again(stored, tmp_path):
    before, teacher = files(stored), tiny.llama(1)
    count = counting(teacher)
    assert len(store(stored, teacher)) == 10
    assert not count and files(stored) == before


# --- everything else that could be in the folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard-00001.arrow", "shard-00002.arrow"])
def test_a_damaged_shard_is_found(name, stored, tmp_path):
    folder = tmp_path / "new"
    shutil.copytree(stored, folder)
    data = bytearray((folder / name).read_bytes())
    data[-100] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256 is"):
        load_teacher_logits(folder)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        store(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        load_teacher_logits(folder)


def nudged(teacher):
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1e-3
    return teacher


def changed(row, index):
    return {"labels": [-100] * len(row["labels"])} if index == 7 else {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": tiny.llama(2)}, "another teacher"),
        ({"teacher": nudged(tiny.llama(1))}, "another teacher"),
        ({"teacher": tiny.llama(1).bfloat16()}, "another teacher"),
        ({"teacher": bert(BertForMaskedLM)}, "another task: 'causal_lm' there, 'masked_lm' now"),
        ({"k": 6}, "another k: 5 there, 6 now"),
        ({"dtype": "float32"}, "another dtype: 'float16' there"),
        ({"rows_per_shard": 5}, "another rows_per_shard: 4 there, 5 now"),
        ({"processing_class": tokenizer()}, "another tokenizer: None there"),
        ({"data": texts(9)}, "another dataset: of 10 rows, and this one has 9"),
        ({"data": texts().map(changed, with_indices=True)}, "another dataset: rows 4 to 7 .shard-00001"),
        ({"data": texts().rename_column("name", "title")}, "another dataset: rows 0 to 3"),
        ({"data": texts(8).to_iterable_dataset()}, "has 3 shards, and this dataset ends after 8 rows"),
        ({"data": texts(14).to_iterable_dataset()}, "another dataset: rows 8 to 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_with_what_differs(settings, message, stored):
    before = files(stored)
    with pytest.raises(ValueError, match=message):
        store(stored, **settings)
    assert files(stored) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="has files but no teacher_logits.json"):
        store(tmp_path)
    with pytest.raises(ValueError, match="has no teacher_logits.json"):
        load_teacher_logits(tmp_path)
    (tmp_path / MANIFEST).write_text('{"schema": "hf_logits/teacher_logits/99"}')
    with pytest.raises(ValueError, match="schema 'hf_logits/teacher_logits/99'"):
        load_teacher_logits(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_teacher_logits(tmp_path)


def masked():
    made = padding()
    made.mask_token = "w5"
    return DataCollatorForLanguageModeling(made)


def drop_labels(rows):
    return tokenizer().pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be a whole number of at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"rows_per_shard": 0}, ValueError, "rows_per_shard"),
        ({"dtype": "bfloat16"}, ValueError, "dtype must be 'float16' or 'float32'"),
        ({"data": texts().select([])}, ValueError, "has no rows"),
        ({"data": texts().add_column(IDS, [0] * 10)}, ValueError, "'teacher_ids' already"),
        ({"teacher": tiny.llama(1).model}, ValueError, "LlamaModel has no logits"),
        ({"teacher": bert(BertForSequenceClassification, num_labels=1)}, ValueError, "does not choose one class"),
        ({"data_collator": drop_labels}, ValueError, "no labels"),
        ({"data_collator": DataCollatorWithFlattening()}, ValueError, "made 1 rows of 2"),
        (
            {"data_collator": masked(), "teacher": bert(BertForMaskedLM), "data": texts().select_columns(["input_ids"])},
            ValueError, "makes other (input_ids|labels) of the same rows each time",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        store(tmp_path / "new", **settings)


# --- into a batch --------------------------------------------------------------------------------------------------------


def rows_of(folder, order):
    found = load_teacher_logits(folder).remove_columns("name")
    return [found[i] for i in order]


def check_batch(batch, rows):
    """Valid positions of the batch, in order, are the rows' entries, and where the teacher would predict them."""
    valid = targets(batch["labels"], "causal_lm") != -100
    assert batch[IDS].shape == batch[LOG_PROBS].shape == (*batch["labels"].shape, K)
    assert batch[IDS][valid].flatten().tolist() == [x for row in rows for x in row[IDS].tolist()]
    assert not batch[IDS][~valid].any() and not batch[LOG_PROBS][~valid].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [9, 2, 5, 0], [2]], ids=str)
def test_a_batch_is_padded_with_its_teacher(side, order, stored):
    rows = rows_of(stored, order)
    batch = TeacherLogitsCollator(pad(side), k=K, task="causal_lm")(rows)
    check_batch(batch, rows)
    plain = pad(side)([{name: row[name] for name in row if name not in (IDS, LOG_PROBS)} for row in rows])
    assert all(torch.equal(value, batch[name]) for name, value in plain.items())
    with torch.no_grad():
        logits = tiny.llama(1)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    judge, _ = valid_rows(logits, targets(batch["labels"], "causal_lm"))
    valid = targets(batch["labels"], "causal_lm") != -100
    torch.testing.assert_close(
        batch[LOG_PROBS][valid], judge.log_softmax(-1).gather(-1, batch[IDS][valid].long()), atol=1e-2, rtol=1e-3
    )


def test_rows_that_are_flattened_into_one_keep_their_order(stored):
    rows = rows_of(stored, [4, 1, 8])
    flat = DataCollatorWithFlattening(return_position_ids=True)
    batch = TeacherLogitsCollator(flat, k=K, task="causal_lm")(rows)
    assert batch["labels"].shape[0] == 1 and "position_ids" in batch
    check_batch(batch, rows)


def test_labels_that_were_made_otherwise_are_refused(stored):
    rows = rows_of(stored, [0, 1])
    rows[1] = rows[1] | {"labels": [-100] * len(rows[1]["labels"])}
    collator = TeacherLogitsCollator(pad(), k=K, task="causal_lm")
    with pytest.raises(ValueError, match="the labels were made otherwise"):
        collator(rows)
    with pytest.raises(ValueError, match="no teacher_ids"):
        collator([{"input_ids": [1]}])


def test_a_folder_can_be_asked_whose_it_is(stored):
    load_teacher_logits(stored, teacher=tiny.llama(1), dataset=texts())
    for settings, message in [
        ({"teacher": tiny.llama(2)}, "is of another teacher"),
        ({"dataset": texts().map(changed, with_indices=True)}, "another dataset: rows 4 to 7"),
        ({"dataset": texts(9)}, "another dataset: rows 8 to 9"),
        ({"dataset": texts(8)}, "of 10 rows, and this one has 8"),
        ({"dataset": texts(14).to_iterable_dataset()}, "another dataset: rows 8 to 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_teacher_logits(stored, **settings)


def test_what_is_known_goes_with_the_dataset(stored):
    found = load_teacher_logits(stored)
    for made in (found.shuffle(seed=0), found.filter(lambda row: True), found.select([1, 2]).remove_columns("name")):
        assert stored_manifest(made)["k"] == K
        assert isinstance(made[0][IDS], np.ndarray)
    assert stored_manifest(texts()) is None
    assert stored_manifest([1]) is None


# --- training without the teacher ----------------------------------------------------------------------------------------


class TopK(LogitDistillationTrainer):
    """The judge: the teacher at hand, of whom only the best tokens are looked at."""

    def terms(self, student, teacher, labels):
        best, ids = top_log_probs(teacher, K)
        return self.stored_terms(student, labels, ids, best)


def distil(folder, data, kind="causal_lm", *, teacher=None, trainer=LogitDistillationTrainer, **settings):
    given = {"optim": "sgd", "learning_rate": 1e-2, "ce_weight": 0.3, "kd_weight": 0.7}
    rest = settings.pop("rest", {})
    evaluation, lora = settings.pop("evaluation", None), settings.pop("lora", False)
    model = settings.pop("model", None) or KINDS[kind][0](0)
    return trainer(
        adapted(model, kind) if lora else model,
        teacher,
        arguments(LogitDistillationConfig, folder, **(given | settings)),
        train_dataset=data,
        eval_dataset=evaluation,
        data_collator=right(kind),
        **({"processing_class": tokenizer()} | rest),
    )


def right(kind):
    """Pads on the right, where the tests' tokenizer would do so on the left."""
    pads = collator(kind) or (DataCollatorWithPadding(padding()) if kind == "sequence_classification" else pad())
    return lambda rows: dict(pads(rows))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Stored teachers by kind, in float32."""

    def get(kind):
        folder = tmp_path_factory.getbasetemp() / f"kept-{kind}"
        build, data = KINDS[kind]
        given = {
            "data_collator": right(kind),
            "processing_class": None if kind == "image_classification" else tokenizer(),
        }
        return store(
            folder, build(1), data(), dtype="float32", k=min(K, 3 if "classification" in kind else K), **given
        )

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_the_stored_teacher_teaches_what_the_one_at_hand_does(mode, fused, kept, tmp_path):
    data, found = kept("causal_lm"), []
    for name, teacher, trainer in (("stored", None, LogitDistillationTrainer), ("online", tiny.llama(1), TopK)):
        made = distil(
            tmp_path / name, data, teacher=teacher, trainer=trainer, evaluation=data, offline_mode=mode,
            fused_head=fused, chunk_size=5,
        )  # fmt: skip
        start = weights(made)
        made.train()
        found.append((weights(made), logged(made, "loss"), made.evaluate()))
    moved = distance(start, found[0][0])
    assert moved > 1e-4
    assert distance(found[0][0], found[1][0]) < 1e-4 * moved
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for key in ("loss", "distillation/divergence", "distillation/cross_entropy", "distillation/agreement"):
        assert found[0][2][f"eval_{key}"] == pytest.approx(found[1][2][f"eval_{key}"], rel=1e-5)


@pytest.mark.parametrize("kind", ["softcapped", "gpt2", "bart", "masked_lm", "token_classification", "sequence_classification", "image_classification"])  # fmt: skip
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_every_head_learns_from_a_stored_teacher(kind, lora, kept, tmp_path):
    rest = {"processing_class": None} if kind == "image_classification" else {}
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 12, "ce_weight": 0.0, "kd_weight": 1.0}
    made = distil(tmp_path, kept(kind), kind, lora=lora, rest=rest, evaluation=kept(kind), **settings)
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_loss"] == pytest.approx(after["eval_distillation/divergence"], rel=1e-6)


def test_nothing_is_lost_however_a_step_is_cut(kept, tmp_path):
    found = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        made = distil(tmp_path, kept("causal_lm"), per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        start = weights(made)
        made.train()
        found.append(weights(made))
    moved = distance(start, found[0])
    assert distance(found[0], found[1]) < 1e-3 * moved and distance(found[0], found[2]) < 1e-3 * moved


def test_the_model_card_names_the_stored_teacher(tmp_path):
    teacher = tiny.llama(1)
    teacher.config.name_or_path = "tester/teacher"
    trainer = distil(tmp_path / "run", store(tmp_path / "teacher", teacher), max_steps=1)
    trainer.create_model_card()
    assert "trained with Logit distillation from `tester/teacher`." in (tmp_path / "run" / "README.md").read_text()


def test_rows_without_a_label_are_no_trouble(stored, tmp_path):
    made = distil(tmp_path, load_teacher_logits(stored).select([2, 2, 2, 2]), max_steps=1)
    before = weights(made)
    made.train()
    assert distance(before, weights(made)) == 0


def test_a_killed_training_resumes_bit_for_bit_and_only_with_its_teacher(kept, tmp_path):
    data = kept("causal_lm")
    settings = {"max_steps": 6, "save_steps": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    unbroken = distil(tmp_path / "unbroken", data, **settings)
    unbroken.train()
    killed = distil(tmp_path / "killed", data, save_strategy="steps", rest={"callbacks": [StopAt(5)]}, **settings)
    with pytest.raises(Stop):
        killed.train()
    resumed = distil(tmp_path / "killed", data, save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))
    assert logged(unbroken, "loss") == logged(resumed, "loss")
    other = store(tmp_path / "other", tiny.llama(2), KINDS["causal_lm"][1]())
    with pytest.raises(ValueError, match="trained with another teacher"):
        distil(tmp_path / "killed", other, **settings).train(resume_from_checkpoint=True)


def test_a_student_with_a_padded_vocabulary_learns_the_same(kept, tmp_path):
    """Its padding is cut before the softmax."""
    plain, padded = tiny.llama(0), tiny.llama(0, vocab_size=80)
    padded.load_state_dict(plain.state_dict() | {
        name: torch.cat([plain.state_dict()[name], torch.full((16, 32), 3.0)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    })  # fmt: skip
    losses = []
    for model in (plain, padded):
        made = distil(tmp_path, kept("causal_lm"), model=model)
        made.train()
        losses.append(logged(made, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def small_tokenizer():
    return word_tokenizer(["other", "words"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.0}, "temperature=2.0 needs the logits of all"),
        ({"divergence": "reverse_kl"}, "divergence='reverse_kl' needs all of them"),
        ({"divergence": "jsd"}, "divergence='jsd' needs all of them"),
        ({"offline_mode": "full"}, "'tail', 'renorm' or 'zero', got 'full'"),
        ({"rest": {"processing_class": small_tokenizer()}}, "stored for another tokenizer"),
        ({"model": tiny.llama(0, vocab_size=48)}, "for a vocabulary of 64 and the student has 48"),
        ({"kind": "masked_lm"}, "The stored teacher does causal_lm and the student masked_lm"),
        ({"evaluation": texts()}, "for eval_dataset nothing is stored"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_learned_from_it_is_refused(settings, message, kept, tmp_path):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, kept("causal_lm"), **settings)


def test_another_teacher_for_evaluation_or_no_teacher_at_all_is_refused(kept, stored, tmp_path):
    with pytest.raises(ValueError, match="for eval_dataset another teacher is stored"):
        distil(tmp_path, kept("causal_lm"), evaluation=load_teacher_logits(stored))
    with pytest.raises(ValueError, match="needs a teacher: give a model, or the dataset of load_teacher_logits"):
        distil(tmp_path, texts())
    with pytest.raises(ValueError, match="Class 0 is"):
        model = KINDS["sequence_classification"][0](0, id2label={0: "b", 1: "a", 2: "c", 3: "d"})
        named = KINDS["sequence_classification"][0](1, id2label={0: "a", 1: "b", 2: "c", 3: "d"})
        data = store(
            tmp_path / "named",
            named,
            KINDS["sequence_classification"][1](),
            data_collator=right("sequence_classification"),
        )
        distil(tmp_path, data, "sequence_classification", model=model)


def test_a_stream_of_a_stored_teacher_has_to_say_whose_it_is(kept, tmp_path):
    data = kept("causal_lm")
    stream = data.with_format(None).to_iterable_dataset()
    with pytest.raises(ValueError, match="is lost: streams and files"):
        distil(tmp_path, stream)
    stream.info.description = data.info.description
    losses = []
    for one in (stream, data):
        trainer = distil(tmp_path, one, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_a_classifier_stored_for_another_tokenizer_is_refused(kept, tmp_path):
    data = kept("sequence_classification")
    distil(tmp_path, data, "sequence_classification")
    with pytest.raises(ValueError, match="stored for another tokenizer"):
        distil(tmp_path, data, "sequence_classification", rest={"processing_class": small_tokenizer()})


def test_a_teacher_in_half_precision_reads_images_in_its_own_dtype(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4, layer_type="basic")
    teacher = ResNetForImageClassification(config).to(torch.bfloat16)
    data = store(tmp_path, teacher, KINDS["image_classification"][1](3), data_collator=default_data_collator)
    assert len(data) == 3


def test_a_method_that_needs_all_logits_says_so(kept, tmp_path):
    class Needy(DistillationTrainer):
        _config = LogitDistillationConfig

    with pytest.raises(ValueError, match="Needy needs all of a teacher's logits, and this dataset has its 5 best"):
        distil(tmp_path, kept("causal_lm"), trainer=Needy)
