"""Decoding methods for `generate` and pipelines, one a file."""

from hf_logits.attention_heads import collect_head_activations
from hf_logits.head_vectors import HeadVectors
from hf_logits.processors.dynamic_fusion import DynamicFusionLogitsProcessor
from hf_logits.processors.entropy_adaptive import EntropyAdaptiveLogitsProcessor
from hf_logits.processors.gedi import GeDiLogitsProcessor
from hf_logits.processors.gedi_repetition_penalty import GeDiRepetitionPenaltyLogitsProcessor
from hf_logits.processors.lqcd import LQCDLogitsProcessor, neutralize
from hf_logits.processors.mixture import MixtureLogitsProcessor, MixtureTerm
from hf_logits.processors.negative_pool import NegativePool
from hf_logits.processors.personality_alignment import answer_probabilities, fit_personality, search_strength
from hf_logits.processors.refusal_tokens import RefusalTokenLogitsProcessor
from hf_logits.processors.steer import SteerLogitsProcessor


__all__ = [
    "DynamicFusionLogitsProcessor",
    "EntropyAdaptiveLogitsProcessor",
    "GeDiLogitsProcessor",
    "GeDiRepetitionPenaltyLogitsProcessor",
    "HeadVectors",
    "LQCDLogitsProcessor",
    "MixtureLogitsProcessor",
    "MixtureTerm",
    "NegativePool",
    "RefusalTokenLogitsProcessor",
    "SteerLogitsProcessor",
    "answer_probabilities",
    "collect_head_activations",
    "fit_personality",
    "neutralize",
    "search_strength",
]
