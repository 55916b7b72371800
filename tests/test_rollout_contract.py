"""What every trainer that learns from its own samples must do. A new one adds a row.

Started with `accelerate launch`, this file is also the program that trains every row in several processes.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_logits.trainers
import rollouts
from contract import accumulates, goes_to_the_hub, resumes
from launching import LAUNCH, leave, run
from preferences import distance, equal, logged, weights


@dataclass(frozen=True)
class Row:
    """A trainer with settings, by the names in `hf_logits.trainers`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    metrics: tuple[str, ...] = ()
    """What it logs beside the host's metrics."""
    rows: int = 8
    """Of a step."""
    steep: dict[str, Any] = field(default_factory=dict)
    """What its plain gradient descent needs."""
    draws: bool = False
    """Whether it draws more than its samples: then it is the same only in runs that draw alike."""
    prepare: Callable[[Any], Any] = lambda trainer: None
    """What its users do with a new trainer before they train."""

    def make(self, folder: Path | str, *, conversational: bool = False, **settings: Any) -> Any:
        trainer, config = (getattr(hf_logits.trainers, f"{self.name}{part}") for part in ("Trainer", "Config"))
        given = {"data": rollouts.questions(conversational=conversational), "per_device_train_batch_size": self.rows}
        given |= self.settings | settings
        made = rollouts.make(trainer, config, folder, **given)
        self.prepare(made)
        return made


def init_memory(trainer: Any) -> None:
    trainer.init_memory()


SCORE = {"score_correction_prompt": "w9 w10", "num_generations": 2, "max_completion_length": 5}
ATTEMPTS = ("kl", *(f"score/{name}" for name in ("accuracy_1", "accuracy_2", "delta", "edit_ratio", "kl_1")))
SLOW = {"learning_rate": 2e-3, "max_steps": 2}
ROWS = [
    Row("TRICE", label="control-variate", prepare=init_memory),
    Row("TRICE", {"control_variate": False, "divide_by": "all"}, label="basic"),
    Row("TRICE", {"subsample_size": 4}, label="subsampled", draws=True, prepare=init_memory),
    Row("SCoRe", SCORE | {"score_stage": 1}, label="stage-1", metrics=ATTEMPTS, rows=4, steep=SLOW),
    Row(
        "SCoRe", SCORE | {"score_stage": 2, "score_alpha": 2.0}, label="stage-2", metrics=ATTEMPTS, rows=4, steep=SLOW
    ),
]
STEEP = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 4}
"""Plain gradient descent, over the data twice: Adam would blow up what differs in the last digit of a small gradient."""

each = pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(filter(None, (row.name, row.label))))
exact = pytest.mark.parametrize(
    "row",
    [row for row in ROWS if not row.draws],
    ids=lambda row: "-".join(filter(None, (row.name, row.label))),
)
plain_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture
def script(monkeypatch):
    rollouts.follow_a_script(monkeypatch)


@each
@plain_and_lora
@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_it_steps_and_evaluates(row, lora, conversational, tmp_path):
    data = rollouts.questions(4, conversational=conversational, seed=3)
    trainer = row.make(tmp_path, conversational=conversational, lora=lora, evaluation=data, max_steps=6)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 0
    found = trainer.evaluate()
    keys = ("loss", "reward", "entropy", "completions/mean_length", *row.metrics)
    assert all(math.isfinite(found[f"eval_{key}"]) for key in keys)
    for key in ("grad_norm", *keys):
        assert logged(trainer, key) and all(map(math.isfinite, logged(trainer, key)))


@exact
def test_evaluation_changes_nothing(row, script, tmp_path):
    alone, watched = (
        row.make(
            tmp_path / name,
            evaluation=rollouts.questions(4, seed=3),
            eval_strategy=name,
            eval_steps=1,
            **STEEP | row.steep,
        )
        for name in ("no", "steps")
    )
    start = weights(alone)
    alone.train()
    watched.train()
    assert len(logged(watched, "eval_loss")) == watched.state.max_steps
    # the order of the rows in a batch is drawn, and evaluation draws too
    assert distance(weights(alone), weights(watched)) < 1e-3 * distance(start, weights(alone))


@exact
@plain_and_lora
def test_accumulation_cuts_a_step_as_it_likes(row, lora, script, tmp_path):
    cuts = ((row.rows, 1), (row.rows // 2, 2), (1, row.rows))
    accumulates(partial(row.make, tmp_path, lora=lora, **STEEP | row.steep), cuts)


@each
@plain_and_lora
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(row, lora, tmp_path):
    make = partial(row.make, lora=lora, per_device_train_batch_size=row.rows // 2)
    resumes(make, tmp_path, ("loss", "reward", "grad_norm", *row.metrics))


@exact
def test_bf16_is_near_float32(row, script, tmp_path):
    norms = []
    for bf16 in (False, True):
        trainer = row.make(tmp_path, bf16=bf16, learning_rate=0.0, max_steps=4)
        trainer.train()
        norms.append(logged(trainer, "grad_norm"))
    assert max(norms[0]) > 0
    assert norms[1] == pytest.approx(norms[0], rel=0.05, abs=0.02)


@each
def test_gradient_checkpointing_changes_nothing(row, script, tmp_path):
    found = []
    for value in (False, True):
        trainer = row.make(tmp_path / str(value), gradient_checkpointing=value, **STEEP | row.steep)
        start = weights(trainer)
        trainer.train()  # a new trainer seeds what is drawn
        found.append(weights(trainer))
    assert equal(*found) and not equal(start, found[0])


@each
def test_a_stream_is_data_like_any_other(row, script, tmp_path):
    settings = STEEP | row.steep | {"lora": True, "shuffle_dataset": False}
    found = []
    for data in (rollouts.questions(), rollouts.questions().to_iterable_dataset()):
        trainer = row.make(tmp_path, data=data, **settings)
        start = weights(trainer)
        trainer.train()
        found.append(weights(trainer))
    moved = distance(start, found[0])
    assert moved > 1e-5
    assert distance(*found) < 1e-3 * moved  # the host shuffles a step's rows by chance


@each
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_model_goes_to_the_hub_with_a_card(row, hub, tmp_path):
    goes_to_the_hub(row.make(tmp_path / "run", max_steps=1, hub_model_id="tester/aligned"), hub)


@each
def test_another_config_is_refused(row, tmp_path):
    trainer, config = (getattr(hf_logits.trainers, f"{row.name}{part}") for part in ("Trainer", "Config"))
    stock = next(base for base in config.__mro__ if base.__module__.startswith("trl."))
    with pytest.raises(TypeError, match=config.__name__):
        rollouts.make(trainer, stock, tmp_path)


# --- two processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with the weights of every row after training in two processes."""
    folder = tmp_path_factory.mktemp("two")
    run(__file__, folder, folder=folder, launch=LAUNCH)
    return folder


@exact
def test_two_processes_do_what_one_does_with_twice_the_batch(row, script, two_processes, tmp_path):
    """Where a prompt has four answers, either process makes two of them."""
    one = row.make(tmp_path, **spread(row, processes=1))
    start = weights(one)
    one.train()
    moved = distance(start, weights(one))
    assert moved > 1e-4
    index = ROWS.index(row)
    assert distance(load_file(two_processes / f"{index}.safetensors"), weights(one)) < 1e-3 * moved
    theirs = load_file(two_processes / f"{index}-metrics.safetensors")
    for key in row.metrics:
        assert theirs[key].tolist() == pytest.approx(logged(one, key), abs=1e-5)


def spread(row: Row, *, processes: int) -> dict[str, Any]:
    answers = {"num_generations": 4} if "num_generations" in row.settings else {}
    return (
        STEEP | row.steep | answers | {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    )


def train_every_row(folder: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        rollouts.follow_a_script(monkeypatch)
        for index, row in enumerate(ROWS):
            trainer = row.make(os.path.join(folder, f"run{index}"), **spread(row, processes=2))
            assert trainer.accelerator.num_processes == 2
            trainer.train()
            if trainer.accelerator.is_main_process:
                save_file(weights(trainer), os.path.join(folder, f"{index}.safetensors"))
                metrics = {key: torch.tensor(logged(trainer, key), dtype=torch.float64) for key in row.metrics}
                save_file(metrics, os.path.join(folder, f"{index}-metrics.safetensors"))
        leave()


if __name__ == "__main__":
    train_every_row(sys.argv[1])
