"""Where a reply begins: the tokens that a chat template puts between the user's text and the answer."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Integer
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def pattern_position(
    ids: Integer[Tensor, "B L"], mask: Bool[Tensor, "B L"], pattern: Sequence[int]
) -> Integer[Tensor, " B"]:
    """Where the last occurrence of `pattern` begins in each row."""
    width = len(pattern)
    if ids.shape[1] >= width:
        found = (ids.unfold(1, width, 1) == torch.tensor(pattern, device=ids.device)).all(-1)
        found = found & mask.unfold(1, width, 1).all(-1)
        starts = torch.where(found, torch.arange(found.shape[1], device=ids.device), -1).amax(-1)
    else:
        starts = torch.full((ids.shape[0],), -1, device=ids.device)
    if (missing := (starts < 0).nonzero().flatten().tolist()) != []:
        raise ValueError(
            f"The tokens {list(pattern)} that stand in front of a reply (config.prompt_pattern) do not occur in rows {missing} of "
            "the batch: was the text made with the chat template, and not cut on the left? Else pass prompt_lengths."
        )
    return starts


def reply_pattern(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between a user's text and the reply in the chat template: end of turn and assistant header.

    Spaces at their end are left out, as they may melt into the reply's first token.
    """
    text = "qzx"
    chat = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    tokens = tokenizer(text=rendered, add_special_tokens=False, return_offsets_mapping=True)
    end = rendered.rindex(text) + len(text)
    pattern = [
        token for token, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True) if start >= end
    ]
    while pattern and not str(tokenizer.decode(pattern[-1:])).strip():
        pattern = pattern[:-1]
    if not pattern:
        raise ValueError("This chat template puts nothing between the user's text and the reply; pass prompt_lengths.")
    return pattern
