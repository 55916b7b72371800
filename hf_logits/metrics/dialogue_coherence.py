"""Dialogue coherence: what a scorer says of responses to their contexts, and whether humans agree.

As in QuantiDCE (Ye et al. 2021, https://arxiv.org/abs/2106.00507): correlations of a model's scores with ratings from 1 to 5.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.checks import check_count
from hf_logits.correlation import constant, kendall, pearson, spearman
from hf_logits.metrics import module


Context = str | list[str]
Scorer = Callable[[list[Any], list[str]], Any]
"""Contexts and as many responses, to as many numbers, the higher the more coherent."""


def dialogue_coherence(
    contexts: Sequence[Context],
    responses: Sequence[str],
    *,
    scorer: Scorer,
    ratings: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Scores of responses, and their correlations with human ratings.

    Args:
        contexts (list of `str`, or of lists of turns): handed to the scorer as they are.
        responses (list of `str`): one for each context.
        scorer (`Callable`): contexts and responses to a number each, such as [`pair_scorer`] of a model that
            [`~hf_logits.trainers.MultiLevelRankingTrainer`] has trained.
        ratings (list of `float`, *optional*): of the same responses by humans.

    Returns:
        `dict`: `mean` and `scores`; with ratings, `pearson`, `spearman` (ties share the mean of their ranks) and `kendall` (tau-b);
        and `notes`, the reasons where a correlation is NaN: scores or ratings that are all the same.

    Raises:
        ValueError: different lengths; scores that are not one a response; scores or ratings that are not finite.
    """
    if len(contexts) != len(responses):
        raise ValueError(
            f"{len(contexts)} contexts and {len(responses)} responses; give one context for each response."
        )
    scores = _numbers("scores", scorer(list(contexts), list(responses)) if len(responses) else [], len(responses))
    notes: module.Notes = {}
    mean = module.ratio(float(scores.sum()), float(len(scores)), "mean", "there are no responses", notes)
    found: dict[str, Any] = {"mean": mean, "scores": scores.tolist()}
    if ratings is not None:
        humans = _numbers("ratings", ratings, len(responses))
        for name, correlation in (("pearson", pearson), ("spearman", spearman), ("kendall", kendall)):
            found[name] = correlation(scores, humans)
            if math.isnan(found[name]):
                same = "scores" if constant(scores) else "ratings"
                few = "there are fewer than two responses"
                notes[name] = few if len(responses) < 2 else f"the {same} are all the same"
    return found | {"notes": notes}


def _numbers(name: str, values: Any, count: int) -> np.ndarray:
    found = torch.as_tensor(values, dtype=torch.float64).cpu().numpy()
    if found.shape != (count,):
        raise ValueError(
            f"{name} are of shape {found.shape} for {count} responses; there must be one number for each."
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name} must be finite; those of the responses {np.flatnonzero(~np.isfinite(found))[:5]} are not."
        )
    return found


def pair_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sigmoid: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
    separator: str = " ",
) -> Scorer:
    """The scorer that a model with one output is, reading pairs as [`~hf_logits.trainers.MultiLevelRankingTrainer`] does.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a sequence classifier with `num_labels=1`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): with a padding token.
        sigmoid (`bool`, *optional*, defaults to `True`): whether a score is the sigmoid of the output, as the trainer's.
        max_length (`int`, *optional*, defaults to 128): tokens of a context with its response, as the trainer's.
        batch_size (`int`, *optional*, defaults to 32): pairs a forward.
        separator (`str`, *optional*, defaults to a space): between the turns of a context that is a list.
    """
    if model.config.num_labels != 1:
        raise ValueError(
            f"A score is one output, got num_labels={model.config.num_labels}: load it with num_labels=1."
        )

    check_count("max_length", max_length, minimum=1)
    check_count("batch_size", batch_size, minimum=1)

    @torch.no_grad()
    def score(contexts: list[Context], responses: list[str]) -> Tensor:
        joined = [context if isinstance(context, str) else separator.join(context) for context in contexts]
        training = model.training
        found = []
        model.eval()
        try:
            for start in range(0, len(responses), batch_size):
                part = slice(start, start + batch_size)
                batch = tokenizer(
                    joined[part],
                    responses[part],
                    padding=True,
                    padding_side="right",  # absolute positions count from the left
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                    return_attention_mask=True,
                ).to(model.device)
                found.append(model(**batch).logits.flatten().double().cpu())
        finally:
            model.train(training)
        outputs = torch.cat(found)
        return outputs.sigmoid() if sigmoid else outputs

    return score


class DialogueCoherence(module.LogitMetric):
    """What a scorer says of responses to their contexts, and whether humans agree: Pearson, Spearman and Kendall.

    ```python
    from hf_logits.metrics import DialogueCoherence
    from hf_logits.metrics.dialogue_coherence import pair_scorer

    metric = DialogueCoherence("rated")
    metric.compute(predictions=replies, references=contexts, ratings=ratings, scorer=pair_scorer(model, tokenizer))
    ```

    Without ratings: `DialogueCoherence()`. Contexts that are lists of turns: `"turns"` and `"rated_turns"`.
    """

    inputs = {
        "pairs": {"predictions": Value("string"), "references": Value("string")},
        "rated": {"predictions": Value("string"), "references": Value("string"), "ratings": Value("float64")},
        "turns": {"predictions": Value("string"), "references": List(Value("string"))},
        "rated_turns": {
            "predictions": Value("string"),
            "references": List(Value("string")),
            "ratings": Value("float64"),
        },
    }
    paper = "Ye et al. 2021, Towards Quantifiable Dialogue Coherence Evaluation, https://arxiv.org/abs/2106.00507"

    def measure(
        self,
        predictions: list[str],
        references: list[Context],
        scorer: Scorer,
        ratings: list[float] | None = None,
    ) -> dict[str, Any]:
        """As `dialogue_coherence`: `predictions` are the responses, `references` their contexts."""
        return dialogue_coherence(references, predictions, scorer=scorer, ratings=ratings)
