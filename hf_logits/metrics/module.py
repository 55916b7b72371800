"""What the metrics share as modules of `evaluate`: their inputs, their options, and how they say that a value is undefined."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import datasets
import evaluate


logger = logging.getLogger(__name__)

Notes = dict[str, str]
"""Why a value is NaN, by the value's key; in a result under `"notes"`."""


class LogitMetric(evaluate.Metric):
    """A metric whose `measure` is called with the inputs as lists and with the options that it names.

    Class attributes:
        inputs: what each row has, by `config_name`; the first is the default. Inputs that not everybody has make another
            configuration, since `evaluate` has no optional ones.
        paper: where the metric was defined.
    """

    inputs: ClassVar[Mapping[str, Mapping[str, Any]]]
    paper: ClassVar[str] = ""
    measure: Callable[..., dict[str, Any]]

    def _info(self) -> evaluate.MetricInfo:
        name = next(iter(self.inputs)) if self.config_name == "default" else self.config_name
        if name not in self.inputs:
            raise ValueError(f"{type(self).__name__} has no configuration {name!r}; it has {', '.join(self.inputs)}.")
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            inputs_description=inspect.getdoc(self.measure) or "",
            citation=self.paper,
            features=datasets.Features(dict(self.inputs[name])),
        )

    def _compute(self, **inputs: Any) -> dict[str, Any]:
        known = inspect.signature(self.measure).parameters
        # `evaluate.combine` hands everybody's options to everybody
        others = sorted(inputs.keys() - known.keys())
        if others:
            logger.warning("%s does not know the options %s; they are left out.", type(self).__name__, others)
        return self.measure(**{key: value for key, value in inputs.items() if key in known})


def ratio(numerator: float | int, denominator: float | int, key: str, reason: str, notes: Notes) -> float:
    """A quotient, or NaN with the reason in `notes` where there is nothing to divide by."""
    if denominator == 0:
        notes[key] = reason
        return math.nan
    return float(numerator / denominator)
