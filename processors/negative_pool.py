"""A pool of texts to stay away from, for negative prompting."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hf_logits.checks import check_count


class NegativePool:
    """The examples to stay away from: real ones to begin with, and every one that was written since.

    Args:
        examples (`Sequence[str]`): the texts to begin with.
        k (`int`, *optional*, defaults to `10`): how many to draw.
        seed (`int`, *optional*, defaults to `0`): of the draws.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): needed for `max_tokens`.
        max_tokens (`int`, *optional*):
            Leave out drawn examples that would make the context longer than this. Whole examples, never their tails.
    """

    def __init__(
        self,
        examples: Sequence[str],
        *,
        k: int = 10,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int | None = None,
    ):
        if isinstance(examples, str) or not examples:
            raise ValueError(f"examples must be a list with at least one text, got {examples!r}.")
        check_count("k", k, minimum=1)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, minimum=1)
        if max_tokens is not None and tokenizer is None:
            raise ValueError("max_tokens counts tokens: pass tokenizer= too.")
        self.examples: list[str] = []
        self.add(*examples)
        self.k, self.tokenizer, self.max_tokens = k, tokenizer, max_tokens
        self._random = random.Random(seed)

    def add(self, *examples: str) -> None:
        """Put newly written texts into the pool."""
        for example in examples:
            if not isinstance(example, str) or not example:
                raise TypeError(f"examples must be texts that are not empty, got {example!r}.")
        self.examples.extend(examples)

    def draw(self) -> list[str]:
        """`k` examples without replacement (all, if there are fewer)."""
        drawn = self._random.sample(self.examples, min(self.k, len(self.examples)))
        if self.max_tokens is None or self.tokenizer is None:
            return drawn
        kept: list[str] = []
        room: float = self.max_tokens
        for example in drawn:
            size = len(self.tokenizer(example, add_special_tokens=False)["input_ids"]) + 1
            if size <= room:
                kept.append(example)
                room -= size
        if not kept:
            raise ValueError(
                f"No drawn example fits into max_tokens={self.max_tokens}: raise it, or add shorter examples."
            )
        return kept
