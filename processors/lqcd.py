"""Leading query contrastive decoding: take out of an answer what a leading question put into it."""

import re
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.checks import check_choice, check_per_row
from hf_logits.logits import difference, keep, plausible, row_column
from hf_logits.processing import AuxiliaryLogitsProcessor, Model, prompt_context
from hf_logits.prompts import as_data


def leading_query_contrast(
    neutral: Float[Tensor, "R V"],
    leading: Float[Tensor, "R V"],
    *,
    contrast: float | Tensor,
    plausibility: float | Tensor,
) -> Float[Tensor, "R V"]:
    """`(1 + contrast) * neutral - contrast * leading` over the tokens that are plausible under the neutral question.

    Takes log-probabilities. Banned tokens of `neutral` stay banned; where only `leading` bans, `neutral` speaks alone.
    """
    # (1 + a) l_n - a l_l, as l_n + a (l_n - l_l) so that a ban in l_l can't turn into +inf
    push = difference(neutral, leading).masked_fill(leading.isneginf(), 0.0)
    return keep(neutral + contrast * push, plausible(neutral, plausibility))


class LQCDLogitsProcessor(AuxiliaryLogitsProcessor):
    """Leading Query Contrastive Decoding, against sycophancy, for text and vision-language models.

    Zhao et al. 2024, "Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models"
    (https://huggingface.co/papers/2408.11261). There is no published code; the form is that of visual contrastive decoding
    with the question distorted instead of the image. The paper's own values of `contrast` and `plausibility` are not known to
    us: the defaults are the family's usual ones. The second version's sentiment scaler is not part of this.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the generating model itself.
        other_prompt:
            The question in the form that is not generated from, in any form that [`~hf_logits.prompts.as_rewrite`] takes; for
            pipelines a mapping from prompt to prompt, or a callable. For a vision-language model the processor's whole output,
            images included; with `mm_encoder_outputs` in place of `pixel_values` (here and in `generate`) an image is encoded once.
        main (`str`, *optional*, defaults to `"neutral"`):
            What `generate` is given: the `"neutral"` question (`other_prompt` is then the leading one), or the `"leading"` one.
        contrast (`float` or `[B]` tensor, *optional*, defaults to `1.0`): alpha. With `main="leading"`, `0` is the neutral prompt.
        plausibility (`float` or `[B]` tensor, *optional*, defaults to `0.1`):
            beta: ban tokens below this fraction of the best probability under the neutral question. `0` bans none.
        tokenizer, auxiliary_tokenizer, pad_token_id:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`].

    Example:

    ```python
    >>> leading = tokenizer("I think it is Lyon. What is the capital of France?").input_ids
    >>> processor = LQCDLogitsProcessor(model, leading)
    >>> model.generate(**tokenizer("What is the capital of France?", return_tensors="pt"), logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        model: Model,
        other_prompt: Any,
        *,
        main: Literal["neutral", "leading"] = "neutral",
        contrast: float | Tensor = 1.0,
        plausibility: float | Tensor = 0.1,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
    ):
        check_choice("main", main, "neutral", "leading")
        if other_prompt is None:
            raise ValueError("other_prompt is missing: it is the question in the form that generate() is not given.")
        self.model, self.other_prompt, self.main = model, other_prompt, main
        self.contrast = check_per_row("contrast", contrast, minimum=0.0)
        self.plausibility = check_per_row("plausibility", plausibility, minimum=0.0, maximum=1.0)
        needed = main == "leading" or isinstance(self.contrast, Tensor) or self.contrast > 0
        self.acts_alone = isinstance(self.plausibility, Tensor) or self.plausibility > 0
        super().__init__(
            [(model, prompt_context(model, other_prompt, tokenizer=tokenizer, what="other_prompt"))] if needed else [],
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
        )

    def saved_arguments(self) -> dict[str, Any]:
        return super().saved_arguments() | {"other_prompt": as_data(self.other_prompt, self.tokenizer)}

    def combine(self, log_probs: Float[Tensor, "R V"], *auxiliary: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        other = auxiliary[0] if auxiliary else log_probs
        neutral, leading = (log_probs, other) if self.main == "neutral" else (other, log_probs)
        rows = log_probs.shape[0]
        return leading_query_contrast(
            keep(neutral, ~log_probs.isneginf()),
            leading,
            contrast=row_column(self.contrast, rows, log_probs),
            plausibility=row_column(self.plausibility, rows, log_probs),
        )


_CUES = re.compile(
    r"""(?ix)
    \s* (?: \b (?: i | we ) \s+ (?: really\s+ | strongly\s+ )? (?: think | believe | guess | suspect | feel | am\s+sure | am\s+certain )
          | \b i'm \s+ (?: pretty\s+ | quite\s+ )? (?: sure | certain )
          | \b (?: i | we ) \s+ don't \s+ think
          | \b (?: everyone | everybody | my \s+ \w+ ) \s+ (?: knows | says | said | thinks )
          | \b are \s+ you \s+ (?: really\s+ | absolutely\s+ )? (?: sure | certain )
          | \b (?: isn't | wasn't | aren't ) \s+ (?: it | that ) \s+ (?: right | true | correct )
        ) \b [^.!?\n]* [.!?]*
    """
)


def neutralize(text: str, rewrite: Callable[[str], str] | None = None) -> str:
    """A leading question without its cue: drops sentences such as "I think the answer is B." and "Are you sure?".

    Args:
        text (`str`): the leading question, in English.
        rewrite (`Callable[[str], str]`, *optional*): used in place of the patterns, to let a language model do it.

    Returns:
        `str`: the neutral question; the text itself if nothing is left of it.
    """
    if rewrite is not None:
        return rewrite(text)
    neutral = re.sub(r"[ \t]{2,}", " ", _CUES.sub("", text)).strip()
    return neutral or text
