"""What the recipes share: arguments, parts, how continuations are made and measured, and small adapters."""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
sys.path.append(str(Path(__file__).parents[1]))

import torch  # noqa: E402
from peft import PeftModel, save_as_lora  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from smollm2 import load  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402


BATCH_SIZE = 256 if torch.cuda.is_available() else 32
"""Rows that are written or measured at once, if nothing else is asked for."""


def parser(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="a Hub id or a folder, in place of SmolLM2-135M-Instruct")
    made.add_argument("--output", type=Path, default=folder, help="the recipe's folder")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def schedule(options: argparse.Namespace) -> dict[str, Any]:
    """What all helpers are trained with, for any config of a Trainer: one cosine with a short warm-up, and nothing saved on the way."""
    return {
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": options.seed,
        "use_cpu": options.device == "cpu",
        "logging_steps": 10.0,
        "save_strategy": "no",
        "report_to": [],
    }


def tenth(text: str) -> int:
    """0 to 9, by the words of the text alone: what decides for good which part it belongs to."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[0] % 10


def models(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that was asked for, where it was asked for, and its tokenizer."""
    model, tokenizer = load(options.model)
    return model.to(options.device), tokenizer


def halve(model: PeftModel) -> None:
    """Adapters in half precision, which is what a recipe carries; what they add to the weights is small and forgives it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()


def save_adapter(model: PeftModel, folder: Path, *, rank: int | None = None) -> None:
    """An adapter in half precision, without PEFT's empty card and this machine's paths. `rank`: its best approximation of this rank."""
    if rank is None:
        halve(model)
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already")
            save_as_lora(folder, model, rank=rank)
        weights = load_file(folder / "adapter_model.safetensors")
        halved = {name: weight.half().contiguous() for name, weight in weights.items()}
        save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    processor: LogitsProcessor | None = None,
    *,
    tokens: int,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of each prompt, up to the end of the text. `options` are of `generate`."""
    found = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        batch = batch.to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=tokens,
            logits_processor=[] if processor is None else [processor],
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        for row in output[:, batch["input_ids"].size(1) :].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            found.append(row[:end])
    return found


@torch.no_grad()
def read_continuations(
    model: torch.nn.Module,
    beginnings: Sequence[list[int]],
    continuations: Sequence[list[int]],
    *,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each continuation's place, the logits that predict it, in float32, and its tokens. Beginnings have a token or more; all are ids."""
    device = next(model.parameters()).device
    rows = [begin + continuation for begin, continuation in zip(beginnings, continuations, strict=True)]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # alike in length: little is padded
    for start in range(0, len(rows), batch_size):
        batch = by_length[start : start + batch_size]
        shape = len(batch), max(len(rows[index]) for index in batch)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for place, index in enumerate(batch):  # padded on the right: positions count from the left
            end = len(rows[index])
            ids[place, :end], mask[place, :end] = torch.tensor(rows[index]), 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for place, index in enumerate(batch):
            begin, end = len(beginnings[index]), len(rows[index])
            yield index, logits[place, begin - 1 : end - 1].float(), ids[place, begin:end].to(device)


def log_likelihoods_of_ids(
    model: torch.nn.Module,
    beginnings: Sequence[list[int]],
    continuations: Sequence[list[int]],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """The log-prob of each continuation behind its beginning, summed over its tokens. Arguments as in [`read_continuations`]."""
    found = [0.0] * len(continuations)
    for index, logits, wanted in read_continuations(model, beginnings, continuations, batch_size=batch_size):
        found[index] = -cross_entropy(logits, wanted, reduction="sum").item()
    return found


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """As [`log_likelihoods_of_ids`], behind prompts that are texts."""
    beginnings = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return log_likelihoods_of_ids(model, beginnings, continuations, batch_size=batch_size)


def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
    *,
    batch_size: int = BATCH_SIZE,
) -> float:
    """Of all continuations together, without their prompts."""
    total = sum(log_likelihoods(model, tokenizer, prompts, continuations, batch_size=batch_size))
    return math.exp(-total / max(1, sum(map(len, continuations))))


def interval(
    values: Sequence[float], statistic: Callable[[list[float]], float], *, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """A bootstrap interval over examples."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(list(values), k=len(values))) for _ in range(draws))
    tail = round((1 - level) / 2 * draws)
    return found[tail], found[-1 - tail]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(values: Sequence[float], *, signed: bool = False, digits: int = 0) -> str:
    """The mean and its interval, in percent."""
    form = f"{'+' if signed else ''}.{digits}f"
    middle, low, high = (format(100 * value, form) for value in (mean(values), *interval(values, mean)))
    return f"{middle} ({low} to {high})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
