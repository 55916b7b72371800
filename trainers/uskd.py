"""USKD: soft labels without a teacher, from the student's own logits and from weak ones of an intermediate feature."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.class_logits import check_logits, expected, label_mask, log_softmax_without, widen
from hf_logits.distillation import DistillationConfig
from hf_logits.extra_head import ExtraHeadMixin
from hf_logits.fused_head import Head, fused_loss
from hf_logits.tasks import LANGUAGE, bare, valid_rows


RANKINGS = ("paper", "official")
ZIPFS = ("official", "compact")
SMOOTHING = 0.1
"""Of the labels that the weak logits learn."""


def label_values(labels: Num[Tensor, "N ..."], classes: int) -> Float[Tensor, "N C"]:
    """Class ids as one-hot rows; probabilities, of one label or of two (mixup), as they are.

    Raises:
        ValueError: probabilities with more than two labels in a row, or with none.
    """
    if labels.dim() == 1:
        return label_mask(labels, classes).float()
    count = (labels > 0).sum(-1)
    if count.numel() and (count.min() < 1 or count.max() > 2):
        raise ValueError(
            f"Soft labels must have one or two classes above 0 in each row, as mixup makes them; got {int(count.min())} to "
            f"{int(count.max())}. Label smoothing goes into the task's own loss."
        )
    return labels


def soft_targets(
    log_probs: Float[Tensor, "N C"], values: Float[Tensor, "N C"], *, mean: Float[Tensor, ""] | None = None
) -> Float[Tensor, "N C"]:
    """`v + p(y)^2 - mean p(y)^2` at the labels, 0 elsewhere: more weight for rows that the student is sure of.

    The mean is over the batch, for each of two labels (the larger, the smaller) its own, over the rows that have it; or it is given,
    where these rows are a part of the batch. A target may exceed 1. Detached.
    """
    squares = log_probs.detach().exp().square()
    first = label_mask(values.argmax(-1), values.size(-1))
    result = torch.zeros_like(squares)
    for mask in (first, (values > 0) & ~first):
        own = torch.where(mask, squares, 0.0).sum() / mask.sum().clamp(min=1) if mean is None else mean
        result = torch.where(mask, values + squares - own, result)
    return result


def rank_scores(
    log_probs: Float[Tensor, "N C"],
    weak_log_probs: Float[Tensor, "N C"],
    is_label: Bool[Tensor, "N C"],
    *,
    ranking: str,
) -> Float[Tensor, "N C"]:
    """By what the classes are ranked: the two probabilities of a class, each divided by what its model leaves to the others.

    `"official"` has the student's log-probability in place of its probability, in the denominator too.
    """

    def share(values: Tensor) -> Tensor:
        taken = torch.where(is_label, values, 0.0).sum(-1, keepdim=True)
        return values / (1 - taken + 1e-6)

    student = log_probs.detach()
    return share(weak_log_probs.detach().exp()) + share(student.exp() if ranking == "paper" else student)


def zipf_weights(
    scores: Float[Tensor, "N C"], is_label: Bool[Tensor, "N C"], *, zipf: str, limit: int | None
) -> Float[Tensor, "N C"]:
    """`1 / rank` by falling scores for all classes but the label, normalised to 1. A score of `-inf` has no rank.

    Args:
        zipf: `"official"`: the label has a rank too, which the others skip. `"compact"`: it has none.
        limit: classes behind this rank weigh nothing. `None`: all have a weight.
    """
    if zipf == "compact":
        scores = scores.masked_fill(is_label, -math.inf)
    classes = scores.size(-1)
    places = scores.topk(classes if limit is None else min(limit, classes), dim=-1).indices
    inverse = 1.0 / torch.arange(1, places.size(-1) + 1, dtype=scores.dtype, device=scores.device)
    weights = torch.zeros_like(scores).scatter(-1, places, inverse.expand_as(places))
    weights = weights.masked_fill(is_label | scores.isneginf(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def uskd_terms(
    student_logits: Float[Tensor, "N C"],
    weak_logits: Float[Tensor, "N C"],
    labels: Num[Tensor, "N ..."],
    *,
    ranking: str,
    zipf: str,
    limit: int | None,
    mean: Float[Tensor, ""] | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """The three parts of [`uskd_loss`] before their weights, one value a row: `target`, `non_target`, `weak`.

    `mean` is that of [`soft_targets`].
    """
    values = label_values(labels, student_logits.size(-1)).to(student_logits.dtype)
    is_label = values > 0
    student, weak = student_logits.log_softmax(-1), weak_logits.log_softmax(-1)
    scores = rank_scores(student, weak, is_label, ranking=ranking)
    scores = scores.masked_fill(student_logits.isneginf(), -math.inf)
    weights = zipf_weights(scores, is_label, zipf=zipf, limit=limit)
    smooth = (1 - SMOOTHING) * values + SMOOTHING / values.size(-1)
    return {
        "target": -expected(soft_targets(student, values, mean=mean), student),
        "non_target": -expected(weights, log_softmax_without(student_logits, is_label)),
        "weak": -expected(smooth.masked_fill(weak_logits.isneginf(), 0.0), weak),
    }


def uskd_loss(
    student_logits: Float[Tensor, "N C"],
    weak_logits: Float[Tensor, "N C"],
    labels: Num[Tensor, "N ..."],
    *,
    alpha: float,
    beta: float,
    mu: float,
    ranking: str = "paper",
    zipf: str = "official",
    limit: int | None = None,
) -> Float[Tensor, ""]:
    """`alpha L_target + beta L_non_target + mu L_weak`, averaged over the rows. The task's loss is not in it.

    Args:
        student_logits, weak_logits: of the rows that have a label, in any floating dtype; computed in float32 at least. Both get
            a gradient, through their own parts; what makes the targets is detached.
        labels: class ids, or probabilities with one or two classes a row (mixup). Two labels are both left out of the other
            classes, and a single one leaves out no second class, as the released code would.
        alpha: weight of the label's part, `-(1 + p(y)^2 - mean p(y)^2) log p(y)`. Its mean makes rows depend on their batch.
        beta: weight of the other classes' part, a cross-entropy with Zipf's law over their ranks.
        mu: weight of the cross-entropy of the weak logits and the labels, smoothed by 0.1.
        ranking: `"paper"`: by probabilities of both. `"official"`: the released code takes the student's log-probability.
        zipf: `"official"`: the label is ranked too and then left out, so the others skip its rank. `"compact"`: they do not.
        limit: the classes that are ranked, best first, for large vocabularies [ours]. `None` is all of them.

    Raises:
        ValueError: shapes that do not fit, labels out of range, fewer than two classes, no rows, unknown words.
    """
    for name, weight in (("alpha", alpha), ("beta", beta), ("mu", mu)):
        check_number(name, weight, minimum=0.0)
    check_choice("ranking", ranking, *RANKINGS)
    check_choice("zipf", zipf, *ZIPFS)
    if limit is not None:
        check_count("limit", limit, minimum=1)
    check_logits(student_logits, weak_logits, "weak", labels=labels, classes=2)
    terms = uskd_terms(widen(student_logits), widen(weak_logits), labels, ranking=ranking, zipf=zipf, limit=limit)
    return (alpha * terms["target"] + beta * terms["non_target"] + mu * terms["weak"]).mean()


def pool(hidden: Float[Tensor, "B ..."], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B D"]:
    """One vector for each example: the mean over the pixels of a map `[B, D, H, W]`, or over the tokens of `[B, L, D]`."""
    if hidden.dim() == 4:
        return hidden.mean((-2, -1))
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    return hidden.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@dataclass
class USKDConfig(DistillationConfig):
    """What [`USKDTrainer`] needs beside the settings of all distillation trainers.

    Args:
        alpha (`float`, *optional*, defaults to `1.0`): weight of the label's part. The authors take 0.1 for CIFAR-100.
        beta (`float`, *optional*, defaults to `0.1`): weight of the other classes' part.
        mu (`float`, *optional*, defaults to `0.005`): weight of the weak logits' part. The authors take 0.1 for CIFAR-100.
        ce_weight (`float`, *optional*, defaults to `1.0`): weight of the labels' cross-entropy, the task's own loss.
        ranking (`str`, *optional*, defaults to `"paper"`): `"paper"` or `"official"`, see [`uskd_loss`].
        zipf (`str`, *optional*, defaults to `"official"`): `"official"` or `"compact"`, see [`uskd_loss`].
        rank_limit (`int`, *optional*): the classes that are ranked. `None`: all, and 256 of a language model's tokens [ours].
        weak_layer (`int`, *optional*):
            Of the model's hidden states, which weak logits are made of. `None`: the last but one of a model whose stages differ in
            width, as the authors take for convolutional models, else the middle one [ours].
    """

    alpha: float = field(default=1.0, metadata={"help": "Weight of the label's part."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the other classes' part."})
    mu: float = field(default=0.005, metadata={"help": "Weight of the weak logits' part."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the labels' cross-entropy."})
    ranking: str = field(default="paper", metadata={"help": "By what classes are ranked.", "choices": list(RANKINGS)})
    zipf: str = field(default="official", metadata={"help": "Whether the label has a rank.", "choices": list(ZIPFS)})
    rank_limit: int | None = field(default=None, metadata={"help": "The classes that are ranked."})
    weak_layer: int | None = field(default=None, metadata={"help": "Which hidden state weak logits are made of."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "mu", "ce_weight"):
            check_number(name, getattr(self, name), minimum=0.0)
        check_choice("ranking", self.ranking, *RANKINGS)
        check_choice("zipf", self.zipf, *ZIPFS)
        if self.rank_limit is not None:
            check_count("rank_limit", self.rank_limit, minimum=1)


class USKDTrainer(ExtraHeadMixin):
    """Cross-entropy + USKD, without a teacher, from [From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
    with Normalized Loss and Customized Soft Labels](https://huggingface.co/papers/2303.13005).

    Weak logits come from a linear head on an intermediate feature, which is trained with the student and is in its resume
    checkpoints, and not in what is saved of it. A language model reads its own head from a middle layer instead, without the last
    norm [ours]. That head runs on a chunk of the tokens at a time, and once more before, for the mean that the label's part needs.

    Beside the released code: classes are ranked by probabilities (`ranking="official"`: by the student's log-probabilities), and
    there is one sort. Which feature a vision transformer's weak logits come from there is not certain; here it is the mean over the
    tokens. The label's part compares a row with its micro-batch and process, so it changes with their size; a batch of one has a
    target of 1.

    Logged under `distillation/`: `cross_entropy`, `target`, `non_target`, `weak`, and the common meters. Arguments as in
    [`~hf_logits.distillation.DistillationTrainer`], without a teacher.
    """

    args: USKDConfig
    needs_teacher = False
    _config = USKDConfig
    _name = "USKD"
    _tag_names = ["hf_logits", "uskd"]
    _paper = {
        "title": "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized "
        "Soft Labels",
        "id": "2303.13005",
        # docstyle-ignore
        "citation": """\
@inproceedings{yang2023knowledge,
    title     = {{From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels}},
    author    = {Zhendong Yang and Ailing Zeng and Zhe Li and Tianke Zhang and Chun Yuan and Yu Li},
    year      = 2023,
    booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision}
}""",
    }

    def __init__(self, model: Any, teacher: Any = None, args: Any = None, **rest: Any):
        super().__init__(model, teacher, args, **rest)
        self._weak: Tensor | None = None
        self._mean: Tensor | None = None
        if not self._active:
            return
        if self.task in LANGUAGE:
            self._lens = Head(self._unwrapped)
            return
        config: Any = bare(model).config
        widths = config.to_dict().get("hidden_sizes") or [getattr(config, "hidden_size", None)]
        if None in widths:
            raise ValueError(
                f"{type(config).__name__} does not say how wide the hidden states are, which weak logits are made of: give a model whose "
                "config has hidden_size or hidden_sizes."
            )
        layer = self._layer(len(widths) + 1) if len(widths) > 1 else -1
        # the first hidden state is the embeddings', as wide as the first stage
        width = widths[max(layer - 1, 0)] if layer >= 0 else widths[layer]
        self.attach(lambda: nn.Linear(width, config.num_labels))

    @property
    def _active(self) -> bool:
        return bool(self.args.alpha or self.args.beta or self.args.mu)

    def _layer(self, states: int) -> int:
        layer = self.args.weak_layer
        if layer is None:
            config: Any = bare(self._unwrapped).config
            layer = -2 if "hidden_sizes" in config.to_dict() else (states - 1) // 2
        if not -states <= layer < states:
            raise ValueError(f"weak_layer={layer}, but there are {states} hidden states.")
        return layer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._active:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        _, wanted, _ = self._split(inputs)
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            if not isinstance(output, ModelOutput):  # a loss comes through here too
                return
            states = output["decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"]
            hidden = states[self._layer(len(states))]
            if wanted.dim() == 1:
                mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                hidden = pool(hidden, mask)
            seen[:] = [valid_rows(hidden, wanted)[0]]

        handle = self._unwrapped.register_forward_hook(keep)
        self._seen = seen
        asked = {**inputs, "output_hidden_states": True}
        try:
            with self._lens.watched() if self._extra is None else contextlib.nullcontext():
                found = super().compute_loss(model, asked, return_outputs, num_items_in_batch)
        finally:
            handle.remove()
            self._seen, self._mean = [], None
        if not return_outputs:
            return found
        loss, outputs = found
        # what only the loss has asked for is no prediction
        kept = {name: value for name, value in outputs.items() if not name.endswith("hidden_states")}
        return loss, type(outputs)(**kept)

    def fused_rows(
        self, hidden: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "N ... D"], Callable[[Tensor], Tensor]]:
        """Of each row what the head reads, and what the weak logits are made of."""
        if not self._active:
            return super().fused_rows(hidden, labels)

        def squares(logits: Tensor, teacher: None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return logits.log_softmax(-1).gather(-1, labels[:, None]).exp().square().sum(), {}

        def head(rows: Float[Tensor, "N 2 D"]) -> Float[Tensor, "N 2 V"]:
            logits = self._student_head(rows.flatten(0, 1))
            return logits.view(-1, 2, logits.size(-1))

        with torch.no_grad():
            total, _ = fused_loss(hidden, self._student_head, labels, squares, chunk_size=self.args.chunk_size)
        self._mean = total / max(1, len(labels))
        return torch.stack([hidden, self._seen[0].to(hidden.dtype)], 1), head

    def weigh(
        self, student: Float[Tensor, "N ... C"], teacher: Tensor | None, labels: Int[Tensor, " N"], *stored: Tensor
    ) -> Any:
        student, self._weak = student.unbind(1) if student.dim() == 3 else (student, None)
        try:
            return super().weigh(student, teacher, labels, *stored)
        finally:
            self._weak = None  # or it would outlive its chunk

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        found = {"cross_entropy": cross_entropy(student, labels, reduction="none")}
        if not self._active:
            return found
        hidden = self._seen[0]
        if self._weak is not None:
            weak = self._weak
        elif self._extra is None:
            weak = self._lens(hidden.to(self._unwrapped.dtype))
        else:
            weak = self._extra(hidden.to(next(self._extra.parameters()).dtype))
        limit = 256 if self.args.rank_limit is None and self.task in LANGUAGE else self.args.rank_limit
        weak, ranking = widen(weak), self.args.ranking
        return found | uskd_terms(
            student, weak, labels, ranking=ranking, zipf=self.args.zipf, limit=limit, mean=self._mean
        )

    def term_weights(self) -> dict[str, float]:
        weights = {"cross_entropy": self.args.ce_weight}
        if not self._active:
            return weights
        return weights | {"target": self.args.alpha, "non_target": self.args.beta, "weak": self.args.mu}
