"""A second model that follows a generation: the engine under every guided decoder.

The contract: *the cache is an optimisation, never a memory*. What [`AuxiliaryLM`] returns is a pure function of the token ids
that it is shown. Rows may be permuted, duplicated or dropped, tokens may be taken back, prompts may change from call to call.
The cache is found again by comparing tokens, and what it does not hold is computed.

All contexts of one model are rows of one batch. A row is a *key*: two head columns (which adapter, which batch item's
encoder or image inputs), then the ids of the context, with -1 on left padding. Rows with equal keys have equal states, so
one integer comparison answers every question about reuse.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from hf_logits.prefix import PromptTracker, Step, match_prefixes
from hf_logits.prompts import Rewrite
from hf_logits.read_state import HEAD, PADDING, ReadState, side_by_side


logger = logging.get_logger(__name__)

BASE = "__base__"
"""The adapter name that PEFT gives to the model without adapters."""


@dataclass(frozen=True)
class Context:
    """One way in which an auxiliary model reads the generation.

    Args:
        prompt ([`~hf_logits.prompts.Rewrite`], *optional*):
            Makes this context's prompt out of the main one; generated tokens follow it. `None`: the main prompt itself.
        adapter (`str`, *optional*):
            An adapter of a [`~peft.PeftModel`], or `"__base__"` for the model without. `None`: the model as it is.
        inputs (`Mapping[str, Any]`, *optional*):
            Further inputs of the prompt for `items` items of the batch: an encoder's `input_ids` and `attention_mask`, or a
            vision-language model's `pixel_values` (or `mm_encoder_outputs`, to encode an image once for two contexts).
        items (`int`, *optional*, defaults to `0`):
            For how many items of the batch `inputs` are.
    """

    prompt: Rewrite | None = None
    adapter: str | None = None
    inputs: Mapping[str, Any] | None = None
    items: int = 0


@dataclass
class EngineStats:
    """What an [`AuxiliaryLM`] has cost.

    Attributes:
        forwards (`int`): calls of the model.
        tokens (`int`): tokens fed, all rows together, padding left out.
        prefill_rows (`int`): rows that were started from nothing.
    """

    forwards: int = 0
    tokens: int = 0
    prefill_rows: int = 0


class AuxiliaryLM:
    """Next-token log-probabilities of a model, in one or more contexts, for whatever rows `generate` shows.

    Right under greedy search, sampling, beams, returned sequences, left padding, assisted decoding and reuse of one object
    over many generations. In the plain case a step feeds exactly the new column, for all contexts in one forward. An engine
    that is not asked costs nothing; asked again, it catches up in one forward. Recurrent (state-space) models can neither
    take tokens back nor read several at once behind a state: they start again, and catch up token by token. Weights that were
    trained, moved or given other adapters are noticed at the next prompt; writes through `.data` are not: call `reset`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, read in eval mode whatever mode it is in. It may be the generating model itself.
        contexts (`Sequence[Context]`, *optional*):
            How it reads the generation. Defaults to one context, the main ids themselves.
        pad_token_id (`int`, *optional*):
            Id that pads the main prompts on the left. Defaults to the model's own, else to its end of text.
        score_tokens (`bool` or `"generated"`, *optional*, defaults to `False`):
            Also keep `token_log_probs`, the log-probability of every token read; `"generated"`: of those behind the prompts, for
            which the logits of the prompts need not be computed.
        prefill_chunk (`int`, *optional*, defaults to `1024`):
            The most tokens a row that one forward reads of a long prompt.

    Attributes:
        stats ([`EngineStats`]): what it has cost so far.
        vocab_size (`int`): entries of the model's logits.
    """

    # Results at this many last positions are kept for a single row: assisted decoding asks again for those of its draft.
    _MEMO = 32
    # So many tokens of padding cost more than the forwards that it takes to avoid them.
    _WASTE = 256
    # Logits that scoring a prompt may hold at once, 64 MiB of them: long prompts are read in so many more pieces.
    _SCORED = 2**24

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        contexts: Sequence[Context] | None = None,
        *,
        pad_token_id: int | None = None,
        score_tokens: bool | Literal["generated"] = False,
        prefill_chunk: int = 1024,
    ):
        self.model = model
        self.contexts = self._given_contexts = tuple(contexts) if contexts is not None else (Context(),)
        self.score_tokens = score_tokens
        self.prefill_chunk = prefill_chunk
        self.stats = EngineStats()
        self._base = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
        self._encoder_decoder = bool(self._base.config.is_encoder_decoder)
        self._adapters = list(dict.fromkeys(context.adapter for context in self.contexts))
        self._check_contexts()

        parameters = inspect.signature(self._base.forward).parameters
        # One name since transformers 5.24; before, it depended on the model.
        named = parameters | inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
        self._cache_name = next((name for name in ("cache", "cache_params") if name in named), "past_key_values")
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        text_config = self._base.config.get_text_config(decoder=True)
        layers = {type(layer) for layer in DynamicCache(config=text_config).layers}
        # Attention layers that keep every token can be rolled back to any depth; the mask still applies a sliding window.
        self._croppable = layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        self._cache_config = None if self._croppable else text_config
        window: int | None = getattr(text_config, "max_position_embeddings", None)
        self._window = window if window is not None and window > 0 else None  # XLNet says -1: no bound
        self._positions_end = any(
            isinstance(module, nn.Embedding) and self._window in (module.num_embeddings, module.num_embeddings - 2)
            for module in self._base.modules()
            if module is not self._base.get_input_embeddings()
        )
        # RoBERTa counts from behind the embedding of its padding.
        self._first_position = next(
            (
                module.padding_idx + 1
                for name, module in self._base.named_modules()
                if name.endswith("position_embeddings")
                and isinstance(module, nn.Embedding)
                and module.padding_idx is not None
            ),
            0,
        )
        self._padding_is_right = self.pads_exactly
        self._static = layers == {DynamicLayer} and not self._encoder_decoder
        self._mrope = next((m for m in self._base.modules() if "rope_deltas" in vars(m)), None)
        self.vocab_size: int = text_config.vocab_size
        self.tracker = tracker_for(model, pad_token_id)
        self.reserved: tuple[int, GenerationConfig | None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and free the cache."""
        self._state: ReadState | None = None
        self._prompts: tuple[Tensor, Tensor] | None = None
        self._encoded: tuple[Tensor, Tensor] | None = None
        self._seen: Any = None
        self._read_ids: Tensor | None = None
        self._keys: Tensor | None = None
        self._in_order = False
        self._scores: Tensor | None = None
        self._doubt: Tensor | None = None
        self._vocab = self.vocab_size
        self._padded = False
        self.tracker.reset()

    def bind(self, encoder_inputs: Mapping[str, Any]) -> None:
        """Give an encoder-decoder the encoder inputs of the coming batch, for the contexts that have none of their own."""
        if not self._encoder_decoder:
            raise ValueError(f"{type(self._base).__name__} has no encoder: it reads the generated ids themselves.")
        items = len(encoder_inputs["input_ids"])
        self.contexts = tuple(
            replace(context, inputs=encoder_inputs, items=items) if context.inputs is None else own
            for context, own in zip(self._given_contexts, self.contexts, strict=True)
        )
        self.reset()

    @property
    def pads_exactly(self) -> bool:
        """Whether rows of unequal length read in one batch what they read alone, and can be taken back to any length."""
        return self._takes_positions and self._croppable and not self._encoder_decoder

    @property
    def positions_as_generate(self) -> bool:
        """Whether the first position is 0, as `generate` counts for the generating model whatever its embeddings begin with."""
        return self._first_position == 0

    def reserve(self, new_tokens: int | None, generation_config: GenerationConfig | None = None) -> None:
        """From the next prompt on, keep the tokens in a static cache with room for `new_tokens` behind the prompt.

        What does not fit is read again into a larger one. Where `generate` would compile the model's single-token forward for
        `generation_config`, it is compiled here. Layers with a sliding window or a recurrent state, and encoder-decoders, keep
        their dynamic cache.

        Args:
            new_tokens (`int`, *optional*): tokens to be generated; `None` goes back to a cache that grows.
            generation_config ([`~transformers.GenerationConfig`], *optional*): says whether and how to compile.
        """
        fixed = self._static and not any(context.items for context in self.contexts)
        self.reserved = (new_tokens, generation_config) if new_tokens is not None and fixed else None
        self._state = None

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "R L"], *, step: Step | None = None, vocab_size: int | None = None
    ) -> Float[Tensor, "N R V"]:
        """Log-probabilities of the next token.

        Args:
            input_ids (`torch.LongTensor` of shape `[R, L]`): the main model's ids, padding included.
            step ([`~hf_logits.prefix.Step`], *optional*): where the caller's own tracker placed this call.
            vocab_size (`int`, *optional*): entries of the main model's logits. What only one of the models has is left out
                before the softmax.

        Returns:
            `torch.FloatTensor` of shape `[contexts, R, V]` with `V` the smaller of both vocabularies, float32, normalised, on the
            device of `input_ids`.
        """
        step = self.tracker.observe(input_ids) if step is None else step
        shared = self.vocab_size if vocab_size is None else min(self.vocab_size, vocab_size)
        if shared != self._vocab:
            self._state = self._state if not self.score_tokens else None
            self._vocab = shared
        logits = self.read(step, check_ids=vocab_size is None or vocab_size > self.vocab_size)
        log_probs = logits[..., :shared].log_softmax(-1)
        self.check_numbers(log_probs, at_once=step.is_new)
        return log_probs.to(input_ids.device)

    @torch.no_grad()
    def read(self, step: Step, *, check_ids: bool = True) -> Float[Tensor, "N R V"]:
        """Logits of the next token as the model gives them, in float32 on its own device. They are the engine's: don't write.

        Args:
            step ([`~hf_logits.prefix.Step`]): the call's place in the generation, from a tracker or a decode loop.
            check_ids (`bool`, *optional*, defaults to `True`): whether ids may be generated that the model does not embed.
        """
        if step.is_new and (fingerprint := self._fingerprint()) != self._seen:
            self._state, self._seen = None, fingerprint
        state = self._state
        if (
            state is not None
            and step.continues is not None
            and step.continues is self._read_ids
            and state.keys.device == self._base.device
        ):
            new = step.input_ids[:, -1:].to(state.keys.device).repeat(len(self.contexts), 1)
            keys = torch.cat([state.keys, new], dim=1)
            changed = 1
        else:
            state, keys, changed = None, self._ask(step), step.position
        if changed and check_ids:
            self._check_ids(int(keys[:, -changed:].max()))
        length = keys.shape[1] - HEAD
        if self._window is not None and length > self._window:
            self._leave_window()
        self._read_ids, self._keys = None, keys
        if state is not None and (state.room is None or length <= state.room):
            self._state = None  # a forward that fails must not leave a half-moved state behind
            self._feed(state, keys)
            self._state = state
            logits = self._result(state, length)
        else:
            state = None  # frees the old cache where a new one grows
            logits = self._find(keys)
        self._read_ids = step.input_ids if self._in_order else None
        return logits.view(len(self.contexts), step.input_ids.shape[0], -1)

    @property
    def token_log_probs(self) -> Float[Tensor, "N R W"]:
        """Of the rows of the last call: the log-probability of each id given those before it, 0 where nothing is before or asked for.

        The ids are the contexts' own: right-aligned, so that the last column belongs to the newest token.
        """
        if self._scores is None:
            raise RuntimeError("There are no token scores: build AuxiliaryLM(score_tokens=True), and call it first.")
        return self._scores.view(len(self.contexts), -1, self._scores.shape[-1])

    @property
    def lengths(self) -> Int[Tensor, "N R"]:
        """Of the rows of the last call: how many ids each context has read, padding left out."""
        if self._keys is None:
            raise RuntimeError("Nothing has been read yet: call the AuxiliaryLM first.")
        return (self._keys[:, HEAD:] != PADDING).sum(-1).view(len(self.contexts), -1)

    def prompt_size(self, contexts: slice) -> tuple[int, int]:
        """Rows and tokens that the prompts of some contexts are, as far as they were read: equal rows are read once."""
        assert self._prompts is not None
        keys = self._prompts[1].view(len(self.contexts), -1, self._prompts[1].shape[1])[contexts].flatten(0, 1)
        keys = keys if self.reserved is not None else torch.unique(keys, dim=0)
        return len(keys), int((keys[:, HEAD:] != PADDING).sum())

    def hand_over(self, cache: Cache, rows: int) -> None:
        """Put what the first `rows` rows have read into an empty `cache`, without the padding that longer contexts cause."""
        if self._state is None or self._prompts is None:
            return
        self._state.copy_to(cache, rows, begin=self._prompts[1].shape[1] - HEAD - self._prompts[0].shape[1])

    # --- keys: what this call asks for -------------------------------------------------------------------------------

    def _ask(self, step: Step) -> Int[Tensor, "F K"]:
        """The rows of this call: head columns, the contexts' prompts, the generated ids."""
        main = step.input_ids[:, : step.prompt_length].masked_fill(~step.prompt_mask, PADDING)
        if self._prompts is not None and (main.device, self._base.device) != tuple(p.device for p in self._prompts):
            self._prompts = self._state = None  # somebody moved a model
        if self._prompts is None or self._prompts[0].shape != main.shape or not torch.equal(self._prompts[0], main):
            self._prompts = (main, self._context_prompts(main).to(self._base.device))
        generated = step.input_ids[:, step.prompt_length :].to(self._base.device)
        return torch.cat([self._prompts[1], generated.repeat(len(self.contexts), 1)], dim=1)

    def _context_prompts(self, main: Int[Tensor, "R P"]) -> Int[Tensor, "F K"]:
        rows = main.shape[0]
        plain = [[i for i in row if i != PADDING] for row in main.tolist()]
        keys: list[list[int]] = []
        first_item = 0
        for context in self.contexts:
            if context.items and rows % context.items:
                raise ValueError(
                    f"A context has inputs for {context.items} items, but generation runs {rows} rows: give inputs for each item of the "
                    "batch."
                )
            for row, ids in enumerate(plain):
                ids = ids if context.prompt is None else context.prompt(ids, row, rows)
                item = first_item + row // (rows // context.items) if context.items else 0
                keys.append([self._adapters.index(context.adapter), item, *ids])
            first_item += context.items
        self._check_prompts(keys)
        # Contexts differ in length: the shorter ones are padded on the left, and from there all grow together.
        width = max(len(key) for key in keys)
        self._padded = any(len(key) < width for key in keys)
        if self._padded and not self._padding_is_right and not self._encoder_decoder:
            self._check_padding(min(keys, key=len), width)
        return torch.tensor([key[:HEAD] + [PADDING] * (width - len(key)) + key[HEAD:] for key in keys])

    # --- reading: from the cache where it has the answer, from the model where not -------------------------------------

    def _find(self, keys: Int[Tensor, "F K"]) -> Float[Tensor, "F V"]:
        """The logits behind `keys`, with as few tokens read as can be."""
        state, length = self._state, keys.shape[1] - HEAD
        self._in_order = True  # the state's rows are these keys
        parents, kept = self._reusable(state, keys)
        if state is None or kept < self._least_kept() or not self._fits(state, keys):
            self._state = None  # frees the old cache before the new one grows
            state = self._start_apart(keys)
            if state is not None:
                self._state = state
                return self._result(state, length)
            state = self._start(keys)  # with images: one row an item, however many rows it has here
            parents, kept = self._reusable(state, keys)
        if kept == length:
            self._state, self._in_order = state, False
            return self._result(state, length, parents)

        inverse = None
        if (kept == 0 or length - kept > 1) and state.room is None:
            # What beams and returned sequences have in common is read once.
            unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
            if unique.shape[0] < keys.shape[0]:
                rows = torch.arange(keys.shape[0], device=keys.device)
                parents = parents[torch.empty_like(unique[:, 0]).scatter_(0, inverse, rows)]
                keys = unique
            else:
                inverse = None
        self._state = None
        if parents.shape[0] != state.keys.shape[0] or not torch.equal(
            parents, torch.arange(len(parents), device=keys.device)
        ):
            state.select(parents)
        state.crop(kept)
        self._feed(state, keys)
        if inverse is not None:
            state.select(inverse)
        self._state = state
        return self._result(state, length)

    @staticmethod
    def _fits(state: ReadState, keys: Int[Tensor, "F K"]) -> bool:
        return state.room is None or (len(keys) == len(state.keys) and keys.shape[1] - HEAD <= state.room)

    def _reusable(self, state: ReadState | None, keys: Int[Tensor, "F K"]) -> tuple[Tensor, int]:
        """Which row of `state` each key continues, and how many leading ids of all rows need not be fed again."""
        if state is None or state.length == 0:
            return torch.arange(keys.shape[0], device=keys.device), 0
        length = keys.shape[1] - HEAD
        shared, parents = match_prefixes(keys, state.keys)
        kept = int(shared.min()) - HEAD
        if kept >= length:
            kept = length if length in state.logits else length - 1
        if kept < min(state.length, length) and not self._croppable:
            kept = 0
        if self.score_tokens and 0 < kept < length and kept not in state.logits:
            kept -= 1  # the score of the next token needs the prediction before it
        return parents, kept

    def _least_kept(self) -> int:
        """A state that shares less than this many ids is of no use."""
        with_inputs = self._prompts is not None and not self._encoder_decoder and any(c.items for c in self.contexts)
        return self._prompts[1].shape[1] - HEAD if with_inputs and self._prompts is not None else 1

    def _start(self, keys: Int[Tensor, "F K"]) -> ReadState:
        """An empty state, or one that has read the prompts of all items that come with images."""
        cache = DynamicCache(config=self._cache_config) if self._cache_config is not None else DynamicCache()
        if self._encoder_decoder:
            self._encoded = self._encode()
            return ReadState(keys[:, :HEAD], EncoderDecoderCache(cache, DynamicCache()))
        if self.reserved is not None and self._prompts is not None:
            length, room = keys.shape[1] - HEAD, self._prompts[1].shape[1] - HEAD + self.reserved[0]
            room = room if length <= room else 2 * length
            config = self._base.config.get_text_config(decoder=True)
            return ReadState(keys[:, :HEAD], StaticCache(config=config, max_cache_len=room))
        if not any(context.items for context in self.contexts):
            return ReadState(keys[:, :HEAD], cache)
        assert self._prompts is not None
        prompts, context = self._prompts[1], self.contexts[0]
        state = ReadState(prompts[:: prompts.shape[0] // context.items, :HEAD], cache)
        self._feed(state, prompts[:: prompts.shape[0] // context.items], context.inputs)
        return state

    def _start_apart(self, keys: Int[Tensor, "F K"]) -> ReadState | None:
        """Contexts of very unequal length, read one by one and laid beside each other, so that no padding is computed."""
        width, contexts = keys.shape[1] - HEAD, len(self.contexts)
        plain = self._croppable and not self._encoder_decoder and self.reserved is None
        if contexts == 1 or not plain or any(context.items for context in self.contexts):
            return None
        parts = keys.view(contexts, -1, keys.shape[1])
        longest = (parts[..., HEAD:] != PADDING).sum(-1).amax(-1).tolist()
        if sum(width - own for own in longest) * parts.shape[1] < self._WASTE:
            return None
        states = []
        for part, own in zip(parts, longest, strict=True):
            short = torch.cat([part[:, :HEAD], part[:, keys.shape[1] - own :]], dim=1)
            unique, inverse = torch.unique(short, dim=0, return_inverse=True)
            state = ReadState(unique[:, :HEAD], DynamicCache())
            self._feed(state, unique)
            state.select(inverse)
            states.append(state)

        return side_by_side(states, keys)

    def _feed(self, state: ReadState, keys: Int[Tensor, "F K"], inputs: Mapping[str, Any] | None = None) -> None:
        """Read the columns of `keys` that `state` has not read."""
        start, stop = state.length, keys.shape[1] - HEAD
        real = keys[:, HEAD:] != PADDING
        if start == 0:
            self.stats.prefill_rows += keys.shape[0]
            state.keys = keys[:, :HEAD]
        for begin, end, scored in self._pieces(start, stop, len(keys), whole=inputs is not None):
            logits = self._forward(state, keys, real, begin, end, inputs, scored)
            if scored:
                self._score(state, keys, real, begin, end, logits)
            elif self.score_tokens:
                state.token_log_probs = logits.new_zeros(len(keys), end, dtype=torch.float32)
            single = keys.shape[0] == len(self.contexts)
            oldest = end - self._MEMO if single else end
            # Several positions, or a buffer that compiled code writes to again: keep the last position alone.
            last = logits[:, -1].to(torch.float32, copy=logits.shape[1] > 1 or state.room is not None)
            state.logits = {n: values for n, values in state.logits.items() if n > oldest} | {end: last}
            state.keys = keys[:, : HEAD + end]
            self.stats.forwards += 1
        padded = self._padded and self._prompts is not None and start < self._prompts[1].shape[1] - HEAD
        self.stats.tokens += int(real[:, start:].sum()) if padded else keys.shape[0] * (stop - start)

    def _pieces(self, start: int, stop: int, rows: int, *, whole: bool) -> Iterator[tuple[int, int, bool]]:
        """First and last column of what each forward reads, and whether it scores what it reads."""
        unscored = 0 if self.score_tokens is True else stop
        if self.score_tokens == "generated" and self._prompts is not None:
            unscored = self._prompts[1].shape[1] - HEAD
        begin = start
        while begin < stop:
            scored, end = begin >= unscored, stop if begin >= unscored else min(unscored, stop)
            if whole or (begin == 0 and not self._croppable):
                chunk = stop  # images must be read with their prompt; a recurrent prefill has no state to begin from
            elif not self._croppable:
                chunk = 1
            else:  # where tokens are scored there are logits at every position
                few = max(self._SCORED // (rows * self.vocab_size), 1)
                chunk = min(self.prefill_chunk, few) if scored else self.prefill_chunk
            end = min(begin + chunk, end)
            yield begin, end, scored
            begin = end

    def _forward(
        self,
        state: ReadState,
        keys: Tensor,
        real: Tensor,
        begin: int,
        end: int,
        inputs: Mapping[str, Any] | None,
        scored: bool,
    ) -> Float[Tensor, "F T V"]:
        seen = real[:, :end]
        extra: dict[str, Any] = {self._cache_name: state.cache, "use_cache": True}
        if self._encoder_decoder:
            assert self._encoded is not None
            hidden, mask = self._encoded
            extra["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden[keys[:, 1]])
            extra["attention_mask"] = mask[keys[:, 1]]
        elif inputs is not None or self._padded:
            extra["attention_mask"] = seen.long()
        typed = self._mrope is not None and inputs is not None and "mm_token_type_ids" in inputs
        if self._takes_positions and not typed:  # with token types the model works out an image's positions itself
            positions = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, begin:] + self._first_position
            if state.offsets is not None:
                positions = (positions + state.offsets)[None].expand(3, -1, -1)  # time, height, width
            extra["position_ids"] = positions
        with self._own_rope_deltas(), self._reading():
            prepared = self._base.prepare_inputs_for_generation(
                keys[:, HEAD : HEAD + end].clamp(min=0),
                next_sequence_length=end - begin,
                is_first_iteration=begin == 0,
                **extra,
                **(inputs or {}),
            )
            if self._takes_logits_to_keep:  # behind prepare_inputs, because some models set their own
                prepared["logits_to_keep"] = 0 if scored else 1
            logits = self._model_call(state, end - begin)(**prepared, **self._adapter_names(state, keys)).logits
            if typed and self._mrope is not None and self._mrope.rope_deltas is not None:
                state.offsets = self._mrope.rope_deltas.to(keys.device).view(-1, 1)
        if begin == 0 and not len(state.cache):
            raise ValueError(
                f"{type(self._base).__name__} does not keep its state in a transformers `Cache`, so it cannot follow a generation as an "
                "auxiliary model."
            )
        return logits

    def _score(self, state: ReadState, keys: Tensor, real: Tensor, begin: int, end: int, logits: Tensor) -> None:
        """Append the log-probabilities of the ids in columns `begin` to `end`."""
        ids = keys[:, HEAD + begin : HEAD + end]
        known = state.token_log_probs if state.token_log_probs is not None else logits.new_zeros(len(keys), 0).float()
        inner = logits[:, :-1, : self._vocab].float().log_softmax(-1)
        if begin in state.logits:
            before = state.logits[begin][:, None, : self._vocab].log_softmax(-1)
            inner = torch.cat([before, inner], dim=1)
            known = known[:, :begin]
        else:  # the first id has nothing before it, or was scored before the cache was taken back
            known = known[:, : begin + 1] if begin else logits.new_zeros(len(keys), 1).float()
            ids = ids[:, 1:]
        scores = inner.gather(-1, ids.clamp(0, self._vocab - 1)[..., None])[..., 0]
        # No opinion on ids of the main model's own, and nothing to say about padding or the first real id.
        first = end - ids.shape[1]
        before = real[:, first - 1 : end - 1] if first else real[:, :0]
        scores = scores.masked_fill(~before | (ids >= self._vocab) | (ids == PADDING), 0.0)
        state.token_log_probs = torch.cat([known, scores], dim=1)

    def _result(self, state: ReadState, length: int, rows: Tensor | None = None) -> Float[Tensor, "F V"]:
        if state.token_log_probs is not None:
            scores = state.token_log_probs[:, :length]
            self._scores = scores if rows is None else scores[rows]
        return state.logits[length] if rows is None else state.logits[length][rows]

    # --- the model's surroundings --------------------------------------------------------------------------------------

    def _encode(self) -> tuple[Tensor, Tensor]:
        """Encoder states of all contexts' items, one below the other, and their mask."""
        device = self._base.device
        states, masks = [], []
        for context in self.contexts:
            if context.inputs is None:
                raise ValueError(
                    f"{type(self._base).__name__} is an encoder-decoder: as an auxiliary model it needs its own encoder inputs. Pass "
                    "encoder_inputs=tokenizer(texts, return_tensors='pt', padding=True), or bind(encoder_inputs=...) before each batch."
                )
            ids = torch.as_tensor(context.inputs["input_ids"]).to(device)
            mask = torch.as_tensor(context.inputs.get("attention_mask", torch.ones_like(ids))).to(device)
            with self._reading():
                encoder = self._base.get_encoder()
                states.append(encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
            masks.append(mask)
        width = max(mask.shape[1] for mask in masks)
        hidden = [nn.functional.pad(state, (0, 0, 0, width - state.shape[1])) for state in states]
        return torch.cat(hidden), torch.cat([nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks])

    @contextlib.contextmanager
    def _own_rope_deltas(self) -> Iterator[None]:
        """Some vision-language models keep the last prompt's position offset on the module: see none, hand theirs back."""
        saved = self._mrope.rope_deltas if self._mrope is not None else None
        try:
            if self._mrope is not None:
                self._mrope.rope_deltas = None
            yield
        finally:
            if self._mrope is not None:
                self._mrope.rope_deltas = saved

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """The model in eval mode, and without its adapters where that is asked for; afterwards as it was."""
        training = [module for module in self.model.modules() if module.training] if self.model.training else []
        base = self._adapters == [BASE] and isinstance(self.model, PeftModel)
        try:
            for module in training:
                module.training = False
            with cast(PeftModel, self.model).disable_adapter() if base else contextlib.nullcontext():
                yield
        finally:
            for module in training:
                module.training = True

    def _fingerprint(self) -> tuple[Any, ...]:
        """What a state depends on besides its ids: weights that were trained, moved or exchanged make it stale, and so do adapters."""
        weights = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in self.model.parameters())
        adapters = tuple(
            (tuple(layer.active_adapters), layer.disable_adapters, layer.merged, tuple(layer.scaling.items()))
            for layer in self._base.modules()
            if isinstance(layer, LoraLayer)
        )
        return weights, adapters, self._base.dtype, self._base.device, torch.is_inference_mode_enabled()

    def _model_call(self, state: ReadState, tokens: int) -> Any:
        """The model, or its compiled form for the step that is always the same."""
        if (
            tokens == 1
            and state.room is not None
            and self.reserved is not None
            and not isinstance(self.model, PeftModel)
        ):
            settings = self.reserved[1]
            # The rule by which `generate` compiles the generating model.
            if settings is not None and self._base._valid_auto_compile_criteria(
                {self._cache_name: state.cache}, settings
            ):
                return self._base.get_compiled_call(settings.compile_config)
        return self.model

    def _adapter_names(self, state: ReadState, keys: Tensor) -> dict[str, list[str]]:
        """One adapter name a row, where rows differ: one forward then serves the base and all its adapters."""
        if self._adapters in ([None], [BASE]):
            return {}
        assert isinstance(self.model, PeftModel)
        if None in self._adapters and len(self.model.active_adapters) > 1:
            raise ValueError(
                f"The adapters {self.model.active_adapters} are active at once, which one forward cannot read beside others: merge them "
                "with add_weighted_adapter(), or name one."
            )
        if state.adapters is None or len(state.adapters) != len(keys):
            names = [self.model.active_adapter if name is None else name for name in self._adapters]
            state.adapters = [names[i] for i in keys[:, 0].tolist()]
        return {"adapter_names": state.adapters}

    def check_numbers(self, log_probs: Float[Tensor, "N R V"], *, at_once: bool) -> None:
        """NaN logits are an error. Where reading a flag would stall the device, it is read with the next call's."""
        if self._doubt is not None:
            doubt, self._doubt = self._doubt, None
            self._refuse_nan(doubt)
        doubt = log_probs[..., 0].isnan().any()  # the softmax has spread a NaN over its row
        if at_once or doubt.device.type == "cpu":
            self._refuse_nan(doubt)
        else:
            self._doubt = doubt

    def _refuse_nan(self, doubt: Tensor) -> None:
        if bool(doubt):
            self._state = None
            raise ValueError(
                f"{type(self._base).__name__} returned NaN logits as an auxiliary model: float16 overflows in some models, load it in "
                "bfloat16 or float32."
            )

    # --- what cannot be right is refused ---------------------------------------------------------------------------------

    def _check_contexts(self) -> None:
        if not self.contexts:
            raise ValueError("AuxiliaryLM needs at least one Context.")
        if not all(context.prompt is None or callable(context.prompt) for context in self.contexts):
            raise TypeError(
                "A Context's prompt is a function: make one of text or ids with hf_logits.prompts.as_rewrite()."
            )
        named = {name for name in self._adapters if name is not None}
        if named and not isinstance(self.model, PeftModel):
            raise ValueError(
                f"Adapters {sorted(named)} were named, but the model is a {type(self.model).__name__}: pass a PeftModel."
            )
        if isinstance(self.model, PeftModel):
            unknown = named - {BASE} - set(self.model.peft_config)
            if unknown:
                raise ValueError(
                    f"Unknown adapters {sorted(unknown)}; the model has {sorted(self.model.peft_config)}."
                )
            if self._adapters != [BASE] and any(c.is_prompt_learning for c in self.model.peft_config.values()):
                raise ValueError(
                    "Prompt-learning adapters (prompt, prefix or p-tuning) carry a cache of their own: as an auxiliary model use a LoRA "
                    "adapter, or merge_and_unload()."
                )
            if self._adapters not in ([None], [BASE]) and not mixes_adapters(self.model):
                raise ValueError(
                    "Only plain LoRA adapters that are not merged can be read beside each other or while inactive. Build one AuxiliaryLM for "
                    "the base and one for the active adapter, or merge_and_unload()."
                )
            if self._encoder_decoder and len(self._adapters) > 1:
                raise ValueError(
                    "An encoder-decoder reads its contexts under one adapter: build one AuxiliaryLM for each."
                )
        with_inputs = [context for context in self.contexts if context.items]
        if with_inputs and not self._encoder_decoder and len(self.contexts) > 1:
            raise ValueError(
                "A context with image inputs needs an AuxiliaryLM of its own: its prompt is read by itself."
            )

    def _check_prompts(self, keys: list[list[int]]) -> None:
        for context, key in zip(self.contexts, keys[:: len(keys) // len(self.contexts)], strict=True):
            if len(key) == HEAD:
                raise ValueError(
                    "The auxiliary model has no prompt to read: generate() was given inputs_embeds without input_ids. Pass input_ids, or "
                    "give the context a prompt of its own."
                )
            image = getattr(self._base.config, "image_token_id", getattr(self._base.config, "image_token_index", None))
            if image is not None and image in key[HEAD:] and not context.items:
                raise ValueError(
                    "The prompt holds image tokens, but the auxiliary model was given no image: pass the processor's whole output "
                    "(pixel_values and all) as this context's prompt."
                )
        longest = max(len(key) for key in keys) - HEAD
        if self._window is not None and longest > self._window:
            raise ValueError(
                f"The auxiliary prompt has {longest} tokens, but {type(self._base).__name__} holds {self._window} "
                "(max_position_embeddings): shorten the prompt (or the negative examples), or use an auxiliary model with a longer window."
            )
        self._check_ids(max(max(key[HEAD:], default=0) for key in keys))

    def _check_padding(self, key: list[int], width: int) -> None:
        """Some models cannot be told where a padded row begins: compare one with itself unpadded, once."""
        ids = torch.tensor([key[HEAD:]], device=self._base.device)
        pads = width - len(key)
        padded = nn.functional.pad(ids, (pads, 0))
        mask = nn.functional.pad(torch.ones_like(ids), (pads, 0))
        with self._reading():
            alone, beside = (
                self.model(input_ids=i, attention_mask=m, use_cache=False).logits[0, -1].float().softmax(-1)
                for i, m in ((ids, torch.ones_like(ids)), (padded, mask))
            )
        if float((alone - beside).abs().sum()) > 0.02:
            raise ValueError(
                f"{type(self._base).__name__} cannot read prompts of unequal length in one batch (its positions do not follow the attention "
                "mask): generate for one prompt at a time, with contexts of one length, or use another auxiliary model."
            )
        self._padding_is_right = True

    def _check_ids(self, highest: int) -> None:
        if highest >= self.vocab_size:
            raise ValueError(
                f"Token id {highest} is unknown to the auxiliary {type(self._base).__name__}, which embeds {self.vocab_size} ids: use a model "
                "of the same family, resize_token_embeddings(), or keep generate() from that token with suppress_tokens."
            )

    def _leave_window(self) -> None:
        name = type(self._base).__name__
        # Learned positions end; rotary and relative ones only get worse.
        if self._positions_end:
            raise ValueError(
                f"The auxiliary {name} has read {self._window} tokens and has no further positions: generate fewer tokens, or use an "
                "auxiliary model with a longer window."
            )
        logger.warning_once(
            f"{name} reads beyond its max_position_embeddings ({self._window}): expect worse text and guidance."
        )


def mixes_adapters(model: PeftModel) -> bool:
    """Whether one forward can read rows under different adapters: PEFT can for plain LoRA, and silently can't for others."""
    configs = model.peft_config.values()
    plain = all(config.peft_type == PeftType.LORA and not getattr(config, "use_dora", False) for config in configs)
    apart = (layer for layer in model.modules() if isinstance(layer, ParamWrapper) or getattr(layer, "merged", False))
    return plain and next(apart, None) is None


def tracker_for(model: PreTrainedModel | PeftModel | None, pad_token_id: int | None) -> PromptTracker:
    """A tracker that knows how prompts for `model` are padded: by `pad_token_id`, else as its configuration says."""
    if model is None:
        return PromptTracker(pad_token_id, begins_text=False)
    config, generation = model.config, model.generation_config
    ids = {
        name: getattr(generation, name, None)
        if getattr(generation, name, None) is not None
        else getattr(config, name, None)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    }
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    pad = pad_token_id if pad_token_id is not None else ids["pad_token_id"]
    pad = pad if pad is not None else ends[0]
    begins = {ids["bos_token_id"], ids["decoder_start_token_id"]} | (
        set(ends) if ids["bos_token_id"] is None else set()
    )
    return PromptTracker(pad, begins_text=pad in begins)
