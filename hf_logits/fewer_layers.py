"""A smaller model made of a larger one: some of its decoder layers, with the same embeddings, and with the same weights in memory."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def keep_layers(model: PreTrainedModel, layers: Sequence[int], *, share: bool = True) -> PreTrainedModel:
    """The model with some of its decoder layers only, which answers quicker and worse until it is taught again.

    `model.config.kept_layers` of the result says which layers they are. A recipe that is saved with the larger model as its main model stores
    this list in place of weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): a decoder-only language model, without adapters; it stays as it is.
        layers (`Sequence[int]`): the layers to keep, from 0, in their order.
        share (`bool`, *optional*, defaults to `True`):
            Whether both have the same weights in memory: what is trained or merged into one then changes the other. Adapters may be put
            around either. `False` copies the weights.

    Raises:
        ValueError: layers that the model does not have, or not in increasing order.
        TypeError: a model whose decoder has no list of layers.
    """
    decoder = model.get_decoder()
    stack = getattr(decoder, "layers", None)
    name = "layers"
    if stack is None:
        stack, name = getattr(decoder, "h", None), "h"
    if not isinstance(stack, nn.ModuleList) or model.config.is_encoder_decoder:
        raise TypeError(f"{type(model).__name__} has no list of decoder layers: give a decoder-only language model.")
    kept = [int(index) for index in layers]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(stack):
        raise ValueError(f"layers is {kept}: give some of 0 to {len(stack) - 1}, each once and in increasing order.")
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]} if share else {}
    # what is left out is not copied to be thrown away
    left_out: dict[int, Any] = {id(layer): None for index, layer in enumerate(stack) if index not in kept}
    twin: PreTrainedModel = copy.deepcopy(model, {**shared, **left_out})
    rest = nn.ModuleList([getattr(twin.get_decoder(), name)[index] for index in kept])
    setattr(twin.get_decoder(), name, rest)
    for place, layer in enumerate(rest):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                setattr(part, "layer_idx", place)  # noqa: B010, mypy; where it writes in the cache
    config: Any = twin.config
    config.num_hidden_layers = len(kept)
    types = getattr(model.config, "layer_types", None)
    wanted = None if types is None else [types[index] for index in kept]
    if wanted is not None and list(config.layer_types) != wanted:
        try:
            config.layer_types = wanted
        except AttributeError as error:  # computed from something else
            raise TypeError(
                f"{type(config).__name__} works out by itself which layer is of which type, and would not say {wanted}: keep other layers."
            ) from error
    before = getattr(model.config, "kept_layers", None)
    config.kept_layers = kept if before is None else [before[index] for index in kept]
    return twin
