"""Metrics as a trainer's `compute_metrics`, for classifiers and for language models that answer with one token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import preferences
import tiny
from hf_logits.metrics import (
    Attentiveness,
    CalibrationError,
    JudgePosition,
    McqChain,
    OpenSet,
    Personality,
    PositionBias,
    SteeringCost,
    Sycophancy,
    as_compute_metrics,
    choice_logprobs,
    open_set_inputs,
)
from hf_logits.metrics.calibration_error import calibration_error
from hf_logits.metrics.mcq_chain import mcq_chain
from hf_logits.metrics.open_set import open_set


LETTERS = [40, 41, 42]
PROMPTS = [[10, 11, 12], [20, 21], [30], [31, 32, 33, 34], [13, 14]]
ANSWERS = [0, 2, 1, 1, 0]


def answered(folder: Any, measured: Any, **settings: Any) -> dict[str, float]:
    """An evaluation of a language model on prompts that are followed by the letter of their answer."""
    rows = [
        {"input_ids": [*prompt, LETTERS[answer], 5], "labels": [*([-100] * len(prompt)), LETTERS[answer], 5]}
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    trainer = Trainer(
        model=tiny.llama(),
        args=preferences.arguments(TrainingArguments, folder, per_device_eval_batch_size=2, **settings),
        eval_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(preferences.tokenizer()),
        compute_metrics=measured,
        preprocess_logits_for_metrics=measured.preprocess,
    )
    return trainer.evaluate()


@pytest.mark.parametrize("batches", [False, True])
def test_a_language_model(tmp_path: Path, batches: bool) -> None:
    measured = as_compute_metrics(McqChain(keep_in_memory=True), choice_ids=LETTERS, reduction="mean")
    prompts = [" ".join(f"w{one}" for one in prompt) for prompt in PROMPTS]
    table = choice_logprobs(tiny.llama(), preferences.tokenizer(), prompts, [f"w{one}" for one in LETTERS])
    expected = mcq_chain(table.logprobs, ANSWERS, reduction="mean")
    for _ in range(2):  # nothing is left over from the time before
        found = answered(tmp_path, measured, batch_eval_metrics=batches)
        for key in ("log_p_vocab", "p_vocab_choices", "brier", "accuracy"):
            assert found[f"eval_{key}"] == pytest.approx(expected[key], abs=1e-5)


def test_other_answers_than_the_choices(tmp_path: Path) -> None:
    measured = as_compute_metrics(McqChain(keep_in_memory=True), choice_ids=LETTERS[:2])
    with pytest.raises(ValueError, match=r"begin with the tokens \[42\]"):
        answered(tmp_path, measured)


@pytest.mark.parametrize("batches", [False, True])
def test_a_classifier(tmp_path: Path, batches: bool) -> None:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **config)).eval()
    ids = torch.randint(4, 64, (9, 5))
    labels = [0, 1, 2] * 3
    data = Dataset.from_list(
        [{"input_ids": row, "label": label} for row, label in zip(ids.tolist(), labels, strict=True)]
    )
    with torch.no_grad():
        truth = model(ids).logits.double().log_softmax(-1).numpy()
    confidence = as_compute_metrics(CalibrationError("choices", keep_in_memory=True))
    chain = as_compute_metrics(McqChain(keep_in_memory=True))
    expected = calibration_error(np.exp(truth.max(1)), (truth.argmax(1) == labels).astype(int))
    bias = as_compute_metrics(PositionBias(keep_in_memory=True), num_choices=3)
    found: dict[str, float] = {}
    for measured in (confidence, chain, bias):
        trainer = Trainer(
            model=model,
            args=preferences.arguments(
                TrainingArguments, tmp_path, per_device_eval_batch_size=4, batch_eval_metrics=batches
            ),
            eval_dataset=data,
            compute_metrics=measured,
        )
        found |= trainer.evaluate()
    assert found["eval_ece"] == pytest.approx(expected["ece"], abs=1e-5)
    assert found["eval_log_p_vocab"] == pytest.approx(truth[range(9), labels].mean(), abs=1e-5)
    assert found["eval_nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx(accuracy_score(labels, truth.argmax(1)))
    assert "eval_frequencies" not in found and "eval_entropy" in found


def test_a_classifier_that_does_not_know_everything(tmp_path: Path) -> None:
    """Rows without a class are labelled as losses leave them out; the largest logit is that of the model."""
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **config)).eval()
    ids = torch.randint(4, 64, (12, 5))
    labels = [0, 1, -100] * 4
    data = Dataset.from_list(
        [{"input_ids": row, "label": label} for row, label in zip(ids.tolist(), labels, strict=True)]
    )
    measured = as_compute_metrics(OpenSet(keep_in_memory=True))
    trainer = Trainer(
        model=model,
        args=preferences.arguments(TrainingArguments, tmp_path, per_device_eval_batch_size=6),
        eval_dataset=data,
        compute_metrics=measured,
        preprocess_logits_for_metrics=measured.preprocess,
    )
    found = trainer.evaluate()
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    expected = open_set(**open_set_inputs(logits), references=[0, 1, -1] * 4)
    shares = open_set(**open_set_inputs(logits, score="max_probability"), references=[0, 1, -1] * 4)
    assert {key: found[f"eval_{key}"] for key in ("acc", "auroc", "oscr")} == pytest.approx(
        {key: expected[key] for key in ("acc", "auroc", "oscr")}
    )
    assert expected["auroc"] != shares["auroc"]


def test_what_an_interrupted_evaluation_leaves() -> None:
    measured = as_compute_metrics(McqChain(keep_in_memory=True))
    first, second = (EvalPrediction(np.array([row]), np.array([0])) for row in ([1.0, 0.0], [0.0, 1.0]))
    measured(first, compute_result=False)
    with pytest.raises(ValueError, match="not a score for each choice"):
        measured(EvalPrediction(np.zeros((1, 2, 3)), np.array([0])), compute_result=False)
    assert measured(second, compute_result=True)["accuracy"] == 0
    measured(first, compute_result=False)
    measured.reset()
    assert measured(second, compute_result=True)["accuracy"] == 0


def test_what_is_undefined_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        measured = as_compute_metrics(Attentiveness(keep_in_memory=True))
        found = measured(EvalPrediction(predictions=np.zeros((2, 3)), label_ids=np.array([0, 1])))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert found["attentiveness"] == pytest.approx(1) and "accuracy_pmi" not in found
    assert "accuracy_pmi: prior_logprobs were not given" in caplog.text


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="say with inputs="):
        as_compute_metrics(CalibrationError(keep_in_memory=True))
    # a list of numbers is not always a table of choices, and some have no predictions
    for metric in (Personality, SteeringCost, JudgePosition, Sycophancy):
        with pytest.raises(ValueError, match="could be anything: say with inputs="):
            as_compute_metrics(metric(keep_in_memory=True))
    plain = as_compute_metrics(McqChain(keep_in_memory=True))
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        plain(EvalPrediction(predictions=np.zeros((2, 4, 64)), label_ids=np.zeros((2, 4), dtype=int)))
    with pytest.raises(ValueError, match="give as_compute_metrics the choice_ids"):
        plain.preprocess(torch.zeros(2, 4, 64), torch.zeros(2, 4, dtype=torch.long))
    letters = as_compute_metrics(McqChain(keep_in_memory=True), choice_ids=LETTERS)
    with pytest.raises(ValueError, match="not a score for each choice"):
        letters(EvalPrediction(predictions=np.zeros((2, 64)), label_ids=np.zeros((2, 4), dtype=int)))
    with pytest.raises(ValueError, match="no label behind its prompt"):
        letters.preprocess(torch.zeros(1, 4, 64), torch.full((1, 4), -100))
