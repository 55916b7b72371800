"""Language models as judges of two answers, in both orders: by the probability of a verdict, or by scores that are sampled.

Both make the tables that [`JudgePosition`] takes: `JudgePosition().compute(**judge_by_log_probs(...))`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_logits.checks import check_count
from hf_logits.completions import Prompt, first_token_logits, sample_completions
from hf_logits.prompts import single_token


logger = logging.get_logger(__name__)

VERDICT_TEMPLATE = """Here are a question and two answers to it.

Question: {question}

Answer 1: {first}

Answer 2: {second}

Which answer is better, 1 or 2? Reply with its number only."""
"""What the judge by log-probabilities reads; the next token is the verdict."""

SCORE_TEMPLATE = """Here are a question and two answers to it.

Question: {question}

Answer 1: {first}

Answer 2: {second}

How helpful, correct and detailed is each answer? Neither their order nor their length shall matter. Explain first what speaks for
and against each. Then end with two lines that give each a score from 1 to 10, like this:
Score of answer 1: <score>
Score of answer 2: <score>"""
"""What the judge by samples reads: evidence first, scores last."""

LITTLE = 0.1
"""Where the verdicts have less of the probability than this, the model does not understand what it shall do."""

_SCORE_LINE = re.compile(r"^(.*):[\s*]*(\d+(?:\.\d+)?)\s*(?:/\s*10)?[\s*.]*$")


def read_scores(text: str) -> tuple[float, float] | None:
    """The two scores with which a judge ends, or `None` if its last two lines are not scores from 1 to 10 of answers 1 and 2.

    Args:
        text (`str`): lines of which the last two, empty ones aside, end with a colon and a number. Where there are numbers in front of
            the colons, the last one says which answer is scored; without any, the order does.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()][-2:]
    found = [_SCORE_LINE.match(line) for line in lines]
    scores = [float(match[2]) for match in found if match is not None]
    if len(scores) != 2 or not all(1 <= score <= 10 for score in scores):
        return None
    names = [(re.findall(r"\d+", match[1]) or [""])[-1] for match in found if match is not None]
    if names == ["2", "1"]:
        return scores[1], scores[0]
    return (scores[0], scores[1]) if names in (["1", "2"], ["", ""]) else None


def judge_by_log_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    template: str = VERDICT_TEMPLATE,
    labels: tuple[str, str] = ("1", "2"),
    chat: bool | None = None,
    batch_size: int = 8,
    logits_processor: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Judge pairs of answers by the probabilities of the two verdicts, in both orders: deterministic, two forwards a pair.

    Probabilities are taken among the two verdicts, so that an order in which the model would rather say something else counts as
    much as the other (ours).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the judge, which had better not be one of the candidates.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the judge.
        questions, first, second (`list[str]`): of each pair the question, and the answers of both candidates.
        template (`str`, *optional*): with `{question}`, `{first}` and `{second}`; the verdict is the next token.
        labels (`tuple[str, str]`, *optional*, defaults to `("1", "2")`):
            The verdicts, one token each. Behind plain text that ends with a colon many tokenizers want `" 1"`.
        chat (`bool`, *optional*): whether the template is a user's message. By default where there is a chat template.
        batch_size (`int`, *optional*, defaults to `8`): prompts in a forward.
        logits_processor (*optional*): what steers the judge, as in `generate`.

    Returns:
        `dict`: `predictions1` and `predictions2`, a pair of probabilities a row, and `swapped_back=True`.

    Raises:
        ValueError: lists of different lengths, a template without one of its places, labels that are not two tokens.
    """
    tokens = [single_token(label, tokenizer, what="verdict") for label in labels]
    if tokens[0] == tokens[1]:
        raise ValueError(f"The two verdicts must be different tokens; {labels} are both {tokens[0]}.")
    prompts = _prompts(tokenizer, questions, first, second, template, chat)
    # what is read twice, as where both answers are the same, must not differ in its last bits
    keys = [one if isinstance(one, str) else one[0]["content"] for one in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    place_of = {key: place for place, key in enumerate(unique)}
    found = torch.empty(len(unique), 2)
    mass = torch.empty(len(unique))
    for places, logits in first_token_logits(
        model, tokenizer, list(unique.values()), batch_size=batch_size, logits_processor=logits_processor
    ):
        verdicts = logits.log_softmax(-1)[:, tokens]
        if verdicts.isneginf().all(-1).any():
            raise ValueError(f"The model gives neither verdict of {labels} any probability: a processor bans both.")
        found[places], mass[places] = verdicts.softmax(-1).cpu(), verdicts.exp().sum(-1).cpu()
    if len(prompts) and mass.mean() < LITTLE:
        logger.warning(
            "The verdicts %s have only %.2g of the judge's probability: look at the template, the labels and chat=.",
            labels,
            mass.mean(),
        )
    found = found[[place_of[key] for key in keys]]
    ab, ba = found[: len(questions)], found[len(questions) :].flip(-1)
    return {"predictions1": ab[:, None].tolist(), "predictions2": ba[:, None].tolist(), "swapped_back": True}


def judge_by_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    num_samples: int = 3,
    template: str = SCORE_TEMPLATE,
    read: Callable[[str], tuple[float, float] | None] = read_scores,
    chat: bool | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    **generation_kwargs: Any,
) -> dict[str, Any]:
    """Judge pairs of answers by scores at the end of sampled explanations, in both orders.

    Samples that cannot be read are left out, and the log says how many.

    Args:
        model, tokenizer, questions, first, second: as in [`judge_by_log_probs`].
        num_samples (`int`, *optional*, defaults to `3`): k, in each order.
        template (`str`, *optional*): with `{question}`, `{first}` and `{second}`.
        read (*optional*): a function from a judge's text to the scores of what was shown first and second, or `None`.
        chat (`bool`, *optional*): whether the template is a user's message. By default where there is a chat template.
        max_new_tokens (`int`, *optional*, defaults to `512`): what is longer is cut, and has no scores.
        batch_size (`int`, *optional*, defaults to `8`): prompts that are sampled from at once.
        generation_kwargs: of `generate`; by default tokens are drawn at temperature 1.

    Returns:
        `dict`: `predictions1` and `predictions2`, up to k pairs of scores a row, and `swapped_back=True`.

    Raises:
        ValueError: lists of different lengths, or a template without one of its places.
    """
    check_count("num_samples", num_samples, minimum=1)
    prompts = _prompts(tokenizer, questions, first, second, template, chat)
    sampled = sample_completions(
        model,
        tokenizer,
        prompts,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **generation_kwargs,
    )
    texts = [[text if isinstance(text, str) else text[-1]["content"] for text in texts] for texts in sampled]
    read_out = [[scores for text in row if (scores := read(text)) is not None] for row in texts]
    lost = sum(map(len, texts)) - sum(map(len, read_out))
    if lost:
        logger.warning("%d of %d samples of the judge have no scores.", lost, sum(map(len, texts)))
    ab, ba = read_out[: len(questions)], read_out[len(questions) :]
    return {
        "predictions1": [[list(pair) for pair in row] for row in ab],
        "predictions2": [[list(pair)[::-1] for pair in row] for row in ba],
        "swapped_back": True,
    }


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    template: str,
    chat: bool | None,
) -> list[Prompt]:
    """All pairs as first and second, then all as second and first."""
    if not len(questions) == len(first) == len(second):
        raise ValueError(
            f"{len(questions)} questions, {len(first)} first and {len(second)} second answers; give one of each a pair."
        )
    missing = [place for place in ("{question}", "{first}", "{second}") if place not in template]
    if missing:
        raise ValueError(f"The template lacks {', '.join(missing)}, where the judge would read what it judges.")
    as_message = bool(tokenizer.chat_template) if chat is None else chat
    made: list[Prompt] = []
    for one, other in ((first, second), (second, first)):
        for question, shown_first, shown_second in zip(questions, one, other, strict=True):
            text = template.format(question=question, first=shown_first, second=shown_second)
            made.append([{"role": "user", "content": text}] if as_message else text)
    return made
