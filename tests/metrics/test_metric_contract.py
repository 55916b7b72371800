"""What every metric does, whoever loads it. A new metric adds a row."""

import os
import subprocess
import sys
from typing import Any

import evaluate
import numpy as np
import pytest
import torch

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

ALL_INPUTS = {key for name in METRICS for own in getattr(metrics, name).inputs.values() for key in own}


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


@pytest.mark.parametrize("name", METRICS)
def test_each_is_combined_with_another(name: str) -> None:
    """Everybody gets everybody's inputs and options."""
    made, other = (getattr(metrics, name)(keep_in_memory=True) for _ in range(2))
    both = evaluate.combine({"one": made, "other": other}).compute(**METRICS[name], option_of_another=1)
    alone = getattr(metrics, name)(keep_in_memory=True).compute(**METRICS[name])
    assert repr(both) == repr({f"{which}_{key}": value for which in ("one", "other") for key, value in alone.items()})


@pytest.mark.parametrize(
    ("name", "config"), [(name, one) for name in METRICS for one in getattr(metrics, name).inputs]
)
def test_without_rows_everything_is_undefined_and_says_so(name: str, config: str) -> None:
    made = getattr(metrics, name)(config, keep_in_memory=True)
    options = {key: value for key, value in METRICS[name].items() if key not in ALL_INPUTS}
    if config == "answers":
        options["questions"] = [{"trait": "E"}]
    if name == "PositionBias" and config != "default":
        del options["num_choices"]
    found = made.compute(**dict.fromkeys(made.features, []), **options)
    undefined = {key for key, value in found.items() if isinstance(value, float) and value != value}
    assert undefined <= found["notes"].keys()
    assert undefined or all(reason == "there are no rows" for reason in found["notes"].values()) and found["notes"]


DROPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "Diversity": ("reference_normalized_ngrams", {"references": ["a cow ran", "a cow", "b"]}),
    "JudgePosition": ("kappa", {"references": ["win", "lose", "tie"]}),
    "RefusalRate": ("over_refusal", {"references": [1, 0, 0]}),
    "SteeringCost": ("flops", {"references": [10, 20]}),
}
"""Inputs that the default configuration lacks and `measure` knows, and a value that needs them."""


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("kind", [list, np.array])
def test_references_that_are_no_input_are_used_all_the_same(name: str, kind: Any) -> None:
    key, given = DROPPED[name]
    given = {name: kind(value) for name, value in given.items()}
    made = getattr(metrics, name)(keep_in_memory=True)
    without, found = made.compute(**METRICS[name]), made.compute(**METRICS[name], **given)
    assert repr(found.get(key)) != repr(without.get(key)) and key in found
    configs = [
        one
        for one in made.inputs
        if "references" in made.inputs[one] and made.inputs[one].keys() <= {*METRICS[name], "references"}
    ]
    other = getattr(metrics, name)(configs[0], keep_in_memory=True).compute(**METRICS[name], **given)
    assert repr(found) == repr(other)
    with pytest.raises(ValueError, match=r"unknown are \['references'\].*There are the configurations"):
        made.add_batch(**{one: METRICS[name][one] for one in made.features}, **given)


def test_inputs_that_nobody_knows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        metrics.JudgePosition(keep_in_memory=True).compute(**METRICS["JudgePosition"], predictions=[1, 2, 3])
    assert "does not know the options ['predictions']" in caplog.text


WHOLE = [
    (name, config, key)
    for name in METRICS
    for config, own in getattr(metrics, name).inputs.items()
    for key, feature in own.items()
    if "int64" in str(feature)
]


@pytest.mark.parametrize(("name", "config", "key"), WHOLE)
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_fractions_are_not_cut_off(name: str, config: str, key: str, kind: Any) -> None:
    made = getattr(metrics, name)(config, keep_in_memory=True)
    rows: dict[str, Any] = {}
    for one, feature in made.features.items():
        text, nested = str(feature), str(feature).count("List")
        value: Any = "a" if "string" in text else 0.4 if one == key else 0
        for _ in range(nested):
            value = [value]
        rows[one] = kind([value]) if one == key else [value]
    with pytest.raises(ValueError, match=f"{key} must be whole numbers; got 0.4"):
        made.add_batch(**rows)
    with pytest.raises(ValueError, match=f"{key} must be whole numbers"):
        singular = {"predictions": "prediction", "references": "reference"}
        made.add(**{singular.get(one, one): value[0] for one, value in rows.items()})


def test_whole_numbers_may_be_floats() -> None:
    made = metrics.PositionBias(keep_in_memory=True)
    made.add(prediction=1.0, reference=True)
    made.add_batch(predictions=np.array([0.0]), references=torch.tensor([0]))
    assert made.compute(num_choices=2)["accuracy"] == 1
    with pytest.raises(ValueError, match=r"missing are \['references'\]"):
        made.add_batch(predictions=[1])


def test_an_unknown_configuration_or_script_is_refused() -> None:
    with pytest.raises(ValueError, match="no configuration 'other'"):
        metrics.CalibrationError("other")
    with pytest.raises(ValueError, match="calibration_error"):
        metrics.script("other")
