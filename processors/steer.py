"""STEER: stay in the domain of a fine-tuned model, and away from what has been written before."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.auxiliary import BASE, Context
from hf_logits.checks import check_count, check_number, check_per_row
from hf_logits.logits import difference, keep, plausible, row_column
from hf_logits.processing import AuxiliaryLogitsProcessor, Model
from hf_logits.prompts import as_data, as_rewrite


def steer(
    tuned: Float[Tensor, "R V"],
    base: Float[Tensor, "R V"] | None,
    negative: Float[Tensor, "R V"] | None,
    *,
    contrast: float | Tensor,
    repulsion: float | Tensor,
    normalise: bool,
) -> Float[Tensor, "R V"]:
    """Contrastive expert guidance with negative prompting, in log-probabilities.

    `(1 + contrast) * tuned - contrast * base - repulsion * negative`. The weights sum to `1 - repulsion`, as in the published
    code; with `normalise` the factor of `tuned` is `1 + contrast + repulsion` and they sum to 1, as in classifier-free
    guidance. Without `base` or `negative` that term is absent. Zero weights return `tuned`.
    """
    scores = tuned
    if base is not None:
        # (1 + g) l_F - g l_B
        scores = scores + contrast * difference(tuned, base)
    if negative is not None:
        # - e l_N, or + e (l_F - l_N)
        scores = scores + repulsion * (difference(tuned, negative) if normalise else -negative)
    return keep(scores, ~tuned.isneginf())


class SteerLogitsProcessor(AuxiliaryLogitsProcessor):
    """STEER for a fine-tuned model: push away from its base, and from examples already written.

    Made for synthetic data that should stay in its domain without repeating itself. O'Neill et al. 2023, "Steering Language
    Generation: Harnessing Contrastive Expert Guidance and Negative Prompting" (https://huggingface.co/papers/2308.07645).
    The arithmetic follows the authors' code; the paper's own typesetting of it was not compared. Use with sampling (the
    authors': `top_k=10`, temperature 1), which then acts on the steered scores.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The fine-tuned model that generates. Needed for `negatives`, and where `base_model` is `None`.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The model before fine-tuning. `None`: `model` is a [`~peft.PeftModel`], and its base is used.
        negatives (*optional*):
            What to stay away from: a list of example texts (joined by one space, shared by all rows), a list of such lists (one
            a batch item), or ids in any form that [`~hf_logits.prompts.as_rewrite`] takes. The task prompt is not part of it.
            [`~hf_logits.processors.NegativePool`] draws them. Texts need `tokenizer`.
        contrast (`float` or `[B]` tensor, *optional*, defaults to `0.2`): gamma, the push away from the base.
        repulsion (`float` or `[B]` tensor, *optional*, defaults to `0.6`):
            eta, the push away from the negatives. Towards 1 the scores become a pure ratio: then use `plausibility` or `top_k`.
        plausibility (`float`, *optional*): ban tokens below this fraction of the tuned model's best probability.
        normalise (`bool`, *optional*, defaults to `False`): weights that sum to 1 instead of `1 - repulsion`.
        protect_ids (`Sequence[int]`, *optional*):
            Ids that the negatives do not push (the end-of-text id: a context of finished examples repels it strongly).
        tokenizer, auxiliary_tokenizer, pad_token_id, encoder_inputs:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`].

    Raises:
        ValueError: no base, no negatives where `model` was given for them, a weight out of range, tokenizers that differ.

    Example:

    ```python
    >>> processor = SteerLogitsProcessor(model=tuned, negatives=pool.draw(), tokenizer=tokenizer)
    >>> tuned.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=10)
    ```
    """

    def __init__(
        self,
        *,
        model: Model | None = None,
        base_model: Model | None = None,
        negatives: Any = None,
        contrast: float | Tensor = 0.2,
        repulsion: float | Tensor = 0.6,
        plausibility: float | None = None,
        normalise: bool = False,
        protect_ids: Sequence[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        encoder_inputs: Any = None,
    ):
        self.model, self.base_model, self.negatives = model, base_model, negatives
        self.contrast = check_per_row("contrast", contrast, minimum=0.0)
        self.repulsion = check_per_row("repulsion", repulsion, minimum=0.0)
        if plausibility is not None:
            check_number("plausibility", plausibility, minimum=0.0, maximum=1.0)
        self.plausibility, self.normalise = plausibility, normalise
        self.protect_ids = [check_count("protect_ids", i, minimum=0) for i in protect_ids]

        terms: list[tuple[Model, Context]] = []
        self._contrasts = isinstance(self.contrast, Tensor) or self.contrast > 0
        self._repels = negatives is not None and (isinstance(self.repulsion, Tensor) or self.repulsion > 0)
        if self._contrasts:
            if base_model is not None:
                terms.append((base_model, Context()))
            elif isinstance(model, PeftModel):
                terms.append((model, Context(adapter=BASE)))
            else:
                raise ValueError(
                    "contrast > 0 needs the model before fine-tuning: pass base_model=, or as model= the PeftModel whose base it is."
                )
        if self._repels:
            if model is None:
                raise ValueError("negatives are read by the fine-tuned model: pass model=.")
            if model.config.is_encoder_decoder:
                raise ValueError(
                    "negatives continue a decoder-only model's text; an encoder-decoder has no such context."
                )
            terms.append((model, Context(as_rewrite(_joined(negatives), tokenizer, what="negatives"))))
        super().__init__(
            terms,
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
            encoder_inputs=encoder_inputs,
        )

    def saved_arguments(self) -> dict[str, Any]:
        negatives = as_data(_joined(self.negatives), self.tokenizer, what="negatives")
        return super().saved_arguments() | {"negatives": negatives}

    def combine(self, log_probs: Float[Tensor, "R V"], *auxiliary: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        rows = log_probs.shape[0]
        base = auxiliary[0] if self._contrasts else None
        negative = auxiliary[-1] if self._repels else None
        if negative is not None and self.protect_ids:
            # No push: as if the negatives thought of these tokens what the tuned model thinks.
            if max(self.protect_ids) >= log_probs.shape[-1]:
                raise ValueError(
                    f"protect_ids holds {max(self.protect_ids)}; the models share the ids below {log_probs.shape[-1]}."
                )
            negative = negative.clone()
            negative[:, self.protect_ids] = log_probs[:, self.protect_ids]
        scores = steer(
            log_probs,
            base,
            negative,
            contrast=row_column(self.contrast, rows, log_probs),
            repulsion=row_column(self.repulsion, rows, log_probs),
            normalise=self.normalise,
        )
        return scores if self.plausibility is None else keep(scores, plausible(log_probs, self.plausibility))


def _joined(negatives: Any) -> Any:
    """Example texts become one text each context; everything else is left as it is."""
    if isinstance(negatives, Sequence) and not isinstance(negatives, str):
        if not negatives:
            raise ValueError(
                "negatives is empty: give at least one example, or None to push away from the base alone."
            )
        if all(isinstance(text, str) for text in negatives):
            return " ".join(negatives)
        if any(isinstance(group, Sequence) and not group for group in negatives):
            raise ValueError(
                f"negatives holds an empty set of examples: give each item of the batch at least one token; got {negatives!r}."
            )
        if all(isinstance(group, Sequence) and all(isinstance(t, str) for t in group) for group in negatives):
            return [group if isinstance(group, str) else " ".join(group) for group in negatives]
    return negatives
