"""Gradient entanglement, measured: whether margin losses will move chosen and rejected log-probs together."""

import itertools
import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer

from hf_logits.gradients import gradients, inner_product


def log_prob_changes(
    chosen_square: Float[Tensor, " B"],
    rejected_square: Float[Tensor, " B"],
    inner: Float[Tensor, " B"],
    *,
    chosen_weight: float,
    rejected_weight: float,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """How a small step of a margin loss changes both log-probs, per unit of learning rate.

    Args:
        chosen_square, rejected_square: `|G_w|^2` and `|G_l|^2`, of the gradients of both log-probs.
        inner: `<G_w, G_l>`.
        chosen_weight, rejected_weight: `d_w` and `d_l`, what the loss weighs the gradients with. Equal for DPO, whose
            chosen log-prob then rises if and only if `<G_w, G_l> < |G_w|^2`, and whose rejected one falls if and only if
            `<G_w, G_l> < |G_l|^2`.
    """
    # the step is d_w G_w - d_l G_l
    return (
        chosen_weight * chosen_square - rejected_weight * inner,
        chosen_weight * inner - rejected_weight * rejected_square,
    )


class EntanglementCallback(TrainerCallback):
    """Logs, for any DPO-like run, whether its pairs are entangled and where their log-probs went.

    Yuan et al. 2024, "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement"
    (https://huggingface.co/papers/2410.13828).

    Measured on the first pairs of the training data, each alone, every few steps; means over the pairs are logged as:

    - `entanglement/cosine`: of both gradients;
    - `entanglement/inner_over_chosen`, `entanglement/inner_over_rejected`: `<G_w, G_l> / |G_w|^2` and `/ |G_l|^2`. Above 1, a
      small step of a loss that weighs both alike moves that log-prob the wrong way;
    - `entanglement/violated`: the fraction of the pairs with one of them above 1;
    - `entanglement/chosen_change`, `entanglement/rejected_change`: of the log-probs since training began.

    Costs two backward passes a pair. Training itself is not touched: same weights, to the last bit.

    Example:

    ```python
    >>> trainer = DPOTrainer(...)
    >>> trainer.add_callback(EntanglementCallback(trainer, pairs=8, every=50))
    ```

    Args:
        trainer ([`~trl.DPOTrainer`]): the trainer, or one of its subclasses.
        pairs (`int`, *optional*, defaults to `4`): how many to measure.
        every (`int`, *optional*, defaults to `10`): at steps that are multiples of this.
        parameters (`str`, *optional*): a regular expression; gradients of trained parameters with such names only.
    """

    def __init__(self, trainer: Trainer, *, pairs: int = 4, every: int = 10, parameters: str | None = None):
        if not isinstance(trainer, DPOTrainer):
            raise TypeError(f"EntanglementCallback needs a DPOTrainer, with pairs; got {type(trainer).__name__}.")
        if pairs < 1 or every < 1:
            raise ValueError(f"pairs and every must be at least 1, got {pairs} and {every}.")
        self.trainer: Any = trainer
        self.pairs, self.every, self.parameters = pairs, every, parameters
        self._batches: list[dict[str, Tensor]] = []
        self._first: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = itertools.islice(self.trainer.train_dataset, self.pairs)
        self._batches = [self.trainer.data_collator([row]) for row in rows]
        with torch.no_grad():
            self._first = [self._log_probs(batch) for batch in self._batches]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            for name, value in self.measure().items():
                self.trainer._metrics["train"][f"entanglement/{name}"].append(value)

    def measure(self) -> dict[str, float]:
        """The means over the pairs, now."""
        pattern = self.parameters or ""
        named = self.trainer.model.named_parameters()
        parameters = [one for name, one in named if one.requires_grad and re.search(pattern, name)]
        rows = []
        for batch, first in zip(self._batches, self._first, strict=True):
            with torch.enable_grad():
                log_probs = self._log_probs(batch)
                chosen, rejected = (gradients(one, parameters) for one in log_probs)
            inner, square_w, square_l = (
                inner_product(chosen, rejected),
                inner_product(chosen, chosen),
                inner_product(rejected, rejected),
            )
            rises, falls = log_prob_changes(
                square_w[None], square_l[None], inner[None], chosen_weight=1.0, rejected_weight=1.0
            )
            ratios = torch.stack([inner / (square_w * square_l).sqrt(), inner / square_w, inner / square_l])
            violated = torch.cat([rises < 0, falls > 0]).any().float()
            rows.append(torch.cat([ratios, violated[None], log_probs.detach() - first]))
        names = ("cosine", "inner_over_chosen", "inner_over_rejected", "violated", "chosen_change", "rejected_change")
        return dict(zip(names, torch.stack(rows).nanmean(0).tolist(), strict=True))

    def _log_probs(self, batch: dict[str, Tensor]) -> Float[Tensor, " 2"]:
        model, device = self.trainer.model, self.trainer.accelerator.device
        inputs = {key: value.to(device) for key, value in batch.items() if not key.startswith("ref_")}
        mask = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        training = model.training
        model.eval()
        try:
            with self.trainer.compute_loss_context_manager():
                output = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        finally:
            model.train(training)
        return output.log_probs.sum(1)
