"""Arithmetic on logits, right and fast inside the Hugging Face stack.

The decoding methods live in `hf_logits.processors`, the training objectives in `hf_logits.trainers`; this package is
the floor that both stand on. The names below are imported when they are first asked for, so `import hf_logits` costs
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_logits.auxiliary import AuxiliaryLM, Context
    from hf_logits.generation import generate
    from hf_logits.processing import ResettingLogitsProcessorList
    from hf_logits.recipe import load_recipe, save_recipe
    from hf_logits.recipe_format import RecipeError
    from hf_logits.sharing import pipeline, push_recipe

__version__ = "0.1.0"

__all__ = [
    "AuxiliaryLM",
    "Context",
    "RecipeError",
    "ResettingLogitsProcessorList",
    "generate",
    "load_recipe",
    "pipeline",
    "push_recipe",
    "save_recipe",
]

_HOMES = {
    "AuxiliaryLM": "hf_logits.auxiliary",
    "Context": "hf_logits.auxiliary",
    "RecipeError": "hf_logits.recipe_format",
    "ResettingLogitsProcessorList": "hf_logits.processing",
    "generate": "hf_logits.generation",
    "load_recipe": "hf_logits.recipe",
    "pipeline": "hf_logits.sharing",
    "push_recipe": "hf_logits.sharing",
    "save_recipe": "hf_logits.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
