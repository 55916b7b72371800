"""What every alignment trainer must do. A new one adds a row.

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
from safetensors.torch import load_file, save_file

import hf_logits.trainers
from contract import accumulates, goes_to_the_hub, resumes
from launching import LAUNCH, leave, run
from preferences import distance, equal, logged, make, pairs, unpaired, weights


@dataclass(frozen=True)
class Row:
    """A trainer with settings, by the names in `hf_logits.trainers`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: Callable[..., Any] = pairs
    label: str = ""
    refuses: frozenset[str] = frozenset()
    """Settings that cannot be had together with these."""

    def make(self, folder: Path | str, *, conversational: bool = False, **settings: Any) -> Any:
        trainer, config = (getattr(hf_logits.trainers, f"{self.name}{part}") for part in ("Trainer", "Config"))
        given = {"data": self.data(conversational=conversational)} | self.settings | settings
        return make(trainer, config, folder, **given)


ROWS = [
    Row("FDPO", {"divergence": "forward_kl"}, label="forward-kl"),
    Row("FDPO", {"divergence": "alpha", "divergence_alpha": 0.3}, label="alpha"),
    Row("FDPO", {"divergence": "chi2_kl"}, label="chi2-kl"),
    Row("RPO", {"rpo_eta": 0.5}, label="sum"),
    Row("RPO", {"rpo_eta": 0.2, "rpo_reduction": "mean"}, label="mean"),
    Row("RPO", {"rpo_eta": 0.2, "rpo_reduction": "token_mean"}, label="token-mean"),
    Row("BCO", {"train_sampling_strategy": "sequential"}, data=unpaired),
    Row("Entanglement", {"gradient_norm": "hidden"}, label="hidden"),
    Row("Entanglement", {"gradient_norm": "full"}, label="full"),
    Row(
        "Entanglement",
        {"gradient_norm": "none", "token_mask": "learned"},
        label="learned-masks",
        refuses=frozenset({"precompute_ref_log_probs"}),
    ),
]
STEEP = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}
"""Plain gradient descent: Adam would blow up what differs in the last digit of a small gradient."""

each = pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(filter(None, (row.name, row.label))))
plain_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@each
@plain_and_lora
@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_it_steps_and_evaluates(row, lora, conversational, tmp_path):
    data = row.data(4, conversational=conversational, seed=3)
    trainer = row.make(tmp_path, conversational=conversational, lora=lora, evaluation=data, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 0
    found = trainer.evaluate()
    stock = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    assert all(math.isfinite(found[f"eval_{key}"]) for key in stock)
    assert all(math.isfinite(logged(trainer, key)[0]) for key in stock)


@each
def test_evaluation_changes_nothing(row, tmp_path):
    alone, watched = (
        row.make(tmp_path / name, evaluation=row.data(4, seed=3), eval_strategy=name, eval_steps=1)
        for name in ("no", "steps")
    )
    alone.train()
    watched.train()
    assert len(logged(watched, "eval_loss")) == 3
    assert equal(weights(alone), weights(watched))


@each
@plain_and_lora
def test_accumulation_cuts_a_step_as_it_likes(row, lora, tmp_path):
    accumulates(partial(row.make, tmp_path, lora=lora, **STEEP), ((4, 1), (2, 2), (1, 4)))


@each
@plain_and_lora
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(row, lora, tmp_path):
    resumes(partial(row.make, lora=lora, per_device_train_batch_size=1), tmp_path, ("loss",))


@each
def test_bf16_is_near_float32(row, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = row.make(tmp_path, bf16=bf16, learning_rate=0.0, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)


@each
@pytest.mark.parametrize(
    ("setting", "rounding"),
    # References that are computed beforehand are computed in other batches: the last digit can differ.
    [("precompute_ref_log_probs", 1e-6), ("gradient_checkpointing", 0.0)],
)
def test_settings_that_cost_or_save_memory_change_nothing(row, setting, rounding, tmp_path):
    if setting in row.refuses:
        with pytest.raises(ValueError, match=setting):
            row.make(tmp_path, **{setting: True})
        return
    trainers = [row.make(tmp_path / str(value), **STEEP, **{setting: value}) for value in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert distance(*map(weights, trainers)) <= rounding


@each
def test_a_stream_is_data_like_any_other(row, tmp_path):
    settings = {"lora": True, "train_sampling_strategy": "sequential"}
    whole = row.make(tmp_path / "whole", **settings)
    stream = row.make(tmp_path / "stream", **settings, data=row.data().to_iterable_dataset())
    whole.train()
    stream.train()
    assert equal(weights(whole), weights(stream))


@each
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_model_goes_to_the_hub_with_a_card(row, hub, tmp_path):
    goes_to_the_hub(row.make(tmp_path / "run", max_steps=1, hub_model_id="tester/aligned"), hub)


@each
def test_another_config_or_vocabulary_is_refused(row, tmp_path):
    import tiny
    from preferences import arguments, tokenizer

    trainer, config = (getattr(hf_logits.trainers, f"{row.name}{part}") for part in ("Trainer", "Config"))
    given = {"model": tiny.llama(0), "train_dataset": row.data(), "processing_class": tokenizer()}
    stock = next(base for base in config.__mro__ if base.__module__.startswith("trl."))
    with pytest.raises(TypeError, match=config.__name__):
        trainer(**given, ref_model=tiny.llama(1), args=arguments(stock, tmp_path))
    with pytest.raises(ValueError, match="vocabulary of 64 tokens"):
        trainer(
            **given, ref_model=tiny.llama(1, vocab_size=80), args=arguments(config, tmp_path / "new", **row.settings)
        )
    assert not (tmp_path / "new").exists()


# --- two processes -------------------------------------------------------------------------------------------------------

SPREAD = STEEP | {"gradient_accumulation_steps": 2, "max_steps": 2}


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
    one = ROWS[index].make(tmp_path, per_device_train_batch_size=2, **SPREAD)
    start = weights(one)
    one.train()
    moved = distance(start, weights(one))
    assert moved > 1e-4
    assert distance(load_file(two_processes / f"{index}.safetensors"), weights(one)) < 1e-3 * moved


def train_every_row(folder: str) -> None:
    for index, row in enumerate(ROWS):
        trainer = row.make(os.path.join(folder, f"run{index}"), per_device_train_batch_size=1, **SPREAD)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        if trainer.accelerator.is_main_process:
            save_file(weights(trainer), os.path.join(folder, f"{index}.safetensors"))
    leave()


if __name__ == "__main__":
    train_every_row(sys.argv[1])
