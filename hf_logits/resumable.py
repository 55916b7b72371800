"""What a trainer knows beside the weights, saved with every checkpoint and back when training resumes."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer


Stock: Any = Trainer if TYPE_CHECKING else object


class ResumableMixin(Stock):
    """Goes in front of a [`~transformers.Trainer`]. The state lies beside that of the optimizer, and lives as long."""

    _state_file: str

    def extra_state(self) -> dict[str, Tensor]:
        """What has to be saved; nothing if empty."""
        raise NotImplementedError

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what [`extra_state`] gave."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.extra_state()
        if state and self.args.should_save:
            save_file(state, os.path.join(output_dir, self._state_file))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.extra_state():
            return
        path = os.path.join(checkpoint, self._state_file)
        if not os.path.exists(path):
            raise ValueError(
                f"{checkpoint} has no {self._state_file}: it was saved by another trainer, or with other settings than "
                f"this {type(self).__name__}'s. Start from its weights instead of resuming."
            )
        self.load_extra_state(load_file(path))


class RenamedWeightsMixin(Stock):
    """Goes in front of a [`~transformers.Trainer`] that resumes models which are saved under other names than they run with.

    `save_pretrained` gives weights the names of the original checkpoints (of ViT, say), and `from_pretrained` turns them
    back. The host's own loading does not: it would go on from what the model had before.
    """

    _unloaded: bool = False

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model._tied_weights_keys or ()) if isinstance(self.model, PreTrainedModel) else set()
        self._unloaded = bool(set(load_result.missing_keys) - tied) and isinstance(self.model, PreTrainedModel)
        if not self._unloaded:
            super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_under_new_names(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_under_new_names(self.state.best_model_checkpoint)

    def _load_under_new_names(self, checkpoint: str | None) -> None:
        if self._unloaded and checkpoint is not None:
            self._unloaded = False
            fresh = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(fresh.state_dict())


class EpochOrderMixin(Stock):
    """Goes in front of [`~trl.GRPOTrainer`], so that a run resumed in a later epoch sees the prompts in that epoch's order.

    The host draws the order of every epoch from one generator, which begins anew when a run resumes.
    """

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        stock: Any = super()._get_train_sampler(dataset)
        return _EpochOrder(stock, self.args.seed, lambda: int(self.state.epoch or 0)) if stock.shuffle else stock


class _EpochOrder(Sampler[int]):
    """The host's order, as a function of the seed and the epoch."""

    def __init__(self, stock: Any, seed: int, epoch: Callable[[], int]):
        self.stock, self.seed, self.epoch = stock, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.stock.generator.manual_seed(self.seed + self.epoch())
        return iter(self.stock)

    def __len__(self) -> int:
        return len(self.stock)
