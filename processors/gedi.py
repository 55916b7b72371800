"""GeDi: a small class-conditional model says of every candidate token how it fits the wanted class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.auxiliary import Context
from hf_logits.checks import check_number, check_per_row
from hf_logits.logits import leading, row_column
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor, Model
from hf_logits.prompts import Rewrite, as_data, as_rewrite, control_code


def class_log_posterior(
    conditional: Float[Tensor, "C R V"],
    running: Float[Tensor, "C R"],
    length: Int[Tensor, " R"],
    *,
    scale: float | Tensor,
    bias: Float[Tensor, " C"],
    length_normalise: bool,
) -> Float[Tensor, "R V"]:
    """Log-probability that a text belongs to class 0, for each candidate next token.

    Args:
        conditional: next-token log-probs of the class-conditional model, class 0 the desired one.
        running: R_c, the sum of the log-probs of the tokens so far under each class.
        length: how many tokens that sum has.
        scale: of the class logits (alpha); a number or a column `[R, 1]`.
        bias: added to each class's logit.
        length_normalise: whether sums are divided by their length, the candidate included.
    """
    # a_c(w) = scale * (R_c + log p(w | c)) / (n + 1) + bias_c
    factor = torch.ones_like(conditional[0, :, :1]) * scale
    if length_normalise:
        factor = factor / (length[:, None] + 1)
    offset = running[..., None] * factor + bias[:, None, None]
    return (conditional * factor).add_(offset).log_softmax(0)[0]


def gedi_filter(
    scores: Float[Tensor, "R V"], log_posterior: Float[Tensor, "R V"], *, filter_p: float, target_p: float
) -> Float[Tensor, "R V"]:
    """Ban the tokens of least posterior that together hold less than `filter_p` of the weighted probability.

    Tokens whose posterior is at least `target_p` stay. So do, always, the best ones by posterior, rounding or not. Of equal
    posteriors the first token goes first.
    """
    if target_p == 0:
        return scores
    removed = leading(log_posterior, scores.softmax(-1), filter_p, descending=False, inclusive=True)
    return scores.masked_fill(removed & (log_posterior < math.log(target_p)), -math.inf)


class GeDiLogitsProcessor(AuxiliaryLogitsProcessor):
    """GeDi: guide a large model with a small class-conditional one, at the price of one small forward of two rows a row.

    Krause et al. 2020, "GeDi: Generative Discriminator Guided Sequence Generation"
    (https://huggingface.co/papers/2009.06367). Weighting, then filtering, as in the published code; repetition penalty is
    `generate`'s (it runs before), or [`~hf_logits.processors.GeDiRepetitionPenaltyLogitsProcessor`] behind this one, as in that code. The published
    code swaps a learned bias between the classes when the desired class is the second one; here a bias belongs to its code.

    Args:
        guide ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The class-conditional language model; it reads `<code><secondary code><prompt>...`, the code behind a BOS token.
        desired (`int` or `str`): control code of the wanted class, an id or a text (its first token; needs `tokenizer`).
        undesired (`int`, `str` or a list of them): control code(s) of what to steer away from.
        strength (`float` or `[B]` tensor, *optional*, defaults to `30.0`): omega, the weight of the log-posterior.
        filter_p (`float`, *optional*, defaults to `0.8`):
            At most this much of the weighted probability is banned (1 - rho in the paper). `0` bans nothing.
        target_p (`float`, *optional*, defaults to `0.8`): tau; tokens with at least this posterior are never banned.
        scale (`float` or `[B]` tensor, *optional*, defaults to `1.0`): the learned scale of the class logits.
        bias (`Mapping`, *optional*): the learned bias, as `{code: bias}`.
        class_bias (`float`, *optional*, defaults to `0.0`): added to the desired class. (The published detoxification uses 2 and
            `target_p=0.967273`, so that the threshold of the unbiased posterior stays at 0.8.)
        secondary_code (*optional*): text or ids behind the code in all classes (a topic keyword), shared or one a batch item.
        length_normalise (`bool`, *optional*, defaults to `True`): divide log-likelihoods by length.
        tokenizer, auxiliary_tokenizer, pad_token_id:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`].

    Example:

    ```python
    >>> processor = GeDiLogitsProcessor(guide, desired="positive", undesired="negative", tokenizer=tokenizer)
    >>> pipe("The movie was", logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        guide: Model,
        *,
        desired: int | str,
        undesired: int | str | Sequence[int | str],
        strength: float | Tensor = 30.0,
        filter_p: float = 0.8,
        target_p: float = 0.8,
        scale: float | Tensor = 1.0,
        bias: Mapping[int | str, float] | None = None,
        class_bias: float = 0.0,
        secondary_code: Any = None,
        length_normalise: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
    ):
        if guide.config.is_encoder_decoder:
            raise ValueError("GeDi's guide reads a control code and the text in one stream: use a decoder-only model.")
        self.guide, self.desired, self.undesired = guide, desired, undesired
        self.strength = check_per_row("strength", strength, minimum=0.0)
        check_number("filter_p", filter_p, minimum=0.0, maximum=1.0)
        check_number("target_p", target_p, minimum=0.0, maximum=1.0)
        self.filter_p, self.target_p = filter_p, target_p
        self.scale = check_per_row("scale", scale)
        self.bias = {code: check_number(f"bias[{code!r}]", value) for code, value in (bias or {}).items()}
        check_number("class_bias", class_bias)
        self.class_bias, self.secondary_code, self.length_normalise = class_bias, secondary_code, length_normalise

        others = [undesired] if isinstance(undesired, int | str) else list(undesired)
        self.codes = [control_code(code, tokenizer) for code in [desired, *others]]
        if not others or len(set(self.codes)) < len(self.codes):
            raise ValueError(f"desired and undesired must be different codes; got the token ids {self.codes}.")
        biases = {control_code(code, tokenizer): value for code, value in self.bias.items()}
        if set(biases) - set(self.codes):
            raise ValueError(
                f"bias names codes {sorted(set(biases) - set(self.codes))} that are not among {self.codes}."
            )
        self._biases = torch.tensor([biases.get(code, 0.0) for code in self.codes])
        self._biases[0] += class_bias
        self._bos = guide.config.bos_token_id
        self._secondary = as_rewrite(secondary_code, tokenizer, what="secondary_code")
        active = isinstance(self.strength, Tensor) or self.strength > 0 or filter_p > 0
        terms = [(guide, Context(self._with_code(code))) for code in self.codes] if active else []
        super().__init__(
            terms,
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
            score_tokens=True,
        )

    def saved_arguments(self) -> dict[str, Any]:
        bias = {control_code(code, self.tokenizer): value for code, value in self.bias.items()}
        secondary = as_data(self.secondary_code, self.tokenizer, what="secondary_code")
        codes = {"desired": self.codes[0], "undesired": self.codes[1:]}
        return super().saved_arguments() | codes | {"bias": bias, "secondary_code": secondary}

    def _with_code(self, code: int) -> Rewrite:
        def rewrite(main: list[int], row: int, rows: int) -> list[int]:
            if not main:
                return []  # inputs_embeds alone: the engine says so
            start = self._leading_bos(main)
            secondary = self._secondary(main, row, rows) if self._secondary is not None else []
            # of a text, a tokenizer may begin with another BOS
            return [*main[:start], code, *secondary[self._leading_bos(secondary) :], *main[start:]]

        return rewrite

    def _leading_bos(self, main: list[int]) -> int:
        return int(self._bos is not None and main[:1] == [self._bos])

    def steer(self, step: Step, log_probs: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        if not self.engines:
            return log_probs
        rows = log_probs.shape[0]
        log_posterior = self._log_posterior(step, log_probs)
        strength = row_column(self.strength, rows, log_probs)

        def formula(main: Float[Tensor, "R V"], log_posterior: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
            # log p_w = log p_LM + omega * log p(desired | ...)
            weighted = main + strength * log_posterior
            return gedi_filter(weighted, log_posterior, filter_p=self.filter_p, target_p=self.target_p)

        steered = self.mix(log_probs, formula, log_posterior)
        chosen = steered[:, : log_posterior.shape[-1]].exp()
        self.record(step, posterior=(chosen * log_posterior.exp()).sum(-1))
        return steered

    def _log_posterior(self, step: Step, like: Float[Tensor, "R V"]) -> Float[Tensor, "R W"]:
        """Of the desired class, should a token come next; `W` is `V` or, with a guide of fewer tokens, less."""
        conditional = torch.stack(self.auxiliary_log_probs(step, like.shape[-1]))
        scores = self.engines[0].token_log_probs.to(conditional.device)
        length = self._scored(step)
        newest = torch.arange(scores.shape[-1], 0, -1, device=scores.device) <= length[:, None]
        return class_log_posterior(
            conditional,
            scores.masked_fill(~newest, 0.0).sum(-1),
            length,
            scale=row_column(self.scale, like.shape[0], like),
            bias=self._biases.to(conditional),
            length_normalise=self.length_normalise,
        )

    def _scored(self, step: Step) -> Int[Tensor, " R"]:
        """How many of the last tokens count: everything behind the code, so neither the code nor a BOS before it."""
        read = self.engines[0].lengths[0].to(step.input_ids.device)
        if self._bos is None or step.prompt_length == 0:
            return read - 1
        first = step.input_ids.gather(-1, step.prompt_mask.int().argmax(-1, keepdim=True))[:, 0]
        return read - 1 - (first == self._bos).long()
