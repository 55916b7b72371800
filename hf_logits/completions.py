"""Prompts and completions as TRL knows them, plain text or lists of messages: drawn from a model, or joined to one text."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import apply_chat_template

from hf_logits.checks import check_count
from hf_logits.prompts import pad_id, pad_left


Messages = list[dict[str, Any]]
Prompt = str | Messages
"""Text, or the messages of a chat whose last one is the user's."""
Completion = str | Messages


def conversation_text(
    prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any
) -> str:
    """What a reward model reads: prompt and completion one behind the other, through the chat template if they are messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, str) or isinstance(completion, str):
        raise TypeError(
            f"Prompt and completion must both be text or both be lists of messages; got {type(prompt).__name__} and "
            f"{type(completion).__name__}."
        )
    return apply_chat_template({"messages": prompt + completion}, tokenizer, **template_kwargs)["text"]


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    **generation_kwargs: Any,
) -> list[list[Completion]]:
    """Completions that a model samples, in the format of the prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]): is put into eval mode for the time of the call.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): needs a chat template if the prompts are messages.
        prompts (`list[str]` or `list[list[dict]]`): none of them empty.
        num_samples (`int`): completions per prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`): what is longer is cut.
        batch_size (`int`, *optional*, defaults to `8`): how many prompts are sampled from at once.
        generation_kwargs: of `generate`; by default tokens are drawn from the model's distribution as it is.

    Returns:
        `list[list]`: `num_samples` completions for each prompt. Special tokens are left out.
    """
    check_count("num_samples", num_samples, minimum=1)
    check_count("batch_size", batch_size, minimum=1)
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": max_new_tokens}
    options |= {"num_return_sequences": num_samples, "pad_token_id": pad_id(tokenizer)} | generation_kwargs
    sampled: list[list[Completion]] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            ids, mask = pad_left([prompt_ids(prompt, tokenizer) for prompt in batch], pad_id(tokenizer))
            generate = cast(Any, model).generate
            out = generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for row, prompt in enumerate(batch):
                own = texts[row * num_samples : (row + 1) * num_samples]
                sampled.append([t if isinstance(prompt, str) else [{"role": "assistant", "content": t}] for t in own])
    finally:
        model.train(training)
    return sampled


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[int]:
    """A prompt as ids, up to where the answer begins."""
    # The chat template writes the special tokens itself.
    chat = not isinstance(prompt, str)
    text = (
        apply_chat_template({"prompt": prompt}, tokenizer, **template_kwargs)["prompt"]
        if not isinstance(prompt, str)
        else prompt
    )
    ids = tokenizer(text=text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError(f"A prompt must have at least one token; got {prompt!r}.")
    return ids
