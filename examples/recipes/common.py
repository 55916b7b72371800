"""What the recipes share: arguments, how continuations are made and measured, and small adapters."""

import argparse
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
sys.path.append(str(Path(__file__).parents[1]))

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402


def parser(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="a Hub id or a folder, in place of SmolLM2-135M-Instruct")
    made.add_argument("--output", type=Path, default=folder, help="the recipe's folder")
    made.add_argument("--seed", type=int, default=0)
    return made


def halve(model: PeftModel) -> None:
    """Adapters in half precision, which is what a recipe carries; what they add to the weights is small and forgives it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    processor: LogitsProcessor | None = None,
    *,
    tokens: int,
    batch_size: int = 32,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of each prompt, up to the end of the text. `options` are of `generate`."""
    found = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
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
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
) -> list[float]:
    """The log-prob of each continuation behind its prompt, summed over its tokens."""
    found = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        begin = tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([begin + continuation])).logits[0, len(begin) - 1 : -1].float()
        found.append(-cross_entropy(logits, torch.tensor(continuation, dtype=torch.long), reduction="sum").item())
    return found


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
) -> float:
    """Of all continuations together, without their prompts."""
    total = sum(log_likelihoods(model, tokenizer, prompts, continuations))
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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
