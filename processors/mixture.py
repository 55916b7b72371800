"""Mixtures of logits: classifier-free guidance, context-aware decoding, proxy-tuning, DExperts, contrastive decoding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.auxiliary import Context
from hf_logits.checks import check_count, check_number, check_per_row
from hf_logits.logits import keep, plausible, row_column, top_p
from hf_logits.processing import AuxiliaryLogitsProcessor, Model, prompt_context
from hf_logits.prompts import as_data, last_token


def mixture(
    main: Float[Tensor, "R V"],
    others: Sequence[Float[Tensor, "R V"]],
    *,
    main_weight: float | Tensor,
    weights: Sequence[float | Tensor],
) -> Float[Tensor, "R V"]:
    """`main_weight * main + sum of weight * other`, in log-probabilities; what `main` bans stays banned."""
    scores = main_weight * main
    for other, weight in zip(others, weights, strict=True):
        scores = scores + weight * other
    return keep(scores, ~main.isneginf())  # also where a weight has made NaN or +inf of a ban


class MixtureTerm(NamedTuple):
    """One summand of a mixture.

    Attributes:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): whose log-probabilities.
        weight (`float` or `[B]` tensor): their weight, of either sign.
        prompt: what the model reads in place of the main prompt, in any form that [`~hf_logits.prompts.as_rewrite`] takes.
        adapter (`str`, *optional*): an adapter of a [`~peft.PeftModel`], or `"__base__"`.
        temperature (`float`): divides the log-probabilities, which are not normalised again.
    """

    model: Model
    weight: float | Tensor
    prompt: Any = None
    adapter: str | None = None
    temperature: float = 1.0


class MixtureLogitsProcessor(AuxiliaryLogitsProcessor):
    """A weighted sum of log-probabilities, which many methods are. Use its named constructors, or write your own terms.

    Args:
        terms (`Sequence[MixtureTerm]`): what is added to the main model's log-probabilities.
        main_weight (`float` or `[B]` tensor, *optional*, defaults to `1.0`): of the main model's own.
        plausibility (`float` or `[B]` tensor, *optional*):
            Ban tokens below this fraction of the main model's best probability.
        base_filter_p (`float`, *optional*): ban what is outside the main model's nucleus of this mass, before mixing.
        min_tokens_to_keep (`int`, *optional*, defaults to `1`): tokens that `plausibility` leaves at least; 2 for beams.
        tokenizer, auxiliary_tokenizer, pad_token_id, encoder_inputs:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`]; the named constructors pass them on.

    Example:

    ```python
    >>> processor = MixtureLogitsProcessor.cfg(model, "A rude answer:", scale=1.5, tokenizer=tokenizer)
    >>> model.generate(**inputs, num_beams=4, logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        terms: Sequence[MixtureTerm],
        *,
        main_weight: float | Tensor = 1.0,
        plausibility: float | Tensor | None = None,
        base_filter_p: float | None = None,
        min_tokens_to_keep: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        encoder_inputs: Any = None,
    ):
        if isinstance(terms, MixtureTerm):
            raise TypeError("terms must be a list of MixtureTerm, got one alone: put it into a list.")
        self.terms = [MixtureTerm(*term) for term in terms]
        self.main_weight = check_per_row("main_weight", main_weight)
        for term in self.terms:
            check_per_row("weight", term.weight)
            check_number("temperature", term.temperature, minimum=0.0, above=True)
        if plausibility is not None:
            plausibility = check_per_row("plausibility", plausibility, minimum=0.0, maximum=1.0)
        if base_filter_p is not None:
            check_number("base_filter_p", base_filter_p, minimum=0.0, maximum=1.0, above=True)
        check_count("min_tokens_to_keep", min_tokens_to_keep, minimum=1)
        self.plausibility, self.base_filter_p, self.min_tokens_to_keep = (
            plausibility,
            base_filter_p,
            min_tokens_to_keep,
        )
        self._live = [term for term in self.terms if isinstance(term.weight, Tensor) or term.weight != 0]
        plain = not isinstance(self.main_weight, Tensor) and self.main_weight == 1
        self.acts_alone = not plain or plausibility is not None or base_filter_p is not None
        contexts: list[tuple[Model, Context]] = []
        for term in self._live:
            context = prompt_context(term.model, term.prompt, tokenizer=tokenizer, adapter=term.adapter)
            contexts.append((term.model, context))
        super().__init__(
            contexts,
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
            encoder_inputs=encoder_inputs,
        )

    def combine(self, log_probs: Float[Tensor, "R V"], *auxiliary: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        rows = log_probs.shape[0]
        scores = mixture(
            log_probs,
            [values / term.temperature for values, term in zip(auxiliary, self._live, strict=True)],
            main_weight=row_column(self.main_weight, rows, log_probs),
            weights=[row_column(term.weight, rows, log_probs) for term in self._live],
        )
        if self.base_filter_p is not None:
            scores = keep(scores, top_p(log_probs, self.base_filter_p))
        if self.plausibility is not None:
            beta = row_column(self.plausibility, rows, log_probs)
            scores = keep(scores, plausible(log_probs, beta, min_tokens_to_keep=self.min_tokens_to_keep))
        return scores

    def saved_arguments(self) -> dict[str, Any]:
        terms = [term._replace(prompt=as_data(term.prompt, self.tokenizer)) for term in self.terms]
        return super().saved_arguments() | {"terms": terms}

    @classmethod
    def cfg(
        cls, model: Model, negative_prompt: Any = None, *, scale: float | Tensor, **kwargs: Any
    ) -> "MixtureLogitsProcessor":
        """Classifier-free guidance: `scale * main + (1 - scale) * negative`.

        Sanchez et al. 2023 (https://huggingface.co/papers/2306.17806). Without `negative_prompt` the unconditional branch
        begins with the prompt's last token, as in transformers. `scale=1` is the plain model. `kwargs` go to the class.
        """
        scale = check_per_row("scale", scale)
        prompt = last_token if negative_prompt is None and not model.config.is_encoder_decoder else negative_prompt
        return cls([MixtureTerm(model, 1 - scale, prompt)], main_weight=scale, **kwargs)

    @classmethod
    def context_aware(
        cls, model: Model, prompt_without_context: Any, *, contrast: float | Tensor, **kwargs: Any
    ) -> "MixtureLogitsProcessor":
        """Context-aware decoding: `(1 + contrast) * main - contrast * without`. Trust the context over what is remembered.

        Shi et al. 2023 (https://huggingface.co/papers/2305.14739). The authors use 0.5 for summaries, 1 for conflicting facts.
        """
        contrast = check_per_row("contrast", contrast, minimum=0.0)
        return cls([MixtureTerm(model, -contrast, prompt_without_context)], main_weight=1 + contrast, **kwargs)

    @classmethod
    def proxy(
        cls, expert: Model, antiexpert: Model, *, weight: float | Tensor = 1.0, prompt: Any = None, **kwargs: Any
    ) -> "MixtureLogitsProcessor":
        """Proxy-tuning: `main + weight * (expert - antiexpert)`, a small model's fine-tuning lent to a large one.

        Liu et al. 2024 (https://huggingface.co/papers/2401.08565). `prompt` is the expert's own, for a chat model that needs its
        template.
        """
        weight = check_per_row("weight", weight)
        return cls([MixtureTerm(expert, weight, prompt), MixtureTerm(antiexpert, -weight)], **kwargs)

    @classmethod
    def dexperts(
        cls,
        expert: Model | None,
        antiexpert: Model | None,
        *,
        weight: float | Tensor,
        filter_p: float | None = 0.9,
        **kwargs: Any,
    ) -> "MixtureLogitsProcessor":
        """DExperts: proxy-tuning's sum inside the main model's nucleus, with a negative `weight` to flip the direction.

        Liu et al. 2021 (https://huggingface.co/papers/2105.03023): 2.0 for detoxification, 3.2 for sentiment. A missing model is
        the main one, before the filter (the published code then gets NaN).
        """
        weight = check_per_row("weight", weight)
        if expert is None and antiexpert is None:
            raise ValueError("dexperts needs an expert, an antiexpert, or both.")
        terms = [MixtureTerm(m, w) for m, w in ((expert, weight), (antiexpert, -weight)) if m is not None]
        main_weight = 1.0 if len(terms) == 2 else 1 - weight if antiexpert is None else 1 + weight
        return cls(terms, main_weight=main_weight, base_filter_p=filter_p, **kwargs)

    @classmethod
    def contrastive(
        cls,
        amateur: Model,
        *,
        plausibility: float | Tensor = 0.1,
        amateur_temperature: float = 1.0,
        weight: float | Tensor = 1.0,
        strength: float | Tensor | None = None,
        ignore_prompt: bool = False,
        **kwargs: Any,
    ) -> "MixtureLogitsProcessor":
        """Contrastive decoding: `main - weight * amateur / amateur_temperature` among the plausible tokens.

        Li et al. 2022 (https://huggingface.co/papers/2210.15097; they use an amateur temperature of 0.5 and beams, for which
        their code keeps two tokens: `min_tokens_to_keep=2`). With `strength` the form of O'Brien and Lewis 2023
        (https://huggingface.co/papers/2309.09117): `(1 + strength) * main - strength * amateur`. With `ignore_prompt` the amateur
        sees the prompt's last token only, as in the published code.
        """
        prompt = last_token if ignore_prompt else None
        if strength is None:
            weight = check_per_row("weight", weight, minimum=0.0)
            terms = [MixtureTerm(amateur, -weight, prompt, None, amateur_temperature)]
            return cls(terms, plausibility=plausibility, **kwargs)
        strength = check_per_row("strength", strength, minimum=0.0)
        terms = [MixtureTerm(amateur, -strength, prompt, None, amateur_temperature)]
        return cls(terms, main_weight=1 + strength, plausibility=plausibility, **kwargs)
