"""Tiny policies that are trained on what they sample, and how the tests hold them to a script."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

import preferences
import tiny


def verifier(completions: list[Any], **_: Any) -> list[float]:
    """An answer is right if its last word has an even number. About half of the tiny models' are."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(text[-1:] in tuple("02468")) for text in texts]


def questions(rows: int = 8, *, conversational: bool = False, seed: int = 0) -> Dataset:
    return preferences.pairs(rows, conversational=conversational, seed=seed).select_columns("prompt")


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
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny model: eight rows a step, answers of six tokens at most."""
    defaults = {"per_device_train_batch_size": 8, "max_completion_length": 6}
    return trainer(
        model=tiny.llama(0) if model is None else model,
        reward_funcs=reward,
        args=preferences.arguments(config, folder, **(defaults | settings)),
        train_dataset=questions() if data is None else data,
        eval_dataset=evaluation,
        processing_class=preferences.tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **preferences.LORA) if lora else None,
        callbacks=callbacks,
    )


def follow_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples become a function of the prompt, how often the batch has it, and the step: the same however a batch is cut."""

    def speak(trainer: Any, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        seen: Counter[str] = Counter()
        found = []
        for ids in prompt_ids:
            line = f"{trainer.state.global_step} {ids} {seen[str(ids)]}"
            seen[str(ids)] += 1
            rng = random.Random(line)
            found.append([rng.randint(6, 63) for _ in range(rng.randint(2, 5))])
        return found, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", speak)
