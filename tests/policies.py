"""How the tests train with rollouts: prompts, a verifier, and trainers of a tiny policy whose reference lies in a folder."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import preferences
import tiny


class Policy:
    """A saved tiny model. TRL loads the reference from where the policy came from."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self.path = self._folder.name
        model = tiny.llama(0)
        model.generation_config.eos_token_id = tiny.EOS
        logging.disable_progress_bar()
        model.save_pretrained(self.path)

    def __call__(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path)


@cache
def policy() -> Policy:
    return Policy()


def prompts(rows: int = 8, *, conversational: bool = False, seed: int = 0) -> Dataset:
    return preferences.pairs(rows, conversational=conversational, seed=seed).select_columns("prompt")


def texts(completions: Any) -> list[str]:
    return [one if isinstance(one, str) else one[0]["content"] for one in completions]


def even_words(completions: Any, **_: Any) -> list[float]:
    """A verifier that a random policy satisfies half of the time: the words' numbers have an even sum."""
    found = [[int(word[1:]) for word in text.split() if word[0] == "w"] for text in texts(completions)]
    return [float(sum(numbers) % 2 == 0) for numbers in found]


def make(
    trainer: type,
    config: type,
    folder: Path | str,
    *,
    data: Any = None,
    evaluation: Any = None,
    lora: bool = False,
    model: Any = None,
    reward: Any = even_words,
    processing_class: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny policy: two groups of two a step, answers of at most five tokens."""
    quiet = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 5}
    return trainer(
        model=policy()() if model is None else model,
        reward_funcs=reward,
        args=preferences.arguments(config, folder, **(quiet | settings)),
        train_dataset=prompts() if data is None else data,
        eval_dataset=evaluation,
        processing_class=preferences.tokenizer() if processing_class is None else processing_class,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **preferences.LORA) if lora else None,
        callbacks=callbacks,
    )
