"""What every trainer that learns from its own rollouts must do. A new one adds a row.

Started with `accelerate launch`, this file is also the program that trains every row in several processes.
"""

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_logits.trainers
import policies
from launching import LAUNCH, leave, run
from preferences import Stop, StopAt, distance, equal, logged, weights


@dataclass(frozen=True)
class Row:
    """A trainer with settings, by the names in `hf_logits.trainers`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    metrics: tuple[str, ...] = ()
    """What it logs beside the host's metrics."""

    def make(self, folder: Path | str, *, conversational: bool = False, **settings: Any) -> Any:
        trainer, config = (getattr(hf_logits.trainers, f"{self.name}{part}") for part in ("Trainer", "Config"))
        given = {"data": policies.prompts(conversational=conversational)} | self.settings | settings
        return policies.make(trainer, config, folder, **given)


SCORE = {"score_correction_prompt": "w9 w10"}
ATTEMPTS = ("score/accuracy_1", "score/accuracy_2", "score/delta", "score/edit_ratio", "score/kl_1")
ROWS = [
    Row("SCoRe", SCORE | {"score_stage": 1}, label="stage-1", metrics=ATTEMPTS),
    Row("SCoRe", SCORE | {"score_stage": 2, "score_alpha": 2.0}, label="stage-2", metrics=ATTEMPTS),
]
STEEP = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": 2}
"""Plain gradient descent: Adam would blow up what differs in the last digit of a small gradient."""


def deterministic(trainer: Any) -> Any:
    """Samples that depend on nothing but the prompt and the row's place among those of all processes."""

    def sampled(prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        start = trainer.accelerator.process_index * len(prompt_ids)
        seeds = [sum(ids) + 5 * (start + row) for row, ids in enumerate(prompt_ids)]
        return [[6 + (seed * place) % 50 for place in range(1, 3 + seed % 3)] for seed in seeds], None

    trainer._generate_single_turn = sampled
    return trainer


each = pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(filter(None, (row.name, row.label))))
plain_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@each
@plain_and_lora
@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_it_steps_and_evaluates(row, lora, conversational, tmp_path):
    data = policies.prompts(4, conversational=conversational, seed=3)
    trainer = row.make(tmp_path, conversational=conversational, lora=lora, evaluation=data, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 0
    found = trainer.evaluate()
    stock = ("loss", "reward", "kl", "entropy", "completions/mean_length")
    assert all(math.isfinite(found[f"eval_{key}"]) for key in (*stock, *row.metrics))
    assert all(math.isfinite(logged(trainer, key)[0]) for key in (*stock, *row.metrics))


@each
def test_accumulation_cuts_a_step_as_it_likes(row, tmp_path):
    found, start = [], weights(row.make(tmp_path, **STEEP))
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = row.make(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **STEEP)
        trainer.train()
        found.append(weights(trainer))
    moved = distance(start, found[0])
    assert moved > 1e-4
    assert distance(found[0], found[1]) < 1e-3 * moved
    assert distance(found[0], found[2]) < 1e-3 * moved


@each
@plain_and_lora
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(row, lora, tmp_path):
    settings = {"lora": lora, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}  # step 5 begins the second epoch
    unbroken = row.make(tmp_path / "unbroken", **settings)
    unbroken.train()
    killed = row.make(tmp_path / "killed", save_strategy="steps", callbacks=[StopAt(5)], **settings)
    with pytest.raises(Stop):
        killed.train()
    resumed = row.make(tmp_path / "killed", save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))
    for key in ("loss", "reward", *row.metrics):
        assert logged(unbroken, key) == logged(resumed, key)


@each
def test_bf16_is_near_float32(row, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = row.make(tmp_path, bf16=bf16, learning_rate=0.0, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "grad_norm")[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)


@each
def test_gradient_checkpointing_changes_nothing(row, tmp_path):
    trainers = [row.make(tmp_path / str(on), **STEEP, gradient_checkpointing=on) for on in (False, True)]
    for trainer in trainers:
        deterministic(trainer).train()
    assert distance(*map(weights, trainers)) == 0.0


@each
def test_a_stream_is_data_like_any_other(row, tmp_path):
    settings = STEEP | {"lora": True, "shuffle_dataset": False}
    prompts = policies.prompts(seed=1)  # of which some are answered rightly and some are not
    whole = row.make(tmp_path / "whole", **settings, data=prompts)
    stream = row.make(tmp_path / "stream", **settings, data=prompts.to_iterable_dataset())
    start = weights(whole)
    deterministic(whole).train()
    deterministic(stream).train()
    moved = distance(start, weights(whole))
    assert moved > 1e-5
    assert distance(weights(whole), weights(stream)) < 1e-3 * moved  # the host shuffles a step's rows by chance


@each
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_model_goes_to_the_hub_with_a_card(row, hub, tmp_path):
    trainer = row.make(tmp_path / "run", max_steps=1, hub_model_id="tester/aligned")
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["tester/aligned"].files
    card = files["README.md"].decode()
    assert f"trained with {trainer._name}" in card
    for part in (trainer._paper["title"], trainer._paper["id"], trainer._paper["citation"], *trainer._tag_names):
        assert part in card
    loaded = AutoModelForCausalLM.from_pretrained("tester/aligned")
    assert equal(weights(trainer), {name: value.detach() for name, value in loaded.named_parameters()})
    assert not hub.unknown


# --- two processes -------------------------------------------------------------------------------------------------------

SPREAD = STEEP | {"num_generations": 4}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with the weights of every row after training in two processes."""
    folder = tmp_path_factory.mktemp("two")
    run(__file__, folder, folder=folder, launch=LAUNCH)
    return folder


@pytest.mark.parametrize(
    "index", range(len(ROWS)), ids=lambda i: "-".join(filter(None, (ROWS[i].name, ROWS[i].label)))
)
def test_two_processes_do_what_one_does_with_twice_the_batch(index, two_processes, tmp_path):
    """A prompt's four answers are made by two processes, two by each."""
    one = deterministic(ROWS[index].make(tmp_path, per_device_train_batch_size=4, **SPREAD))
    start = weights(one)
    one.train()
    moved = distance(start, weights(one))
    assert moved > 1e-4
    assert distance(load_file(two_processes / f"{index}.safetensors"), weights(one)) < 1e-3 * moved
    metrics = {key: logged(one, key) for key in ROWS[index].metrics}
    theirs = load_file(two_processes / f"{index}-metrics.safetensors")
    assert metrics == {key: pytest.approx(theirs[key].tolist(), abs=1e-5) for key in metrics}


def train_every_row(folder: str) -> None:
    import torch

    for index, row in enumerate(ROWS):
        trainer = row.make(os.path.join(folder, f"run{index}"), per_device_train_batch_size=2, **SPREAD)
        assert trainer.accelerator.num_processes == 2
        deterministic(trainer).train()
        if trainer.accelerator.is_main_process:
            save_file(weights(trainer), os.path.join(folder, f"{index}.safetensors"))
            metrics = {key: torch.tensor(logged(trainer, key), dtype=torch.float64) for key in row.metrics}
            save_file(metrics, os.path.join(folder, f"{index}-metrics.safetensors"))
    leave()


if __name__ == "__main__":
    train_every_row(sys.argv[1])
