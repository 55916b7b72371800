"""A metric as `compute_metrics` of a [`~transformers.Trainer`], with the step that makes logits small before they are kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from hf_logits.metrics.module import LogitMetric


logger = logging.get_logger(__name__)

Inputs = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
"""From log-probs `[N, K]` and labels `[N]` to the inputs of a metric."""


class ComputeMetrics:
    """What [`as_compute_metrics`] returns: `compute_metrics` itself, and `preprocess` for `preprocess_logits_for_metrics`."""

    def __init__(self, metric: LogitMetric, choice_ids: Sequence[int] | None, inputs: Inputs, options: dict[str, Any]):
        self.metric, self.choice_ids, self.inputs, self.options = metric, choice_ids, inputs, options
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def preprocess(self, logits: Any, labels: Tensor) -> Tensor:
        """`[B, L, V]` to the log-probs `[B, K]` of the choices where the answer begins; a classifier's `[B, K]` to log-probs."""
        scores = (logits[0] if isinstance(logits, tuple | list) else logits).float()
        if self.choice_ids is None:
            if scores.dim() != 2:
                raise ValueError(
                    f"Logits of shape {tuple(scores.shape)} are not a classifier's: give as_compute_metrics the choice_ids."
                )
            return scores.log_softmax(-1)
        first = (labels != -100).long().argmax(-1)  # 0 too where there is none
        if bool((first == 0).any()):
            raise ValueError("A row has no label behind its prompt: nothing tells where the answer begins.")
        # the logits at i predict the token at i + 1
        rows = scores[torch.arange(len(scores), device=scores.device), first - 1]
        return rows.log_softmax(-1)[:, torch.tensor(self.choice_ids, device=scores.device)]

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self._batches.append(self._read(prediction))
        if not compute_result:
            return {}
        log_probs, labels = (np.concatenate(parts) for parts in zip(*self._batches, strict=True))
        self._batches = []
        found = self.metric.measure(**self.inputs(log_probs, labels), **self.options)
        for key, reason in found.get("notes", {}).items():
            logger.warning_once(f"{type(self.metric).__name__}: {key}: {reason}.")
        numbers = {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
        return {key: value for key, value in numbers.items() if not math.isnan(value)}

    def _read(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        def array(value: Any) -> np.ndarray:
            value = value[0] if isinstance(value, tuple | list) else value
            return value.float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)

        scores, labels = array(prediction.predictions).astype(np.float64), array(prediction.label_ids).astype(int)
        if scores.ndim != 2 or (self.choice_ids is not None and scores.shape[1] != len(self.choice_ids)):
            raise ValueError(
                f"Got predictions of shape {scores.shape}, not a score for each choice: pass this object's preprocess to the trainer as "
                "preprocess_logits_for_metrics, or a whole vocabulary is kept for every token."
            )
        if self.choice_ids is None:
            best = scores.max(1, keepdims=True)
            return scores - best - np.log(np.exp(scores - best).sum(1, keepdims=True)), labels
        first = labels[np.arange(len(labels)), (labels != -100).argmax(1)]
        unknown = sorted(set(first.tolist()) - set(self.choice_ids))
        if unknown:
            raise ValueError(
                f"Answers begin with the tokens {unknown[:5]}, which are not among choice_ids {self.choice_ids}."
            )
        return scores, np.array([list(self.choice_ids).index(one) for one in first.tolist()], dtype=int)


def as_compute_metrics(
    metric: LogitMetric,
    *,
    choice_ids: Sequence[int] | None = None,
    inputs: Inputs | None = None,
    **options: Any,
) -> ComputeMetrics:
    """A metric for a [`~transformers.Trainer`] of a classifier, or of a language model whose answers are single tokens.

    ```python
    measured = as_compute_metrics(Attentiveness(), choice_ids=[tokenizer.encode(f" {letter}")[0] for letter in "ABCD"])
    trainer = Trainer(..., compute_metrics=measured, preprocess_logits_for_metrics=measured.preprocess)
    ```

    `batch_eval_metrics=True` works too. TRL's trainers (but its reward trainer) run the model twice for the logits that they hand out,
    and will cease to: take [`~hf_logits.metrics.MCQEvalCallback`] there.

    Args:
        metric ([`~hf_logits.metrics.module.LogitMetric`]): one of this package, in its configuration.
        choice_ids (`Sequence[int]`, *optional*): the first tokens of the choices, for language models. Without: a classifier.
        inputs (`Callable`, *optional*): from log-probs `[N, K]` and right classes `[N]` to the metric's inputs. By default
            `predictions` are the log-probs, or the best class if the metric takes classes, and `references` the right ones. A metric that
            takes something else needs it: `lambda log_probs, labels: {"predictions": np.exp(log_probs.max(1)), "references":
            log_probs.argmax(1) == labels}` for [`~hf_logits.metrics.CalibrationError`].
        options: of the metric.

    Returns:
        [`ComputeMetrics`]: the numbers among the metric's results; undefined ones are left out, and the log says why.
    """
    feature = metric.features["predictions"]
    if inputs is None and isinstance(feature, Value) and not feature.dtype.startswith("int"):
        raise ValueError(
            f"{type(metric).__name__} takes {feature.dtype} predictions, which could be anything: say with inputs= how they come from "
            "log-probs and labels."
        )
    table = isinstance(feature, List)

    def by_feature(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        # a sum of rounded numbers may end just above 0
        found = np.minimum(log_probs, 0.0).tolist() if table else log_probs.argmax(1).tolist()
        return {"predictions": found, "references": labels.tolist()}

    chosen: Inputs = by_feature if inputs is None else inputs
    return ComputeMetrics(metric, choice_ids, chosen, options)
