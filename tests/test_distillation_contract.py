"""What every distillation trainer must do. A new one adds a row.

Started with `accelerate launch`, this file is also the program that trains every row in several processes.
"""

import gc
import math
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import hf_logits.trainers
from contract import accumulates, goes_to_the_hub, resumes
from distilling import KINDS, SCORES, make
from launching import LAUNCH, leave, run
from preferences import arguments, distance, equal, logged, weights


@dataclass(frozen=True)
class Row:
    """A trainer with settings, by the names in `hf_logits.trainers`, and a kind of model and data from `distilling`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal_lm"
    label: str = ""
    cuts: bool = True
    """Whether a step is the same however it is cut: not so for losses that compare the rows of a micro-batch."""
    logs: tuple[str, ...] = ()
    """What is logged, where the trainer does not tell its terms."""

    def make(self, folder: Path | str, *, callbacks: list[Any] | None = None, **settings: Any) -> Any:
        trainer, config = (getattr(hf_logits.trainers, f"{self.name}{part}") for part in ("Trainer", "Config"))
        settings |= {"rest": {"callbacks": callbacks}} if callbacks else {}
        return make(trainer, config, folder, kind=self.kind, **(self.settings | settings))

    def data(self, rows: int = 8, seed: int = 0) -> Any:
        return (KINDS | SCORES)[self.kind][1](rows, seed)

    def means(self, trainer: Any) -> list[str]:
        """What is logged beside the loss, by its full names."""
        names = list(self.logs)
        if not names:  # a term that counts for nothing may compare rows
            terms = [name for name, weight in trainer.term_weights().items() if weight]
            names = list(dict.fromkeys([*terms, "cross_entropy", "student_entropy"]))
        return [f"{trainer._meter_prefix}/{name}" for name in names]

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.name, self.kind, self.label)))


ALIGNED = {"gradient_alignment": True, "auxiliary_weight": 5.0}
KD = {"ce_weight": 0.5, "temperature": 2.0}
ROWS = [
    Row("LogitDistillation", KD | {"chunk_size": 3}),
    Row("LogitDistillation", KD | {"fused_head": False}, label="dense"),
    Row("LogitDistillation", KD | {"divergence": "jsd", "beta": 0.3, "chunk_size": 3}, kind="seq2seq"),
    Row("LogitDistillation", KD | {"divergence": "reverse_kl", "chunk_size": 3}, kind="masked_lm"),
    Row("LogitDistillation", KD | {"divergence": "tvd"}, kind="token_classification"),
    Row("LogitDistillation", KD, kind="sequence_classification"),
    Row("LogitDistillation", KD, kind="image_classification"),
    Row("NKD", {"gamma": 0.7, "temperature": 2.0, "chunk_size": 3}),
    Row("NKD", {"gamma": 0.7, "temperature": 2.0}, kind="image_classification"),
    Row("USKD", {"alpha": 0.0, "beta": 0.5, "mu": 0.5, "chunk_size": 3}, label="rowwise"),
    Row("USKD", {"mu": 0.5}, cuts=False),
    Row("USKD", {"alpha": 0.0, "beta": 0.5, "mu": 0.5}, kind="image_classification", label="rowwise"),
    Row("USKD", {"mu": 0.5}, kind="sequence_classification", cuts=False),
    Row("DualHeadDistillation", {"chunk_size": 3}),
    Row("DualHeadDistillation", ALIGNED, kind="sequence_classification", label="aligned"),
    Row("SinkhornDistillation", cuts=False),
    Row("SinkhornDistillation", kind="sequence_classification", cuts=False),
    Row("MultiLevelRanking", kind="ranking", logs=("separation", "compactness", "ordering")),
    Row("MultiLevelRanking", kind="rating", logs=("rating", "hidden_states", "attentions", "scores")),
]
CLASSES = ("sequence_classification", "image_classification")
STEEP = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}
"""Plain gradient descent: Adam would blow up what differs in the last digit of a small gradient."""

each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
plain_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@each
@plain_and_lora
def test_it_steps_and_evaluates(row, lora, tmp_path):
    trainer = row.make(tmp_path, lora=lora, evaluation=row.data(4, seed=3), max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 0
    found = trainer.evaluate()
    for name in ("loss", *row.means(trainer)):
        assert math.isfinite(found[f"eval_{name}"]) and math.isfinite(logged(trainer, name)[0])


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind in CLASSES], ids=lambda row: row.id)
def test_predictions_are_the_logits_and_nothing_else(row, tmp_path):
    trainer, data = row.make(tmp_path), row.data(4, seed=3)
    plain = Trainer(
        trainer.model, arguments(TrainingArguments, tmp_path / "plain"), data_collator=trainer.data_collator
    )
    torch.testing.assert_close(trainer.predict(data).predictions, plain.predict(data).predictions)


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind in KINDS], ids=lambda row: row.id)
def test_a_batch_without_rows_reaches_every_weight(row, tmp_path):
    """Other processes wait for its gradients."""
    trainer = row.make(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    assert loss.item() == 0.0
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@each
def test_evaluation_changes_nothing(row, tmp_path):
    data = row.data(4, seed=3)
    found = []
    for strategy in ("no", "steps"):  # one behind the other: building a trainer sets the seed of dropout
        trainer = row.make(tmp_path, evaluation=data, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        found.append(weights(trainer))
    assert len(logged(trainer, "eval_loss")) == 3
    assert equal(*found)


@pytest.mark.parametrize("row", [row for row in ROWS if row.cuts], ids=lambda row: row.id)
@plain_and_lora
def test_accumulation_cuts_a_step_as_it_likes(row, lora, tmp_path):
    make = partial(row.make, tmp_path, lora=lora, **STEEP)
    first, *others = (logged(trainer, "loss") for trainer in accumulates(make, ((4, 1), (2, 2), (1, 4)), least=1e-5))
    assert all(losses == pytest.approx(first, rel=1e-5) for losses in others)


@each
@plain_and_lora
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(row, lora, tmp_path):
    resumes(partial(row.make, lora=lora), tmp_path, ("loss",), stop_at=3, max_steps=4)


@each
def test_bf16_is_near_float32(row, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = row.make(tmp_path, bf16=bf16, learning_rate=0.0, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)


@each
def test_gradient_checkpointing_changes_nothing(row, tmp_path):
    found = []
    for value in (False, True):
        trainer = row.make(tmp_path, **STEEP, gradient_checkpointing=value)
        trainer.train()
        found.append(weights(trainer))
    assert distance(*found) < 1e-6


@each
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_model_goes_to_the_hub_with_a_card(row, hub, tmp_path):
    goes_to_the_hub(row.make(tmp_path / "run", max_steps=1, hub_model_id="tester/student"), hub)


# --- two processes -------------------------------------------------------------------------------------------------------

UNEVEN = 5
"""Rows of evaluation that do not fill two processes' batches."""
SPREAD = STEEP | {"gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with the weights of every row after training in two processes."""
    folder = tmp_path_factory.mktemp("two")
    run(__file__, folder, folder=folder, launch=LAUNCH)
    return folder


@pytest.mark.parametrize("index", [i for i, row in enumerate(ROWS) if row.cuts], ids=lambda i: ROWS[i].id)
def test_two_processes_do_what_one_does_with_twice_the_batch(index, two_processes, tmp_path):
    row = ROWS[index]
    one = row.make(tmp_path, per_device_train_batch_size=2, evaluation=row.data(UNEVEN, seed=3), **SPREAD)
    start = weights(one)
    one.train()
    moved = distance(start, weights(one))
    found = load_file(two_processes / f"{index}.safetensors")
    losses, means = found.pop("losses"), found.pop("means")
    assert moved > 1e-5
    assert distance(found, weights(one)) < 1e-3 * moved
    assert losses.tolist() == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert means.tolist() == pytest.approx(summary(row, one), rel=1e-5, abs=1e-9)


def summary(row: Row, trainer: Any) -> list[float]:
    """Means over rows, in training and in evaluation."""
    found, names = trainer.evaluate(), row.means(trainer)
    trained = [value for name in names for value in logged(trainer, name)]
    return [*trained, *(found[f"eval_{name}"] for name in ("loss", *names))]


def train_every_row(folder: str) -> None:
    gc.freeze()  # what is imported is no garbage
    for index, row in enumerate(ROWS):
        # a loss that compares rows needs two of them
        settings = {"per_device_train_batch_size": 1 if row.cuts else 2, "per_device_eval_batch_size": 2}
        settings["evaluation"] = row.data(UNEVEN, seed=3)
        trainer = row.make(os.path.join(folder, f"run{index}"), **settings, **SPREAD)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        extra = {"losses": torch.tensor(logged(trainer, "loss")), "means": torch.tensor(summary(row, trainer))}
        sums = torch.stack([value.double().sum() for value in weights(trainer).values()])
        everywhere = trainer.accelerator.gather(sums[None])
        assert torch.equal(everywhere[0], everywhere[1])
        if trainer.accelerator.is_main_process:
            save_file(weights(trainer) | extra, os.path.join(folder, f"{index}.safetensors"))
    leave()


if __name__ == "__main__":
    train_every_row(sys.argv[1])
