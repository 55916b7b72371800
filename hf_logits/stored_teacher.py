"""A teacher's best log-probabilities on disk: what a folder of them says about itself, and how they get into a batch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.tasks import LANGUAGE, bare, check_class_names, targets
from hf_logits.teachers import fingerprint


MANIFEST = "teacher_logits.json"
SCHEMA = "hf_logits/teacher_logits/1"
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"
"""Columns of a stored dataset, and the tensors of a batch: both flat in a row of the dataset, `[..., k]` in a batch."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(tokenizer: Any) -> str | None:
    """SHA-256 of which token has which id, `None` for anything but a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What is written in the folder about its shards, `None` if nothing is.

    Raises:
        ValueError: the manifest is no JSON, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: the file is damaged. Store the teacher in another folder.") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r} and this version reads {SCHEMA!r}: store the teacher again in another folder."
        )
    return found


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    path = folder / f".{MANIFEST}.{os.getpid()}"
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, folder / MANIFEST)


def check_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Refuse a shard that is not what was written."""
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {MANIFEST} lists it: bring it back, or store the teacher again.")
    found = file_hash(path)
    if found != shard["sha256"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found[:12]}... and {MANIFEST} says {shard['sha256'][:12]}.... Take the shard from a "
            f"backup, or delete the folder and store the teacher again."
        )


def weights_hash(teacher: PreTrainedModel | PeftModel) -> str:
    needed = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    teacher.requires_grad_(False)
    try:
        return fingerprint(teacher).numpy().tobytes().hex()
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


def row_blocks(dataset: Dataset | IterableDataset, rows: int) -> Iterator[Dataset]:
    if isinstance(dataset, Dataset):
        for start in range(0, len(dataset), rows):
            yield dataset.select(range(start, min(start + rows, len(dataset))))
        return
    stream, features = iter(dataset), dataset.features
    while block := list(islice(stream, rows)):
        shard = Dataset.from_list(block, features=features)
        features = shard.features
        yield shard


def _plain(value: Any) -> Any:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def rows_hash(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for row in table.to_pylist():
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
    return digest.hexdigest()


def check_rows(shard: dict[str, Any], digest: str, start: int, folder: Path) -> None:
    if shard["rows_sha256"] != digest:
        raise ValueError(
            f"{folder} holds another dataset: rows {start} to {start + shard['rows'] - 1} ({shard['file']}) were others. Go on with the "
            "dataset that it was begun with, or give a new folder."
        )


def check_dataset(folder: Path, manifest: dict[str, Any], dataset: Dataset | IterableDataset) -> None:
    """Refuse a dataset with other rows than those that were stored."""
    rows = 0
    for index, block in enumerate(row_blocks(dataset, manifest["rows_per_shard"])):
        if index == len(manifest["shards"]):
            raise ValueError(f"{folder} holds another dataset: of {manifest['rows']} rows, and this one has more.")
        check_rows(manifest["shards"][index], rows_hash(block.with_format("arrow")[:]), rows, folder)
        rows += len(block)
    if rows != manifest["rows"]:
        raise ValueError(f"{folder} holds another dataset: of {manifest['rows']} rows, and this one has {rows}.")


def load_teacher_logits(
    folder: str | os.PathLike,
    *,
    teacher: PreTrainedModel | PeftModel | None = None,
    dataset: Dataset | IterableDataset | None = None,
    verify: bool = True,
) -> Dataset:
    """The dataset that [`~hf_logits.trainers.store_teacher_logits`] has written, memory-mapped.

    Args:
        folder (`str` or `os.PathLike`):
            Where it lies.
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            That it must be of.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Whose rows it must have.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to compare the shards with their checksums, which reads them once.

    Returns:
        [`~datasets.Dataset`]: The columns of the original dataset, `teacher_ids` and `teacher_log_probs`. A row's are flat, `k`
        numbers for each position that predicts something, in order, the best token first. What the manifest says goes with
        the dataset, through `map`, `filter` and the like; see [`stored_manifest`].

    Raises:
        ValueError: there is nothing, it is unfinished, a shard is missing or damaged, or it is of another teacher or dataset.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no {MANIFEST}: give the folder of store_teacher_logits.")
    if manifest["rows"] is None:
        raise ValueError(
            f"{folder} is unfinished, {len(manifest['shards'])} shards are there: call store_teacher_logits again as before; it goes on."
        )
    if teacher is not None and weights_hash(teacher) != manifest["teacher"]["weights"]:
        raise ValueError(
            f"{folder} is of another teacher, {manifest['teacher']['name']!r}, than {bare(teacher).config.name_or_path!r}: its weights or "
            "their dtype differ. Store this one in another folder."
        )
    if dataset is not None:
        check_dataset(folder, manifest, dataset)
    if verify:
        for shard in manifest["shards"]:
            check_shard(folder, shard)
    loaded = concatenate_datasets([Dataset.from_file(str(folder / shard["file"])) for shard in manifest["shards"]])
    loaded.info.description = json.dumps({key: value for key, value in manifest.items() if key != "shards"})
    # Python lists of so many numbers would take longer to make than the step that they are for.
    return loaded.with_format("numpy", columns=[IDS, LOG_PROBS], output_all_columns=True)


def stored_manifest(dataset: Any) -> dict[str, Any] | None:
    """What is known about the teacher of a dataset from [`load_teacher_logits`]; `None` for any other dataset."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return None
    try:
        found = json.loads(dataset.info.description)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def stored_of(given: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher that the datasets of a trainer's arguments were stored from, `None` if the one for training is not stored.

    Raises:
        ValueError: a dataset for evaluation is of another teacher, or of none, or it is not known of whom the one for training is.
    """
    manifest = stored_manifest(given.get("train_dataset"))
    evaluation = given.get("eval_dataset")
    others = evaluation if isinstance(evaluation, dict) else {} if evaluation is None else {"eval_dataset": evaluation}
    if manifest is None and given.get("train_dataset") is None and others:
        manifest = stored_manifest(next(iter(others.values())))
    train = given.get("train_dataset")
    if manifest is None and isinstance(train, Dataset | IterableDataset) and IDS in (train.column_names or ()):
        raise ValueError(
            f"train_dataset has the column {IDS}, but what load_teacher_logits knows about the teacher is lost: streams and files such as "
            "Parquet drop it, and several teachers cannot be joined. Hand it on with `train_dataset.info.description = "
            "stored.info.description`, or give the dataset of load_teacher_logits itself."
        )
    if manifest is None:
        return None
    for name, other in others.items():
        theirs = stored_manifest(other)
        if theirs is None or not torch.equal(stored_fingerprint(theirs), stored_fingerprint(manifest)):
            what = "nothing is stored" if theirs is None else f"another teacher is stored ({_title(theirs)})"
            raise ValueError(
                f"Training has a stored teacher ({_title(manifest)}), but for {name} {what}: store the same teacher's logits for both."
            )
    return manifest


def _title(manifest: dict[str, Any]) -> str:
    return (
        f"{manifest['teacher']['name'] or 'no name'}, weights {manifest['teacher']['weights'][:8]}, k={manifest['k']}"
    )


def check_stored(
    manifest: dict[str, Any], student: PreTrainedModel | PeftModel, task: str, tokenizer: Any
) -> int | None:
    """How many of the student's classes the stored teacher had, `None` if all.

    Raises:
        ValueError: it was stored for another task, tokenizer or vocabulary, or for other classes.
    """
    config: Any = bare(student).config
    if manifest["task"] != task:
        raise ValueError(
            f"The stored teacher does {manifest['task']} and the student {task}: load the student for it."
        )
    mine = tokenizer_hash(tokenizer)
    if None not in (mine, manifest["tokenizer"]) and mine != manifest["tokenizer"]:
        raise ValueError(
            "The teacher's logits were stored for another tokenizer than the student's processing_class: ids mean other tokens. Distil "
            "within one tokenizer, or store the teacher again."
        )
    if task not in LANGUAGE:
        check_class_names(config, PreTrainedConfig(id2label=dict(enumerate(manifest["names"]))))
        return None
    size, classes = config.get_text_config().vocab_size, manifest["classes"]
    if classes > size:
        raise ValueError(
            f"The teacher's logits were stored for a vocabulary of {classes} and the student has {size}: if the teacher's is only "
            "padded further, store it again with processing_class=tokenizer."
        )
    return None if classes == size else classes


def stored_fingerprint(manifest: dict[str, Any]) -> Tensor:
    """32 bytes that tell stored teachers apart."""
    known = {name: manifest[name] for name in ("task", "tokenizer", "classes", "k", "dtype")}
    text = json.dumps(known | {"teacher": manifest["teacher"]["weights"]}, sort_keys=True)
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


class TeacherLogitsCollator:
    """Gives a batch what is stored of the teacher, `teacher_ids` and `teacher_log_probs` of shape `[*labels, k]`.

    They stand where the logits stand that predict something, so padding on either side, packed and flattened rows are all
    the same. Elsewhere they are zero and nothing reads them.

    Args:
        data_collator (`Callable`):
            Makes the rest of the batch, `labels` (or `shift_labels`) among it.
        k (`int`):
            How many tokens are stored for a position.
        task (`str`):
            The one of [`~hf_logits.tasks.task_of`]: causal language models predict the next label.
    """

    def __init__(self, data_collator: Callable[[list[dict[str, Any]]], Any], *, k: int, task: str):
        self.data_collator = data_collator
        self.k = k
        self.task = task

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        missing = [name for name in (IDS, LOG_PROBS) if name not in rows[0]]
        if missing:
            raise ValueError(
                f"A row has no {missing[0]}, only {sorted(rows[0])}: train on the dataset of load_teacher_logits."
            )
        stored = [(np.asarray(row[IDS]), np.asarray(row[LOG_PROBS])) for row in rows]
        batch = self.data_collator(
            [{name: value for name, value in row.items() if name not in (IDS, LOG_PROBS)} for row in rows]
        )
        wanted = batch["shift_labels"] if "shift_labels" in batch else targets(batch["labels"], self.task)
        valid = wanted != -100
        have = [ids.size // self.k for ids, _ in stored]
        need = valid.flatten(1).sum(1).tolist() if valid.dim() > 1 else valid.long().tolist()
        # rows may have been flattened into one
        if sum(need) != sum(have) or (len(need) == len(have) and need != have):
            raise ValueError(
                f"The rows of a batch have {need} positions with a label, and the teacher's logits of {have} are stored: the labels were "
                "made otherwise when they were stored. Use the same data_collator, or store the teacher again."
            )
        ids = torch.zeros(*wanted.shape, self.k, dtype=torch.int32)
        log_probs = torch.zeros(*wanted.shape, self.k)
        ids[valid] = torch.from_numpy(np.concatenate([row for row, _ in stored]).astype(np.int32)).view(-1, self.k)
        log_probs[valid] = torch.from_numpy(np.concatenate([row for _, row in stored]).astype(np.float32)).view(
            -1, self.k
        )
        return {**batch, IDS: ids, LOG_PROBS: log_probs}
