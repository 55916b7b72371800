"""The one base class of the processors: the contract with `generate`, and nothing about any method.

A subclass says which contexts it needs and writes `combine(log_probs, *auxiliary_log_probs)`. It gets normalised
log-probabilities over the shared vocabulary and returns scores; the rest is here: where in the generation a call stands,
bans, vocabularies of unequal size, normalisation, the trace.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.auxiliary import AuxiliaryLM, Context, mixes_adapters, tracker_for
from hf_logits.logits import keep, kl_divergence, log_probs, normalise
from hf_logits.prefix import PrefixHistory, Step
from hf_logits.prompts import as_rewrite, check_same_tokenizer
from hf_logits.recipe import SharedAsRecipe


Model = PreTrainedModel | PeftModel


@dataclass
class Stats:
    """What a processor has cost, and what it did.

    Attributes:
        calls (`int`): calls of the processor.
        forwards, tokens, prefill_rows (`int`): of the auxiliary models, see [`~hf_logits.auxiliary.EngineStats`].
        trace (`dict[str, torch.Tensor]`): values of shape `[rows, generated tokens]` of the last generation, rows as `generate`
            ordered them last. `"kl"` (nats), how far each next-token distribution was moved, is there for every method, unless
            it picks a model and the other one did not run.
    """

    calls: int = 0
    forwards: int = 0
    tokens: int = 0
    prefill_rows: int = 0
    trace: dict[str, Tensor] = field(default_factory=dict)


class AuxiliaryLogitsProcessor(SharedAsRecipe, LogitsProcessor):
    """Base of the processors that mix the logits of auxiliary models into those of the generating model.

    Whatever the subclass does, the result is normalised (beam search adds it up), banned tokens stay banned, the given tensors
    stay untouched, and ids that not all models have keep exactly their plain probability.

    Args:
        terms (`Sequence[tuple[model, Context]]`):
            Whose log-probabilities `combine` gets, in this order. Terms of one model are read in one forward.
        tokenizer, auxiliary_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            If both are given, they are checked to agree.
        pad_token_id (`int`, *optional*):
            Id that pads prompts on the left. Defaults to the auxiliary model's own. `bind` settles it where ids can't.
        encoder_inputs (`Mapping[str, torch.Tensor]`, *optional*):
            Encoder inputs of the batch for auxiliary encoder-decoder models. `bind` changes them.
        score_tokens (`bool`, *optional*, defaults to `False`):
            Whether the engines score the tokens that they read.
    """

    supports_continuous_batching = False
    picks_model = (
        False  # whether the method chooses a model for each token, which `hf_logits.generate` can spare the other one
    )
    acts_alone = False  # whether the method does something to the main scores even with no term left to read

    def __init__(
        self,
        terms: Sequence[tuple[Model, Context]] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        encoder_inputs: Mapping[str, Any] | None = None,
        score_tokens: bool = False,
    ):
        if tokenizer is not None and auxiliary_tokenizer is not None:
            check_same_tokenizer(tokenizer, auxiliary_tokenizer)
        if pad_token_id is None and tokenizer is not None:
            pad_token_id = tokenizer.pad_token_id
        self.tokenizer, self.pad_token_id = tokenizer, pad_token_id
        groups: dict[Any, list[int]] = {}
        for index, (model, context) in enumerate(terms):
            alone = context.items and not model.config.is_encoder_decoder
            # One forward can tell rows of different adapters apart only for LoRA.
            apart = context.adapter if isinstance(model, PeftModel) and not mixes_adapters(model) else None
            groups.setdefault((id(model), index if alone else None, apart), []).append(index)
        self._places = list(groups.values())
        self.engines = [
            AuxiliaryLM(
                terms[places[0]][0],
                [terms[place][1] for place in places],
                pad_token_id=pad_token_id,
                score_tokens=score_tokens,
            )
            for places in self._places
        ]
        self.tracker = self.engines[0].tracker if self.engines else tracker_for(None, pad_token_id)
        self._calls = 0
        self._histories: dict[str, PrefixHistory] = {}
        if encoder_inputs is not None:
            self.bind(encoder_inputs=encoder_inputs)

    def combine(self, log_probs: Float[Tensor, "R V"], *auxiliary: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """The method: new scores from the main model's log-probabilities and those of each term. Need not be normalised."""
        raise NotImplementedError(f"{type(self).__name__} must define combine() or steer().")

    def steer(self, step: Step, log_probs: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Normalised steered log-probabilities. Methods that are no plain combination override this instead of `combine`."""
        if not self.engines:
            return self.mix(log_probs, self.combine) if self.acts_alone else log_probs
        auxiliary = self.auxiliary_log_probs(step, log_probs.shape[-1])
        return self.mix(log_probs, self.combine, *auxiliary)

    def pick(self, step: Step, main: AuxiliaryLM) -> Float[Tensor, "R V"]:
        """Logits of the model that the method picks for each row; it reads `main`, the generating model, only where it must."""
        raise NotImplementedError(f"{type(self).__name__} does not pick a model.")

    def __call__(self, input_ids: Int[Tensor, "R L"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        if input_ids.dim() != 2 or input_ids.shape[0] != scores.shape[0]:
            raise ValueError(
                f"{type(self).__name__} got input_ids of shape {tuple(input_ids.shape)} for scores of shape {tuple(scores.shape)}. Paged "
                "or continuous batching shows a processor only the last token of each request: use generate() with a dynamic or static "
                "cache."
            )
        with torch.no_grad():
            step = self.tracker.observe(input_ids)
            plain = log_probs(scores)
            steered = self.steer(step, plain)
            self._calls += 1
            self.record(step, kl=kl_divergence(steered, plain))
        return steered

    # --- for subclasses --------------------------------------------------------------------------------------------------

    def auxiliary_log_probs(self, step: Step, vocab_size: int) -> list[Float[Tensor, "R V"]]:
        """Log-probabilities of every term, all over the vocabulary that every model has."""
        terms: list[Tensor] = [torch.empty(0)] * sum(len(places) for places in self._places)
        for engine, places in zip(self.engines, self._places, strict=True):
            for place, values in zip(places, engine(step.input_ids, step=step, vocab_size=vocab_size), strict=True):
                terms[place] = values
        shared = min(values.shape[-1] for values in terms)
        return [values if values.shape[-1] == shared else values[:, :shared].log_softmax(-1) for values in terms]

    def mix(
        self, plain: Float[Tensor, "R V"], formula: Callable[..., Tensor], *auxiliary: Float[Tensor, "R S"]
    ) -> Float[Tensor, "R V"]:
        """Apply `formula` to the log-probabilities of the ids that all models share; the others keep their plain probability."""
        shared = min([plain.shape[-1], *(values.shape[-1] for values in auxiliary)])
        head = plain[:, :shared]
        if shared == plain.shape[-1]:
            return normalise(keep(formula(head, *auxiliary), ~head.isneginf()))
        # The shared ids hold a fixed part of the probability: the formula only redistributes it.
        mass = head.logsumexp(-1, keepdim=True)
        conditional = head - mass.masked_fill(mass.isneginf(), 0.0)
        mixed = keep(formula(conditional, *auxiliary), ~head.isneginf())
        return torch.cat([normalise(mixed) + mass, plain[:, shared:]], dim=-1)

    def record(self, step: Step, **values: Float[Tensor, " R"]) -> None:
        """Put values, one a row, into the trace."""
        for name, value in values.items():
            self._histories.setdefault(name, PrefixHistory()).append(step, value)

    # --- for users -------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counters of all generations and the trace of the last one."""
        engines = [engine.stats for engine in self.engines]
        return Stats(
            calls=self._calls,
            forwards=sum(e.forwards for e in engines),
            tokens=sum(e.tokens for e in engines),
            prefill_rows=sum(e.prefill_rows for e in engines),
            trace={name: history.values for name, history in self._histories.items() if history.values is not None},
        )

    def reset(self) -> None:
        """Forget the last generation and free the caches. Needed only where a prompt repeats part of an earlier output."""
        self.tracker.reset()
        self._histories.clear()
        for engine in self.engines:
            engine.reset()

    def bind(
        self,
        *,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        encoder_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell what the ids of the coming batch do not show.

        Args:
            attention_mask (`torch.Tensor` of shape `[batch, prompt length]`, *optional*): where the prompts are padded.
            input_ids (`torch.Tensor`, *optional*): the prompts themselves, to notice a mask that belongs to others.
            encoder_inputs (`Mapping[str, torch.Tensor]`, *optional*): what an auxiliary encoder-decoder reads.
        """
        if encoder_inputs is not None:
            for engine in self.engines:
                engine.bind(encoder_inputs)
        self.tracker.bind(attention_mask, input_ids)

    def __repr__(self) -> str:
        own = vars(self)
        names = inspect.signature(type(self).__init__).parameters
        shown = {name: own.get(name, own.get(f"_{name}")) for name in names if name in own or f"_{name}" in own}
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in shown.items())})"


class ResettingLogitsProcessorList(LogitsProcessorList):
    """A list that tells its processors when a generation begins.

    `generate` walks through the given list once, before decoding, and decodes with a list of its own. So iterating over this
    one is the signal. Use it where a prompt repeats part of an earlier output, which token ids alone cannot show:
    `generate(..., logits_processor=ResettingLogitsProcessorList([processor]))`.
    """

    def __iter__(self) -> Iterator[LogitsProcessor]:
        for processor in super().__iter__():
            if isinstance(processor, AuxiliaryLogitsProcessor):
                processor.reset()
            yield processor

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return LogitsProcessorList(super().__iter__())(input_ids, scores, **kwargs)


def _short(value: Any) -> str:
    if isinstance(value, PreTrainedModel | PeftModel):
        return f"<{type(value).__name__} {value.config.name_or_path}>".replace(" >", ">")
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()})" if value.numel() <= 8 else f"<tensor {tuple(value.shape)}>"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_short(item) for item in value[:8])}{', ...' if len(value) > 8 else ''}]"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def prompt_context(
    model: Model,
    prompt: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    what: str = "prompt",
) -> Context:
    """A [`Context`] that reads `prompt` (any form that [`~hf_logits.prompts.as_rewrite`] takes) in place of the main prompt.

    What a multimodal processor returned keeps its images. An encoder-decoder reads the prompt with its encoder; then it must
    be text, ids or tokenizer output, for the decoder's ids do not show which prompt they answer.
    """
    if prompt is None:
        return Context(adapter=adapter)
    if model.config.is_encoder_decoder:
        if isinstance(prompt, str | Sequence) and not isinstance(prompt, Mapping):
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            if tokenizer is None or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{what} of an encoder-decoder must be text (with tokenizer=) or the tokenizer's output."
                )
            prompt = tokenizer(texts, return_tensors="pt", padding=True)
        if isinstance(prompt, Tensor):
            prompt = {"input_ids": prompt if prompt.dim() == 2 else prompt[None]}
        if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
            raise ValueError(
                f"{what} of an encoder-decoder must be text, ids or the tokenizer's output; got {type(prompt).__name__}."
            )
        return Context(adapter=adapter, inputs=prompt, items=len(prompt["input_ids"]))
    rewrite = as_rewrite(prompt, tokenizer, what=what)
    if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
        return Context(rewrite, adapter)
    extra = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    if set(extra) <= {"token_type_ids"}:
        return Context(rewrite, adapter)
    ids = torch.as_tensor(prompt["input_ids"])
    mask = torch.as_tensor(prompt.get("attention_mask", torch.ones_like(ids))).bool()
    # Contexts are padded on the left, as narrowly as possible: what belongs to tokens moves along.
    order = mask.long().argsort(dim=-1, stable=True)[:, ids.shape[1] - int(mask.sum(-1).max()) :]
    inputs = {
        name: value.gather(-1, order.to(value.device)) * mask.gather(-1, order).to(value)
        if isinstance(value, Tensor) and value.shape == ids.shape
        else value
        for name, value in extra.items()
    }
    return Context(
        rewrite, adapter, {name: _own(value, model.device) for name, value in inputs.items()}, items=len(ids)
    )


def _own(value: Any, device: torch.device) -> Any:
    """A copy on `device`, down to the tensors: `generate` repeats the rows of the encoder outputs that it is given in place."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        own = copy.copy(value)
        for name, item in value.items():
            own[name] = _own(item, device)  # type: ignore[index]
        return own
    if isinstance(value, list | tuple):
        return type(value)(_own(item, device) for item in value)
    return value
