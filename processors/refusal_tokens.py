"""Refusal tokens: the model says by its first token whether it refuses, and a threshold decides."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.checks import check_choice, check_number, check_per_row
from hf_logits.logits import repeat_items
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor
from hf_logits.prompts import single_token


def choose_single(
    probs: Float[Tensor, "R V"], *, refuse: int, respond: int, threshold: float | Tensor | None
) -> Int[Tensor, " R"]:
    """Refuse iff `p(refuse) >= threshold`; without a threshold, iff it is at least `p(respond)`."""
    bound = probs[:, respond] if threshold is None else threshold
    return torch.where(probs[:, refuse] >= bound, refuse, respond)


def choose_category(
    probs: Float[Tensor, "R V"], *, categories: Int[Tensor, " C"], respond: int, thresholds: Float[Tensor, "R C"]
) -> Int[Tensor, " R"]:
    """The most probable category, if it reaches its own threshold; else respond.

    A NaN threshold is a category that was not selected: the model then keeps its own most probable token, marked by -1.
    """
    best, index = probs[:, categories].max(-1)
    bound = thresholds.gather(-1, index[:, None])[:, 0]
    chosen = torch.where(best >= bound, categories[index], respond)
    return torch.where(bound.isnan(), -1, chosen)


def choose_sum(
    probs: Float[Tensor, "R V"], *, categories: Int[Tensor, " C"], respond: int, threshold: float | Tensor
) -> Int[Tensor, " R"]:
    """Refuse iff all categories together reach the threshold, with the most probable of them; else respond."""
    of_categories = probs[:, categories]
    return torch.where(of_categories.sum(-1) >= threshold, categories[of_categories.argmax(-1)], respond)


class RefusalTokenLogitsProcessor(AuxiliaryLogitsProcessor):
    """Turn the refusal rate of a model trained with refusal tokens, at the first position of its answer.

    Jain et al. 2024, "Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models"
    (https://huggingface.co/papers/2412.06748). `"single"` and `"category"` follow the published evaluation code (which uses a
    softmax temperature of 2 for categories, whatever it is told; here it is what you pass). `"sum"` and `"bias"` follow the
    paper as we remember it: not compared with the authors' code, which has neither.

    Costs no forward. All rows of a batch begin their answers together, so this acts on the first generated token, and on
    later ones only returns log-probabilities. If the chat template has already begun the answer, the position is wrong. A
    repetition penalty runs before and lowers the tokens' probability if the prompt contains them.

    Args:
        refuse (`int`, `str` or `Mapping`): the refusal token, or `{category: token}`. Text must be exactly one token.
        respond (`int` or `str`): the token of ordinary answers.
        threshold (`float`, `[B]` tensor or `Mapping`, *optional*):
            Probability from which on the model refuses (inclusive). In mode `"single"` the default `None` asks for at least the
            probability of `respond`. In mode `"category"` it may be `{category: threshold}`; a category without one is left to the
            model.
        mode (`str`, *optional*, defaults to `"single"`):
            `"single"`: one token; `"category"`: the best category against its threshold; `"sum"`: all categories together against
            one threshold, the best is emitted; `"bias"`: add `bias` to the tokens' logits and decode as usual.
        softmax_temperature (`float`, *optional*, defaults to `1.0`): of the probabilities that are compared.
        bias (`float`, `[B]` tensor or `Mapping`, *optional*): for `"bias"`, one number or `{category: number}`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): needed where tokens are given as text.

    Example:

    ```python
    >>> processor = RefusalTokenLogitsProcessor(refuse="[refuse]", respond="[respond]", threshold=0.3, tokenizer=tokenizer)
    >>> model.generate(**inputs, logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        *,
        refuse: int | str | Mapping[str, int | str],
        respond: int | str,
        threshold: float | Tensor | Mapping[str, float] | None = None,
        mode: Literal["single", "category", "sum", "bias"] = "single",
        softmax_temperature: float = 1.0,
        bias: float | Tensor | Mapping[str, float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        check_choice("mode", mode, "single", "category", "sum", "bias")
        self.refuse, self.respond, self.threshold, self.mode = refuse, respond, threshold, mode
        check_number("softmax_temperature", softmax_temperature, minimum=0.0, above=True)
        self.softmax_temperature, self.bias = softmax_temperature, bias

        names = refuse if isinstance(refuse, Mapping) else {"refuse": refuse}
        self._categories = {name: single_token(token, tokenizer, what="refuse") for name, token in names.items()}
        self._respond = single_token(respond, tokenizer, what="respond")
        tokens = [*self._categories.values(), self._respond]
        if not names or len(set(tokens)) < len(tokens):
            raise ValueError(f"refuse and respond must be different tokens, at least one to refuse; got ids {tokens}.")
        if mode == "single" and len(names) > 1:
            raise ValueError(f"mode='single' has one refusal token, got {len(names)}: use mode='category' or 'sum'.")
        if (mode == "bias") != (bias is not None) or (mode == "bias" and threshold is not None):
            raise ValueError(
                f"mode='bias' takes bias= and no threshold=, the others no bias=; got {mode=}, {threshold=}, {bias=}."
            )
        if mode in ("category", "sum") and threshold is None:
            raise ValueError(f"mode={mode!r} needs a threshold.")
        if mode in ("single", "sum") and isinstance(threshold, Mapping):
            raise ValueError(f"mode={mode!r} compares one probability: give one threshold, or use mode='category'.")
        self._values = self._per_category(
            "bias" if mode == "bias" else "threshold", bias if mode == "bias" else threshold
        )
        super().__init__()

    def _per_category(self, name: str, value: float | Tensor | Mapping[str, float] | None) -> Tensor | None:
        """The checked values, of shape `[C]`, or `[B, C]` when each batch item has its own."""
        low = -math.inf if name == "bias" else 0.0
        if value is None:
            return None
        if isinstance(value, Mapping):
            unknown = set(value) - set(self._categories)
            if unknown:
                raise ValueError(f"{name} names {sorted(unknown)}; the categories are {sorted(self._categories)}.")
            for category in value:
                check_number(f"{name}[{category!r}]", value[category], minimum=low)
            missing = 0.0 if name == "bias" else math.nan
            return torch.tensor([value.get(category, missing) for category in self._categories])
        number = check_per_row(name, value, minimum=low)
        columns = len(self._categories)
        return number[:, None].expand(-1, columns) if isinstance(number, Tensor) else torch.full((columns,), number)

    def saved_arguments(self) -> dict[str, Any]:
        refuse = self._categories if isinstance(self.refuse, Mapping) else self._categories["refuse"]
        return super().saved_arguments() | {"refuse": refuse, "respond": self._respond}

    def steer(self, step: Step, log_probs: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        categories = torch.tensor(list(self._categories.values()), device=log_probs.device)
        highest = max(int(categories.max()), self._respond)
        if highest >= log_probs.shape[-1]:
            raise ValueError(
                f"Token {highest} is beyond the model's {log_probs.shape[-1]} logits: add the tokens and resize_token_embeddings() before "
                "training."
            )
        if step.position:
            return log_probs
        values = self._rows(log_probs.shape[0], log_probs)
        if self.mode == "bias":
            assert values is not None
            biased = log_probs.clone()
            biased[:, categories] += values
            self.record(step, refusal=biased.log_softmax(-1)[:, categories].exp().sum(-1))
            return biased.log_softmax(-1) if bool(values.any()) else log_probs
        probs = (log_probs / self.softmax_temperature).softmax(-1)
        self.record(step, refusal=probs[:, categories].sum(-1))
        bound = None if values is None else values[:, 0]
        if self.mode == "single":
            chosen = choose_single(probs, refuse=int(categories[0]), respond=self._respond, threshold=bound)
        elif self.mode == "sum":
            assert bound is not None
            chosen = choose_sum(probs, categories=categories, respond=self._respond, threshold=bound)
        else:
            assert values is not None
            chosen = choose_category(probs, categories=categories, respond=self._respond, thresholds=values)
        chosen = torch.where(chosen < 0, log_probs.argmax(-1), chosen)
        forced = torch.full_like(log_probs, -math.inf).scatter(-1, chosen[:, None], 0.0)
        # A decision for a token that is banned (suppress_tokens, say) cannot be carried out: those rows stay plain.
        return torch.where(log_probs.gather(-1, chosen[:, None]).isneginf(), log_probs, forced)

    def _rows(self, rows: int, like: Tensor) -> Tensor | None:
        if self._values is None:
            return None
        values = self._values.to(like)
        return values.expand(rows, -1) if values.dim() == 1 else repeat_items(values, rows)
