"""A teacher runs once over a dataset, and what it thinks of every token is kept: students then learn without it."""

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_logits.checks import check_choice, check_count
from hf_logits.sparse_teacher import top_log_probs
from hf_logits.stored_teacher import (
    IDS,
    LOG_PROBS,
    MANIFEST,
    SCHEMA,
    TeacherLogitsCollator,
    check_rows,
    check_shard,
    file_hash,
    load_teacher_logits,
    read_manifest,
    row_blocks,
    rows_hash,
    tokenizer_hash,
    weights_hash,
    write_manifest,
)
from hf_logits.tasks import LANGUAGE, bare, check_one_class, decoder_inputs, targets, task_of, valid_rows
from hf_logits.teachers import in_dtype, without_cache


__all__ = ["TeacherLogitsCollator", "load_teacher_logits", "store_teacher_logits"]

_ROWS = 1024
"""Rows of logits that are looked through at a time, in float32."""


def store_teacher_logits(
    teacher: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    folder: str | os.PathLike,
    *,
    k: int,
    data_collator: Callable[[list[dict[str, Any]]], Any],
    processing_class: Any = None,
    batch_size: int = 8,
    rows_per_shard: int = 1024,
    dtype: str = "float16",
) -> Dataset:
    """Write what a teacher predicts at every position with a label: its `k` best tokens and their log-probabilities.

    A call that was interrupted goes on where it stopped if it is made again: a shard is written under another name and
    renamed, and the manifest (`teacher_logits.json`) lists it, with its checksum, only then. Call it in one process.

    Args:
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Any language model or classifier. It runs where it is, in its own dtype, without dropout, and only rows that
            predict something go through a language model's head.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As it will be given to the trainer.
        folder (`str` or `os.PathLike`):
            Where to write: a new folder, or that of an interrupted call.
        k (`int`):
            Tokens or classes to keep; all of them if there are fewer.
        data_collator (`Callable`):
            The one for training. It must make `labels`, the same ones at each call, and keep rows apart.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer: ids beyond it are padding of the vocabulary and get no probability. Training compares it.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows in a forward.
        rows_per_shard (`int`, *optional*, defaults to `1024`):
            Rows in a file. What an interruption can cost.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Of the log-probabilities. With 64 of 49,152 tokens, `"float16"` moves the loss by less than 3e-4 of itself and
            its gradient by 5e-4 to 3e-3, at 4 bytes a token; `"float32"` takes 6 and moves neither (below 1e-6).

    Returns:
        [`~datasets.Dataset`]: That of [`load_teacher_logits`].

    Raises:
        ValueError: the folder holds another teacher, dataset or setting (what differs is named), a shard is damaged, the
            collator draws at random, or the model has no logits of one softmax.
    """
    check_count("k", k, minimum=1)
    check_count("batch_size", batch_size, minimum=1)
    check_count("rows_per_shard", rows_per_shard, minimum=1)
    check_choice("dtype", dtype, "float16", "float32")
    task = task_of(teacher)
    if task is None:
        raise ValueError(f"{type(bare(teacher)).__name__} has no logits that could be stored.")
    check_one_class(teacher)
    folder = Path(folder)
    config: Any = bare(teacher).config
    classes = config.get_text_config().vocab_size if task in LANGUAGE else config.num_labels
    if task in LANGUAGE and tokenizer_hash(processing_class) is not None:
        classes = min(classes, len(processing_class))
    wanted: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task,
        "teacher": {
            "name": config.name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "weights": weights_hash(teacher),
        },
        "tokenizer": tokenizer_hash(processing_class),
        "classes": classes,
        "names": None if task in LANGUAGE else [config.id2label[index] for index in range(classes)],
        "k": min(k, classes),
        "dtype": dtype,
        "rows_per_shard": rows_per_shard,
    }
    total = len(dataset) if isinstance(dataset, Dataset) else None
    manifest = _begin(folder, wanted, total)
    progress = tqdm(total=total, desc="Storing the teacher's logits", unit="row")
    done, rows = 0, 0
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval()
    try:
        for shard in row_blocks(dataset, rows_per_shard):
            table = shard.with_format("arrow")[:]
            digest = rows_hash(table)
            if done < len(manifest["shards"]):
                check_rows(manifest["shards"][done], digest, rows, folder)
                progress.update(len(shard))
            elif manifest["rows"] is not None:
                raise ValueError(f"{folder} is finished with {manifest['rows']} rows, and this dataset has more.")
            else:
                if done == 0:
                    _check_settled(shard, teacher, data_collator, batch_size)
                found = _Stored(teacher, task, classes, wanted["k"], data_collator)
                columns = found.run(shard, batch_size, progress)
                file = f"shard-{done:05d}.arrow"
                _write(folder / file, table, shard.features, columns, dtype, classes)
                entry = {"file": file, "rows": len(shard), "rows_sha256": digest, "sha256": file_hash(folder / file)}
                manifest["shards"].append(entry)
                write_manifest(folder, manifest)
            done, rows = done + 1, rows + len(shard)
    finally:
        progress.close()
        for module, training in modes.items():
            module.training = training
    if done < len(manifest["shards"]):
        raise ValueError(f"{folder} has {len(manifest['shards'])} shards, and this dataset ends after {rows} rows.")
    if not done:
        raise ValueError("The dataset has no rows.")
    if manifest["rows"] is None:
        write_manifest(folder, manifest | {"rows": rows})
    return load_teacher_logits(folder, verify=False)


def _begin(folder: Path, wanted: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """The manifest to go on with. Finished shards must be whole, and of the same teacher and settings."""
    found = read_manifest(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder} has files but no {MANIFEST}: give a new folder.")
        found = wanted | {"rows": None, "shards": []}
        write_manifest(folder, found)
    for name, value in wanted.items():
        mine, theirs = (value, found[name])
        if name == "teacher":  # a teacher may have moved
            mine, theirs = mine["weights"], theirs["weights"]
        if mine != theirs:
            raise ValueError(
                f"{folder} was begun with another {name}: {found[name]!r} there, {value!r} now. Go on with what it was begun with, or "
                "give a new folder."
            )
    if rows is not None and found["rows"] not in (None, rows):
        raise ValueError(f"{folder} holds another dataset: of {found['rows']} rows, and this one has {rows}.")
    for leftover in folder.glob(".shard-*"):
        leftover.unlink()
    for shard in found["shards"]:
        check_shard(folder, shard)
    return found


def _write(
    path: Path, table: pa.Table, features: Features, columns: tuple[list[Any], list[Any]], dtype: str, classes: int
) -> None:
    for name in (IDS, LOG_PROBS):
        if name in features:
            raise ValueError(f"The dataset has a column {name!r} already: remove it.")
    kinds = {IDS: List(Value("uint16" if classes <= 2**16 else "int32")), LOG_PROBS: List(Value(dtype))}
    for (name, kind), values in zip(kinds.items(), columns, strict=True):
        if sum(map(len, values)) >= 2**31:
            raise ValueError(
                f"{sum(map(len, values))} numbers do not fit into {path.name}: give a smaller rows_per_shard, with a new folder."
            )
        flat = pa.array(np.concatenate(values).astype(kind.feature.dtype))
        offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, flat))
    # A block of a larger table drags some of its buffers along: copied, the same rows are the same bytes.
    table = table.take(np.arange(len(table)))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with ArrowWriter(features=Features({**features, **kinds}), path=str(unfinished)) as writer:
        writer.write_table(table)
        writer.finalize()
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _batches(shard: Dataset, teacher: PreTrainedModel | PeftModel, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows with the columns that a trainer would give to its collator."""
    read = {*inspect.signature(bare(teacher).forward).parameters}
    for start in range(0, len(shard), batch_size):
        rows = shard.__getitems__(list(range(start, min(start + batch_size, len(shard)))))
        known = [name for name in rows[0] if name in read]
        kept = {*known, "label", "label_ids", "labels"} if known else {*rows[0]}
        yield [{name: value for name, value in row.items() if name in kept} for row in rows]


def _check_settled(
    shard: Dataset, teacher: Any, data_collator: Callable[[list[dict[str, Any]]], Any], size: int
) -> None:
    rows = next(_batches(shard, teacher, size))
    first, second = data_collator([dict(row) for row in rows]), data_collator([dict(row) for row in rows])
    if "labels" not in first:
        raise ValueError(
            f"The data_collator makes {sorted(first)} and no labels, which say what positions count: give one that does."
        )
    if len(first["labels"]) != len(rows):
        raise ValueError(
            f"The data_collator made {len(first['labels'])} rows of {len(rows)}: give one that keeps rows apart. What is stored fits a "
            "flattening one in training too."
        )
    for name, value in first.items():
        if isinstance(value, Tensor) and not torch.equal(value, second[name]):
            raise ValueError(
                f"The data_collator makes other {name} of the same rows each time, so what the teacher said would be about other tokens "
                "than training sees: draw beforehand (`dataset.map`), and give a collator that only pads."
            )


def _count_positions(batch: dict[str, Any], teacher: Any, task: str) -> None:
    """Positions of rows that are padded on the left begin at their first token, whatever rows they are batched with."""
    mask, known = batch.get("attention_mask"), inspect.signature(bare(teacher).forward).parameters
    if task != "causal_lm" or "position_ids" in batch or "position_ids" not in known:
        return
    if mask is not None and mask.dim() == 2 and not mask[:, 0].all():
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)


class _Stored:
    """The teacher at work."""

    def __init__(self, teacher: Any, task: str, classes: int, k: int, data_collator: Callable[[list[Any]], Any]):
        self.teacher, self.task, self.classes, self.k = teacher, task, classes, k
        self.data_collator = data_collator
        self.settings = without_cache(teacher)

    @torch.no_grad()
    def run(self, shard: Dataset, batch_size: int, progress: tqdm) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The ids and the log-probs of each row, flat."""
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for rows in _batches(shard, self.teacher, batch_size):
            batch = {
                name: value.to(self.teacher.device) if isinstance(value, Tensor) else value
                for name, value in in_dtype(self.data_collator(rows), bare(self.teacher).dtype).items()
            }
            labels = batch.pop("labels")
            wanted = targets(labels, self.task)
            if self.task == "seq2seq" and batch.get("decoder_input_ids") is None:
                batch["decoder_input_ids"] = decoder_inputs(self.teacher, labels)
            _count_positions(batch, self.teacher, self.task)
            counts = (wanted != -100).view(len(rows), -1).sum(1).tolist()
            parts = [top_log_probs(part, self.k) for part in self.logits(batch, wanted).split(_ROWS)]
            for kept, values in zip(
                found, (torch.cat([ids for _, ids in parts]), torch.cat([best for best, _ in parts])), strict=True
            ):
                kept += [row.flatten().numpy() for row in values.cpu().split(counts)]
            progress.update(len(rows))
        return found

    def logits(self, batch: dict[str, Any], wanted: Int[Tensor, "B ..."]) -> Float[Tensor, "N C"]:
        """Of the rows that predict something, without those of padding in the vocabulary."""
        valid = wanted != -100
        seen: list[int] = []
        head = bare(self.teacher).get_output_embeddings() if self.task in LANGUAGE else None

        def keep(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(1)
            hidden = given[0][:, given[0].size(1) - wanted.size(1) :]
            return (hidden[valid][None], *given[1:])

        handle = None if head is None else head.register_forward_pre_hook(keep)
        try:
            logits = self.teacher(**batch, **self.settings).logits
        finally:
            if handle is not None:
                handle.remove()
        rows = logits[0] if seen else valid_rows(logits, wanted)[0]
        return rows[:, : self.classes]
