"""The scoring pass: one table of log-probabilities, of every choice behind every prompt, that the metrics are functions of.

A prompt is read once, however many choices follow it, and all choices are read together behind what was kept of the prompts.

Where does a choice begin? Prompt and choice are tokenized as one text, because tokens may lie across the border ("Answer: " and "B"
are "Answer", ":", " B"), and what all choices of a prompt have in common with the prompt alone is read as the prompt. All that
follows is scored. Where the prompt does not end in white space this is what lm-eval does. White space at a prompt's end belongs to the
choice there; here only where a token says so. And where letters of the prompt melt into a choice, they are scored with all
choices alike: a log-warning says it, and a mass is then too low, but differences between choices are right.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, Pipeline, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_logits.auxiliary import AuxiliaryLM
from hf_logits.checks import check_count
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor
from hf_logits.prompts import pad_id, pad_left
from hf_logits.sharing import steering


logger = logging.get_logger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a chat. A last message of the assistant is gone on with."""
Ids = tuple[int, ...]
Question = tuple[Ids, list[Ids]]
"""What all choices have before them, and the ids of each choice that is not equal to another one."""

_CHOICES = 16
"""Rows that are read at once for each prompt of a batch: what has more choices is read in parts."""


@dataclass(frozen=True)
class ChoiceTable:
    """Log-probabilities of choices, as the metrics take them. Rows may have unequal numbers of choices.

    Args:
        logprobs (`list[list[float]]`, `[N][K]`): of each choice as a whole, in nats: the sum over its tokens.
        lengths (`dict[str, list[list[int]]]`): its length in `"tokens"` (those that were scored), `"chars"` and UTF-8 `"bytes"`,
            without the separator.
        distinct (`list[list[bool]]`): false where a choice's probability is part of another one's: of equal choices all but the
            first, and choices that begin with all tokens of another.
        prior_logprobs (`list[list[float]]`, *optional*): the same behind the prior prompt.
    """

    logprobs: list[list[float]]
    lengths: dict[str, list[list[int]]]
    distinct: list[list[bool]]
    prior_logprobs: list[list[float]] | None = None


@torch.no_grad()
def choice_logprobs(
    model: PreTrainedModel | PeftModel | Pipeline,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    prior: Prompt | Sequence[Prompt] | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    separator: str | None = None,
    batch_size: int = 8,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChoiceTable:
    """Log-probabilities of every choice behind every prompt.

    With processors, which see `(input_ids, scores)` position by position as in `generate`, the table is that of the steered model.
    Rows of a call are a batch of the prompts, or each of them as often as the batch's longest list of choices, as with
    `num_return_sequences`. What a processor is given for single items of a batch (a list of prompts, a tensor of strengths) does not
    know about our batches: give it one for all, a mapping, or a function.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or a text-generation pipeline):
            A decoder-only language model, read in eval mode. Processors that a pipeline was built with, or loaded as a recipe, are on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` for that of a pipeline.
        prompts (`list[str]` or `list[list[dict]]`): texts, or chats, which the tokenizer's chat template makes texts of.
        choices (`list[str]` or `list[list[str]]`): the same for all prompts, or those of each.
        prior (*optional*): a prompt, or one for each question, behind which the choices are scored too: the domain of PMI_DC.
            `""` is no context, which is lm-eval's mutual information; texts then begin behind the token that begins texts.
        logits_processor (`Sequence[LogitsProcessor]`, *optional*): what steers the model, also behind the prior.
        separator (`str`, *optional*): between a prompt and its choices. By default a space where neither has white space there, and
            nothing behind a chat's template.
        batch_size (`int`, *optional*, defaults to `8`): prompts that are read at once.
        template_kwargs (`Mapping[str, Any]`, *optional*): of the chat template.

    Returns:
        [`ChoiceTable`]: float log-probabilities, computed in float32 from the model's logits.

    Raises:
        ValueError: different lengths, fewer than two choices, an empty choice, a text that is longer than the model reads, NaN logits.
        TypeError: an encoder-decoder, or no tokenizer.
    """
    model, tokenizer, processors = _parts(model, tokenizer, logits_processor)
    check_count("batch_size", batch_size, minimum=1)
    asked = per_prompt(prompts, choices)
    begins = _begins(tokenizer)

    def encode(given: Sequence[Prompt]) -> list[Question]:
        pairs = zip(given, asked, strict=True)
        return [_encode(tokenizer, one, own, separator, begins, template_kwargs or {}) for one, own in pairs]

    def score(encoded: list[Question]) -> list[list[float]]:
        found = _score(model, pad_id(tokenizer), encoded, processors, batch_size)
        return [[found[before, one] for one in own] for before, own in encoded]

    encoded = encode(prompts)
    behind = None
    if prior is not None:
        behind = encode(prior_per_prompt(prompts, prior))
    return ChoiceTable(
        logprobs=score(encoded),
        lengths={
            "tokens": [[len(one) for one in own] for _, own in encoded],
            "chars": [[len(text) for text in own] for own in asked],
            "bytes": [[len(text.encode()) for text in own] for own in asked],
        },
        distinct=[[_adds(own, place) for place in range(len(own))] for _, own in encoded],
        prior_logprobs=None if behind is None else score(behind),
    )


def _parts(
    model: Any, tokenizer: Any, given: Sequence[LogitsProcessor]
) -> tuple[Any, PreTrainedTokenizerBase, list[LogitsProcessor]]:
    """The model, its tokenizer, and all processors in the order in which `generate` calls them."""
    processors = list(given)
    if isinstance(model, Pipeline):
        processors += model._forward_params.get("logits_processor") or []
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    processors += steering(model)
    if tokenizer is None:
        raise TypeError("choice_logprobs needs the model's tokenizer; only a pipeline brings its own.")
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"choice_logprobs reads decoder-only language models, whose prompt and choice are one text; got {type(model).__name__}."
        )
    return model, tokenizer, processors


def per_prompt(prompts: Sequence[Any], choices: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """The choices of each prompt; what cannot be scored is refused."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping)):
        raise ValueError("prompts is one prompt; give a list of prompts.")
    if isinstance(choices, str):
        raise ValueError(f"choices is the text {choices!r}; give a list of choices, or one for each prompt.")
    same = len(choices) > 0 and all(isinstance(one, str) for one in choices)
    asked = [list(cast(Sequence[str], choices))] * len(prompts) if same else [list(own) for own in choices]
    if len(asked) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(asked)} lists of choices; give one list for each, or one for all."
        )
    for place, own in enumerate(asked):
        if len(own) < 2:
            raise ValueError(f"Prompt {place} has {len(own)} choices; there must be at least two to choose from.")
        if "" in own:
            raise ValueError(f"Prompt {place} has an empty choice, which has no tokens to score.")
    return asked


def prior_per_prompt(prompts: Sequence[Prompt], prior: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prior prompt of each prompt."""
    shared = isinstance(prior, str) or (len(prior) > 0 and isinstance(prior[0], Mapping))
    priors = [cast(Prompt, prior)] * len(prompts) if shared else list(cast(Sequence[Prompt], prior))
    if len(priors) != len(prompts):
        raise ValueError(f"{len(priors)} prior prompts for {len(prompts)} prompts; give one for all or one for each.")
    return priors


def _begins(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of texts, and what an empty context is."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    front = whole[: places[0]] if places else []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return front, front or ([] if start is None else [start])


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    choices: list[str],
    separator: str | None,
    begins: tuple[list[int], list[int]],
    template_kwargs: Mapping[str, Any],
) -> Question:
    """The ids before all choices, and the ids that are scored of each."""
    chat = not isinstance(prompt, str)
    front, nothing = ([], begins[1]) if chat else begins
    text = prompt if isinstance(prompt, str) else _chat_text(tokenizer, prompt, template_kwargs)

    def gap(choice: str) -> str:
        if separator is not None:
            return separator
        return "" if chat or text[-1:].isspace() or choice[0].isspace() else " "

    texts = [text, *(text + gap(one) + one for one in choices)]
    alone, *whole = [front + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    shared = min(_common(alone, ids) for ids in whole)
    melted: Any = tokenizer.decode(alone[shared:]) if shared < len(alone) else ""
    if melted.strip():
        logger.warning_once(
            f"The prompt's end {melted!r} melts into a choice when both are tokenized, and is scored with the choices of its prompt: "
            "let prompts end where a word ends, or give a separator."
        )
    if not shared:
        if not nothing:
            raise ValueError(
                "A prompt is empty, and the tokenizer has no token that begins or ends texts to read instead."
            )
        whole = [nothing + ids for ids in whole]
        shared = len(nothing)
    if bare := next((one for one, ids in zip(choices, whole, strict=True) if len(ids) == shared), None):
        raise ValueError(f"The choice {bare!r} adds no token to the prompt that ends in {text[-20:]!r}.")
    return tuple(whole[0][:shared]), [tuple(ids[shared:]) for ids in whole]


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
) -> str:
    if not tokenizer.chat_template:
        raise ValueError("The prompts are messages, but the tokenizer has no chat template; give texts, or set one.")
    goes_on = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on} | dict(template_kwargs)
    return cast(str, tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, **options))


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _adds(choices: list[Ids], place: int) -> bool:
    """Whether a choice's probability is not part of another one's."""
    own = choices[place]
    return own not in choices[:place] and not any(own[: len(one)] == one for one in choices if len(one) < len(own))


# --- reading ---------------------------------------------------------------------------------------------------------------


def _score(
    model: Any,
    pad: int,
    encoded: Sequence[Question],
    processors: list[LogitsProcessor],
    batch_size: int,
) -> dict[tuple[Ids, Ids], float]:
    """The log-prob of each choice behind what it has before it. What is asked twice is read once."""
    together: dict[Ids, dict[Ids, None]] = {}
    for before, own in encoded:
        together.setdefault(before, {}).update(dict.fromkeys(own))
    questions = []
    for before, unique in together.items():
        own = list(unique)
        most = _CHOICES * batch_size
        questions += [(before, own[start : start + most]) for start in range(0, len(own), most)]
    engine = AuxiliaryLM(model, score_tokens=False if processors else "generated")
    window = _checked_window(model, questions)
    found: dict[Any, Any] = {}
    for batch in _batches(questions, batch_size, window, sort=not processors, alike=not engine.pads_exactly):
        sums = _steered(engine, batch, pad, processors) if processors else _plain(engine, batch, pad)
        if bool(sums.isnan().any()):
            raise ValueError(
                f"{type(model).__name__} gives NaN log-probabilities: float16 overflows in some models, load it in bfloat16 or "
                "float32; or the processors forbid every token."
            )
        for (before, own), row in zip(batch, sums.tolist(), strict=True):
            found |= {(before, one): value for one, value in zip(own, row, strict=False)}
    return found


def _width(questions: Sequence[Question]) -> int:
    """Tokens that are read of the longest row, if these questions are a batch: the last token of a choice is predicted, not read."""
    return max(len(before) for before, _ in questions) + max(len(one) for _, own in questions for one in own) - 1


def _checked_window(model: Any, questions: Sequence[Question]) -> int | None:
    """How many tokens the model holds; every question must fit."""
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max((_width([one]) for one in questions), default=0)
    if window is not None and 0 < window < longest:
        raise ValueError(
            f"A prompt with its choice has {longest} tokens to read, but {type(model).__name__} holds {window} "
            "(max_position_embeddings): shorten the prompt; nothing is cut for you."
        )
    return window


def _batches(
    questions: list[Question], size: int, window: int | None, *, sort: bool, alike: bool
) -> Iterator[list[Question]]:
    """Prompts of like length go together: of the same one, if the model cannot be told where a padded row begins."""
    if (sort and len(questions) > size) or alike:
        questions = sorted(questions, key=lambda one: len(one[0]))
    batch: list[Question] = []
    for one in questions:
        rows = len(one[1]) + sum(len(own) for _, own in batch)
        unlike = alike and batch and len(batch[0][0]) != len(one[0])
        # a long prompt beside long choices is wider than either question
        wide = window is not None and 0 < window < _width([*batch, one])
        if batch and (len(batch) == size or rows > _CHOICES * size or unlike or wide):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _laid_out(engine: AuxiliaryLM, batch: Sequence[Question], pad: int) -> tuple[Step, Tensor, Tensor]:
    """The prompts of a batch; its choices' ids of shape `[B, K, T]`, in rows of their last token to the end; what of it is real."""
    device = engine.model.device
    prompts, mask = pad_left([list(before) for before, _ in batch], pad)
    most = max(len(own) for _, own in batch)
    longest = max(len(one) for _, own in batch for one in own)
    filled = [[*own, *[own[0]] * (most - len(own))] for _, own in batch]
    tokens = torch.tensor([[[*one, *[one[-1]] * (longest - len(one))] for one in own] for own in filled])
    lengths = torch.tensor([[len(one) for one in own] for own in filled])
    real = torch.arange(longest) < lengths[..., None]
    prompts = prompts.to(device)
    step = Step(prompts, prompts.shape[1], mask.to(device).bool(), True, None)
    return step, tokens.to(device), real.to(device)


def _plain(engine: AuxiliaryLM, batch: Sequence[Question], pad: int) -> Float[Tensor, "B K"]:
    """Two forwards: the prompts, and all tokens of the choices but the last."""
    step, tokens, real = _laid_out(engine, batch, pad)
    count, most, longest = tokens.shape
    log_probs = engine.read(step)[0].log_softmax(-1)
    if longest == 1:
        return log_probs.gather(1, tokens[..., 0]).double()
    there = torch.tensor([place < len(own) for _, own in batch for place in range(most)], device=tokens.device)
    rows = torch.arange(count, device=tokens.device).repeat_interleave(most)[there]
    flat, kept = tokens.flatten(0, 1)[there], real.flatten(0, 1)[there]
    ids = torch.cat([step.input_ids[rows], flat[:, :-1]], dim=1)
    last = engine.read(Step(ids, step.prompt_length, step.prompt_mask[rows], False, rows))[0].log_softmax(-1)
    scores = torch.cat([engine.token_log_probs[0][:, 1 - longest :], last.gather(1, flat[:, -1:])], dim=1)
    sums = scores.double().masked_fill(~kept, 0.0).sum(-1)
    found = torch.zeros(count * most, dtype=torch.float64, device=tokens.device)
    return found.masked_scatter(there, sums).view(count, most)


def _steered(
    engine: AuxiliaryLM, batch: Sequence[Question], pad: int, processors: list[LogitsProcessor]
) -> Float[Tensor, "B K"]:
    """Position by position, as `generate` would show it to the processors if it were to choose these tokens."""
    step, tokens, real = _laid_out(engine, batch, pad)
    count, most, longest = tokens.shape
    trackers = [one.tracker for one in processors if isinstance(one, AuxiliaryLogitsProcessor)]
    total = torch.zeros(count, most, dtype=torch.float64, device=tokens.device)
    for place in range(longest):
        for tracker in trackers:
            tracker.announce(step)
        scores = cast(Any, LogitsProcessorList(processors))(step.input_ids, engine.read(step)[0].clone())
        log_probs = scores.float().log_softmax(-1)
        chosen = tokens[..., place] if place == 0 else tokens[..., place].view(-1, 1)
        picked = log_probs.gather(1, chosen).view(count, most)
        # what follows a token without any probability may have none left to share out, which is NaN
        picked = picked.double().masked_fill(~real[..., place], 0.0)
        total = torch.where(total.isneginf(), total, total + picked)
        if place + 1 < longest:
            rows = torch.arange(count, device=tokens.device).repeat_interleave(most) if place == 0 else None
            before, mask = (one if rows is None else one[rows] for one in (step.input_ids, step.prompt_mask))
            ids = torch.cat([before, tokens[..., place].reshape(-1, 1)], dim=1)
            step = Step(ids, step.prompt_length, mask, False, rows, step.input_ids if rows is None else None)
    return total
