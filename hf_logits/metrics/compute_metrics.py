"""A metric as `compute_metrics` of a [`~transformers.Trainer`], with the step that makes logits small before they are kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_logits.metrics.module import LogitMetric, numbers
from hf_logits.metrics.open_set import UNKNOWN, open_set_inputs
from hf_logits.metrics.tables import log_softmax


Inputs = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
"""From scores `[N, K]`, a classifier's logits or the choices' log-probs, and labels `[N]` to the inputs of a metric."""

IGNORED = -100
"""The label that losses leave out."""


class ComputeMetrics:
    """What [`as_compute_metrics`] returns: `compute_metrics` itself, and `preprocess` for `preprocess_logits_for_metrics`.

    With `batch_eval_metrics=True` it keeps what it got from batch to batch. An evaluation that fails elsewhere leaves that behind:
    call `reset` before the next one.
    """

    def __init__(self, metric: LogitMetric, choice_ids: Sequence[int] | None, inputs: Inputs, options: dict[str, Any]):
        self.metric, self.choice_ids, self.inputs, self.options = metric, choice_ids, inputs, options
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an evaluation that did not come to its end."""
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def preprocess(self, logits: Any, labels: Tensor) -> Tensor:
        """`[B, L, V]` to the log-probs `[B, K]` of the choices where the answer begins; a classifier's `[B, K]` as they are."""
        scores = (logits[0] if isinstance(logits, tuple | list) else logits).float()
        if self.choice_ids is None:
            if scores.dim() != 2:
                raise ValueError(
                    f"Logits of shape {tuple(scores.shape)} are not a classifier's: give as_compute_metrics the choice_ids."
                )
            return scores
        first = (labels != IGNORED).long().argmax(-1)  # 0 too where there is none
        if bool((first == 0).any()):
            raise ValueError("A row has no label behind its prompt: nothing tells where the answer begins.")
        # the logits at i predict the token at i + 1
        rows = scores[torch.arange(len(scores), device=scores.device), first - 1]
        return rows.log_softmax(-1)[:, torch.tensor(self.choice_ids, device=scores.device)]

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        try:
            self._batches.append(self._read(prediction))
            if not compute_result:
                return {}
            scores, labels = (np.concatenate(parts) for parts in zip(*self._batches, strict=True))
            found = self.metric.measure(**self.inputs(scores, labels), **self.options)
        except BaseException:
            self.reset()
            raise
        self.reset()
        return numbers(found, type(self.metric).__name__)

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
            return scores, labels
        first = labels[np.arange(len(labels)), (labels != IGNORED).argmax(1)]
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

    `batch_eval_metrics=True` works too; `measured.reset()` forgets the batches of an evaluation that failed on its way. TRL's trainers (but its reward trainer) run the model twice for the logits that they hand out,
    and will cease to: take [`~hf_logits.metrics.MCQEvalCallback`] there.

    Args:
        metric ([`~hf_logits.metrics.module.LogitMetric`]): one of this package, in its configuration.
        choice_ids (`Sequence[int]`, *optional*): the first tokens of the choices, for language models. Without: a classifier.
        inputs (`Callable`, *optional*): from scores `[N, K]` and labels `[N]` to the metric's inputs. The scores are the logits of a
            classifier, or, with `choice_ids`, log-probs of the choices. By default `references` are the labels and `predictions`
            log-probs ([`~hf_logits.metrics.Attentiveness`], [`~hf_logits.metrics.McqChain`], `PositionBias("logprobs")`), the best
            class ([`~hf_logits.metrics.PositionBias`]), probabilities (`CalibrationError("choices")`), or for
            [`~hf_logits.metrics.OpenSet`] the best class with its logit, where rows that the loss leaves out (-100) belong to
            none. Other metrics need it.
        options: of the metric.

    Returns:
        [`ComputeMetrics`]: the numbers among the metric's results; undefined ones are left out, and the log says why.

    Raises:
        ValueError: a metric that needs `inputs`, without.
    """
    kind = metric.from_scores.get(metric.configuration)
    if inputs is None and kind is None:
        raise ValueError(
            f"{type(metric).__name__} in the configuration {metric.configuration!r} takes {', '.join(metric.features)}, which could be "
            "anything: say with inputs= how they come from scores and labels."
        )

    def plain(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        if kind == "open_set":
            rows = {**open_set_inputs(scores), "references": np.where(labels == IGNORED, UNKNOWN, labels)}
            return {key: column.tolist() for key, column in rows.items()}
        if kind == "classes":
            return {"predictions": scores.argmax(1).tolist(), "references": labels.tolist()}
        log_probs = np.minimum(scores if choice_ids is not None else log_softmax(scores), 0.0)
        # probabilities are among the choices
        shares = np.exp(log_probs if choice_ids is None else log_softmax(log_probs))
        return {"predictions": (log_probs if kind == "log_probs" else shares).tolist(), "references": labels.tolist()}

    return ComputeMetrics(metric, choice_ids, plain if inputs is None else inputs, options)
