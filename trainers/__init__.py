"""Training objectives on logits, one a file. Installed as `hf_logits.trainers`, with the extra `hf_logits[train]`.

The names below are imported when they are first asked for, so that one objective does not load what another one needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_logits.trainers.f_dpo import FDPOConfig, FDPOTrainer, f_dpo_loss
    from hf_logits.trainers.rpo import RPOConfig, RPOTrainer, rpo_loss

__all__ = [
    "FDPOConfig",
    "FDPOTrainer",
    "RPOConfig",
    "RPOTrainer",
    "f_dpo_loss",
    "rpo_loss",
]

_HOMES = {
    "FDPOConfig": "f_dpo",
    "FDPOTrainer": "f_dpo",
    "RPOConfig": "rpo",
    "RPOTrainer": "rpo",
    "f_dpo_loss": "f_dpo",
    "rpo_loss": "rpo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
