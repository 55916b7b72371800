"""What every distillation trainer must do. A new one adds a row.

Started with `accelerate launch`, this file is also the program that trains every row in several processes.
"""

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_logits.trainers
from distilling import KINDS, make
from launching import LAUNCH, leave, run
from preferences import Stop, StopAt, distance, equal, logged, weights


@dataclass(frozen=True)
class Row:
    """A trainer with settings, by the names in `hf_logits.trainers`, and a kind of model from `distilling`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal_lm"
    label: str = ""
    cuts: bool = True
    """Whether a step is the same however it is cut: not so for losses that compare the rows of a micro-batch."""

    def make(self, folder: Path | str, **settings: Any) -> Any:
        trainer, config = (getattr(hf_logits.trainers, f"{self.name}{part}") for part in ("Trainer", "Config"))
        return make(trainer, config, folder, kind=self.kind, **(self.settings | settings))

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.name, self.kind, self.label)))


KD = {"ce_weight": 0.5, "temperature": 2.0}
ROWS = [
    Row("LogitDistillation", KD | {"chunk_size": 3}),
    Row("LogitDistillation", KD | {"fused_head": False}, label="dense"),
    Row("LogitDistillation", KD | {"divergence": "jsd", "beta": 0.3, "chunk_size": 3}, kind="seq2seq"),
    Row("LogitDistillation", KD | {"divergence": "reverse_kl", "chunk_size": 3}, kind="masked_lm"),
    Row("LogitDistillation", KD | {"divergence": "tvd"}, kind="token_classification"),
    Row("LogitDistillation", KD, kind="sequence_classification"),
    Row("LogitDistillation", KD, kind="image_classification"),
]
STEEP = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}
"""Plain gradient descent: Adam would blow up what differs in the last digit of a small gradient."""

each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
plain_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@each
@plain_and_lora
def test_it_steps_and_evaluates(row, lora, tmp_path):
    trainer = row.make(tmp_path, lora=lora, evaluation=KINDS[row.kind][1](4, seed=3), max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 0
    found = trainer.evaluate()
    names = [f"distillation/{name}" for name in (*trainer.term_weights(), "cross_entropy", "student_entropy")]
    assert all(math.isfinite(found[f"eval_{name}"]) for name in ("loss", *names))
    assert all(math.isfinite(logged(trainer, name)[0]) for name in ("loss", *names))


@each
def test_evaluation_changes_nothing(row, tmp_path):
    data = KINDS[row.kind][1](4, seed=3)
    alone, watched = (
        row.make(tmp_path / name, evaluation=data, eval_strategy=name, eval_steps=1) for name in ("no", "steps")
    )
    alone.train()
    watched.train()
    assert len(logged(watched, "eval_loss")) == 3
    assert equal(weights(alone), weights(watched))


@pytest.mark.parametrize("row", [row for row in ROWS if row.cuts], ids=lambda row: row.id)
@plain_and_lora
def test_accumulation_cuts_a_step_as_it_likes(row, lora, tmp_path):
    found, start = [], weights(row.make(tmp_path, lora=lora, **STEEP))
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = row.make(
            tmp_path, lora=lora, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **STEEP
        )
        trainer.train()
        found.append((weights(trainer), logged(trainer, "loss")))
    moved = distance(start, found[0][0])
    assert moved > 1e-5
    for others in found[1:]:
        assert distance(found[0][0], others[0]) < 1e-3 * moved
        assert others[1] == pytest.approx(found[0][1], rel=1e-5)


@each
@plain_and_lora
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(row, lora, tmp_path):
    settings = {"lora": lora, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "lr_scheduler_type": "linear"}
    unbroken = row.make(tmp_path / "unbroken", **settings)
    unbroken.train()
    killed = row.make(tmp_path / "killed", save_strategy="steps", rest={"callbacks": [StopAt(5)]}, **settings)
    with pytest.raises(Stop):
        killed.train()
    resumed = row.make(tmp_path / "killed", save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))
    assert logged(unbroken, "loss") == logged(resumed, "loss")


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
    trainers = [row.make(tmp_path / str(value), **STEEP, gradient_checkpointing=value) for value in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert distance(*map(weights, trainers)) < 1e-6


@each
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_model_goes_to_the_hub_with_a_card(row, hub, tmp_path):
    trainer = row.make(tmp_path / "run", max_steps=1, hub_model_id="tester/student")
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["tester/student"].files
    card = files["README.md"].decode()
    assert f"trained with {trainer._name}" in card
    for part in (trainer._paper["title"], trainer._paper["id"], trainer._paper["citation"], *trainer._tag_names):
        assert part in card
    loaded = type(trainer.model).from_pretrained("tester/student")
    assert equal(weights(trainer), {name: value.detach() for name, value in loaded.named_parameters()})
    assert not hub.unknown


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
    evaluation = KINDS[ROWS[index].kind][1](UNEVEN, seed=3)
    one = ROWS[index].make(tmp_path, per_device_train_batch_size=2, evaluation=evaluation, **SPREAD)
    start = weights(one)
    one.train()
    moved = distance(start, weights(one))
    found = load_file(two_processes / f"{index}.safetensors")
    losses, means = found.pop("losses"), found.pop("means")
    assert moved > 1e-5
    assert distance(found, weights(one)) < 1e-3 * moved
    assert losses.tolist() == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert means.tolist() == pytest.approx(summary(one), rel=1e-5)


def summary(trainer: Any) -> list[float]:
    """Means over rows, in training and in evaluation."""
    found = trainer.evaluate()
    return [
        *logged(trainer, "distillation/cross_entropy"),
        found["eval_loss"],
        found["eval_distillation/cross_entropy"],
    ]


def train_every_row(folder: str) -> None:
    for index, row in enumerate(ROWS):
        evaluation = KINDS[row.kind][1](UNEVEN, seed=3)
        settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "evaluation": evaluation}
        trainer = row.make(os.path.join(folder, f"run{index}"), **settings, **SPREAD)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        extra = {"losses": torch.tensor(logged(trainer, "loss")), "means": torch.tensor(summary(trainer))}
        if trainer.accelerator.is_main_process:
            save_file(weights(trainer) | extra, os.path.join(folder, f"{index}.safetensors"))
    leave()


if __name__ == "__main__":
    train_every_row(sys.argv[1])
