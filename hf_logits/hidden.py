"""The hidden states of a language model behind its last norm: what its head reads, without running the head."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def backbone(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model in front of its LM head, of T5 and its kin the decoder. Adapters of a [`~peft.PeftModel`] stay active."""
    whole = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
    body: Any = whole.base_model
    if body is whole and whole.config.is_encoder_decoder:
        body = whole.get_decoder()
    if body is whole:
        raise ValueError(f"{type(whole).__name__} has no backbone in front of a head. Give a causal language model.")
    return cast(nn.Module, body)


@contextlib.contextmanager
def watch_hidden(model: PreTrainedModel | PeftModel) -> Iterator[list[Float[Tensor, "R L D"]]]:
    """Collect the last hidden states of every forward inside of the block, part of its graph, at no forward of our own."""
    seen: list[Tensor] = []
    handle = backbone(model).register_forward_hook(lambda body, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


Fork = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The ids of a prompt and of two continuations."""


def pack_forks(
    forks: Sequence[Fork], *, pad: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Bool[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """One row for each prompt with both of its continuations, which do not see each other: prompts are read once.

    Returns the arguments of a backbone, and where the hidden states are that predict either continuation.
    """
    width = max(sum(map(len, fork)) for fork in forks)
    ids = torch.full((len(forks), width), pad)
    positions = torch.zeros_like(ids)
    sees = torch.eye(width, dtype=torch.bool).repeat(
        len(forks), 1, 1
    )  # padding sees itself: a softmax needs something
    predicts = torch.zeros(2, len(forks), width, dtype=torch.bool)
    for row, (prompt, first, second) in enumerate(forks):
        start, fork, end = len(prompt), len(prompt) + len(first), len(prompt) + len(first) + len(second)
        ids[row, :end] = torch.tensor([*prompt, *first, *second])
        positions[row, :end] = torch.tensor([*range(fork), *range(start, start + len(second))])
        sees[row, :end, :end] = torch.ones(end, end, dtype=torch.bool).tril()
        sees[row, fork:end, start:fork] = False
        for which, places in enumerate(([*range(start, fork)], [*range(fork, end)])):
            # a token is predicted one place before it, the first one at the end of the prompt
            before = [start - 1, *places[:-1]] if places else []
            predicts[which, row, before if start else before[1:]] = True
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}, predicts[0], predicts[1]


@torch.no_grad()
def reads_forks(body: nn.Module, fork: Fork, *, pad: int) -> bool:
    """Whether a backbone reads a packed fork as it reads both continuations alone, tried out on this one.

    State-space layers and sliding windows do not, nor do attention kernels without masks.
    """
    config: Any = body.config
    if (
        config._attn_implementation not in ("eager", "sdpa")
        or "position_ids" not in inspect.signature(body.forward).parameters
    ):
        return False
    parameter = next(body.parameters())
    inputs, *places = pack_forks([fork], pad=pad, dtype=parameter.dtype)
    inputs = {key: value.to(parameter.device) for key, value in inputs.items()}
    packed = body(**inputs, use_cache=False).last_hidden_state[0]
    for continuation, place in zip(fork[1:], places, strict=True):
        ids = torch.tensor([[*fork[0], *continuation]], device=parameter.device)
        alone = body(input_ids=ids, use_cache=False).last_hidden_state[0, max(len(fork[0]) - 1, 0) : -1]
        difference = packed[place[0].to(parameter.device)] - alone
        if difference.numel() and difference.abs().max() > torch.finfo(parameter.dtype).eps ** 0.5 * alone.abs().max():
            return False
    return True


@torch.no_grad()
def embed_texts(
    texts: Sequence[str],
    *,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    max_length: int = 512,
) -> Float[Tensor, "N D"]:
    """One vector of length 1 a text: the mean of its tokens' last hidden states. Encoders and decoders both work."""
    body = model if not isinstance(model, PeftModel) and model.base_model is model else backbone(model)
    training = model.training
    model.eval()
    found = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            return_tensors="pt",
            padding=True,
            padding_side="right",  # absolute positions count from the left
            truncation=True,
            max_length=max_length,
        ).to(model.device)
        hidden = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        kept = batch["attention_mask"].bool()
        mean = hidden.masked_fill(~kept.unsqueeze(-1), 0.0).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
        found.append(nn.functional.normalize(mean, dim=-1).cpu())
    model.train(training)
    return torch.cat(found)
