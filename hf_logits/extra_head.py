"""A head that a student has while it is trained: in its optimizer and its checkpoints, and not in what is saved of it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_logits.distillation import DistillationTrainer
from hf_logits.fused_head import inside
from hf_logits.tasks import bare


NAME = "distillation_head"


class ExtraHeadMixin(DistillationTrainer):
    """Goes over a distillation trainer. A subclass calls [`attach`] behind the host's `__init__`."""

    _extra: nn.Module | None = None

    def attach(self, build: Callable[[], nn.Module]) -> None:
        """Add a head to the student, drawn from the seed without touching the random numbers of training."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                f"{type(self).__name__} adds a head to the student, which cannot be sharded: use DDP, or DeepSpeed's ZeRO-1 or 2."
            )
        if self.optimizer is not None:
            raise ValueError(
                f"{type(self).__name__} adds a head to the student, which the optimizer that was given does not know: give "
                "optimizer_cls_and_kwargs, or set optim and learning_rate."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            self._extra = build()
        whole = bare(self._unwrapped)
        self._extra.to(whole.device)
        whole.add_module(NAME, self._extra)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        student, loss = self._unwrapped, super().compute_loss
        if self._extra is None or model is student:
            return loss(model, inputs, return_outputs, num_items_in_batch)
        # DDP looks for unused weights behind its forward, and the head would be one of them.
        return inside(model, student, loss, student, inputs, return_outputs, num_items_in_batch)

    @contextlib.contextmanager
    def _without_extra(self) -> Iterator[None]:
        whole: Any = bare(self._unwrapped)
        taken = whole._modules.pop(NAME, None)
        try:
            yield
        finally:
            if taken is not None:
                whole.add_module(NAME, taken)

    def keep_alive(self) -> Tensor:
        """Zero, with a gradient of zero for the head: DDP waits for one even in a step or a batch that does not use it."""
        assert self._extra is not None
        return torch.stack([0.0 * parameter.sum() for parameter in self._extra.parameters()]).sum()

    def weigh(self, student: Tensor, teacher: Tensor | None, labels: Tensor, *stored: Tensor) -> Any:
        total, sums = super().weigh(student, teacher, labels, *stored)
        return (total if len(labels) or self._extra is None else total + self.keep_alive()), sums

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {name: value for name, value in state_dict.items() if f"{NAME}." not in name}
        with self._without_extra():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._without_extra():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._without_extra():
            super()._load_best_model()

    def extra_state(self) -> dict[str, Tensor]:
        if self._extra is None:
            return super().extra_state()
        head = {
            f"{NAME}.{name}": value.detach().cpu().contiguous() for name, value in self._extra.state_dict().items()
        }
        return super().extra_state() | head

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        super().load_extra_state(state)
        if self._extra is not None:
            start = len(NAME) + 1
            self._extra.load_state_dict(
                {name[start:]: value for name, value in state.items() if name.startswith(NAME)}
            )
