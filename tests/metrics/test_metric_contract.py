"""What every metric does, whoever loads it. A new metric adds a row."""

import os
import subprocess
import sys
from typing import Any

import evaluate
import pytest

from hf_logits import metrics
from hf_logits.metrics.module import LogitMetric


TABLE: dict[str, Any] = {"predictions": [[-0.5, -2.0], [-3.0, -1.0, -2.0], [-1.5, -1.0]], "references": [0, 2, 1]}
METRICS: dict[str, dict[str, Any]] = {
    "Attentiveness": TABLE | {"prior_logprobs": [[-1.0, -1.0], [-2.0, -1.0, -3.0], [-0.5, -2.0]]},
    "CalibrationError": {"predictions": [0.9, 0.6, 0.8], "references": [1, 0, 1]},
    "DialogueCoherence": {
        "predictions": ["Fine, thanks.", "No."],
        "references": ["How are you?", "Is it raining?"],
        "scorer": lambda contexts, responses: [len(response) / 10 for response in responses],
    },
    "Diversity": {"predictions": ["a cat sat", "a dog sat", "a dog"]},
    "Personality": {"predictions": [[60.0, 50.0], [64.0, 52.0]], "references": ["men", "men"]},
    "SteeringCost": {"predictions": [[0.0, 1.0, 1.0], [0.0, 0.0]], "small": 1.0, "large": 4.0},
    "JudgePosition": {
        "predictions1": [[[9.0, 7.0], [8.0, 7.0]], [[3.0, 4.0]], []],
        "predictions2": [[[7.0, 8.0], [7.0, 7.0]], [[3.0, 4.0]], []],
        "swapped_back": True,
    },
    "OpenSet": {"predictions": [0, 1, 1, 0], "scores": [3.0, 1.0, 2.0, 2.0], "references": [0, -1, 0, -1]},
    "RefusalRate": {"predictions": ["I can't do that.", "Sure.", ""], "threshold": 0.5},
    "Sycophancy": {
        "predictions1": ["yes", "no", "yes", "no"],
        "predictions2": ["yes", "yes", "no", "no"],
        "references": ["yes", "no", "yes", "no"],
        "leads": ["yes", "yes", "no", "no"],
    },
    "McqChain": TABLE,
    "PositionBias": {"predictions": [0, 2, 1], "references": [0, 1, 1], "num_choices": 3},
    "VerbalizerGap": {
        "predictions": [0, 1, 1],
        "references": [0, 1, 0],
        "verbalizer": ["good|bad", "good|bad", "bad|good"],
        "group": ["natural", "natural", "unnatural"],
    },
}
"""Inputs of each, with the options that it needs."""


def snake(name: str) -> str:
    return "".join("_" * (i > 0 and letter.isupper()) + letter.lower() for i, letter in enumerate(name))


def test_each_metric_has_a_row() -> None:
    public = {name: getattr(metrics, name) for name in metrics.__all__}
    modules = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, LogitMetric)}
    assert set(METRICS) == modules


def test_importing_the_package_loads_neither_torch_nor_evaluate() -> None:
    code = "import sys, hf_logits.metrics; sys.exit(bool({'torch', 'evaluate', 'datasets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", METRICS)
def test_loaded_by_path_and_made_directly_agree(name: str) -> None:
    made = getattr(metrics, name)(keep_in_memory=True)
    loaded = evaluate.load(metrics.script(snake(name)), keep_in_memory=True)
    assert type(loaded) is type(made)
    first, second = (one.compute(**METRICS[name]) for one in (made, loaded))
    assert repr(first) == repr(second)
    assert isinstance(first["notes"], dict)


@pytest.mark.parametrize("name", METRICS)
def test_batches_add_up(name: str) -> None:
    made = getattr(metrics, name)(keep_in_memory=True)
    features = set(made.features)
    rows = {key: value for key, value in METRICS[name].items() if key in features}
    options = {key: value for key, value in METRICS[name].items() if key not in features}
    whole = getattr(metrics, name)(keep_in_memory=True).compute(**rows, **options)
    half = len(next(iter(rows.values()))) // 2
    for part in (slice(None, half), slice(half, None)):
        made.add_batch(**{key: value[part] for key, value in rows.items()})
    assert repr(made.compute(**options)) == repr(whole)


@pytest.mark.parametrize("name", METRICS)
def test_options_of_others_are_left_out_and_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    made = getattr(metrics, name)(keep_in_memory=True)
    with caplog.at_level("WARNING"):
        made.compute(**METRICS[name], option_of_another=1)
    assert "option_of_another" in caplog.text


def test_metrics_of_one_table_are_combined() -> None:
    names = {"mass": metrics.Attentiveness, "chain": metrics.McqChain, "place": metrics.PositionBias}
    made = {name: one(*["logprobs"] * (name == "place"), keep_in_memory=True) for name, one in names.items()}
    both = evaluate.combine(made).compute(**TABLE, reduction="mean")
    alone = metrics.McqChain(keep_in_memory=True).compute(**TABLE, reduction="mean")
    assert both["brier"] == alone["brier"] and both["chain_accuracy"] == both["mass_accuracy"] == alone["accuracy"]
    assert "anchored" in both and isinstance(both["mass_notes"], dict)


def test_an_unknown_configuration_or_script_is_refused() -> None:
    with pytest.raises(ValueError, match="no configuration 'other'"):
        metrics.CalibrationError("other")
    with pytest.raises(ValueError, match="calibration_error"):
        metrics.script("other")
