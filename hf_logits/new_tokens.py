"""Tokens that a model is taught later: their rows in both embeddings, and LoRA that trains these rows and no others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.prompts import single_token, tokenize


def _embeddings(model: Any) -> tuple[Any, Any]:
    """Both embedding modules of a language model, whose weights are one tensor if they are tied."""
    if isinstance(model, PeftModel):
        raise TypeError("New rows are made before an adapter is put on: give the base model, not a PeftModel.")
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings. Give a causal language model.")
    return given, output


@torch.no_grad()
def add_token_rows(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PeftModel,
    texts: Sequence[str],
    *,
    like: Mapping[str, str] | None = None,
) -> list[int]:
    """Make each text one special token, with a row in both embeddings. What is there already is left alone.

    A new row is the mean of the rows of all older tokens, or of those of the words in `like`. So nothing is drawn at random:
    who loads the base model and calls this again has the same rows. A vocabulary never shrinks.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): changed in place.
        model ([`~transformers.PreTrainedModel`]): a causal language model, tied or not, without adapter; changed in place.
        texts (`Sequence[str]`): the tokens.
        like (`Mapping[str, str]`, *optional*): `{token: words}`, words that mean what the token shall mean.

    Returns:
        `list[int]`: the ids of the tokens.
    """
    whole: Any = model
    _embeddings(whole)
    like = dict(like or {})
    if unknown := set(like) - set(texts):
        raise ValueError(f"like names {sorted(unknown)}; the tokens are {sorted(texts)}.")
    words = {text: tokenize(meaning, tokenizer, what="like", special_tokens=False) for text, meaning in like.items()}
    if empty := [text for text, ids in words.items() if not ids]:
        raise ValueError(f"like has no words for {empty}.")
    known = tokenizer.get_vocab()
    older = max(known.values()) + 1
    # Not normalised: a tokenizer that lower-cases would never find a token with capitals.
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
    ids = {text: single_token(text, tokenizer, what="token") for text in texts}

    rows: int = _embeddings(whole)[0].weight.shape[0]
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        whole.resize_token_embeddings(size, mean_resizing=False)
    fresh = {*range(rows, size), *(ids[text] for text in texts if text not in known)}
    given, output = _embeddings(whole)
    tensors = [given.weight, *([output.weight] if output.weight is not given.weight else [])]
    if output.bias is not None:
        tensors.append(output.bias)
    for tensor in tensors:
        _start(
            tensor, fresh, min(older, rows), {ids[text]: like for text, like in words.items() if ids[text] in fresh}
        )
    return [ids[text] for text in texts]


def _start(
    tensor: Float[Tensor, "V ..."], fresh: Iterable[int], older: int, words: Mapping[int, Sequence[int]]
) -> None:
    """Fill the fresh rows of an embedding, in place."""
    mean = tensor[:older].float().mean(0)
    for token in fresh:
        tensor[token] = (tensor[list(words[token])].float().mean(0) if token in words else mean).to(tensor.dtype)


def lora_with_token_rows(model: PreTrainedModel | PeftModel, ids: Sequence[int], **settings: Any) -> LoraConfig:
    """A LoRA that also trains the rows of some tokens, in both embeddings, by PEFT's `trainable_token_indices`.

    An adapter then holds a row for each token and no whole embedding. Where the embeddings are tied, PEFT trains one row
    for both; where they are not, both have to be named, or the rows that predict the tokens would stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]): with rows for the tokens.
        ids (`Sequence[int]`): the tokens.
        settings: of [`~peft.LoraConfig`].
    """
    given, output = _embeddings(model)
    if max(ids) >= given.weight.shape[0]:
        raise ValueError(
            f"Token {max(ids)} has no row in the {given.weight.shape[0]} of the model: add its row first."
        )
    if output.bias is not None:
        raise ValueError(
            f"The head of {type(model).__name__} has a bias, which PEFT leaves out as soon as it trains single rows of it. Train "
            "both embeddings as a whole with a LoraConfig of your own: modules_to_save=[<embedding>, <head>]."
        )
    modules = [given] if output.weight is given.weight else [given, output]
    names = [next(name for name, module in model.named_modules() if module is one) for one in modules]
    settings.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(trainable_token_indices={name: list(ids) for name in names}, **settings)


def make_head_readable(model: PreTrainedModel | PeftModel) -> None:
    """Let TRL's fused head read a head of which PEFT trains single rows.

    TRL reads `weight` and `bias` of the head in place of calling it. PEFT's wrapper passes the weight on, trained rows and
    gradient included, but knows no bias: the first step would end in an `AttributeError`.
    """
    head: Any = model.get_output_embeddings()
    single_rows = isinstance(head, TrainableTokensWrapper)
    if single_rows:
        if head.original_module.bias is not None:
            raise ValueError(
                "PEFT's trainable_token_indices leaves the bias of a head out. Train head and embedding as a whole "
                "(modules_to_save)."
            )
        head.bias = None


def frozen_rows(model: PreTrainedModel | PeftModel, ids: Sequence[int]) -> list[str]:
    """Which of `"input"` and `"output"` embeddings do not train the rows of all these tokens."""
    modules: dict[str, Any] = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    return [side for side, module in modules.items() if not _trains(module, set(ids))]


def _trains(module: nn.Module, ids: set[int]) -> bool:
    if isinstance(module, TrainableTokensWrapper):
        layer: Any = module.token_adapter
        active = [name for name in module.active_adapters if name in layer.token_indices]
        trained = [
            set(layer.token_indices[name]) for name in active if layer.trainable_tokens_delta[name].requires_grad
        ]
        return ids <= set().union(*trained)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return any(parameter.requires_grad for parameter in module.parameters())
    weight: Any = module.weight
    return bool(weight.requires_grad)
