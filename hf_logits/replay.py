"""Run the model once, then let a stock TRL trainer compute with an edited copy of what it returned.

A stock `_compute_loss` touches the policy only by calling it, and reads the reference's log-probs from the batch when they
are precomputed. So whoever holds the outputs can change them, or the reference, and everything else stays TRL's:
metrics, PEFT, precomputed references, weightings, auxiliary losses.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_logits.preferences import check_pairs


if TYPE_CHECKING:
    from trl import DPOTrainer as Stock
else:
    Stock = object


NOT_FOR_THE_MODEL = frozenset(
    {"completion_mask", "label", "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}
)
"""What stock batches hold beside the arguments of the model. Whatever a subclass adds, it pops before it calls these."""


class ReplayMixin(Stock):
    """Goes in front of `DPOTrainer`, or of `KTOTrainer` with a loss that needs no KL pairs.

    A subclass overrides `compute_loss`, which calls [`run_once`], edits, and returns [`replay`]. It names its config
    class, so that the stock one is never made in its place.
    """

    _config: type
    reference_columns: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self, model: Any, ref_model: PreTrainedModel | None = None, args: Any = None, *rest: Any, **kwargs: Any
    ):
        name = type(self).__name__
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = self._config(f"{path.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self._config):
            raise TypeError(f"{name} needs `args` of type {self._config.__name__}, got {type(args).__name__}.")
        if ref_model is not None and not isinstance(model, str):
            sizes = [one.config.get_text_config().vocab_size for one in (model, ref_model)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The model has a vocabulary of {sizes[0]} tokens and `ref_model` one of {sizes[1]}: their log-probs "
                    "cannot be compared. Leave `ref_model` out to take the model before training, or, if one of the two "
                    "was only padded, call `resize_token_embeddings` on it."
                )
        super().__init__(model, ref_model, args, *rest, **kwargs)

    def record(self, **values: Tensor) -> None:
        """Log the mean of each value over the processes among the metrics, under the mode that runs."""
        assert self.model is not None
        metrics = self._metrics["train" if self.model.training else "eval"]
        for key, value in values.items():
            metrics[key].append(self.accelerator.gather(value.detach()).mean().item())

    def check_dataset(self, dataset: Any, name: str) -> Any:
        """Refuse rows that cannot be learned from. Pairs by default."""
        return check_pairs(dataset, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        checked = self.check_dataset(dataset, dataset_name)
        return super()._prepare_dataset(checked, processing_class, args, dataset_name)

    def run_once(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The policy's per-token fields for the batch, asked for as the stock trainer does."""
        kwargs = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL} | {"use_cache": False}
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**kwargs, labels=labels, fused_lm_head=True)

    def reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The reference's log-probs by column: the batch's own if they are precomputed, else of one forward."""
        if self.precompute_ref_logps:
            return {column: inputs[column] for column in self.reference_columns if column in inputs}
        found = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        columns = zip(self.reference_columns, found, strict=True)
        return {column: value for column, value in columns if value is not None}

    def replay(
        self,
        model: Any,
        inputs: dict[str, Any],
        outputs: Any,
        *,
        reference: dict[str, Any] | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """The stock loss, and the stock metrics, of `outputs` in place of a forward.

        Args:
            outputs: what [`run_once`] returned, or a copy with other fields (`dataclasses.replace`).
            reference: the reference's log-probs by column. `None` leaves them to the stock trainer.
        """

        def recorded(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            # KTO asks with a copy where the device has a number that its tensors lack, as "cpu:0" under gloo
            given, ran = kwargs["input_ids"], inputs["input_ids"]
            if given is not ran and not torch.equal(given, ran):
                raise RuntimeError(
                    "The stock trainer asked for a batch that was not run (KL pairs?): nothing to replay."
                )
            return outputs

        stock = super().compute_loss
        if reference is None:
            return stock(recorded, inputs, return_outputs)
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return stock(recorded, {**inputs, **reference}, return_outputs)
        finally:
            self.precompute_ref_logps = before
