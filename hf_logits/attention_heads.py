"""What the attention heads of a causal language model put out, and where."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Integer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_logits.hidden import backbone
from hf_logits.reading import Model, Prompt, chat_ids, evaluating, right_padded
from hf_logits.tasks import bare


_PROJECTION = re.compile(
    r"(?:^|\.)(?:self_attn|self_attention|multi_head_attention|attention|attn)\.(?:o_proj|out_proj|c_proj|dense)$"
)
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}


def output_projections(model: Model) -> list[tuple[str, nn.Module]]:
    """Name and module of the projection behind the heads of each layer, adapters around it included.

    Its input is what the heads put out, side by side: `[B, L, heads * head size]`, also with grouped queries.
    """
    config: Any = bare(model).config.get_text_config()
    found = [(name, module) for name, module in backbone(model).named_modules() if _PROJECTION.search(name)]
    if len(found) != config.num_hidden_layers:
        raise ValueError(
            f"{type(bare(model)).__name__} has {config.num_hidden_layers} layers, but {len(found)} output projections of attention heads "
            "were found: only causal language models with attention in every layer are known here."
        )
    # some models call linear attention self_attn too, and what that puts out is gated and normed before it is projected
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        raise ValueError(
            f"{type(bare(model)).__name__} has layers of {', '.join(sorted(others))}: only causal language models with "
            f"{', '.join(sorted(_LAYERS))} in every layer are known here."
        )
    return found


def bare_linear(module: nn.Module) -> nn.Module:
    """Without the adapters around it; of a module that is trained as a whole, the copy that runs."""
    if isinstance(module, ModulesToSaveWrapper):
        known: Any = module
        runs = known.active_adapters if not known.disable_adapters else []
        return cast(nn.Module, known.modules_to_save[runs[0]] if runs else known.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _width(module: nn.Module) -> int:
    linear = cast(Any, bare_linear(module))
    return int(linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features)


def head_shape(model: Model) -> tuple[int, int, int]:
    """Layers, heads and size of a head's output."""
    widths = {_width(module) for _, module in output_projections(model)}
    heads: int = bare(model).config.get_text_config().num_attention_heads
    if len(widths) > 1 or min(widths) % heads:
        raise ValueError(f"The layers' heads differ: projections of {sorted(widths)} inputs with {heads} heads each.")
    return len(output_projections(model)), heads, min(widths) // heads


@contextmanager
def watch_heads(model: Model, places: Integer[Tensor, " B"]) -> Iterator[list[Float[Tensor, "B E"]]]:
    """Collect what the heads of each layer, one after the other, put out at one position of each row of a forward inside."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any) -> None:
        seen.append(args[0][torch.arange(len(places), device=args[0].device), places.to(args[0].device)])

    handles = [module.register_forward_pre_hook(keep) for _, module in output_projections(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def collect_head_activations(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    answers: Sequence[str] = ("A", "E"),
    batch_size: int = 8,
) -> Float[Tensor, "N A L H D"]:
    """What the attention heads put out at the last token of each prompt with each answer. It serves all subjects.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal language model with attention in all layers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model, with a chat template if the prompts are messages.
        prompts: one an item, text or messages whose last one is the user's, such as `QUESTION` with a statement in it.
        answers (*optional*, defaults to `("A", "E")`): the agreeing and the opposing answer, put directly behind the prompt.
        batch_size (`int`, *optional*, defaults to `8`): rows in a forward.

    Returns:
        `torch.Tensor` of shape `[items, answers, layers, heads, head size]`, float32, on the CPU.
    """
    shape = head_shape(model)
    suffixes = [list(tokenizer(text=answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    if not all(suffixes):
        raise ValueError(f"Every answer must have at least one token; got {list(answers)}.")
    rows = [[*chat_ids(prompt, tokenizer), *suffix] for prompt in prompts for suffix in suffixes]
    found = torch.empty(len(rows), *shape)
    with evaluating(model):
        for batch, inputs, places in right_padded(rows, model, batch_size):
            with watch_heads(model, places) as seen:
                backbone(model)(**inputs)
            found[batch] = torch.stack([layer.float().cpu() for layer in seen], 1).unflatten(-1, shape[1:])
    return found.unflatten(0, (len(prompts), len(answers)))
