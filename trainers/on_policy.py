"""What makes preference training work: data from the policy itself, and a push away from bad answers. Tools to mix and to switch."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Float
from torch import Tensor
from transformers.utils import logging
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from hf_logits.checks import check_number
from hf_logits.rewards import Generate, RewardFunction, rated_samples


if TYPE_CHECKING:
    Stock = GRPOTrainer
else:
    Stock = object

logger = logging.get_logger(__name__)


def best_and_worst(rewards: Sequence[float | None], *, min_margin: float = 0.0) -> tuple[int, int] | None:
    """Which of a prompt's samples become chosen and rejected: the best and the worst one that has a reward.

    `None` if they are not more than `min_margin` apart: there is nothing to prefer.
    """
    rated = {index: reward for index, reward in enumerate(rewards) if reward is not None}
    if not rated:
        return None
    best, worst = max(rated, key=rated.__getitem__), min(rated, key=rated.__getitem__)
    return (best, worst) if rated[best] - rated[worst] > min_margin else None


def build_pairs(
    dataset: Dataset,
    generate: Generate,
    reward: RewardFunction,
    *,
    num_samples: int = 4,
    min_margin: float = 0.0,
    batch_size: int = 8,
) -> Dataset:
    """On-policy preference pairs: the policy answers, a reward function judges, the best answer is chosen over the worst.

    From [Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data](https://huggingface.co/papers/2404.14367).

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column `prompt`. The reward function gets the others.
        generate (`Callable`):
            `generate(prompts, num_samples=n)` returns `n` completions for each prompt.
            `functools.partial(sample_completions, model, tokenizer)` of `hf_logits.completions` is one.
        reward (`Callable`):
            As TRL calls it: `reward(prompts=..., completions=..., **columns)`.
        num_samples (`int`, *optional*, defaults to `4`):
            Completions per prompt; two or more.
        min_margin (`float`, *optional*, defaults to `0.0`):
            By how much the best reward has to exceed the worst one.
        batch_size (`int`, *optional*, defaults to `8`):
            How many prompts are handled at once.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `chosen_reward`, `rejected_reward` and `on_policy`, which is true. Prompts
        without a margin are left out, and their number is logged.
    """
    if num_samples < 2:
        raise ValueError(f"A pair needs two samples of each prompt or more; got num_samples={num_samples}.")
    check_number("min_margin", min_margin, minimum=0.0)
    pairs: list[dict[str, Any]] = []
    for prompt, own, given in rated_samples(dataset, generate, reward, num_samples=num_samples, batch_size=batch_size):
        if (found := best_and_worst(given, min_margin=min_margin)) is None or own[found[0]] == own[found[1]]:
            continue
        best, worst = found
        pair = {"prompt": prompt, "chosen": own[best], "rejected": own[worst], "on_policy": True}
        pairs.append(pair | {"chosen_reward": given[best], "rejected_reward": given[worst]})
    logger.info(f"{len(pairs)} pairs from {len(dataset)} prompts; the others' samples were all as good as each other.")
    if not pairs:
        raise ValueError(
            f"None of the {len(dataset)} prompts has samples whose rewards are more than {min_margin} apart. Draw more samples, at a "
            "higher temperature, or look at the reward function."
        )
    return Dataset.from_list(pairs)


def mix_datasets(on_policy: Dataset, offline: Dataset, *, offline_fraction: float, seed: int = 0) -> Dataset:
    """A shuffled mixture, as large as possible without a row twice, in which `offline_fraction` of the rows are offline data.

    0 and 1 return `on_policy` and `offline` as they are. In between, a column `on_policy` says which row is which; of the other
    columns those stay that both have.
    """
    check_number("offline_fraction", offline_fraction, minimum=0.0, maximum=1.0)
    if offline_fraction in (0, 1):
        return offline if offline_fraction else on_policy
    total = min(len(on_policy) / (1 - offline_fraction), len(offline) / offline_fraction)
    count = (
        min(round(total * offline_fraction), len(offline)),
        min(round(total * (1 - offline_fraction)), len(on_policy)),
    )
    shared = [name for name in on_policy.column_names if name in offline.column_names and name != "on_policy"]
    if not shared or 0 in count:
        raise ValueError(
            f"These cannot be mixed: {len(on_policy)} on-policy rows with {on_policy.column_names}, {len(offline)} offline rows with "
            f"{offline.column_names}, and a fraction of {offline_fraction}."
        )
    parts = []
    for part, rows, own in ((offline, count[0], False), (on_policy, count[1], True)):
        chosen = part.shuffle(seed=seed).select(range(rows)).select_columns(shared)
        parts.append(chosen.add_column("on_policy", [own] * rows))
    return concatenate_datasets(parts).shuffle(seed=seed)


# --- The switch ----------------------------------------------------------------------------------------------------------


def detach_rejected(log_probs: Float[Tensor, "R T"]) -> Float[Tensor, "R T"]:
    """The same log-probs, of which the second half, that of the rejected completions, has no gradient."""
    chosen, rejected = log_probs.chunk(2)
    return torch.cat([chosen, rejected.detach()])


def keep_positive(advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The advantages of what was better than expected; 0 for the rest, so that nothing is pushed down."""
    return advantages.clamp(min=0.0)


class _DetachRejected:
    """Stands for the model in a stock DPO loss. All else of the outputs is the model's own."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if not kwargs.get("fused_lm_head"):  # logits for `compute_metrics`
            return outputs
        return dataclasses.replace(outputs, log_probs=detach_rejected(outputs.log_probs))


class _PairsWithoutNegatives(Stock):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(_DetachRejected(model), *args, **kwargs)


class _RolloutsWithoutNegatives(Stock):
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        return output | {"advantages": keep_positive(output["advantages"])}


def without_negative_gradient(trainer: type) -> type:
    """The same trainer class with one switch turned: it learns from good answers and is not pushed away from bad ones.

    From [Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data](https://huggingface.co/papers/2404.14367), which
    finds that the push matters; here is how to measure what it does for you. `without_negative_gradient(DPOTrainer)(model, ...)`.

    Args:
        trainer (`type`):
            [`~trl.DPOTrainer`] or a subclass: the rejected log-probs keep their values and have no gradient.
            [`~trl.GRPOTrainer`], [`~trl.RLOOTrainer`] or a subclass: negative advantages become 0. What a KL term does stays.
    """
    if issubclass(trainer, DPOTrainer):
        switch: type = _PairsWithoutNegatives
    elif issubclass(trainer, GRPOTrainer | RLOOTrainer):
        switch = _RolloutsWithoutNegatives
    else:
        raise TypeError(f"Only DPO, GRPO, RLOO and their subclasses have this switch; got {trainer.__name__}.")
    name = f"{trainer._name} without negative gradient"  # for the model card
    return type(
        f"{trainer.__name__}WithoutNegativeGradient", (switch, trainer), {"_name": name, "__doc__": trainer.__doc__}
    )
