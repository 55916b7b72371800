"""What the metrics share as modules of `evaluate`: their inputs, their options, and how they say that a value is undefined."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, SupportsFloat, no_type_check

import datasets
import evaluate
from transformers.utils import logging


logger = logging.get_logger(__name__)

Notes = dict[str, str]
"""Why a value is NaN, by the value's key; in a result under `"notes"`."""


class LogitMetric(evaluate.Metric):
    """A metric whose `measure` is called with the inputs as lists and with the options that it names.

    Class attributes:
        inputs: what each row has, by `config_name`; the first is the default. Inputs that not everybody has make another
            configuration, since `evaluate` has no optional ones. `compute` takes them in any configuration that `measure`
            can use them in, `add_batch` in their own alone.
        from_scores: what `predictions` are of a trainer's scores for the classes, by `config_name`, where that is plain:
            `"log_probs"`, `"probabilities"`, `"classes"` (the best one), or `"open_set"` (the best one and its logit).
        paper: where the metric was defined.
    """

    inputs: ClassVar[Mapping[str, Mapping[str, Any]]]
    from_scores: ClassVar[Mapping[str, str]] = {}
    paper: ClassVar[str] = ""
    measure: Callable[..., dict[str, Any]]

    @property
    def configuration(self) -> str:
        """The name of the configuration, the first one's where none was asked for."""
        return next(iter(self.inputs)) if self.config_name == "default" else self.config_name

    def _info(self) -> evaluate.MetricInfo:
        name = self.configuration
        if name not in self.inputs:
            raise ValueError(f"{type(self).__name__} has no configuration {name!r}; it has {', '.join(self.inputs)}.")
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            inputs_description=inspect.getdoc(self.measure) or "",
            citation=self.paper,
            features=datasets.Features(dict(self.inputs[name])),
        )

    # evaluate copies the code of these three for each object, and with it only a docstring that is the code's own: no wrapper's
    @no_type_check
    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
        """The measurement of these inputs, and of what was added before.

        Args:
            predictions, references (*optional*): as in `measure`.
            kwargs: further inputs, and options of `measure`.

        Returns:
            `dict`: what `measure` returns; `None` on all processes but the first, where `evaluate` counts several.
        """
        given = {"predictions": predictions, "references": references}
        # evaluate drops these two without a word where the configuration has no such input
        direct = {key: value for key, value in given.items() if value is not None and key not in self.features}
        columns = {key: None if key in direct else value for key, value in given.items()}
        return super().compute(**columns, **kwargs, direct=direct)

    def _compute(self, direct: Mapping[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
        known = inspect.signature(self.measure).parameters
        for key, value in (direct or {}).items():
            inputs[key] = _plain(value)
        # `evaluate.combine` hands everybody's options to everybody
        others = sorted(inputs.keys() - known.keys())
        if others:
            logger.warning("%s does not know the options %s; they are left out.", type(self).__name__, others)
        return self.measure(**{key: value for key, value in inputs.items() if key in known})

    @no_type_check
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Rows to measure later, when `compute` is called.

        Args:
            predictions, references, kwargs: each input of the configuration, a value for each row.
        """
        super().add_batch(**self._checked({"predictions": predictions, "references": references, **kwargs}))

    @no_type_check
    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """A single row to measure later."""
        given = {"predictions": prediction, "references": reference, **kwargs}
        rows = self._checked({key: None if value is None else [value] for key, value in given.items()})
        super().add_batch(**rows)

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Exactly the inputs of the configuration; whole numbers where it has such."""
        name, columns = type(self).__name__, {key: value for key, value in given.items() if value is not None}
        strange, missing = sorted(columns.keys() - self.features.keys()), sorted(self.features.keys() - columns.keys())
        if strange or missing:
            raise ValueError(
                f"{name} takes {', '.join(self.features)} in the configuration {self.configuration!r}: "
                f"{' and '.join(f'{word} {keys}' for word, keys in (('unknown are', strange), ('missing are', missing)) if keys)}. "
                f"There are the configurations {', '.join(self.inputs)}."
            )
        for key, value in columns.items():
            _check_whole(key, self.features[key], value)
        return columns


def _plain(values: Any) -> Any:
    """Arrays and tensors as lists."""
    return values.tolist() if hasattr(values, "tolist") else values


def _check_whole(name: str, feature: Any, values: Any) -> None:
    """Where whole numbers are wanted, `datasets` would cut off what is behind the point."""
    values = _plain(values)
    while isinstance(feature, datasets.List):
        feature, values = feature.feature, [one for row in values for one in _plain(row)]
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith("int"):
        return
    for value in map(_plain, values):
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{name} must be whole numbers; got {value:g}, of which the rest would be cut off.")


def numbers(found: Mapping[str, Any], metric: str) -> dict[str, float]:
    """What a trainer can log of a result: its numbers. Undefined ones are left out, and the log says why, once.

    Args:
        found (`dict`): with `notes`, or without.
        metric (`str`): whose result it is.
    """
    values = {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
    missing = [key for key, value in values.items() if math.isnan(value)]
    notes = found.get("notes", {})
    for key in (*notes, *(key for key in missing if key not in notes)):
        logger.warning_once(f"{metric}: {key}: {notes.get(key, 'it is NaN')}.")
    return {key: value for key, value in values.items() if key not in missing}


def merged(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one, with the notes of all of them."""
    found, notes = dict[str, Any](), Notes()
    for one in results:
        found |= one
        notes |= one.get("notes", {})
    return found | {"notes": notes}


def ratio(numerator: SupportsFloat, denominator: SupportsFloat, key: str, reason: str, notes: Notes) -> float:
    """A quotient, or NaN with the reason in `notes` where there is nothing to divide by."""
    if float(denominator) == 0:
        notes[key] = reason
        return math.nan
    return float(numerator) / float(denominator)
