"""What the recipes share: arguments, parts, how continuations are made and measured, and small adapters."""

import argparse
import hashlib
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
from smollm2 import load  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402


def parser(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="a Hub id or a folder, in place of SmolLM2-135M-Instruct")
    made.add_argument("--output", type=Path, default=folder, help="the recipe's folder")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


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
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
    *,
    batch_size: int = 32,
) -> list[float]:
    """The log-prob of each continuation behind its prompt, summed over its tokens."""
    pairs = [(tokenizer(prompt)["input_ids"], own) for prompt, own in zip(prompts, continuations, strict=True)]
    order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))  # alike in length: little padding
    found = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(sum(map(len, pairs[place])) for place in places)
        ids, mask, labels = [], [], []
        for begin, own in (pairs[place] for place in places):
            empty = width - len(begin) - len(own)
            ids.append(begin + own + [0] * empty)
            mask.append([1] * (width - empty) + [0] * empty)
            labels.append([-100] * len(begin) + own + [-100] * empty)
        read, kept, wanted = (torch.tensor(rows, device=model.device) for rows in (ids, mask, labels))
        logits = model(input_ids=read, attention_mask=kept).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), wanted[:, 1:], reduction="none").sum(-1)
        for place, loss in zip(places, losses.tolist(), strict=True):
            found[place] = -loss
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


def distinct(texts: Sequence[list[int]], n: int) -> float:
    """Different n-grams over all n-grams, none across texts."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


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
