"""A second turn behind an answer that was sampled: what a chat template writes between the two, as ids."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_logits.completions import Prompt, prompt_ids


logger = logging.get_logger(__name__)

_ANSWER = "the-answer-goes-here-7041"
"""Stands for the answer while the template is read. Nothing that a template could take for markup."""


class SecondTurn(NamedTuple):
    """What stands between an answer and the next one. Of `ids`, the first `closing` end the answer's turn."""

    ids: list[int]
    closing: int

    def after(self, answer: list[int], eos_token_ids: list[int]) -> list[int]:
        """The ids that follow `answer`: without what closes its turn if it closed the turn itself."""
        if answer and answer[-1] in eos_token_ids and answer[-1] in self.ids[: self.closing]:
            return self.ids[self.ids.index(answer[-1]) + 1 :]
        return self.ids


def second_turn(
    prompt: Prompt, instruction: str, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any
) -> SecondTurn:
    """Read off the chat template what it puts behind an answer, when the user then says `instruction`.

    The answer itself is never rendered: its ids stay those that were sampled, whatever the template or the tokenizer would make of
    its text. A prompt that is a plain string is no chat: `instruction` then follows the answer as it stands.

    Args:
        prompt: a string, or messages of which the last is not the assistant's.
        instruction: what the user says next.
        template_kwargs: for [`~transformers.PreTrainedTokenizerBase.apply_chat_template`].
    """
    if isinstance(prompt, str):
        ids = tokenizer(text=instruction, add_special_tokens=False)["input_ids"]
        return SecondTurn(_some(ids, instruction), 0)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are messages, but the tokenizer has no chat template to write a second turn with. Set "
            "tokenizer.chat_template, or give prompts that are strings: the instruction then follows the answer as it stands."
        )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"A prompt must end where the assistant is to answer; got one that ends with its message {prompt[-1]['content']!r}."
        )
    turns = [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(
        [*prompt, *turns], tokenize=False, add_generation_prompt=True, **template_kwargs
    )
    assert isinstance(text, str)
    before, *rest = text.split(_ANSWER)
    wanted = instruction.strip()
    if len(rest) != 1 or not wanted or wanted not in rest[0]:
        lost = "the answer" if len(rest) != 1 else f"the instruction {instruction!r}"
        raise ValueError(
            f"The chat template drops {lost} when a user speaks again behind an answer: it wrote {text!r}. Take a template that "
            "renders every turn as it is, and an instruction that is not empty."
        )
    if tokenizer(text=before, add_special_tokens=False)["input_ids"] != prompt_ids(
        prompt, tokenizer, **template_kwargs
    ):
        logger.warning_once(
            "The chat template opens a turn in other words than it shows it with afterwards (as those do that hide "
            "thoughts). The second attempt follows the first as it was sampled: continue from those ids when you use the "
            "model, do not render the first answer anew."
        )
    ids = tokenizer(text=rest[0], add_special_tokens=False)["input_ids"]
    closing = tokenizer(text=rest[0][: rest[0].index(wanted)], add_special_tokens=False)["input_ids"]
    return SecondTurn(_some(ids, instruction), min(len(closing), len(ids)))


def _some(ids: list[int], instruction: str) -> list[int]:
    if not ids:
        raise ValueError(f"The instruction must have at least one token, got {instruction!r}.")
    return ids
