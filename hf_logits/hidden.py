"""The hidden states of a language model behind its last norm: what its head reads, without running the head."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def backbone(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model in front of its LM head. Adapters of a [`~peft.PeftModel`] stay in place and active."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    body: nn.Module = whole.base_model  # type: ignore[assignment]
    if body is whole:
        raise ValueError(f"{type(whole).__name__} has no backbone in front of a head. Give a causal language model.")
    return body


@contextlib.contextmanager
def watch_hidden(model: PreTrainedModel | PeftModel) -> Iterator[list[Float[Tensor, "R L D"]]]:
    """Collect the last hidden states of every forward inside of the block, part of its graph, at no forward of our own."""
    seen: list[Tensor] = []
    handle = backbone(model).register_forward_hook(lambda body, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


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
