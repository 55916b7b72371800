"""Tiny policies, references and preference data, built in memory, and how the tests train with them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

import tiny
from oracles import word_tokenizer


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
_STEPS = ("eval_steps", "logging_steps", "save_steps", "warmup_steps")
_CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """64 words and a chat template."""
    made = word_tokenizer(["user", "assistant"])
    made.chat_template = _CHAT
    return made


def _words(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(f"w{rng.randint(6, 63)}" for _ in range(rng.randint(fewest, most)))


def pairs(rows: int = 8, *, conversational: bool = False, seed: int = 0) -> Dataset:
    """Chosen and rejected completions of unequal lengths behind a prompt."""
    rng = random.Random(seed)
    found = [
        {"prompt": _words(rng, 2, 5) + " ", "chosen": _words(rng, 2, 6), "rejected": _words(rng, 2, 6)}
        for _ in range(rows)
    ]
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        found = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in found]
    return Dataset.from_list(found)


def unpaired(rows: int = 8, *, conversational: bool = False, seed: int = 0) -> Dataset:
    """Completions with a thumb up or down, in turns."""
    found = []
    for index, row in enumerate(pairs(rows, conversational=conversational, seed=seed)):
        good = index % 2 == 0
        found.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return Dataset.from_list(found)


def arguments(config: type, folder: Path | str, **settings: Any) -> Any:
    """A config for one process on the CPU: two rows a step, plain float32, nothing saved, every step logged."""
    quiet = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1.0,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    # transformers takes whole numbers of steps for what it annotates as a fraction; the shape checker does not
    return config(**{key: float(value) if key in _STEPS else value for key, value in (quiet | settings).items()})


def make(
    trainer: type,
    config: type,
    folder: Path | str,
    *,
    data: Dataset | None = None,
    evaluation: Dataset | None = None,
    lora: bool = False,
    model: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny model. Without LoRA its reference is another model, so that log-ratios are not zero at first."""
    return trainer(
        model=tiny.llama(0) if model is None else model,
        ref_model=None if lora else tiny.llama(1),
        args=arguments(config, folder, **settings),
        train_dataset=pairs() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
        callbacks=callbacks,
    )


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """The machine goes away in the middle of training."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def logged(trainer: Any, key: str) -> list[float]:
    """What was logged under `key`, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    assert first.keys() == second.keys()
    return max((value - second[name]).abs().max().item() for name, value in first.items())


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Counts the forwards of a model's backbone."""
    count: list[int] = []
    hook = model.base_model.register_forward_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        hook.remove()
