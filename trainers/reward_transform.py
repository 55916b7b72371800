"""Log-sigmoid-centred rewards: what is good enough already stops paying, and several rewards combine to a logical AND."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.checks import check_count, check_number
from hf_logits.completions import conversation_text
from hf_logits.rewards import (
    Generate,
    RewardFunction,
    call_reward,
    check_reward_function,
    rated_samples,
    reward_name,
)


def log_sigmoid_centered(
    rewards: Float[Tensor, "*shape"], reference: Tensor | float | int, *, scale: float | int = 1.0
) -> Float[Tensor, "*shape"]:
    """`log sigmoid(scale * (reward - reference))`: the log-probability that a completion beats an acceptable one.

    Linear far below the reference, 0 far above it. The order of the rewards stays.

    Args:
        rewards: on the log-odds scale of a Bradley-Terry model. Those of a model that divides by a temperature need it as `scale`.
        reference: the acceptable reward, one number or a tensor that broadcasts.
        scale: multiplies the centred reward.
    """
    check_number("scale", scale, minimum=0.0, above=True)
    centered = scale * (rewards - reference)
    if centered.dtype in (torch.float16, torch.bfloat16):
        centered = centered.float()
    if centered.isnan().any():
        raise ValueError(
            "A reward or its reference is NaN, or both are the same infinity. A log-sigmoid of it would spread through the whole "
            "batch: repair the reward function, or return None where a reward does not apply."
        )
    return F.logsigmoid(centered)


def conjunction(
    rewards: Float[Tensor, "*B K"], references: Tensor | float | int, *, scale: float | int = 1.0
) -> Float[Tensor, "*B"]:
    """`sum_k log sigmoid(scale * (r_k - ref_k))`: the log-probability that a completion is good in all K respects at once.

    It is the logical AND of K independent judgements, so that none can make up for another.
    """
    return log_sigmoid_centered(rewards, references, scale=scale).sum(-1)


def normal_quantile(rewards: Float[Tensor, "N S"], *, quantile: float) -> Float[Tensor, " N"]:
    """The quantile of each row, as if it were a sample of a normal distribution: `mean + z * std` (0.85 has z = 1.0364).

    The standard deviation is the unbiased one; the paper does not say which it took, as far as we know.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1; got {quantile}.")
    if rewards.shape[-1] < 2 and quantile != 0.5:
        raise ValueError(f"A quantile needs two samples a prompt or more; got {rewards.shape[-1]}.")
    mean = rewards.mean(-1)
    return mean if quantile == 0.5 else mean + NormalDist().inv_cdf(quantile) * rewards.std(-1)


class LogSigmoidCenteredReward:
    """A TRL reward function whose rewards are log-sigmoid-centred. Works wherever TRL takes `reward_funcs`.

    From [Transforming and Combining Rewards for Aligning Large Language Models](https://huggingface.co/papers/2402.00742).

    The advantages of GRPO undo part of it if they are divided by a group's standard deviation: a group in which everything is
    good enough is stretched to unit variance again. Set `scale_rewards="none"` or `"batch"`. The bounded reward also asks for
    another KL weight than the raw one.

    Args:
        reward (`Callable`):
            A reward function. A reward model becomes one through [`reward_model_as_function`].
        reference (`float`, `str` or `Callable`):
            The reward that is acceptable: one number, the name of the dataset's column that has it (see
            [`add_reference_rewards`]; the evaluation set needs it too), or a function `(prompts=..., **columns)` that returns a
            list of them.
        scale (`float`, *optional*, defaults to `1.0`):
            Multiplies the centred reward; above 0.
        name (`str`, *optional*):
            Under which metrics are logged. Defaults to the reward's own name with `log_sigmoid_` before it.

    A reward of `None` (not applicable) stays `None`. NaN and infinity are refused.
    """

    def __init__(
        self,
        reward: RewardFunction,
        *,
        reference: float | int | str | Callable[..., Sequence[float]],
        scale: float | int = 1.0,
        name: str | None = None,
    ):
        self.reward = check_reward_function(reward)
        self.reference = reference if isinstance(reference, str) or callable(reference) else float(reference)
        self.scale = check_number("scale", scale, minimum=0.0, above=True)
        if isinstance(self.reference, float):
            check_number("reference", self.reference)
        self.__name__ = name or f"log_sigmoid_{reward_name(reward)}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        raw = call_reward(self.reward, prompts, completions, columns)
        references = self._references(prompts, columns)
        rows = [row for row, reward in enumerate(raw) if reward is not None]
        if missing := [row for row in rows if references[row] is None or math.isnan(references[row])]:
            raise ValueError(f"{self.__name__}: no reference reward for the prompt {prompts[missing[0]]!r}.")
        rewards = torch.tensor([raw[row] for row in rows], dtype=torch.float64)
        reference = torch.tensor([references[row] for row in rows], dtype=torch.float64)
        values = iter(log_sigmoid_centered(rewards, reference, scale=self.scale).tolist())
        return [None if reward is None else next(values) for reward in raw]

    def _references(self, prompts: Sequence[Any], columns: dict[str, Any]) -> list[Any]:
        if isinstance(self.reference, float):
            return [self.reference] * len(prompts)
        if isinstance(self.reference, str):
            if self.reference not in columns:
                raise ValueError(
                    f"{self.__name__}: the dataset has no column {self.reference!r} of reference rewards. Add it with "
                    "add_reference_rewards, to the evaluation set too."
                )
            return list(columns[self.reference])
        references = list(self.reference(prompts=prompts, **columns))
        if len(references) != len(prompts):
            raise ValueError(f"{self.__name__}: {len(references)} reference rewards for {len(prompts)} prompts.")
        return references


class ConjunctionReward:
    """The sum of log-sigmoid-centred rewards: a completion has to be good in every respect (a logical AND).

    From [Transforming and Combining Rewards for Aligning Large Language Models](https://huggingface.co/papers/2402.00742).

    Several [`LogSigmoidCenteredReward`] in `reward_funcs` sum up to the same, unless
    `multi_objective_aggregation="normalize_then_sum"`, which undoes the AND. A reward of `None` is left out of its row's sum, as
    if satisfied (our choice, and TRL's own); a row with nothing but `None` stays `None`.

    Args:
        rewards (`Sequence[LogSigmoidCenteredReward]`): each with its own reference and scale.
        name (`str`, *optional*, defaults to `"conjunction"`): under which metrics are logged, those of the parts below it.
    """

    def __init__(self, rewards: Sequence[LogSigmoidCenteredReward], *, name: str = "conjunction"):
        self.rewards = list(rewards)
        if not self.rewards:
            raise ValueError("A conjunction needs at least one reward.")
        for reward in self.rewards:
            if not isinstance(reward, LogSigmoidCenteredReward):
                raise TypeError(
                    f"A conjunction sums log-probabilities: wrap {reward_name(reward)} in LogSigmoidCenteredReward, with its reference."
                )
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        parts = [reward(prompts, completions, **columns) for reward in self.rewards]
        if "log_metric" in columns:  # a function that TRL passes along
            for reward, values in zip(self.rewards, parts, strict=True):
                if given := [value for value in values if value is not None]:
                    columns["log_metric"](f"rewards/{self.__name__}/{reward.__name__}", sum(given) / len(given))
        rows = [[value for value in row if value is not None] for row in zip(*parts, strict=True)]
        return [sum(row) if row else None for row in rows]


def reward_model_as_function(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    name: str | None = None,
    **template_kwargs: Any,
) -> RewardFunction:
    """A TRL reward function out of a reward model, so that its rewards can be transformed. They are the same as TRL's own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence classification model with one label. It stays on its device, in eval mode, and learns the tokenizer's
            padding token.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's own, with a padding token.
        batch_size (`int`, *optional*, defaults to `16`): how many completions are rated at once.
        name (`str`, *optional*): under which metrics are logged. Defaults to the model's name.
        template_kwargs: of the chat template.
    """
    check_count("batch_size", batch_size, minimum=1)
    if model.config.num_labels != 1:
        raise ValueError(f"A reward model has one label; this one has {model.config.num_labels}.")
    if tokenizer.pad_token_id is None:
        raise ValueError("The reward model's tokenizer has no padding token; set tokenizer.pad_token.")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def rate(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        texts = [conversation_text(p, c, tokenizer, **template_kwargs) for p, c in pairs]
        rewards: list[float | None] = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            # As TRL does: the text has its special tokens, and the model looks for the last one from the right.
            inputs = tokenizer(
                text=batch, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            with torch.inference_mode():
                rewards += model.eval()(**inputs.to(model.device)).logits[:, 0].float().tolist()
        return rewards

    rate.__name__ = name or str(model.config.name_or_path or "").rstrip("/").split("/")[-1] or type(model).__name__
    return rate


def add_reference_rewards(
    dataset: Dataset,
    generate: Generate,
    reward: RewardFunction,
    *,
    num_samples: int = 64,
    quantile: float = 0.85,
    column: str = "reference_reward",
    batch_size: int = 8,
) -> Dataset:
    """Add the column of reference rewards: for each prompt, the reward that is acceptable for it.

    The paper takes, for helpfulness, the 85th percentile of what the policy earns before training, and for harmlessness the
    mean reward of canned refusals: then `generate` returns the refusals, and `quantile=0.5` their mean.

    Args:
        dataset ([`~datasets.Dataset`]): with a column `prompt`. The reward function gets the others.
        generate (`Callable`):
            `generate(prompts, num_samples=n)`. `functools.partial(sample_completions, model, tokenizer)` of
            `hf_logits.completions` is one.
        reward (`Callable`): the reward function, not transformed.
        num_samples (`int`, *optional*, defaults to `64`): per prompt.
        quantile (`float`, *optional*, defaults to `0.85`): of a normal distribution that fits the samples' rewards.
        column (`str`, *optional*, defaults to `"reference_reward"`): the new column; one for each reward.
        batch_size (`int`, *optional*, defaults to `8`): how many prompts are handled at once.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"A reference is worked out once for each row of a Dataset; got {type(dataset).__name__}.")
    if column in dataset.column_names:
        raise ValueError(f"The new column {column!r} is there already: {dataset.column_names}.")
    references: list[float] = []
    for prompt, _, raw in rated_samples(dataset, generate, reward, num_samples=num_samples, batch_size=batch_size):
        given = [value for value in raw if value is not None]
        if not given:
            raise ValueError(f"No sample for the prompt {prompt!r} has a reward.")
        references += normal_quantile(torch.tensor([given], dtype=torch.float64), quantile=quantile).tolist()
    return dataset.add_column(column, references)
