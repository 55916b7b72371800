"""Questions that are scored while a trainer runs: where the values show, and that several processes share them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import preferences
import tiny
from hf_logits.metrics import MCQEvalCallback, choice_logprobs
from hf_logits.metrics.attentiveness import attentiveness
from hf_logits.metrics.mcq_callback import measure_table
from hf_logits.metrics.mcq_chain import mcq_chain
from hf_logits.metrics.position_bias import bias_of_table
from hf_logits.metrics.scoring import ChoiceTable
from launching import LAUNCH, leave, run


PROMPTS = ["w10 w11 w12", "w20", "w30 w31", "w40 w41 w42 w43", "w50"]
CHOICES = [["w13", "w14 w15"], ["w21", "w22", "w23"], ["w32", "w33"], ["w44", "w45 w46"], ["w51", "w52"]]
ANSWERS = [0, 2, 1, 0, 1]


def expected(model: Any, **options: Any) -> dict[str, float]:
    table = choice_logprobs(model, preferences.tokenizer(), PROMPTS, CHOICES, **options)
    found = mcq_chain(table.logprobs, ANSWERS)
    return found | attentiveness(table.logprobs, ANSWERS, lengths=table.lengths, prior_logprobs=table.prior_logprobs)


def data(rows: int = 4) -> Dataset:
    ids = torch.randint(4, 64, (rows, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def made(folder: Any, trainer: type = Trainer, config: type = TrainingArguments, **settings: Any) -> Any:
    arguments = preferences.arguments(config, folder, **settings)
    return trainer(
        model=tiny.llama(),
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(2),
        processing_class=preferences.tokenizer(),
    )


def test_the_values_come_back_and_are_logged(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.add_callback(MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS, prior=""))
    found = trainer.evaluate()
    truth = expected(trainer.model, prior="")
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for key in (
        "accuracy",
        "accuracy_pmi",
        "accuracy_byte",
        "attentiveness",
        "log_p_vocab",
        "p_choices",
        "brier",
        "tie_rate",
    ):
        assert found[f"eval_mcq_{key}"] == logged[f"eval_mcq_{key}"] == pytest.approx(truth[key], abs=1e-6)
    assert "eval_loss" in found and "eval_mcq_notes" not in found
    other = trainer.evaluate(metric_key_prefix="test")
    assert other["test_mcq_brier"] == found["eval_mcq_brier"] and "eval_mcq_brier" not in other


def test_notes_of_all_parts_are_kept_and_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    rows = [[-math.inf, -math.inf], [-1.0, -2.0]]
    sizes = {unit: [[1, 1], [1, 1]] for unit in ("tokens", "chars", "bytes")}
    table = ChoiceTable(logprobs=rows, lengths=sizes, distinct=[[True, True]] * 2, prior_logprobs=None)
    found = measure_table(table, [0, 0])
    assert {"p_choices", "brier", "accuracy_pmi", "rstd", "anchor_gap"} <= found["notes"].keys()
    assert math.isnan(found["brier"]) and found["anchored"] != found["anchored"]
    trainer = made(tmp_path)
    callback = MCQEvalCallback(
        trainer, PROMPTS, CHOICES, ANSWERS, name="said", measure=lambda *_: found | {"odd": math.nan}
    )
    with caplog.at_level("WARNING"):
        values = callback.measure()
    assert "brier" not in values and "odd" not in values
    assert "'said': brier: 1 rows have no choice with any probability" in caplog.text
    assert "'said': odd: it is NaN" in caplog.text


def test_places_are_measured_too() -> None:
    table = choice_logprobs(tiny.llama(), preferences.tokenizer(), PROMPTS, CHOICES)
    found, places = measure_table(table, ANSWERS), bias_of_table(table.logprobs, ANSWERS)
    assert found["anchored"] == places["anchored"] and found["anchor_gap"] == places["anchor_gap"]


class Watch(TrainerCallback):
    """What other callbacks see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(metrics))


def test_the_best_checkpoint_is_chosen_by_it_and_training_can_stop(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1.0, "save_strategy": "best", "max_steps": 4}
    settings |= {"metric_for_best_model": "eval_mcq_brier", "greater_is_better": False, "learning_rate": 0.05}
    trainer = made(tmp_path, **settings)
    callback, watch = MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS), Watch()
    trainer.add_callback(callback)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=9))
    trainer.add_callback(watch)
    trainer.train()
    values = [entry["eval_mcq_brier"] for entry in trainer.state.log_history if "eval_mcq_brier" in entry]
    assert len(set(values)) == 4 and trainer.state.best_metric == min(values)
    assert [one["eval_mcq_brier"] for one in watch.seen] == values
    assert values[-1] == callback.measure()["brier"] == pytest.approx(expected(trainer.model)["brier"], abs=1e-6)


def test_training_is_not_touched(tmp_path: Path) -> None:
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        trainer = made(tmp_path, eval_strategy="steps", eval_steps=1.0, max_steps=3)
        if watched:
            trainer.add_callback(MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS))
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_trl_logs_its_own_means_and_these(tmp_path: Path) -> None:
    trainer = made(
        tmp_path, SFTTrainer, SFTConfig, eval_strategy="steps", eval_steps=1.0, max_steps=2, max_length=None
    )
    trainer.add_callback(MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS))
    trainer.train()
    history = trainer.state.log_history
    assert len([entry for entry in history if "eval_mcq_accuracy" in entry]) == 2
    # the trainer's own means are in its own entries, of training and of evaluation
    assert all("mean_token_accuracy" in entry for entry in history if "loss" in entry)
    assert all("eval_mean_token_accuracy" in entry for entry in history if "eval_loss" in entry)
    found = trainer.evaluate()
    assert found["eval_mcq_brier"] == pytest.approx(expected(trainer.model)["brier"], abs=1e-6)


def test_a_measure_of_ones_own_and_two_callbacks(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    own = {"measure": lambda table, references: {"first": table.logprobs[0][0], "text": "x", "none": float("nan")}}
    trainer.add_callback(MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS, name="own", **own))
    trainer.add_callback(MCQEvalCallback(trainer, PROMPTS, ["w5", "w6"], [0] * 5))
    found = {key: value for key, value in trainer.evaluate().items() if "_own_" in key or "mcq_acc" in key}
    assert set(found) == {"eval_own_first", "eval_mcq_accuracy"} | {
        f"eval_mcq_accuracy_{x}" for x in ("token", "char", "byte")
    }


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(tmp_path)
    with pytest.raises(ValueError, match="5 prompts and 1 references"):
        MCQEvalCallback(trainer, PROMPTS, CHOICES, [0])
    with pytest.raises(ValueError, match="references has 2 in row 0"):
        MCQEvalCallback(trainer, PROMPTS, CHOICES, [2, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="5 prompts and 2 lists"):
        MCQEvalCallback(trainer, PROMPTS, CHOICES[:2], ANSWERS)
    with pytest.raises(ValueError, match="1 prior prompts for 5"):
        MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS, prior=["w5"])
    with pytest.raises(ValueError, match="0 prompts"):
        MCQEvalCallback(trainer, [], [], [])
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="spread over several processes"):
        MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS)


# --- two processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_the_questions(tmp_path: Path) -> None:
    run(__file__, tmp_path, folder=tmp_path, launch=LAUNCH)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0]["values"] == both[1]["values"]
    truth = expected(tiny.llama(), prior="")
    for key in ("accuracy", "accuracy_pmi", "accuracy_token", "attentiveness", "brier"):
        assert both[0]["values"][f"eval_mcq_{key}"] == pytest.approx(truth[key], abs=1e-6)
    assert [one["prompts"] for one in both] == [3, 2]


def share(folder: str) -> None:
    trainer = made(folder)
    assert trainer.accelerator.num_processes == 2
    callback = MCQEvalCallback(trainer, PROMPTS, CHOICES, ANSWERS, prior="")
    trainer.add_callback(callback)
    import hf_logits.metrics.mcq_callback as module

    read, score = [], module.choice_logprobs
    module.choice_logprobs = lambda model, tokenizer, prompts, *rest, **more: (
        read.append(len(prompts)) or score(model, tokenizer, prompts, *rest, **more)
    )
    values = {key: value for key, value in trainer.evaluate().items() if "_mcq_" in key}
    rank = trainer.accelerator.process_index
    Path(folder, f"{rank}.json").write_text(json.dumps({"values": values, "prompts": sum(read)}))
    leave()


if __name__ == "__main__":
    share(sys.argv[1])


def test_what_is_part_of_another_choice_counts_once():
    sizes = [[1, 2]]
    table = ChoiceTable(
        np.log([[0.6, 0.5]]).tolist(), {"tokens": sizes, "chars": sizes, "bytes": sizes}, [[True, False]]
    )
    found = measure_table(table, [0])
    assert found["attentiveness"] == pytest.approx(0.6) and found["p_vocab_choices"] == pytest.approx(0.6)
