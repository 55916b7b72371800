"""Measurements of what steering and alignment do, as `evaluate` modules; one a file, its arithmetic in numpy first.

The names below are imported when they are first asked for, so `import hf_logits.metrics` loads neither torch nor evaluate.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_logits.metrics.attentiveness import Attentiveness
    from hf_logits.metrics.calibration_error import CalibrationError
    from hf_logits.metrics.compute_metrics import as_compute_metrics
    from hf_logits.metrics.dialogue_coherence import DialogueCoherence
    from hf_logits.metrics.diversity import Diversity
    from hf_logits.metrics.judge_position import JudgePosition
    from hf_logits.metrics.judges import judge_by_log_probs, judge_by_samples
    from hf_logits.metrics.mcq_callback import MCQEvalCallback
    from hf_logits.metrics.mcq_chain import McqChain
    from hf_logits.metrics.open_set import OpenSet, open_set_inputs
    from hf_logits.metrics.personality import Personality
    from hf_logits.metrics.position_bias import PositionBias
    from hf_logits.metrics.refusal_rate import RefusalRate
    from hf_logits.metrics.scoring import ChoiceTable, choice_logprobs
    from hf_logits.metrics.steering_cost import SteeringCost
    from hf_logits.metrics.sycophancy import Sycophancy
    from hf_logits.metrics.verbalizer_gap import VerbalizerGap

__all__ = [
    "Attentiveness",
    "CalibrationError",
    "ChoiceTable",
    "DialogueCoherence",
    "Diversity",
    "JudgePosition",
    "MCQEvalCallback",
    "McqChain",
    "OpenSet",
    "Personality",
    "PositionBias",
    "RefusalRate",
    "SteeringCost",
    "Sycophancy",
    "VerbalizerGap",
    "as_compute_metrics",
    "choice_logprobs",
    "judge_by_log_probs",
    "judge_by_samples",
    "open_set_inputs",
    "script",
]

_HOMES = {
    "Attentiveness": "hf_logits.metrics.attentiveness",
    "CalibrationError": "hf_logits.metrics.calibration_error",
    "ChoiceTable": "hf_logits.metrics.scoring",
    "DialogueCoherence": "hf_logits.metrics.dialogue_coherence",
    "Diversity": "hf_logits.metrics.diversity",
    "JudgePosition": "hf_logits.metrics.judge_position",
    "MCQEvalCallback": "hf_logits.metrics.mcq_callback",
    "McqChain": "hf_logits.metrics.mcq_chain",
    "OpenSet": "hf_logits.metrics.open_set",
    "Personality": "hf_logits.metrics.personality",
    "PositionBias": "hf_logits.metrics.position_bias",
    "RefusalRate": "hf_logits.metrics.refusal_rate",
    "SteeringCost": "hf_logits.metrics.steering_cost",
    "Sycophancy": "hf_logits.metrics.sycophancy",
    "VerbalizerGap": "hf_logits.metrics.verbalizer_gap",
    "as_compute_metrics": "hf_logits.metrics.compute_metrics",
    "choice_logprobs": "hf_logits.metrics.scoring",
    "judge_by_log_probs": "hf_logits.metrics.judges",
    "judge_by_samples": "hf_logits.metrics.judges",
    "open_set_inputs": "hf_logits.metrics.open_set",
}


def script(name: str) -> str:
    """The path that `evaluate.load` takes for a metric, as in `evaluate.load(script("calibration_error"))`.

    Args:
        name (`str`): the metric's name in small letters.
    """
    folder = Path(__file__).with_name("scripts")
    path = folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.py")))
        raise ValueError(f"There is no metric named {name!r}; there are {known}.")
    return str(path)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
