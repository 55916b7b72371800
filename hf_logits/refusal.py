"""Refusal tokens as text, and which one a label means: what training, calibration and decoding have to agree on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_logits.prompts import single_token


RESPOND = "respond"
"""A label that means an ordinary answer. No category may have this name."""


@dataclass(frozen=True)
class RefusalTokens:
    """The tokens that begin an answer.

    Args:
        refuse (`str` or `Mapping[str, str]`, *optional*, defaults to `"[refuse]"`):
            The token of refusals, or `{category: token}`.
        respond (`str`, *optional*, defaults to `"[respond]"`): the token of ordinary answers.
    """

    refuse: str | Mapping[str, str] = "[refuse]"
    respond: str = "[respond]"

    def __post_init__(self) -> None:
        texts: list[Any] = self.texts
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise ValueError(f"Refusal tokens are texts, none of them empty; got {texts}.")
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise ValueError(f"refuse and respond must be different tokens, at least one to refuse; got {texts}.")
        if RESPOND in self.categories:
            raise ValueError(f"No category may be called {RESPOND!r}, which is the label of ordinary answers.")

    @property
    def categories(self) -> dict[str, str]:
        """`{category: token}`; a single token is the category `"refuse"`."""
        return dict(self.refuse) if isinstance(self.refuse, Mapping) else {"refuse": self.refuse}

    @property
    def texts(self) -> list[str]:
        """All of them, `respond` last."""
        return [*self.categories.values(), self.respond]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Their ids, in the order of `texts`; a text that is not exactly one token is refused."""
        return [single_token(text, tokenizer, what="refusal token") for text in self.texts]

    def category(self, label: Any) -> str | None:
        """The category that a row's label names, `None` for an ordinary answer.

        With a single token, labels are true (refuse) and false; with categories, their names. `None`, false and
        `"respond"` are ordinary answers in both.
        """
        if label is None or label is False or label == 0 or label == RESPOND:
            return None
        if not isinstance(self.refuse, Mapping) and (label is True or label == 1 or label == "refuse"):
            return "refuse"
        if isinstance(self.refuse, Mapping) and isinstance(label, str) and label in self.refuse:
            return label
        refusing = sorted(self.refuse) if isinstance(self.refuse, Mapping) else [True, "refuse"]
        raise ValueError(
            f"A row has the label {label!r}. Refusals are {', '.join(map(repr, refusing))}; ordinary answers None, False or "
            f"{RESPOND!r}. Map your labels to these (`dataset.map`)."
        )

    def token(self, label: Any) -> str:
        """The token that a row's answer begins with."""
        category = self.category(label)
        return self.respond if category is None else self.categories[category]
