"""The repetition penalty that the published GeDi code applies after guidance."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from hf_logits.checks import check_number
from hf_logits.recipe import SharedAsRecipe


class GeDiRepetitionPenaltyLogitsProcessor(SharedAsRecipe, LogitsProcessor):
    """The repetition penalty of the published GeDi code: scores are made positive first, then divided.

    Goes behind [`~hf_logits.processors.GeDiLogitsProcessor`] in the list. It does not return log-probabilities, so it is for greedy search and
    sampling; under beam search add `renormalize_logits=True`.

    Args:
        penalty (`float`, *optional*, defaults to `1.2`): divides the scores of tokens that occurred.
        scale (`float`, *optional*, defaults to `10.0`): the score that the best token is lifted to before.
    """

    supports_continuous_batching = False

    def __init__(self, penalty: float = 1.2, scale: float = 10.0):
        check_number("penalty", penalty, minimum=0.0, above=True)
        check_number("scale", scale, minimum=0.0)
        self.penalty, self.scale = penalty, scale

    def __call__(self, input_ids: Int[Tensor, "R L"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        lifted = scores - scores.amax(-1, keepdim=True) + self.scale
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, input_ids, True)
        # What lies below zero even so would gain from being divided.
        return torch.where(seen, torch.where(lifted > 0, lifted / self.penalty, lifted * self.penalty), lifted)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(penalty={self.penalty}, scale={self.scale})"
