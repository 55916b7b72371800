"""What a recipe's file may say: its names, its bounds, and the one error that all its faults become."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM


RECIPE_FILE = "logits_processor.json"
TENSOR_FILE = "logits_processor.safetensors"
SCHEMA_VERSION = 1

METHODS = {
    "dynamic_fusion": "DynamicFusionLogitsProcessor",
    "entropy_adaptive": "EntropyAdaptiveLogitsProcessor",
    "gedi": "GeDiLogitsProcessor",
    "gedi_repetition_penalty": "GeDiRepetitionPenaltyLogitsProcessor",
    "lqcd": "LQCDLogitsProcessor",
    "mixture": "MixtureLogitsProcessor",
    "refusal_tokens": "RefusalTokenLogitsProcessor",
    "steer": "SteerLogitsProcessor",
}
"""The only names that a recipe can turn into code."""
METHOD_OF = {name: method for method, name in METHODS.items()}

TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "image-text-to-text": AutoModelForImageTextToText,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
ADAPTERS = {"LORA", "IA3", "LOHA", "LOKR"}
"""Kinds of adapters that hold weights and nothing else. X-LoRA, for one, names further repositories to load."""

RUNTIME = {"self", "tokenizer", "auxiliary_tokenizer", "encoder_inputs"}
"""What a caller gives when loading; never part of a recipe."""

MAX_JSON, MAX_TENSORS = 2_000_000, 256_000_000  # bytes
MAX_DEPTH, MAX_ITEMS = 12, 200_000
FOLDER = re.compile(r"auxiliary_[0-9]{1,4}")
COMMIT, CHECKSUM = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class RecipeError(ValueError):
    """A recipe that is not what it should be. The message names the file, the key and the fix."""


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_repo_id(name: Any) -> bool:
    """Whether `name` could be a repository on the Hub."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
