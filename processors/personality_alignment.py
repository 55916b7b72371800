"""Personality alignment: a person's answers to a questionnaire, turned into a few vectors behind attention heads."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_logits.checks import check_count, check_number
from hf_logits.fused_head import Head
from hf_logits.head_vectors import HeadVectors
from hf_logits.logistic import fit_logistic
from hf_logits.prompts import single_token
from hf_logits.reading import Model, Prompt, chat_ids, evaluating, right_padded


logger = logging.get_logger(__name__)

OPTIONS = ("A", "B", "C", "D", "E")
SCORES = (5.0, 4.0, 3.0, 2.0, 1.0)
QUESTION = (
    'How well does this describe you: "I {statement}."?\n(A) very well\n(B) rather well\n(C) neither well nor badly\n'
    "(D) rather badly\n(E) not at all\nAnswer with one letter."
)
"""A question that the options answer. The scores of the options are those of an inventory: 5 for (A), 1 for (E)."""


# --- the arithmetic --------------------------------------------------------------------------------------------------------


def probe_scores(
    activations: Float[Tensor, "R L H D"],
    labels: Bool[Tensor, " R"],
    train: Bool[Tensor, " R"],
    *,
    penalty: float,
) -> tuple[Float[Tensor, "L H"], Float[Tensor, "L H"]]:
    """How well a logistic regression on each head tells the labels: mean of its accuracies on the rows of `train` and on the
    others, and its loss on the others in nats."""
    accuracies, losses = [], []
    for layer in activations.double().permute(1, 2, 0, 3):
        weights, bias = fit_logistic(layer[:, train], labels[train], penalty=penalty)
        logits = (layer @ weights[:, :, None])[:, :, 0] + bias[:, None]
        right = ((logits > 0) == labels).double()
        accuracies.append((right[:, train].mean(1) + right[:, ~train].mean(1)) / 2)
        losses.append(softplus(torch.where(labels, -logits, logits))[:, ~train].mean(1))
    return torch.stack(accuracies), torch.stack(losses)


def head_displacements(activations: Float[Tensor, "R L H D"], labels: Bool[Tensor, " R"]) -> Float[Tensor, "L H D"]:
    """From the mean of the negative rows towards that of the positive ones, as long as all rows deviate in this direction.

    Zero for a head whose means agree or whose rows do not deviate.
    """
    wide = activations.double()
    difference = wide[labels].mean(0) - wide[~labels].mean(0)
    norm = difference.norm(dim=-1, keepdim=True)
    direction = difference / norm.where(norm > 0, 1.0)
    # sigma = std of <x, theta>
    deviation = (wide * direction).sum(-1).std(0, correction=0)
    return (deviation[..., None] * direction).float()


def expected_error(
    probs: Float[Tensor, "N K"], values: Float[Tensor, " N"], *, scores: Sequence[float], traits: Sequence[str]
) -> float:
    """Sum over the traits of the mean distance between a person's answers and those drawn from `probs`.

    Items whose value is NaN are left out; a trait without any other item counts as 0.
    """
    distance = (torch.tensor(scores, dtype=torch.float64) - values.double()[:, None]).abs()
    error = (probs.double() * distance).sum(-1)
    found = 0.0
    for trait in dict.fromkeys(traits):
        own = torch.tensor([other == trait for other in traits]) & ~values.isnan()
        found += float(error[own].mean()) if own.any() else 0.0
    return found


def _answers(values: Sequence[float] | Tensor, number: int) -> Float[Tensor, " N"]:
    """Answers from 1 to 5, NaN where they are unknown (0 or NaN)."""
    try:
        given = torch.as_tensor(values, dtype=torch.float64).flatten()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"Answers must be numbers from 1 to 5, 0 or NaN where unknown; got {values!r:.200}."
        ) from error
    if len(given) != number:
        raise ValueError(
            f"There are {len(given)} answers to {number} items: give one for each, 0 where it is unknown."
        )
    given = given.where(given != 0, torch.nan)
    if ((given < 1) | (given > 5)).any():
        raise ValueError(f"Answers must be from 1 to 5, or 0 where unknown; got {given.nan_to_num().tolist()}.")
    return given


# --- reading a model -------------------------------------------------------------------------------------------------------


def answer_probabilities(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    options: Sequence[int | str] = OPTIONS,
    batch_size: int = 8,
) -> Float[Tensor, "N K"]:
    """Probabilities of the options as the first token of an answer, among themselves, in float32.

    Args:
        model, tokenizer, prompts, batch_size: see [`~hf_logits.attention_heads.collect_head_activations`].
        options (*optional*, defaults to `("A", "B", "C", "D", "E")`): tokens, by id or text.

    Raises:
        TypeError: for an encoder-decoder.
    """
    tokens = [single_token(option, tokenizer, what="An option") for option in options]
    rows = [chat_ids(prompt, tokenizer) for prompt in prompts]
    found, head = torch.empty(len(rows), len(tokens)), Head(model)
    batches = right_padded(rows, model, batch_size)
    with evaluating(model):
        trial = {"input_ids": torch.tensor([row[:8] for row in rows[:1]], device=model.device), "use_cache": False}
        reason = head.fails(model, trial) if rows else None
        if reason is not None:
            logger.warning_once(f"All logits of a batch are formed at once: {reason}.")
        for batch, inputs, places in batches:
            last = torch.arange(len(batch), device=places.device), places
            if reason is None:
                with head.spared() as seen:
                    model(**inputs)
                logits = head(seen[0][last])
            else:
                logits = cast(Any, model)(**inputs).logits[last]
            found[batch] = logits[:, tokens].float().softmax(-1).cpu()
    return found


# --- a person --------------------------------------------------------------------------------------------------------------


def fit_personality(
    activations: Float[Tensor, "N A L H D"],
    values: Sequence[float] | Tensor,
    *,
    num_heads: int = 24,
    train_fraction: float = 0.6,
    penalty: float = 1.0,
    seed: int = 0,
) -> HeadVectors:
    """The vectors of a person, from their answers to a questionnaire. Nothing is trained but probes on single heads.

    Zhu et al. 2024, "Personality Alignment of Large Language Models" (https://huggingface.co/papers/2408.11779), whose method is
    called PAS. Where the person agrees with an item (4 or 5) the agreeing answer is positive and the opposing one negative,
    where they disagree (1 or 2) it is the other way round; neutral (3) and unknown (0) items say nothing. The heads whose probes
    tell positive from negative best are moved along the difference of the means, by its standard deviation times the strength.

    Ours: both answers of an item are on the same side of the split, which is seeded, and of heads of equal accuracy those with
    the lower loss on held-out items come first (the published code takes the last ones).

    Args:
        activations (`torch.Tensor` of shape `[items, 2, layers, heads, head size]`): from [`~hf_logits.attention_heads.collect_head_activations`].
        values (`Sequence[float]`): the person's answer to each item, 1 to 5, 0 or NaN where unknown.
        num_heads (`int`, *optional*, defaults to `24`): how many heads are moved, K in the paper.
        train_fraction (`float`, *optional*, defaults to `0.6`): share of the items that probes are fitted on.
        penalty (`float`, *optional*, defaults to `1.0`): of the probes' squared weights.
        seed (`int`, *optional*, defaults to `0`): of the split.

    Returns:
        [`~hf_logits.head_vectors.HeadVectors`] of strength 1; find a better one with [`search_strength`].
    """
    check_count("num_heads", num_heads, minimum=1)
    check_number("train_fraction", train_fraction, minimum=0.0, maximum=1.0)
    check_number("penalty", penalty, minimum=0.0, above=True)
    if activations.dim() != 5:
        raise ValueError(
            f"activations must be [items, 2, layers, heads, head size], from collect_head_activations(); got {list(activations.shape)}."
        )
    items, answers, layers, heads, _ = activations.shape
    if answers != 2 or num_heads > layers * heads:
        raise ValueError(
            f"Two answers an item and at most {layers * heads} heads are needed; got {answers}, {num_heads=}."
        )
    given = _answers(values, items)
    used = ((given != 3) & ~given.isnan()).nonzero().flatten()
    if len(used) < 2:
        raise ValueError(
            f"{items - len(used)} of {items} answers are neutral (3) or unknown: two others are needed at least, for there is no "
            "direction to find without. Leave this subject out, or ask more items."
        )
    agrees = given[used] > 3
    rows, labels = activations[used].flatten(0, 1), torch.stack([agrees, ~agrees], 1).flatten()
    order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
    train = torch.zeros(len(used), dtype=torch.bool)
    train[order[: min(max(round(train_fraction * len(used)), 1), len(used) - 1)]] = True
    accuracy, loss = probe_scores(rows, labels, train.repeat_interleave(2), penalty=penalty)
    # by accuracy, then by loss: the second sort is stable
    ranked = loss.flatten().argsort(stable=True)
    ranked = ranked[accuracy.flatten()[ranked].argsort(descending=True, stable=True)]
    chosen = torch.zeros(layers * heads, dtype=torch.bool)
    chosen[ranked[:num_heads]] = True
    return HeadVectors(head_displacements(rows, labels) * chosen.view(layers, heads, 1))


def search_strength(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: HeadVectors,
    prompts: Sequence[Prompt],
    values: Sequence[float] | Tensor,
    *,
    traits: Sequence[str] | None = None,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0),
    options: Sequence[int | str] = OPTIONS,
    scores: Sequence[float] = SCORES,
    batch_size: int = 8,
) -> tuple[HeadVectors, dict[float, float]]:
    """Choose the strength whose answers are nearest to a person's on items that were not fitted on, and will not be reported.

    The published code chooses on the items that it reports, and parses generated text; here the items are a development set of
    your own, and the answers are read from the logits: the error is that of an answer drawn from the options. Of equal
    strengths the first counts.

    Args:
        model, tokenizer, prompts, batch_size: see [`~hf_logits.attention_heads.collect_head_activations`].
        vectors ([`~hf_logits.head_vectors.HeadVectors`]): from [`fit_personality`].
        values (`Sequence[float]`): the person's answer to each item, 1 to 5, 0 or NaN where unknown.
        traits (`Sequence[str]`, *optional*): the trait of each item. Errors are means within a trait, summed over traits.
        strengths (`Sequence[float]`, *optional*): what is tried, alpha in the paper; its values by default.
        options, scores (*optional*): what can be answered, and which value each stands for.

    Returns:
        The vectors with the best strength, and `{strength: error}`.
    """
    given = _answers(values, len(prompts))
    if given.isnan().all():
        raise ValueError(f"All of the {len(prompts)} answers are unknown: there is nothing to choose a strength by.")
    if len(options) != len(scores) or not strengths:
        raise ValueError(
            f"Give a score for each option, and a strength; got {list(options)}, {list(scores)}, {strengths}."
        )
    known = ["" for _ in prompts] if traits is None else list(traits)
    if len(known) != len(prompts):
        raise ValueError(f"There are {len(known)} traits for {len(prompts)} items: give one for each.")
    errors = {}
    for strength in strengths:
        with vectors.applied(model, strength=strength):
            probs = answer_probabilities(model, tokenizer, prompts, options=options, batch_size=batch_size)
        errors[strength] = expected_error(probs, given, scores=scores, traits=known)
    best = min(errors, key=lambda strength: math.inf if math.isnan(errors[strength]) else errors[strength])
    return vectors.with_strength(best), errors
