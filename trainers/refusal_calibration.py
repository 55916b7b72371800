"""Thresholds for refusal tokens, read off a validation set: how often to refuse is then decided without training again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.checks import check_choice, check_number
from hf_logits.completions import Prompt, first_token_logits
from hf_logits.preferences import require_columns
from hf_logits.refusal import RefusalTokens
from hf_logits.roc import (
    ROC,
    auc_interval,
    rate,
    roc_curve,
    threshold_for_false_rate,
    threshold_for_true_rate,
)


Mode = Literal["single", "category", "sum"]


@dataclass(frozen=True)
class RefusalCalibration:
    """Thresholds, and what they did on the validation set.

    With a single token, and in mode `"sum"`, everything is under the name `"refuse"`; else under the categories' names.

    Args:
        mode (`str`): of [`RefusalTokenLogitsProcessor`].
        threshold (`float` or `dict[str, float]`): for its `threshold=`.
        softmax_temperature (`float`): for its `softmax_temperature=`: probabilities were compared at this one.
        refusal_rates (`dict[str, float]`): shares of the rows to refuse, of each category, that are refused as such.
        false_refusal_rates (`dict[str, float]`):
            Shares of the ordinary rows that are refused, as each category. No row is refused twice: they add up.
        roc (`dict[str, ROC]`):
            What the rates would be at other thresholds. In mode `"category"` a row whose best category is another one has
            the score -1, since no threshold refuses it as this one.
        auc_intervals (`dict[str, tuple[float, float]]`): 95% bootstrap intervals, if asked for.
    """

    mode: str
    threshold: float | dict[str, float]
    softmax_temperature: float
    refusal_rates: dict[str, float]
    false_refusal_rates: dict[str, float]
    roc: dict[str, ROC]
    auc_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """For `RefusalTokenLogitsProcessor(refuse=..., respond=..., **calibration.settings)`."""
        return {"mode": self.mode, "threshold": self.threshold, "softmax_temperature": self.softmax_temperature}


def decision_scores(
    probs: Float64[ndarray, "N C"], labels: Int64[ndarray, " N"], *, names: Sequence[str], mode: str
) -> dict[str, tuple[Float64[ndarray, " P"], Float64[ndarray, " M"]]]:
    """What is compared with each threshold: of the rows to refuse, and of the ordinary ones.

    Args:
        probs: of the refusal tokens at the first position of the answer.
        labels: a row's category by its place in `names`; -1 for an ordinary answer.
        names: of the categories.
        mode: `"single"` and `"sum"`: all refusal tokens together. `"category"`: the best one where it is this one, else -1.
    """
    ordinary = labels < 0
    if mode != "category":
        total = probs.sum(-1)
        return {"refuse": (total[~ordinary], total[ordinary])}
    best = probs.argmax(-1)
    scores = {name: np.where(best == place, probs[:, place], -1.0) for place, name in enumerate(names)}
    return {name: (scores[name][labels == place], scores[name][ordinary]) for place, name in enumerate(names)}


def calibrate(
    probs: Float64[ndarray, "N C"],
    labels: Int64[ndarray, " N"],
    *,
    names: Sequence[str],
    mode: str,
    refusal_rate: float | Mapping[str, float] | None = None,
    false_refusal_rate: float | Mapping[str, float] | None = None,
    softmax_temperature: float = 1.0,
    resamples: int = 0,
    seed: int = 0,
) -> RefusalCalibration:
    """Thresholds from probabilities; [`calibrate_refusal`] without a model. Arguments as there and in [`decision_scores`]."""
    if (refusal_rate is None) == (false_refusal_rate is None):
        raise ValueError(
            f"Give refusal_rate or false_refusal_rate, one of them; got {refusal_rate=}, {false_refusal_rate=}."
        )
    check_choice("mode", mode, "single", "category", "sum")
    if mode == "single" and len(names) > 1:
        raise ValueError(f"mode='single' has one refusal token, got {len(names)}: use mode='category' or 'sum'.")
    scores = decision_scores(probs, labels, names=names, mode=mode)
    for name, (refused, ordinary) in scores.items():
        if not len(refused) or not len(ordinary):
            what = f"label {name!r}" if not len(refused) else "ordinary answer"
            raise ValueError(f"The validation set has no row with the {what}: a threshold lies between both kinds.")
    kind = "refusal_rate" if false_refusal_rate is None else "false_refusal_rate"
    wanted = _by_name(kind, refusal_rate if false_refusal_rate is None else false_refusal_rate, scores)
    choose = threshold_for_true_rate if false_refusal_rate is None else threshold_for_false_rate
    thresholds = {name: choose(*scores[name], share) for name, share in wanted.items()}
    return RefusalCalibration(
        mode=mode,
        threshold=thresholds if mode == "category" else thresholds["refuse"],
        softmax_temperature=softmax_temperature,
        refusal_rates={name: rate(scores[name][0], bound) for name, bound in thresholds.items()},
        false_refusal_rates={name: rate(scores[name][1], bound) for name, bound in thresholds.items()},
        roc={name: roc_curve(*pair) for name, pair in scores.items()},
        auc_intervals={
            name: auc_interval(*pair, resamples=resamples, seed=seed) for name, pair in scores.items() if resamples
        },
    )


def _by_name(kind: str, wanted: Any, names: Mapping[str, Any]) -> dict[str, float]:
    wanted = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(names, wanted)
    if unknown := set(wanted) - set(names):
        raise ValueError(f"{kind} names {sorted(unknown)}; there are {sorted(names)}.")
    if not wanted:
        raise ValueError(f"{kind} is empty: name at least one of {sorted(names)}.")
    for name, share in wanted.items():
        check_number(f"{kind} of {name!r}", share, minimum=0.0, maximum=1.0)
    return wanted


def refusal_probabilities(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    tokens: RefusalTokens,
    softmax_temperature: float = 1.0,
    batch_size: int = 8,
    template_kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> Float[Tensor, "N C"]:
    """Probabilities of each refusal token as the first token of an answer, in float32, among the whole vocabulary.

    They are what `generate` would see, before any processor: padding is on the left and changes nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): is put into eval mode for the time of the call.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): needs a chat template if the prompts are messages.
        prompts: texts, or messages up to the answer.
        tokens ([`RefusalTokens`]): whose columns are in the order of its categories.
        softmax_temperature (`float`, *optional*, defaults to `1.0`): of the probabilities.
        batch_size (`int`, *optional*, defaults to `8`): prompts in a forward.
        template_kwargs: what the chat template gets, for each prompt.
    """
    check_number("softmax_temperature", softmax_temperature, minimum=0.0, above=True)
    refusing = tokens.ids(tokenizer)[:-1]
    found = torch.empty(len(prompts), len(refusing))
    for places, logits in first_token_logits(
        model, tokenizer, prompts, batch_size=batch_size, template_kwargs=template_kwargs
    ):
        if max(refusing) >= logits.shape[-1]:
            raise ValueError(
                f"The refusal tokens have the ids {refusing}, the model only {logits.shape[-1]} logits: call add_refusal_tokens "
                "on the base model first."
            )
        found[places] = (logits / softmax_temperature).softmax(-1)[:, refusing].cpu()
    return found


def calibrate_refusal(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    tokens: RefusalTokens,
    refusal_rate: float | Mapping[str, float] | None = None,
    false_refusal_rate: float | Mapping[str, float] | None = None,
    mode: Mode | None = None,
    label_column: str = "label",
    softmax_temperature: float = 1.0,
    batch_size: int = 8,
    resamples: int = 0,
    seed: int = 0,
) -> RefusalCalibration:
    """Find the thresholds at which a model with refusal tokens has the wanted rates on a validation set.

    Jain et al. 2024 (https://huggingface.co/papers/2412.06748) sweep thresholds; to choose them for a rate is our addition. A
    threshold lies half-way between two scores of the set. Which category a row is refused as does not depend on thresholds, so
    each category has its own: moving one leaves the others' rates.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): trained with the tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        dataset ([`~datasets.Dataset`]):
            Rows that were not trained on, with `prompt` (text or messages) or `messages` (the last answer is left off), and a
            label. Answers are not needed.
        tokens ([`RefusalTokens`]): the tokens.
        refusal_rate (`float` or `Mapping[str, float]`, *optional*):
            The share of the rows to refuse that shall be refused at least: the highest threshold that does it. With categories
            the share of each category's rows that are refused as such, for all of them or by name; a category without a
            threshold is left to the model. Where other categories are more probable in too many rows, the threshold is 0, and
            `refusal_rates` says what came of it.
        false_refusal_rate (`float` or `Mapping[str, float]`, *optional*):
            Instead: the share of the ordinary rows that may be refused at most, as each category: the lowest threshold that
            does it.
        mode (`str`, *optional*): of [`RefusalTokenLogitsProcessor`]; `"single"`, or `"category"` where there are categories.
        label_column (`str`, *optional*, defaults to `"label"`): see [`RefusalTokens.category`].
        softmax_temperature (`float`, *optional*, defaults to `1.0`): of the probabilities that are compared.
        batch_size (`int`, *optional*, defaults to `8`): prompts in a forward.
        resamples (`int`, *optional*, defaults to `0`): of the bootstrap of each AUC; 0 is without.
        seed (`int`, *optional*, defaults to `0`): of the bootstrap.

    Example:

    ```python
    >>> calibration = calibrate_refusal(model, tokenizer, validation, tokens=tokens, false_refusal_rate=0.05)
    >>> processor = RefusalTokenLogitsProcessor(
    ...     refuse=tokens.refuse, respond=tokens.respond, tokenizer=tokenizer, **calibration.settings
    ... )
    ```
    """
    require_columns(dataset, "validation", (label_column,))
    if (refusal_rate is None) == (false_refusal_rate is None):  # before the model runs
        raise ValueError(
            f"Give refusal_rate or false_refusal_rate, one of them; got {refusal_rate=}, {false_refusal_rate=}."
        )
    names = list(tokens.categories)
    found = [
        tokens.category(row[label_column][-1] if isinstance(row[label_column], list) else row[label_column])
        for row in dataset
    ]
    labels = np.array([-1 if name is None else names.index(name) for name in found], dtype=np.int64)
    probs = refusal_probabilities(
        model,
        tokenizer,
        [_prompt(row) for row in dataset],
        tokens=tokens,
        softmax_temperature=softmax_temperature,
        batch_size=batch_size,
        template_kwargs=[row.get("chat_template_kwargs") or {} for row in dataset],
    )
    return calibrate(
        probs.double().numpy(),
        labels,
        names=names,
        mode=mode or ("category" if isinstance(tokens.refuse, Mapping) else "single"),
        refusal_rate=refusal_rate,
        false_refusal_rate=false_refusal_rate,
        softmax_temperature=softmax_temperature,
        resamples=resamples,
        seed=seed,
    )


def _prompt(row: Any) -> Prompt:
    if "prompt" in row:
        return row["prompt"]
    if "messages" not in row:
        raise ValueError(f"Validation rows need a prompt or messages; the columns are {sorted(row)}.")
    messages = list(row["messages"])
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    # A conversation that ends with the user is a prompt as it is.
    return messages[: answers[-1]] if answers and answers[-1] == len(messages) - 1 else messages
