"""A decode loop that owns the generating model's forward: `model.generate(..., custom_generate=hf_logits.generate)`.

A logits processor gets a second forward for whatever it wants to know. But decoding is bound by reading weights, and many
contexts are read by the weights that generate anyway: another prompt (guidance, context-aware decoding, leading queries,
negatives) or an adapter of the same base. Here they are rows of the generating model's own batch. And where a method picks
one of two models for each token, only the picked one runs.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from hf_logits.auxiliary import AuxiliaryLM, Context, mixes_adapters
from hf_logits.prefix import PromptTracker, Step
from hf_logits.processing import AuxiliaryLogitsProcessor


logger = logging.get_logger(__name__)

CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What `generate` calls the cache, among its arguments and in its output: transformers 5.24 has renamed it."""


def generate(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "R L"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    text_streamer: BaseStreamer | None = None,
    assistant: PreTrainedModel | None = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Decode with the processors of this package at about the price of the plain model.

    Pass it to `generate` or to a pipeline: `model.generate(**inputs, custom_generate=hf_logits.generate, logits_processor=[...])`.
    The tokens are those that the processors choose without it, up to rounding in half precision. Greedy search and sampling of decoder-only models run here, with
    everything that surrounds them: stopping criteria, other processors, left padding, returned sequences and scores, dynamic and
    static caches, compilation. Whatever else is asked for (beams, assisted decoding, encoder-decoders, images) runs as without
    this function, and the log says so once.

    An [`~hf_logits.processors.EntropyAdaptiveLogitsProcessor`] becomes what its paper means: for each token only the model at work
    runs, and the other one catches up when its turn comes. All other processors, wherever they stand in the list, then see the
    logits of whichever model was chosen, so that penalties and bans hold for both (beside `generate` they reach the small model
    alone); those of this package read their contexts by themselves.

    `generate` keeps some arguments from functions. `streamer=` would be given the prompt and nothing more, not even its end;
    `assistant_model=` would be ignored, `tokenizer=` not reach `stop_strings`. Pass `text_streamer=`, `assistant=`, and a
    [`~transformers.StopStringCriteria`] in `stopping_criteria=`.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, inputs_tensor, model_kwargs:
            From [`~transformers.GenerationMixin.generate`].
        text_streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Gets the tokens, in place of `streamer=`.
        assistant ([`~transformers.PreTrainedModel`], *optional*):
            Drafts tokens, in place of `assistant_model=`. It shares the tokenizer.

    Returns:
        What `generate` returns: a `torch.LongTensor` of shape `[R, L]`, or an output with `sequences`, `scores`, `logits` and
        the cache of the generating model's own rows.
    """
    ours = [processor for processor in logits_processor if isinstance(processor, AuxiliaryLogitsProcessor)]
    picking = [processor for processor in ours if processor.picks_model and processor.engines]
    engines = list(dict.fromkeys(engine for processor in ours for engine in processor.engines))
    guests = [] if picking else [engine for engine in engines if _may_join(engine, model)]
    cache = model_kwargs.get(CACHE)
    # Whoever gave a cache, or is given one, finds the generating model's own rows in it.
    returns_cache = cache is not None and (
        generation_config.return_dict_in_generate or hasattr(cache, "_is_user_defined")
    )
    why_not = _other_mode(model, input_ids, generation_config, assistant, model_kwargs)
    batch = None
    if why_not is None and (picking or guests):
        batch = _SharedBatch(model, guests, prefill_chunk=generation_config.prefill_chunk_size)
        reasons = {
            "two processors want to pick the model": len(picking) > 1,
            "the model counts positions from elsewhere than 0": not batch.host.positions_as_generate,
            "a recurrent state cannot be returned": bool(returns_cache) and not batch.host.pads_exactly,
        }
        why_not = next((reason for reason, holds in reasons.items() if holds), None)
    if why_not is not None or batch is None:
        if picking or guests:
            logger.warning_once(f"hf_logits.generate runs the processors beside the model, each by itself: {why_not}.")
        with _reserved(engines, cache, generation_config, input_ids.shape[1]):
            return _stock_decoding(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                text_streamer=text_streamer,
                assistant=assistant,
                inputs_tensor=inputs_tensor,
                **model_kwargs,
            )

    others = LogitsProcessorList(p for p in logits_processor if p not in picking)
    readers = [batch.host, *(engine for engine in engines if engine not in guests)]
    with _seated(ours, batch), _reserved(readers, cache, generation_config, input_ids.shape[1]):
        output = _decode(
            model,
            input_ids,
            others,
            stopping_criteria,
            generation_config,
            batch=batch,
            picking=picking[0] if picking else None,
            trackers=[processor.tracker for processor in ours],
            prompt_mask=_mask(input_ids, model_kwargs.get("attention_mask")),
            streamer=text_streamer,
        )
        if cache is not None and returns_cache:
            ids = output if isinstance(output, Tensor) else output.sequences
            mask = _mask(input_ids, model_kwargs.get("attention_mask"))
            batch.host.read(Step(ids[:, :-1], input_ids.shape[1], mask, ids.shape[1] == input_ids.shape[1] + 1, None))
            batch.host.hand_over(cache, input_ids.shape[0])
    if isinstance(output, GenerateDecoderOnlyOutput):
        setattr(output, CACHE, cache)
    return output


def _decode(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "R L"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    batch: "_SharedBatch",
    picking: AuxiliaryLogitsProcessor | None,
    trackers: Sequence[PromptTracker],
    prompt_mask: Bool[Tensor, "R L"],
    streamer: BaseStreamer | None,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy search and sampling, as `generate` does them."""
    with_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    with_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores: tuple[Tensor, ...] | None = () if with_scores else None
    raw_logits: tuple[Tensor, ...] | None = () if with_logits else None
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad: Any = generation_config._pad_token_tensor
    pad = pad.to(input_ids.device) if pad is not None else None
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    step = Step(input_ids, input_ids.shape[1], prompt_mask, True, None)
    if streamer is not None:
        streamer.put(input_ids.cpu())

    with cast(Any, model)._optimize_model_for_decode():
        while True:
            for tracker in trackers:
                tracker.announce(step)
            if picking is not None:
                picking.tracker.observe(input_ids)
            logits = batch.read(step) if picking is None else picking.pick(step, batch.host)
            # What is returned must not keep the rows of all contexts.
            logits = logits.to(input_ids.device, copy=raw_logits is not None or scores is not None)
            next_scores = cast(Any, logits_processor)(input_ids, logits)
            if scores is not None:
                scores += (next_scores,)
            if raw_logits is not None:
                raw_logits += (logits,)

            if generation_config.do_sample:
                tokens = torch.multinomial(next_scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = next_scores.argmax(-1)
            if ends:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            longer = torch.cat([input_ids, tokens[:, None]], dim=-1)
            # Every row goes on: nobody has to find that out by comparing tokens.
            step = Step(longer, step.prompt_length, step.prompt_mask, False, None, input_ids)
            input_ids = longer
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~cast(Any, stopping_criteria)(input_ids, scores)
            if bool(unfinished.max() == 0):
                break
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw_logits)  # type: ignore[arg-type]


def _mask(input_ids: Int[Tensor, "R L"], attention_mask: Tensor | None) -> Bool[Tensor, "R L"]:
    """`generate` leaves a mask out that is all ones."""
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


class _SharedBatch:
    """The generating model's rows and those of all contexts that its weights read: one engine, one forward."""

    def __init__(self, model: PreTrainedModel, guests: Sequence[AuxiliaryLM], *, prefill_chunk: int | None):
        # Adapters are named through the PeftModel; `generate` knows only the model inside.
        wrapped = [engine.model for engine in guests if isinstance(engine.model, PeftModel)]
        self.host = AuxiliaryLM(
            wrapped[0] if wrapped else model,
            [Context(), *(context for engine in guests for context in engine.contexts)],
            score_tokens=any(engine.score_tokens for engine in guests),
            **({} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}),
        )
        self.logits: Float[Tensor, "N R V"] | None = None
        ends = list(itertools.accumulate((len(engine.contexts) for engine in guests), initial=1))
        self.places = {engine: slice(*pair) for engine, pair in zip(guests, itertools.pairwise(ends), strict=True)}

    def read(self, step: Step) -> Float[Tensor, "R V"]:
        """Read everybody's new tokens; the logits of the generating model's rows."""
        self.logits = self.host.read(step, check_ids=False)
        for engine, places in self.places.items():
            rows, tokens = 0, len(engine.contexts) * step.input_ids.shape[0]
            if step.is_new:
                rows, tokens = self.host.prompt_size(places)
            engine.stats.prefill_rows, engine.stats.tokens = (
                engine.stats.prefill_rows + rows,
                engine.stats.tokens + tokens,
            )
        return self.logits[0]


class _Seat:
    """What a processor sees in place of its engine: the engine's contexts are rows of a batch that has been read already."""

    def __init__(self, batch: _SharedBatch, engine: AuxiliaryLM):
        self.batch, self.engine, self.places = batch, engine, batch.places[engine]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(
        self, input_ids: Int[Tensor, "R L"], *, step: Step | None = None, vocab_size: int | None = None
    ) -> Float[Tensor, "N R V"]:
        assert self.batch.logits is not None
        log_probs = self.batch.logits[self.places, :, :vocab_size].log_softmax(-1)
        self.batch.host.check_numbers(log_probs, at_once=step is not None and step.is_new)
        return log_probs.to(input_ids.device)

    @property
    def token_log_probs(self) -> Float[Tensor, "N R W"]:
        return self.batch.host.token_log_probs[self.places]

    @property
    def lengths(self) -> Int[Tensor, "N R"]:
        return self.batch.host.lengths[self.places]


@contextmanager
def _seated(processors: Sequence[AuxiliaryLogitsProcessor], batch: _SharedBatch) -> Iterator[None]:
    """Let the processors look into the batch in place of running their own engines."""
    own = [processor.engines for processor in processors]
    try:
        for processor in processors:
            processor.engines = [_Seat(batch, e) if e in batch.places else e for e in processor.engines]  # type: ignore[misc]
        yield
    finally:
        for processor, engines in zip(processors, own, strict=True):
            processor.engines = engines


@contextmanager
def _reserved(
    engines: Sequence[AuxiliaryLM], cache: Cache | None, generation_config: GenerationConfig, prompt_length: int
) -> Iterator[None]:
    """Where `generate` was asked for a static cache, every engine gets one."""
    if not isinstance(cache, StaticCache):
        yield
        return
    before = [engine.reserved for engine in engines]
    try:
        for engine in engines:
            engine.reserve(generation_config.max_length - prompt_length, generation_config)
        yield
    finally:
        for engine, own in zip(engines, before, strict=True):
            engine.reserve(*(own or (None,)))


def _may_join(engine: AuxiliaryLM, model: PreTrainedModel) -> bool:
    """Whether the engine's contexts can be rows of the generating model's batch."""
    base = engine.model.get_base_model() if isinstance(engine.model, PeftModel) else engine.model
    if base is not model or not engine.pads_exactly or any(context.items for context in engine.contexts):
        return False
    if all(context.adapter is None for context in engine.contexts):
        return True
    assert isinstance(engine.model, PeftModel)
    return mixes_adapters(engine.model) and len(engine.model.active_adapters) == 1


def _other_mode(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    assistant: PreTrainedModel | None,
    model_kwargs: Mapping[str, Any],
) -> str | None:
    """Why this generation is not for this loop; `None` if it is."""
    mode = generation_config.get_generation_mode(assistant)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"it does not do {mode.value.replace('_', ' ')}"
    cache = model_kwargs.get(CACHE)
    known = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
    known |= {"output_attentions", "output_hidden_states"}
    unknown = sorted(name for name, value in model_kwargs.items() if name not in known and value is not None)
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    seen = _mask(input_ids, mask)
    reasons = {
        "rows read under adapters of their own (adapter_names)": any(
            isinstance(hook, functools.partial) and not {"adapter_names", "alora_offsets"}.isdisjoint(hook.keywords)
            for module in model.modules()
            for hook in module._forward_pre_hooks.values()
        ),
        "a prompt-learning adapter stands in front of the prompt": "prepare_inputs_for_generation" in vars(model),
        "a prompt is padded elsewhere than on the left, or is nothing but padding": bool(
            (seen[:, 1:] < seen[:, :-1]).any() or not seen.any(-1).all()
        ),
        "the model is an encoder-decoder": model.config.is_encoder_decoder,
        "the model is in training mode": model.training,
        "use_cache is off": not model_kwargs.get("use_cache", True),
        f"there are further inputs, {unknown}": bool(unknown),
        "attentions or hidden states are asked for": generation_config.output_attentions
        or generation_config.output_hidden_states,
        f"the cache is a {type(cache).__name__}": cache is not None
        and (type(cache) not in (DynamicCache, StaticCache) or cache.offloading),
        "the cache already holds tokens": cache is not None and _holds_tokens(cache),
        "the prompt is longer than the model's window": window is not None and 0 < window < input_ids.shape[1],
        "there is no prompt": input_ids.shape[1] == 0,
        "the model's weights are spread over several processes": _spread(model),
        "position_ids were given": positions is not None
        and (
            positions.shape != input_ids.shape
            or not torch.equal(positions * seen, (seen.long().cumsum(-1) - 1) * seen)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _holds_tokens(cache: Cache) -> bool:
    """Whether something has been read into the cache. Recurrent layers do not count what they have read."""
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return bool(cache.has_previous_state())
    return int(cache.get_seq_length()) > 0


def _spread(model: PreTrainedModel) -> bool:
    """Whether the weights are spread over processes, which then have to call the model equally often."""
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _stock_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    generation_config: GenerationConfig,
    text_streamer: BaseStreamer | None,
    assistant: PreTrainedModel | None,
    inputs_tensor: Tensor | None,
    **rest: Any,
) -> Any:
    """The loop that `generate` would have run."""
    mode = generation_config.get_generation_mode(assistant)
    host: Any = model
    rest |= {"generation_config": generation_config, "synced_gpus": _spread(model)}
    if mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE):
        if text_streamer is not None:
            raise ValueError("Beam search does not stream: set num_beams=1, or leave text_streamer out.")
        return host._beam_search(input_ids, **rest)
    rest["streamer"] = text_streamer
    if text_streamer is not None:
        text_streamer.put(input_ids.cpu())
    if mode == GenerationMode.ASSISTED_GENERATION:
        if assistant is not None:
            host._validate_generation_mode(mode, generation_config, {"assistant_model": assistant})
        return host._assisted_decoding(input_ids, inputs_tensor=inputs_tensor, assistant_model=assistant, **rest)
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return host._sample(input_ids, **rest)
    raise ValueError(
        f"generate() was asked for {mode.value.replace('_', ' ')} and for custom_generate=hf_logits.generate: only one can decode."
    )
