"""GATEAU: which long samples teach a model to use far context, by two models' surprise and by where the answer looks."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.completions import pad_id
from hf_logits.correlation import average_ranks
from hf_logits.fused_head import Head, fused_log_probs
from hf_logits.hidden import backbone
from hf_logits.preferences import require_columns
from hf_logits.reading import Model, evaluating, open_ids
from hf_logits.sequences import batches_of_like_size
from hf_logits.tasks import bare


logger = logging.get_logger(__name__)

Ids = list[int]

TEMPLATE = "### Input:\n{context}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
COLUMNS = ("context", "instruction", "response")


# --- the arithmetic --------------------------------------------------------------------------------------------------------


def hmg_scores(
    short_nll: Float[Tensor, " _"] | Sequence[float], long_nll: Float[Tensor, " _"] | Sequence[float]
) -> Float[Tensor, " _"]:
    """Homologous models' guidance: how much harder a response is for the model with the short window, among all samples.

    The perplexities of each model are scaled to [0, 1] over the samples, and subtracted: `norm(PPL_short) - norm(PPL_long)`, between
    -1 and 1, high where the response needs the far context. A model that finds all samples alike tells nothing and adds 0.

    Args:
        short_nll (`torch.Tensor` of shape `[N]`): nats per response token under the model with the short window; see [`response_nll`].
        long_nll (`torch.Tensor` of shape `[N]`): the same under its sibling with the long window.

    Returns:
        `torch.Tensor` of shape `[N]`, float64; NaN where either score is NaN, which then takes no part in the scaling.
    """
    short_nll, long_nll = _numbers("short_nll", short_nll), _numbers("long_nll", long_nll)
    _check_lengths(short_nll=short_nll, long_nll=long_nll)
    known = ~(short_nll.isnan() | long_nll.isnan())
    scaled = []
    for name, nll in (("short_nll", short_nll), ("long_nll", long_nll)):
        # PPL = exp(NLL)
        perplexity = nll.exp().where(known, torch.nan)
        if perplexity[known].isinf().any():
            raise ValueError(
                f"{name} gives an infinite perplexity: it must be in nats per token, from response_nll()."
            )
        low, high = perplexity[known].aminmax() if known.any() else (torch.tensor(0.0), torch.tensor(0.0))
        width = high - low
        scaled.append((perplexity - low) / width.where(width > 0, 1.0))
    return scaled[0] - scaled[1]


def contextual_awareness(
    attention: Float[Tensor, " K"], segment_nll: Float[Tensor, " K"], *, importance: str
) -> Float[Tensor, ""]:
    """Cosine of where the response looks and of which segments help with it: near 1 if the attention is in the right place.

    Args:
        attention: mean attention of the response inside each segment.
        segment_nll: nats per token of the response behind each segment alone.
        importance: of a segment by its perplexity: `"softmax"` of `-PPL`, or `"inverse"`, `1 / PPL`.

    Returns:
        A float64 scalar. NaN with fewer than two segments (the cosine would be 1 whatever happens), and without attention.
    """
    if len(attention) < 2 or not bool(attention.any()):
        return torch.tensor(torch.nan, dtype=torch.float64)
    nll = segment_nll.double()
    weight = (-nll.exp()).softmax(0) if importance == "softmax" else (-nll).exp()
    return functional.cosine_similarity(attention.double(), weight, dim=0)


def combined_scores(
    hmg: Float[Tensor, " N"], cam: Float[Tensor, " N"], *, hmg_weight: float, combine: str
) -> Float[Tensor, " N"]:
    """One score a sample, `hmg_weight * f(HMG) + (1 - hmg_weight) * g(CAM)`; see [`select_top`]. No NaN in either."""
    hmg, cam = hmg.double(), cam.double()
    if combine == "rank":
        hmg, cam = (torch.from_numpy(average_ranks(values.cpu().numpy()) / len(values)) for values in (hmg, cam))
    elif combine == "zscore":
        hmg, cam = (_standardised(values) for values in (hmg, cam))
    else:
        hmg = hmg.softmax(0)
    return hmg_weight * hmg + (1 - hmg_weight) * cam


def _standardised(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    spread = values.std(correction=0)
    return (values - values.mean()) / spread.where(spread > 0, 1.0)


def _numbers(name: str, values: Tensor | Sequence[float]) -> Float[Tensor, " _"]:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, NaN where a sample has none; got {values!r:.200}.") from error


def _check_lengths(**given: Tensor) -> None:
    (first, a), (second, b) = given.items()
    if len(a) != len(b):
        raise ValueError(f"{first} has {len(a)} values and {second} {len(b)}: score the same samples with both.")


# --- the samples -----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """The ids of a sample: what stands before the context, the context, what stands behind it, the response."""

    head: Ids
    context: Ids
    tail: Ids
    response: Ids

    @property
    def prompt(self) -> Ids:
        return [*self.head, *self.context, *self.tail]

    def with_context(self, context: Ids) -> "Sample":
        return self._replace(context=context)


def tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> list[Sample]:
    """The samples as ids. Their parts are tokenized one by one, so that any piece of the context fits between the others."""
    require_columns(dataset, "long-context", COLUMNS)
    if any(template.count(name) != 1 for name in ("{context}", "{instruction}")):
        raise ValueError(f"template must have {{context}} and {{instruction}} once each; got {template!r}.")
    before, behind = template.split("{context}")
    # A chat template has written the first token of a text itself.
    special = tokenizer.bos_token is None or not before.startswith(str(tokenizer.bos_token))

    def ids(text: str, special: bool = False) -> Ids:
        return (
            open_ids(text, tokenizer) if special else list(tokenizer(text=text, add_special_tokens=False)["input_ids"])
        )

    samples = []
    for row in dataset:
        for name in COLUMNS:
            if not isinstance(row[name], str):
                raise TypeError(f"Column {name!r} must hold text; got {type(row[name]).__name__}.")
        head, tail = (part.replace("{instruction}", row["instruction"]) for part in (before, behind))
        samples.append(Sample(ids(head, special), ids(row["context"]), ids(tail), ids(row["response"])))
    return samples


def _fitted(samples: Sequence[Sample], model: Model, max_length: int | None, too_long: str) -> list[Sample | None]:
    """The samples that the model can read, `None` for the others, which a warning counts."""
    check_choice("too_long", too_long, "skip", "truncate", "raise")
    config: Any = bare(model).config.get_text_config()
    # State-space models and some position codes have no limit, and then no such entry.
    window = getattr(config, "max_position_embeddings", None)
    if max_length is not None:
        check_count("max_length", max_length, minimum=1)
        if window is not None and max_length > window and "rope_parameters" not in config.to_dict():
            raise ValueError(f"max_length={max_length}, but {type(bare(model)).__name__} has {window} positions.")
    limit = window if max_length is None else max_length
    fitted: list[Sample | None] = []
    for index, sample in enumerate(samples):
        length = len(sample.prompt) + len(sample.response)
        excess = 0 if limit is None else max(length - limit, 0)
        if excess and too_long == "raise":
            raise ValueError(
                f"Sample {index} has {length} tokens, more than {limit}: pass max_length=, too_long='truncate' or 'skip', or "
                "shorten it."
            )
        cut = too_long == "truncate" and excess <= len(sample.context)
        fits = bool(sample.response) and bool(sample.prompt) and (cut or not excess)
        fitted.append(sample.with_context(sample.context[excess:]) if fits else None)
    if skipped := sum(sample is None for sample in fitted):
        logger.warning(
            f"{skipped} of {len(samples)} samples have no score (NaN): they have no response, or more than {limit} tokens."
        )
    return fitted


def _check_model(model: Model) -> None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("The virtual tokens of prompt learning shift all positions. Score the base model.")
    if bare(model).config.is_encoder_decoder:
        raise ValueError(f"{type(bare(model)).__name__} is an encoder-decoder: give a causal language model.")


# --- surprise --------------------------------------------------------------------------------------------------------------


def response_nll(
    model: Model,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    too_long: str = "skip",
    template: str = TEMPLATE,
    tokens_per_batch: int = 1024,
    chunk_size: int = 256,
) -> Float[Tensor, " N"]:
    """Nats per token of each sample's response behind its context and instruction. `exp` of it is the perplexity.

    No `[tokens, vocabulary]` tensor exists: the head runs on `chunk_size` tokens of the responses at a time.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal language model.
        dataset ([`~datasets.Dataset`]): with the text columns `context`, `instruction` and `response`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model. Models that are compared must share it.
        max_length (`int`, *optional*):
            The longest sample in tokens. Defaults to what the model's config says; models with rotary positions may be asked for
            more.
        too_long (`str`, *optional*, defaults to `"skip"`):
            What happens to longer samples: `"skip"` gives NaN, and a warning with their number; `"truncate"` drops the beginning of
            the context (with NaN if that is not enough); `"raise"` is an error.
        template (`str`, *optional*):
            The prompt, with `{context}` and `{instruction}`, the paper's by default. For chat models make it with
            `tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)` where the user's message is
            `"{context}\\n\\n{instruction}"`. No end token is added to responses.
        tokens_per_batch (`int`, *optional*, defaults to `1024`): how much, padding included, goes through at a time.
        chunk_size (`int`, *optional*, defaults to `256`): tokens whose logits exist at once.

    Returns:
        `torch.Tensor` of shape `[N]`, float32, on the CPU. NaN for a sample that is skipped or has no response.
    """
    _check_model(model)
    samples = _fitted(tokenized(dataset, tokenizer, template), model, max_length, too_long)
    rows = [(sample.prompt, sample.response) for sample in samples if sample is not None]
    found = torch.full((len(samples),), torch.nan)
    with evaluating(model):
        scores = _nll(model, rows, pad_id(tokenizer), tokens_per_batch, chunk_size)
    found[[sample is not None for sample in samples]] = scores
    return found


def _nll(
    model: Model, rows: Sequence[tuple[Ids, Ids]], pad: int, tokens_per_batch: int, chunk_size: int
) -> Float[Tensor, " N"]:
    """Of each (prompt, response), whichever batch it comes in."""
    check_count("tokens_per_batch", tokens_per_batch, minimum=1)
    check_count("chunk_size", chunk_size, minimum=1)
    found = torch.zeros(len(rows))
    if not rows:
        return found
    device, head = model.device, Head(model)
    trial = {"input_ids": torch.tensor([rows[0][0][:8]], device=device), "use_cache": False}
    reason = head.fails(model, trial)
    if reason is not None:
        logger.warning_once(f"All logits of a batch are formed at once: {reason}.")
    for batch in batches_of_like_size([len(prompt) + len(response) for prompt, response in rows], tokens_per_batch):
        width = max(sum(map(len, rows[index])) for index in batch)
        ids = torch.full((len(batch), width), pad, device=device)
        mask, predicts = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool, device=device)
        for row, index in enumerate(batch):
            prompt, response = rows[index]
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response], device=device)
            mask[row, :end] = 1
            predicts[row, len(prompt) - 1 : end - 1] = True  # a token is predicted one place before it
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        labels = ids[:, 1:][predicts[:, :-1]]
        call = cast(Any, model)
        if reason is None:
            with head.spared() as seen:
                call(**inputs)
            log_probs = fused_log_probs(seen[0][predicts], head, labels, chunk_size=chunk_size)
        else:
            log_probs = -functional.cross_entropy(call(**inputs).logits[predicts].float(), labels, reduction="none")
        totals = -torch.stack([part.sum() for part in log_probs.split([len(rows[index][1]) for index in batch])])
        found[batch] = totals.cpu().float() / torch.tensor([len(rows[index][1]) for index in batch])
    return found


# --- attention -------------------------------------------------------------------------------------------------------------


def segment_attention(
    model: Model,
    prompt: Ids,
    response: Ids,
    segments: Sequence[tuple[int, int]],
    *,
    sink_tokens: int = 0,
    rows_at_a_time: int = 16,
) -> Float[Tensor, " K"]:
    """Mean attention probability of a response on the tokens of each segment, over layers, heads and response tokens.

    The prompt is read as the model always reads it (SDPA, flash attention) into a cache, a few response tokens at a time behind
    it with the attention written out: there is never more of it than `[layers, heads, rows_at_a_time, tokens]`.

    Args:
        model: a causal language model with attention in all layers, whose implementation can be switched to `"eager"`; in evaluation
            mode.
        prompt, response: ids.
        segments: first position and the one behind the last of each segment of the prompt.
        sink_tokens (`int`, *optional*, defaults to `0`): so many first positions of the prompt, attention sinks, do not count.
        rows_at_a_time (`int`, *optional*, defaults to `16`): response tokens in a forward.

    Returns:
        `torch.Tensor` of shape `[K]`, float64, on the CPU. 0 for a segment in which nothing counts.
    """
    body: Any = backbone(model)
    total = torch.zeros(len(prompt), dtype=torch.float64)
    # transformers 5.23 has renamed it
    name = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
    cache = DynamicCache(config=bare(model).config.get_text_config())
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(
            f"{type(bare(model)).__name__} has layers without attention, whose state a response cannot continue from: CAM needs a "
            "model with attention in every layer."
        )
    cached = {name: cache, "use_cache": True}
    with torch.no_grad():
        body(input_ids=torch.tensor([prompt], device=model.device), **cached)
        with _attention_written_out(model):
            for start in range(0, len(response), rows_at_a_time):
                part = torch.tensor([response[start : start + rows_at_a_time]], device=model.device)
                output = body(input_ids=part, output_attentions=True, **cached)
                layers = output.attentions
                read = len(prompt) + start + part.shape[1]
                for layer in layers:
                    # mean over the heads, sum over the rows; in float32, since bfloat16 would lose small probabilities
                    mass = layer[0].float().mean(0).sum(0).double().cpu() / len(layers)
                    # A sliding window shows the last tokens only, those in front of it get nothing.
                    total += functional.pad(mass, (read - len(mass), 0))[: len(prompt)]
    total /= len(response)
    total[:sink_tokens] = 0.0
    sizes = [(start, end, max(end - max(start, sink_tokens), 1)) for start, end in segments]
    return torch.stack([total[start:end].sum() / size for start, end, size in sizes])


@contextmanager
def _attention_written_out(model: Model) -> Iterator[None]:
    whole: Any = bare(model)
    config = whole.config
    before = {"": config._attn_implementation}
    before |= {name: getattr(config, name)._attn_implementation for name in config.sub_configs}
    whole.set_attn_implementation("eager")
    try:
        if config._attn_implementation != "eager":
            raise ValueError(
                f"{type(whole).__name__} cannot switch to eager attention: load it with attn_implementation='eager'."
            )
        yield
    finally:
        whole.set_attn_implementation(before)


def cam_scores(
    model: Model,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    segment_length: int = 128,
    importance: str = "softmax",
    sink_tokens: int = 0,
    max_length: int | None = None,
    too_long: str = "skip",
    template: str = TEMPLATE,
    rows_at_a_time: int = 16,
    tokens_per_batch: int = 1024,
    chunk_size: int = 256,
) -> Float[Tensor, " N"]:
    """Contextual awareness: whether the response attends to the segments of the context that make it likely.

    The context is cut into segments. For each, the attention of the response on it (in the whole prompt), and the response's
    perplexity behind this segment alone and the instruction; the score is the cosine of the two, [`contextual_awareness`].

    How paper and authors normalise the two vectors is not sure: the published scripts never compute the score. The attention
    enters as it is; a softmax over these small numbers would make it flat. The published perplexity of a segment is a mean over
    the prompt's tokens too, as if they were all certain, which makes longer segments look better; here it is the mean over the
    response.

    Costs one forward over the sample and one over each segment with the instruction and response, in batches; memory grows with
    response times context, and no `[context, context]` attention is formed.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the one with the long window.
        dataset, tokenizer, max_length, too_long, template, tokens_per_batch, chunk_size: see [`response_nll`].
        segment_length (`int`, *optional*, defaults to `128`): tokens of a segment; the last one may be shorter.
        importance (`str`, *optional*, defaults to `"softmax"`): see [`contextual_awareness`].
        sink_tokens, rows_at_a_time: see [`segment_attention`].

    Returns:
        `torch.Tensor` of shape `[N]`, float32. NaN for samples that [`response_nll`] has no score for, and where the context is a
        single segment, with a warning that counts them.
    """
    _check_model(model)
    check_choice("importance", importance, "softmax", "inverse")
    for name, value in (("segment_length", segment_length), ("rows_at_a_time", rows_at_a_time)):
        check_count(name, value, minimum=1)
    check_count("sink_tokens", sink_tokens, minimum=0)
    samples = _fitted(tokenized(dataset, tokenizer, template), model, max_length, too_long)
    found, short = torch.full((len(samples),), torch.nan), 0
    with evaluating(model):
        for index, sample in enumerate(samples):
            if sample is None:
                continue
            starts = range(0, len(sample.context), segment_length)
            pieces = [sample.context[start : start + segment_length] for start in starts]
            if len(pieces) < 2:
                short += 1
                continue
            spans = [
                (len(sample.head) + start, len(sample.head) + start + len(piece))
                for start, piece in zip(starts, pieces, strict=True)
            ]
            attention = segment_attention(
                model, sample.prompt, sample.response, spans, sink_tokens=sink_tokens, rows_at_a_time=rows_at_a_time
            )
            rows = [(sample.with_context(piece).prompt, sample.response) for piece in pieces]
            nll = _nll(model, rows, pad_id(tokenizer), tokens_per_batch, chunk_size)
            found[index] = contextual_awareness(attention, nll, importance=importance)
    if short:
        logger.warning(
            f"{short} of {len(samples)} contexts are one segment of {segment_length} tokens and have no score (NaN)."
        )
    return found


# --- the choice ------------------------------------------------------------------------------------------------------------


def select_top(
    dataset: Dataset,
    hmg: Float[Tensor, " _"] | Sequence[float],
    cam: Float[Tensor, " _"] | Sequence[float],
    *,
    keep_fraction: float,
    hmg_weight: float = 0.7,
    combine: str = "rank",
) -> Dataset:
    """Keep the fraction of the samples that most need their far context, best first, with their scores as columns.

    Si et al. 2024, "GATEAU: Selecting Influential Samples for Long Context Alignment"
    (https://huggingface.co/papers/2410.15633).

    The published combination adds a softmax of HMG *over the whole dataset* to CAM. With 10,000 samples the former are all about
    1e-4 and differ by 1e-5, the latter by 1e-2: HMG is ignored whatever its weight. Ranks, or z-scores, are our way to let both
    count.

    Args:
        dataset ([`~datasets.Dataset`]): the samples.
        hmg (`torch.Tensor` of shape `[N]`): from [`hmg_scores`].
        cam (`torch.Tensor` of shape `[N]`): from [`cam_scores`].
        keep_fraction (`float`): in (0, 1]; the paper keeps .1, .3 and .5.
        hmg_weight (`float`, *optional*, defaults to `0.7`): alpha in the paper, which takes .7 with little and .8 with much data.
        combine (`str`, *optional*, defaults to `"rank"`):
            `"rank"`: both as ranks in (0, 1], ties sharing theirs. `"zscore"`: both standardised. `"official"`: as published.

    Returns:
        The kept rows with the columns `hmg`, `cam` and `gateau_score`, in place of those of an earlier choice. Samples without a
        score (NaN) are dropped, with a warning that counts them. Infinite scores are an error: neither method gives any.
    """
    check_number("keep_fraction", keep_fraction, minimum=0.0, maximum=1.0, above=True)
    check_number("hmg_weight", hmg_weight, minimum=0.0, maximum=1.0)
    check_choice("combine", combine, "rank", "zscore", "official")
    hmg, cam = _numbers("hmg", hmg), _numbers("cam", cam)
    _check_lengths(hmg=hmg, cam=cam)
    for name, values in (("hmg", hmg), ("cam", cam)):
        if values.isinf().any():
            raise ValueError(
                f"{name} is infinite for {int(values.isinf().sum())} samples: give finite scores, and NaN where a sample has none."
            )
    if len(hmg) != len(dataset):
        raise ValueError(
            f"{len(hmg)} scores for {len(dataset)} samples: score the dataset that is to be selected from."
        )
    known = (~(hmg.isnan() | cam.isnan())).nonzero().flatten()
    if len(known) < len(dataset):
        logger.warning(f"{len(dataset) - len(known)} of {len(dataset)} samples have no score and are dropped.")
    kept = round(keep_fraction * len(known))
    if not kept:
        raise ValueError(f"keep_fraction={keep_fraction} of {len(known)} scored samples is none: raise it.")
    scores = combined_scores(hmg[known], cam[known], hmg_weight=hmg_weight, combine=combine)
    best = scores.argsort(descending=True, stable=True)[:kept]
    rows = known[best]
    chosen = dataset.select(rows.tolist())
    chosen = chosen.remove_columns([name for name in ("hmg", "cam", "gateau_score") if name in chosen.column_names])
    for name, values in (("hmg", hmg[rows]), ("cam", cam[rows]), ("gateau_score", scores[best])):
        chosen = chosen.add_column(name, values.tolist())
    return chosen
