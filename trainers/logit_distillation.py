"""Logit distillation: a student learns a teacher's distribution over classes or tokens, and the labels beside it."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from hf_logits.checks import check_choice, check_number
from hf_logits.class_logits import widen
from hf_logits.distillation import DistillationConfig, DistillationTrainer
from hf_logits.sparse_teacher import MODES, check_sparse_temperature, sparse_kd


logger = logging.get_logger(__name__)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


class _Divergence(torch.autograd.Function):
    """One value a row, with its gradient in closed form, of which no more is kept than one tensor of the logits' size."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, divergence: str, temperature: float, beta: float
    ) -> Tensor:
        ls = (student / temperature if temperature != 1.0 else student).log_softmax(-1)
        lt = (teacher / temperature if temperature != 1.0 else teacher).log_softmax(-1)
        if divergence == "forward_kl":
            # KL(t || s) = sum p_t (log p_t - log p_s); gradient p_s - p_t
            pt = lt.exp()
            value = _expect(pt, lt.sub_(ls))
            gradient = ls.exp_().sub_(pt)
        elif divergence == "reverse_kl":
            # KL(s || t) = sum p_s (log p_s - log p_t); gradient p_s (log p_s - log p_t - KL)
            ps = ls.exp()
            products = _products(ps, ls.sub_(lt))
            value = products.sum(-1)
            gradient = products.sub_(ps.mul_(value[:, None]))
        elif divergence == "jsd":
            # m = (1 - b) p_s + b p_t; b KL(t || m) + (1 - b) KL(s || m); gradient (1 - b) p_s (log p_s - log m - KL(s || m))
            lm = torch.logaddexp(ls + math.log1p(-beta), lt + math.log(beta))
            ps = ls.exp()
            products = _products(ps, ls.sub_(lm))
            to_student = products.sum(-1)
            pt = lt.exp()
            value = beta * _expect(pt, lt.sub_(lm)) + (1.0 - beta) * to_student
            gradient = products.sub_(ps.mul_(to_student[:, None])).mul_(1.0 - beta)
        else:
            # TVD = 1/2 sum |p_s - p_t|; subgradient 1/2 p_s (sign - sum p_s sign)
            ps = ls.exp_()
            difference = lt.exp_().neg_().add_(ps)
            value = difference.abs().sum(-1) / 2
            sign = difference.sign_()
            gradient = sign.sub_((ps * sign).sum(-1, keepdim=True)).mul_(ps).div_(2)
        ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer / ctx.temperature)[:, None], None, None, None, None


def _products(probs: Tensor, values: Tensor) -> Tensor:
    """p v, in place of v, and 0 where p is 0 whatever v is."""
    return values.mul_(probs).masked_fill_(probs == 0, 0.0)


def _expect(probs: Tensor, values: Tensor) -> Tensor:
    return _products(probs, values).sum(-1)


def kd_rows(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N T"],
    *,
    divergence: str,
    temperature: float,
    beta: float = 0.5,
    scale_by_temperature_squared: bool = True,
) -> Float[Tensor, " N"]:
    """The divergence of each row; arguments as in [`kd_loss`]. It can be differentiated once, by the student's logits."""
    check_choice("divergence", divergence, *DIVERGENCES)
    check_number("temperature", temperature, minimum=0.0, above=True)
    check_number("beta", beta, minimum=0.0, maximum=1.0)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student and teacher need logits of one shape, got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}: cut "
            "padded vocabularies to the tokens that both have."
        )
    if divergence == "jsd":
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
        if 0.0 < beta < 0.05:
            logger.warning_once(
                f"beta={beta}: the generalised JSD itself goes to 0 with beta (it is near beta times the forward KL), while beta=0 is the "
                "forward KL. Take 0, or at least 0.05."
            )
    student, teacher = widen(student_logits), widen(teacher_logits).detach()
    rows: Tensor = _Divergence.apply(student, teacher, divergence, float(temperature), float(beta))
    return rows * temperature**2 if scale_by_temperature_squared else rows


def kd_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N T"],
    *,
    divergence: str,
    temperature: float,
    beta: float = 0.5,
    scale_by_temperature_squared: bool = True,
) -> Float[Tensor, ""]:
    """How far the student's distribution is from the teacher's, as the mean over the rows, in float32 or better.

    Args:
        student_logits, teacher_logits: `-inf` for what is excluded. The gradient flows to the student alone.
        divergence (`str`):
            `"forward_kl"`: KL(teacher || student). `"reverse_kl"`: KL(student || teacher). `"jsd"`: the generalised
            Jensen-Shannon divergence, beta KL(t || m) + (1 - beta) KL(s || m) with m = (1 - beta) p_s + beta p_t.
            `"tvd"`: half of the L1 distance.
        temperature (`float`): what both logits are divided by.
        beta (`float`, *optional*, defaults to `0.5`):
            Of `"jsd"`. By convention, `0` is the forward and `1` the reverse KL; the divergence itself goes to zero there.
        scale_by_temperature_squared (`bool`, *optional*, defaults to `True`):
            Whether to multiply by the squared temperature, so that the size of the gradient hardly depends on it.

    Raises:
        ValueError: an unknown divergence, a temperature that is not positive, beta outside of [0, 1], unequal shapes.
    """
    rows = kd_rows(
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        beta=beta,
        scale_by_temperature_squared=scale_by_temperature_squared,
    )
    return rows.mean()


@dataclass
class LogitDistillationConfig(DistillationConfig):
    """What [`LogitDistillationTrainer`] needs beside the settings of all distillation trainers.

    Args:
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            `"forward_kl"`, `"reverse_kl"`, `"jsd"` or `"tvd"`; see [`kd_loss`].
        temperature (`float`, *optional*, defaults to `1.0`):
            What the logits of both models are divided by in the divergence.
        beta (`float`, *optional*, defaults to `0.5`):
            Of the generalised JSD. `0` is the forward KL, `1` the reverse one.
        kd_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the labels' cross-entropy, at temperature 1.
        scale_by_temperature_squared (`bool`, *optional*, defaults to `True`):
            Whether the divergence is multiplied by the squared temperature.
        offline_mode (`str`, *optional*, defaults to `"tail"`):
            How a stored teacher is read of whom only the best tokens are known, `"tail"`, `"renorm"` or `"zero"`; see
            [`~hf_logits.sparse_teacher.sparse_kd_loss`]. Only the forward KL at temperature 1 can be had of it.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={"help": "How far the student is from the teacher.", "choices": list(DIVERGENCES)},
    )
    temperature: float = field(default=1.0, metadata={"help": "What both models' logits are divided by."})
    beta: float = field(default=0.5, metadata={"help": "Of the generalised JSD. 0: forward KL. 1: reverse KL."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the labels' cross-entropy."})
    scale_by_temperature_squared: bool = field(
        default=True, metadata={"help": "Whether the divergence is multiplied by the squared temperature."}
    )
    offline_mode: str = field(
        default="tail",
        metadata={"help": "How a stored teacher's best tokens are read.", "choices": list(MODES)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, *DIVERGENCES)
        check_choice("offline_mode", self.offline_mode, *MODES)
        check_number("temperature", self.temperature, minimum=0.0, above=True)
        check_number("beta", self.beta, minimum=0.0, maximum=1.0)
        check_number("kd_weight", self.kd_weight, minimum=0.0)
        check_number("ce_weight", self.ce_weight, minimum=0.0)


class LogitDistillationTrainer(DistillationTrainer):
    """kd_weight divergence(student, teacher) + ce_weight cross-entropy(student, labels), from [Distilling the Knowledge in a
    Neural Network](https://huggingface.co/papers/1503.02531); the generalised JSD from [On-Policy Distillation of Language
    Models](https://huggingface.co/papers/2306.13649).

    Logged under `distillation/`: `divergence`, `cross_entropy`, and the common meters. With `kd_weight=0` this is training on
    the labels alone. Without a teacher, a dataset from [`load_teacher_logits`] stands in for it. Arguments as in [`~hf_logits.distillation.DistillationTrainer`].
    """

    args: LogitDistillationConfig
    _config = LogitDistillationConfig
    _name = "Logit distillation"
    _tag_names = ["hf_logits", "logit-distillation"]
    _paper = {
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
        # docstyle-ignore
        "citation": """\
@misc{hinton2015distilling,
    title  = {{Distilling the Knowledge in a Neural Network}},
    author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
    year   = 2015,
    eprint = {1503.02531}
}""",
    }

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        assert teacher is not None
        divergence = kd_rows(
            student,
            teacher,
            divergence=self.args.divergence,
            temperature=self.args.temperature,
            beta=self.args.beta,
            scale_by_temperature_squared=self.args.scale_by_temperature_squared,
        )
        return {
            "divergence": divergence,
            "cross_entropy": torch.nn.functional.cross_entropy(student, labels, reduction="none"),
        }

    def stored_terms(
        self,
        student: Float[Tensor, "N C"],
        labels: Int[Tensor, " N"],
        ids: Int[Tensor, "N k"],
        log_probs: Float[Tensor, "N k"],
    ) -> dict[str, Float[Tensor, " N"]]:
        return {
            "divergence": sparse_kd(student, ids, log_probs, mode=self.args.offline_mode),
            "cross_entropy": torch.nn.functional.cross_entropy(student, labels, reduction="none"),
        }

    def _check_stored(self, args: LogitDistillationConfig, stored: dict[str, Any]) -> None:
        check_sparse_temperature(args.temperature)
        if args.divergence != "forward_kl" and (args.divergence, args.beta) != ("jsd", 0.0):
            raise ValueError(
                f"Of a stored teacher only its {stored['k']} best tokens are known, and divergence={args.divergence!r} needs all of them: "
                'set divergence="forward_kl", or give the teacher itself.'
            )

    def term_weights(self) -> dict[str, float]:
        return {"divergence": self.args.kd_weight, "cross_entropy": self.args.ce_weight}
