"""Reward functions as TRL calls them: checked, called, and asked about what a policy samples."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from hf_logits.checks import check_count


RewardFunction = Callable[..., Sequence[float | None]]
"""`reward(prompts=..., completions=..., **columns)`: a number for each completion, or `None` where it does not apply."""
Generate = Callable[..., list[list[Any]]]
"""`generate(prompts, num_samples=n)`: `n` completions for each prompt."""


def reward_name(reward: Any) -> str:
    """The name of a function, or of an object's class, also behind `functools.partial`."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return reward.__name__ if inspect.isroutine(reward) else type(reward).__name__


def check_reward_function(reward: Any) -> RewardFunction:
    """Refuse what cannot be called as an ordinary function."""
    if isinstance(reward, nn.Module | str):
        raise TypeError("A reward model must become a function first: reward_model_as_function(model, tokenizer).")
    plain = reward.func if isinstance(reward, functools.partial) else reward
    if not callable(plain):
        raise TypeError(f"A reward must be a function, got {reward!r}.")
    if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__):
        raise TypeError(f"{reward_name(reward)} is asynchronous; only ordinary reward functions can be used here.")
    return reward


def call_reward(
    reward: RewardFunction, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> list[float | None]:
    """One reward for each completion, finite or `None`."""
    return finite_rewards(
        reward_name(reward), reward(prompts=prompts, completions=completions, **columns), completions
    )


def finite_rewards(name: str, rewards: Sequence[float | None], completions: Sequence[Any]) -> list[float | None]:
    """What the reward function `name` returned, if that is a finite number or `None` for each completion."""
    raw = [r if r is None else float(r) for r in rewards]
    if len(raw) != len(completions):
        raise ValueError(f"{name} returned {len(raw)} rewards for {len(completions)} completions.")
    for row, value in enumerate(raw):
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{name} returned {value} for the completion {completions[row]!r}. Return a finite number, or None "
                "where the reward does not apply."
            )
    return raw


def checked_reward(reward: Any) -> Any:
    """A reward function that refuses what [`finite_rewards`] refuses. Reward models and their ids stay as they are."""
    if isinstance(reward, nn.Module | str):
        return reward
    if not callable(reward):
        raise TypeError(f"A reward must be a function, got {reward!r}.")
    name = reward_name(reward)

    def checked(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return finite_rewards(name, reward(completions=completions, **columns), completions)

    async def awaited(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return finite_rewards(name, await reward(completions=completions, **columns), completions)

    plain = reward.func if isinstance(reward, functools.partial) else reward
    found: Any = checked
    if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__):
        found = awaited
    found.__name__ = name  # what the host's metrics are called by
    return found


def rated_samples(
    dataset: Dataset, generate: Generate, reward: RewardFunction, *, num_samples: int, batch_size: int
) -> Iterator[tuple[Any, list[Any], list[float | None]]]:
    """Each prompt of the dataset with its samples and their rewards. The reward function gets the other columns."""
    check_count("num_samples", num_samples, minimum=1)
    check_count("batch_size", batch_size, minimum=1)
    check_reward_function(reward)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The dataset needs a column 'prompt'; got {dataset.column_names}.")
    for start in range(0, len(dataset), batch_size):
        batch = dataset[start : start + batch_size]
        samples = generate(batch["prompt"], num_samples=num_samples)
        if [len(own) for own in samples] != [num_samples] * len(batch["prompt"]):
            raise ValueError(f"generate must return {num_samples} completions for each prompt.")
        copies = {key: [value for value in values for _ in range(num_samples)] for key, values in batch.items()}
        flat = [completion for own in samples for completion in own]
        rewards = call_reward(reward, copies.pop("prompt"), flat, copies)
        for row, prompt in enumerate(batch["prompt"]):
            yield prompt, samples[row], rewards[row * num_samples : (row + 1) * num_samples]
