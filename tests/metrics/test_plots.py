"""Pictures, read back from what was drawn."""

import builtins
import math
from typing import Any

import numpy as np
import pytest

from hf_logits.metrics.calibration_error import calibration_error
from hf_logits.metrics.plots import position_histogram, reliability_diagram, steering_tradeoff


pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    pyplot.close("all")


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_reliability_diagram() -> None:
    first = calibration_error([0.95, 0.85, 0.75, 0.65, 0.55, 0.95, 0.45, 0.35], [1, 1, 0, 1, 0, 1, 0, 1])
    axes = reliability_diagram(first)
    diagonal, line = axes.get_lines()
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    bins = [(one["confidence"], one["accuracy"]) for one in first["bins"]]
    assert [tuple(point) for point in line.get_xydata()] == bins
    (points,) = axes.collections
    assert [tuple(point) for point in points.get_offsets()] == bins
    # the area of a point grows with the share of the answers
    areas = np.array([one["count"] for one in first["bins"]])
    assert np.argmax(points.get_sizes()) == np.argmax(areas) and len(set(points.get_sizes())) == len(set(areas))
    assert legend(axes) == ["ECE 0.375"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence", "accuracy")
    # a second result goes to the same axes, and the diagonal is drawn once
    assert reliability_diagram(calibration_error([0.5, 0.9], [1, 1]), axes=axes, label="steered") is axes
    assert len(axes.get_lines()) == 3 and legend(axes)[1].startswith("steered, ECE 0.3")
    axes.figure.canvas.draw()


def test_position_histogram() -> None:
    axes = position_histogram({"A": 30, "B": 10, "C": 10})
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.6, 0.2, 0.2])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["A", "B", "C"]
    assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx([1 / 3] * 3)
    axes.figure.canvas.draw()
    axes = position_histogram([3, 1], [1, 9])
    assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx([0.1, 0.9])
    assert axes.get_ylim()[1] > 0.9
    # by name, whatever the order
    axes = position_histogram({"A": 3, "B": 1}, {"B": 9, "A": 1})
    assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx([0.1, 0.9])


def test_steering_tradeoff() -> None:
    curves = {"gedi": [(0.0, 1.0, 0.5), (5.0, 1.24, 0.67)], "steer": [(0.2, 1.1, 0.6)]}
    axes = steering_tradeoff(curves, cost="perplexity", effect="positive")
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[1.0, 0.5], [1.24, 0.67]], [[1.1, 0.6]]]
    assert [(text.get_text(), *text.xy) for text in axes.texts] == [
        ("0", 1.0, 0.5),
        ("5", 1.24, 0.67),
        ("0.2", 1.1, 0.6),
    ]
    assert legend(axes) == ["gedi", "steer"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("perplexity", "positive")
    axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reliability_diagram({"auroc": 1.0}), "needs the bins of CalibrationError"),
        (lambda: reliability_diagram(calibration_error([], [])), "nothing was measured"),
        (lambda: position_histogram({"A": 1}), "two positions or more"),
        (lambda: position_histogram([0, 0]), "not all 0"),
        (lambda: position_histogram([1, -1, 2]), "counts or shares"),
        (lambda: position_histogram([1.0, math.nan]), "counts or shares"),
        (lambda: position_histogram({"A": 1, "B": 1}, {"A": 1, "C": 1}), "name the same ones"),
        (lambda: steering_tradeoff({}), "needs a point"),
        (lambda: steering_tradeoff({"gedi": []}), "needs a point"),
        (lambda: steering_tradeoff({"gedi": [(1.0, math.nan, 1.0)]}), "three finite numbers"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert not pyplot.get_fignums()  # nothing half drawn


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        position_histogram([1, 2])
