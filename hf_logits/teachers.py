"""A model that is only read: how it is frozen, where it is put, and by what it is known again."""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp


def check_apart(student: PreTrainedModel | PeftModel, teacher: PreTrainedModel | PeftModel) -> None:
    """Refuse a teacher that training the student would change."""
    mine = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in mine for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher is the student, or shares weights with it, and would move as the student learns: load it a second time. "
            "For a PEFT student whose base model is to teach, leave the teacher out and set disabled_adapter_teacher=True."
        )


def freeze(teacher: PreTrainedModel | PeftModel) -> None:
    """No gradients, no dropout; its dtype stays."""
    teacher.requires_grad_(False)
    teacher.eval()


def arguments_of(model: PreTrainedModel | PeftModel) -> set[str]:
    """What its forward reads by name."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(type(whole).forward).parameters) - {"self", "args", "kwargs"}


def without_cache(teacher: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Arguments with which it keeps no keys and values that nobody will read."""
    return {"use_cache": False} if "use_cache" in arguments_of(teacher) else {}


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Images, sounds and the like in a model's dtype; ids as they are."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def place(teacher: PreTrainedModel | PeftModel, accelerator: Any) -> Any:
    """The teacher where the student is trained, sharded if that is. One that was placed when it was loaded stays there."""
    quantised = getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_quantizer", None) is not None
    if quantised or getattr(teacher, "hf_device_map", None) is not None:
        return teacher
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(teacher, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(teacher, accelerator)
    placed = accelerator.prepare_model(teacher, evaluation_mode=True)
    # Among the accelerator's models it would be saved by save_state and hold back the preparation of the student.
    accelerator._models = [model for model in accelerator._models if model is not placed]
    # The student's autocast is not for the teacher, which has a dtype of its own.
    return accelerator.unwrap_model(placed, keep_fp32_wrapper=False)


@contextlib.contextmanager
def teaching(teacher: Any, student: Any = None) -> Iterator[Any]:
    """The teacher, or the student without its adapter if one is given, in a block without gradients.

    Not inference mode, whose tensors no graph may use.
    """
    with torch.no_grad():
        if student is None:
            yield teacher
            return
        training = student.training
        student.eval()
        try:
            with student.disable_adapter():
                yield student
        finally:
            student.train(training)


@torch.no_grad()
def fingerprint(model: PreTrainedModel | PeftModel) -> Tensor:
    """32 bytes that tell frozen models apart: a hash of a few numbers of every frozen parameter, and more of the largest."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.is_meta:
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 2**14)]
        digest.update(f"{name.removeprefix('base_model.model.')} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
