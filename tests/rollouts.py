"""Tiny policies that are trained on what they sample, and how the tests hold them to a script."""

import random
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from trl import GRPOTrainer

import preferences
import tiny


@cache
def _saved() -> TemporaryDirectory[str]:
    """TRL loads the reference from where the policy came from."""
    folder, model = TemporaryDirectory(), tiny.llama(0)
    model.generation_config.eos_token_id = tiny.EOS
    logging.disable_progress_bar()
    model.save_pretrained(folder.name)
    return folder


def policy() -> Any:
    """A tiny model that lies in a folder."""
    return AutoModelForCausalLM.from_pretrained(_saved().name)


def texts(completions: list[Any]) -> list[str]:
    return [one if isinstance(one, str) else one[-1]["content"] for one in completions]


def verifier(completions: list[Any], **_: Any) -> list[float]:
    """An answer is right if the numbers of its words have an even sum. About half of the tiny models' are."""
    found = [[int(word[1:]) for word in text.split() if word[0] == "w"] for text in texts(completions)]
    return [float(sum(numbers) % 2 == 0) for numbers in found]


def questions(rows: int = 8, *, conversational: bool = False, seed: int = 0) -> Dataset:
    return preferences.pairs(rows, conversational=conversational, seed=seed).select_columns("prompt")


GROUPS = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 5}
"""Two groups of two a step, for trainers that compare a prompt's answers."""


def make(
    trainer: type,
    config: type,
    folder: Path | str,
    *,
    reward: Any = verifier,
    data: Any = None,
    evaluation: Any = None,
    lora: bool = False,
    model: Any = None,
    processing_class: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny model: eight rows a step, answers of six tokens at most."""
    defaults = {"per_device_train_batch_size": 8, "max_completion_length": 6}
    return trainer(
        model=policy() if model is None else model,
        reward_funcs=reward,
        args=preferences.arguments(config, folder, **(defaults | settings)),
        train_dataset=questions() if data is None else data,
        eval_dataset=evaluation,
        processing_class=preferences.tokenizer() if processing_class is None else processing_class,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **preferences.LORA) if lora else None,
        callbacks=callbacks,
    )


def follow_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples become a function of the prompt, how often it came before, and the step: the same however a batch is cut or spread."""

    def speak(trainer: Any, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        everywhere = gather_object([[str(ids) for ids in prompt_ids]])
        seen = Counter(prompt for ids in everywhere[: trainer.accelerator.process_index] for prompt in ids)
        found = []
        for ids in prompt_ids:
            line = f"{trainer.state.global_step} {ids} {seen[str(ids)]}"
            seen[str(ids)] += 1
            rng = random.Random(line)
            found.append([rng.randint(6, 63) for _ in range(rng.randint(2, 5))])
        return found, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", speak)
