"""Reading texts with a language model: in evaluation mode, in batches, up to where an answer begins. Needs no training library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.checks import check_count
from hf_logits.tasks import bare


Model = PreTrainedModel | PeftModel
Prompt = str | list[dict[str, Any]]
"""Text, or the messages of a chat whose last one is the user's."""


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Without gradients and dropout; the mode comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def open_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Text as ids, with what the tokenizer puts in front of a text and without the end token that some put behind: it goes on."""
    ids, plain = (list(tokenizer(text=text, add_special_tokens=special)["input_ids"]) for special in (True, False))
    # whether the end token is added is seen on another text: this one may end in it by itself, or be empty behind a first token
    probe, bare_probe = (tokenizer(text="a", add_special_tokens=special)["input_ids"] for special in (True, False))
    end = [tokenizer.eos_token_id]
    closes = probe[-1:] == end and bare_probe[-1:] != end
    return ids[:-1] if closes and ids[:-1][len(ids) - 1 - len(plain) :] == plain else ids


def chat_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt as ids, up to where the answer begins."""
    if isinstance(prompt, str):
        ids = open_ids(prompt, tokenizer)
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"A prompt must have at least one token; got {prompt!r}.")
    return list(ids)


def right_padded(
    rows: list[list[int]], model: Model, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any], Tensor]]:
    """Indices, inputs and the last position of rows of like length. Padding is on the right, where no token sees it."""
    check_count("batch_size", batch_size, minimum=1)
    if bare(model).config.is_encoder_decoder:
        raise TypeError(f"{type(bare(model)).__name__} is an encoder-decoder: give a causal language model.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("The virtual tokens of prompt learning shift all positions. Use the base model or LoRA.")
    window = getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    if window is not None and longest > window:
        raise ValueError(
            f"A prompt has {longest} tokens, but {type(bare(model)).__name__} reads {window}: shorten it."
        )
    return _batches(rows, model, batch_size)


def _batches(
    rows: list[list[int]], model: Model, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any], Tensor]]:
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        parts = [torch.tensor(rows[index], device=model.device) for index in batch]
        mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
        inputs = {"input_ids": pad_sequence(parts, batch_first=True), "attention_mask": mask, "use_cache": False}
        yield batch, inputs, mask.sum(1) - 1
