"""What a model has read of each row, and how rows are moved, taken back and laid beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer


HEAD = 2
"""Columns of a key before its ids."""

PADDING = -1


@dataclass
class ReadState:
    """What has been read, row by row. Every tensor has one row a key.

    A key is two head columns (which adapter, which batch item's encoder or image inputs), then the ids, with -1 on left padding.
    """

    keys: Tensor  # [F, 2 + W]
    cache: Cache
    logits: dict[int, Tensor] = field(default_factory=dict)  # number of ids read -> [F, V], float32, of the next token
    token_log_probs: Tensor | None = None  # [F, W or more]: of every id given those before it
    offsets: Tensor | None = (
        None  # [F, 1]: position minus index, for models that give an image fewer positions than tokens
    )
    adapters: list[str] | None = None  # the adapter that reads each row, where rows differ

    @property
    def length(self) -> int:
        return self.keys.shape[1] - HEAD

    @property
    def static(self) -> list[StaticLayer]:
        """The layers of a static cache; none of another."""
        return cast(list[StaticLayer], self.cache.layers) if isinstance(self.cache, StaticCache) else []

    @property
    def room(self) -> int | None:
        """How many ids a static cache holds."""
        return self.static[0].max_cache_len if self.static else None

    def select(self, rows: Int[Tensor, " F"]) -> None:
        self.keys = self.keys[rows]
        for layer in self.static:  # in place, because compiled code knows where they lie
            layer.keys = cast(Tensor, layer.keys).copy_(cast(Tensor, layer.keys)[rows])
            layer.values = cast(Tensor, layer.values).copy_(cast(Tensor, layer.values)[rows])
        if not self.static:
            self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.logits = {length: values[rows] for length, values in self.logits.items()}
        self.token_log_probs = None if self.token_log_probs is None else self.token_log_probs[rows]
        self.offsets = None if self.offsets is None else self.offsets[rows]
        self.adapters = None

    def crop(self, length: int) -> None:
        if length < self.length:
            for layer in self.static:
                layer.cumulative_length.sub_(self.length - length)
            if not self.static:
                self.cache.crop(length - self.length)
            self.keys = self.keys[:, : HEAD + length]
            self.logits = {n: values for n, values in self.logits.items() if n <= length}

    def copy_to(self, cache: Cache, rows: int, *, begin: int) -> None:
        """Put what the first `rows` rows have read from column `begin` on into an empty `cache`.

        Where the rows begin later than that (`begin` is negative), columns that nobody looks at are put in front.
        """
        for index, layer in enumerate(cast(Any, self.cache.layers)):
            key_states, value_states = (
                nn.functional.pad(values[:rows, :, max(begin, 0) : self.length], (0, 0, max(-begin, 0), 0))
                for values in (layer.keys, layer.values)
            )
            cache.update(key_states, value_states, index)


def side_by_side(states: Sequence[ReadState], keys: Int[Tensor, "F K"]) -> ReadState:
    """One state of the rows of several, which end together and begin where each does; `keys` are those of all rows."""
    width = keys.shape[1] - HEAD

    def below(tensors: Sequence[Tensor], dim: int) -> Tensor:
        spare = [(0, 0) * (tensor.dim() - 1 - dim) + (width - tensor.shape[dim], 0) for tensor in tensors]
        return torch.cat([nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, spare, strict=True)])

    together = ReadState(keys, DynamicCache(), {width: torch.cat([state.logits[state.length] for state in states])})
    for index, layers in enumerate(zip(*(cast(Any, state.cache.layers) for state in states), strict=True)):
        key_states, value_states = (
            below([getattr(layer, name) for layer in layers], 2) for name in ("keys", "values")
        )
        together.cache.update(key_states, value_states, index)
    if all(state.token_log_probs is not None for state in states):
        together.token_log_probs = below([cast(Tensor, state.token_log_probs) for state in states], 1)
    return together
