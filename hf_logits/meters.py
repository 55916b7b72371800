"""Means over all rows of many batches and processes: sums on the device, read once in a while."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer


Stock: Any = Trainer if TYPE_CHECKING else object


class Meters:
    """Sums of named values and the number of rows that they are sums over."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Float[Tensor, ""]], rows: int) -> None:
        """Values summed over `rows` rows. Rows that have no values count for nothing."""
        for name, value in sums.items():
            one = torch.stack([value.detach().double(), torch.full_like(value, rows, dtype=torch.float64)])
            self._sums[name] = self._sums[name] + one if name in self._sums else one

    def read(self, accelerator: Any, names: list[str]) -> dict[str, float]:
        """The means over all processes of `names`, in one exchange, and begin anew. A name without rows is left out."""
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        mine = torch.stack([self._sums.get(name, nothing) for name in names])
        self._sums = {}
        total = accelerator.reduce(mine, reduction="sum").tolist()
        return {name: value / rows for name, (value, rows) in zip(names, total, strict=True) if rows}


class MeteredMixin(Stock):
    """Goes in front of a [`~transformers.Trainer`]: logs the means of what `self.meters` is given, while training and evaluating.

    They are means over all rows alike, where the host averages the means of batches.
    """

    _meter_prefix: str
    """Stands in front of every name but `loss`."""

    def meter_names(self) -> list[str]:
        """What is logged beside `loss`."""
        raise NotImplementedError

    @cached_property
    def meters(self) -> dict[str, Meters]:
        """Those of training and those of evaluation."""
        return {"train": Meters(), "eval": Meters()}

    def fresh_rows(self, rows: int) -> int:
        """How many rows of an evaluation's batch, counted from the first, do not repeat others to fill up the last one."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:
        found: Any = super().evaluation_loop(*given, **named)
        prefix = named["metric_key_prefix"] if "metric_key_prefix" in named else given[4] if len(given) > 4 else "eval"
        found.metrics.update({f"{prefix}_{name}": value for name, value in self._means("eval").items()})
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: value for name, value in self._means("train").items() if name != "loss"}
        super().log(logs, start_time)

    def _means(self, mode: str) -> dict[str, float]:
        means = self.meters[mode].read(self.accelerator, list(dict.fromkeys(["loss", *self.meter_names()])))
        return {name if name == "loss" else f"{self._meter_prefix}/{name}": value for name, value in means.items()}


@torch.no_grad()
def compare(
    student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
) -> dict[str, Float[Tensor, ""]]:
    """What is worth knowing about two models' logits, summed over the rows: cross-entropies, entropy, and agreement."""
    # One tensor of their size is made and then worked in: fresh memory is what costs most here.
    best, probs = student.amax(-1), student.softmax(-1)
    normaliser = best - probs.amax(-1).log()
    # H = log Z - sum p s, and 0 times -inf is 0
    mean = probs.mul_(student).nan_to_num_(nan=0.0).sum(-1)
    found = {
        "cross_entropy": (normaliser - student.gather(-1, labels[:, None])[:, 0]).sum(),
        "student_entropy": (normaliser - mean).sum(),
    }
    if teacher is not None:
        found["teacher_cross_entropy"] = cross_entropy(teacher, labels, reduction="sum")
        favourite = teacher.argmax(-1, keepdim=True)
        found["agreement"] = (student.gather(-1, favourite)[:, 0] == best).sum().to(student.dtype)
    return found
