"""Sinkhorn distillation: optimal transport between a batch of student outputs and the batch of teacher outputs."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_logits.checks import check_count, check_number
from hf_logits.class_logits import check_logits, expected, widen
from hf_logits.distillation import DistillationConfig, DistillationTrainer
from hf_logits.tasks import LANGUAGE


OFFICIAL_SCALE = 1e-3


def unrolled_sinkhorn(
    cost: Float[Tensor, "N M"], *, epsilon: float, iterations: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "N M"]]:
    """Distance and plan, iteration by iteration as they are written, for autograd: the judge of [`sinkhorn_distance`]."""
    logits = -cost / epsilon
    rows, columns = cost.shape
    f, g = torch.zeros_like(cost[:, :1]), torch.zeros_like(cost[:1])
    for _ in range(iterations):
        f = -math.log(rows) - (logits + g).logsumexp(1, keepdim=True)
        g = -math.log(columns) - (logits + f).logsumexp(0, keepdim=True)
    plan = (logits + f + g).exp()
    return (plan * cost).sum(), plan


def _stretch(cost: Tensor) -> int:
    """Iterations between two looks at the exponentials of all entries.

    A step scales a row or a column by at most the larger side and at least its inverse (Birkhoff's contraction). So in that many
    steps no entry that counts can rise from below float32's smallest number, and no scale leaves its range.
    """
    return max(1, int(28 / math.log(max(*cost.shape, 2))))


class _Sinkhorn(torch.autograd.Function):
    """Transport cost after so many iterations, and its exact gradient through all of them.

    Between two absorptions, iterations are products of one matrix with vectors, forwards and backwards, and everything that they
    add to the gradient is one product of matrices. Only vectors are kept.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, epsilon: float, iterations: int, frozen_plan: bool) -> Tensor:
        rows, columns = cost.shape
        logits = cost * (-1 / epsilon)
        f = -math.log(rows) - logits.logsumexp(1)
        g = -math.log(columns) - (logits + f[:, None]).logsumexp(0)
        blocks = []
        done, stretch = 1, _stretch(cost)
        while done < iterations:
            kernel = (logits + f[:, None]).add_(g).exp_()
            u, v = [], [torch.ones_like(g)]
            for _ in range(min(stretch, iterations - done)):
                u.append(1 / (rows * (kernel @ v[-1])))
                v.append(1 / (columns * (u[-1] @ kernel)))
            blocks.append((f, g, torch.stack(u), torch.stack(v)))
            done += len(u)
            f, g = f + u[-1].log(), g + v[-1].log()
        plan = (logits + f[:, None]).add_(g).exp_()
        ctx.epsilon, ctx.frozen_plan, ctx.blocks = epsilon, frozen_plan, len(blocks)
        ctx.save_for_backward(cost, f, g, *(vector for block in blocks for vector in block))
        return (plan * cost).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return gradients[0] * _Sinkhorn.slope(ctx), None, None, None

    @staticmethod
    def slope(ctx: Any) -> Tensor:
        cost, f, g, *saved = ctx.saved_tensors
        rows, columns = cost.shape
        logits = cost * (-1 / ctx.epsilon)
        plan = (logits + f[:, None]).add_(g).exp_()
        if ctx.frozen_plan:
            return plan
        # to_x: the derivative by x. That by the logits is gathered from every place where they are read.
        to_logits = plan * cost
        to_f, to_g = to_logits.sum(1), to_logits.sum(0)
        kernel = plan
        for start in range(4 * ctx.blocks - 4, -1, -4):
            first, second, u, v = saved[start : start + 4]
            kernel = (logits + first[:, None]).add_(second).exp_()
            left, right = [], []
            for step in range(len(u) - 1, -1, -1):
                # g = log b - logsumexp_i (logits + f)
                x = columns * v[step + 1] * to_g
                to_f = to_f - u[step] * (kernel @ x)
                # f = log a - logsumexp_j (logits + g of the iteration before)
                y = rows * u[step] * to_f
                to_g = -v[step] * (y @ kernel)
                to_f = torch.zeros_like(to_f)
                left += [u[step], y]
                right += [x, v[step]]
            to_logits = torch.addcmul(to_logits, kernel, torch.stack(left, 1) @ torch.stack(right), value=-1)
        # The first iteration, whose g was the first block's; it had none before it. Divided by their sums, shares cancel where
        # they have to: `to_logits` is yet to be divided by epsilon.
        by_columns = kernel.div(kernel.sum(0)).mul_(to_g)
        to_f = to_f - by_columns.sum(1)
        by_rows = logits.softmax(1).mul_(to_f[:, None])
        to_logits = to_logits - by_columns - by_rows
        return plan - to_logits / ctx.epsilon


def sinkhorn_distance(
    cost: Float[Tensor, "N M"], *, epsilon: float, iterations: int, stop_plan_grad: bool = False
) -> Float[Tensor, ""]:
    """`<P, cost>` of the entropic transport plan P whose rows sum to 1/N and columns to 1/M, after so many iterations.

    Rows are normalised first and columns last, so only the columns' sums are exact before it has converged; far from there, with a
    small `epsilon`, the distance can lie below that of exact transport. Computed in logarithms, in float32 at least: no `epsilon`
    underflows. The gradient is exact, of all iterations.

    Args:
        cost: finite.
        epsilon: strength of the entropy, in units of the cost. To 0: exact transport. To infinity: the mean cost.
        iterations: of rows and columns.
        stop_plan_grad: whether the plan is a constant to the gradient. Nearly free, and the gradient of `<P, cost> - epsilon H(P)`
            once converged, not of the distance.

    Raises:
        ValueError: an empty cost, `epsilon <= 0`, no iterations.
    """
    check_number("epsilon", epsilon, minimum=0.0, above=True)
    check_count("iterations", iterations, minimum=1)
    if cost.dim() != 2 or not cost.numel():
        raise ValueError(f"cost must be a matrix with at least one row and column; got shape {tuple(cost.shape)}.")
    with torch.autocast(cost.device.type, enabled=False):  # which would multiply in half precision
        distance: Tensor = _Sinkhorn.apply(widen(cost), epsilon, iterations, stop_plan_grad)
    return distance


def probability_distance(student: Float[Tensor, "N C"], teacher: Float[Tensor, "M C"]) -> Float[Tensor, "N M"]:
    """`sum_c |p_i(c) - q_j(c)|` of all pairs of rows: between 0 and 2."""
    return torch.cdist(student, teacher, p=1.0)


def transport_loss(
    student: Float[Tensor, "N C"],
    teacher: Float[Tensor, "N C"],
    *,
    epsilon: float,
    iterations: int,
    debiased: bool,
    stop_plan_grad: bool = False,
) -> Float[Tensor, ""]:
    """[`sinkhorn_kd_loss`] of probabilities."""

    def between(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_distance(
            probability_distance(x, y), epsilon=epsilon, iterations=iterations, stop_plan_grad=stop_plan_grad
        )

    loss = between(student, teacher)
    return loss - (between(student, student) + between(teacher, teacher)) / 2 if debiased else loss


def sinkhorn_kd_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    debiased: bool = True,
    stop_plan_grad: bool = False,
    official_scale: bool = False,
) -> Float[Tensor, ""]:
    """The Sinkhorn distance between the N rows of the student and the N rows of the teacher, by the L1 distance of probabilities.

    It does not know which teacher row belongs to which student row, so it has to go with a loss that does.

    Args:
        student_logits, teacher_logits: in any floating dtype; computed in float32 at least.
        temperature: of both softmaxes.
        epsilon, iterations, stop_plan_grad: of [`sinkhorn_distance`].
        debiased: `S(x, y) - S(x, x) / 2 - S(y, y) / 2`, zero at equality [ours]. Without, entropy leaves a positive distance and a
            gradient there, as in the released code.
        official_scale: whether rows have mass 1 in place of 1/N, and the sum is multiplied by 0.001, as in the released code.

    Raises:
        ValueError: shapes that do not fit, no rows, `temperature <= 0`, `epsilon <= 0`, no iterations.
    """
    check_number("temperature", temperature, minimum=0.0, above=True)
    check_logits(student_logits, teacher_logits, "teacher's")
    student = (widen(student_logits) / temperature).softmax(-1)
    teacher = (widen(teacher_logits).detach() / temperature).softmax(-1)
    loss = transport_loss(
        student,
        teacher,
        epsilon=epsilon,
        iterations=iterations,
        debiased=debiased,
        stop_plan_grad=stop_plan_grad,
    )
    return loss * (OFFICIAL_SCALE * len(student)) if official_scale else loss


def shortlist(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], *, top_k: int
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Probabilities of all tokens that are among the `top_k` of the teacher in some row, and of the rest as one more class.

    Distances of rows can only get shorter by this.
    """
    kept = teacher.topk(min(top_k, teacher.size(-1)), dim=-1).indices.unique()

    def lump(probs: Tensor) -> Tensor:
        probs = probs[:, kept]
        return torch.cat([probs, (1 - probs.sum(-1, keepdim=True)).clamp(min=0.0)], -1)

    return lump(student), lump(teacher)


@dataclass
class SinkhornDistillationConfig(DistillationConfig):
    """What [`SinkhornDistillationTrainer`] needs beside the settings of all distillation trainers.

    Args:
        sinkhorn_weight (`float`, *optional*, defaults to `0.8`):
            Weight of the Sinkhorn distance, the paper's beta. `0` leaves it out.
        kd_weight, ce_weight (`float`, *optional*, defaults to `0.9` and `0.1`):
            Weights of the softened cross-entropy with the teacher and of that with the labels; alpha and 1 - alpha.
        temperature (`float`, *optional*, defaults to `2.0`): of the distance.
        kd_temperature (`float`, *optional*, defaults to `2.0`): of the softened cross-entropy, which is not multiplied by its square.
        epsilon (`float`, *optional*, defaults to `0.1`): strength of the plan's entropy.
        iterations (`int`, *optional*, defaults to `20`): of Sinkhorn.
        debiased (`bool`, *optional*, defaults to `True`): whether the distance is zero at equality [ours].
        official_scale (`bool`, *optional*, defaults to `False`):
            Whether the distance is multiplied by 0.001 and the rows of the batch, as in the released code. Its weight then grows with
            the batch.
        max_tokens (`int`, *optional*, defaults to `256`):
            Tokens that are compared in a batch; more are drawn from. Language models and token classifiers only [ours]. All logits
            of these tokens are in memory at once, also where a language model's head is fused: it then reads them a second time.
        top_k (`int`, *optional*, defaults to `8`):
            Language models compare the union of the teacher's `top_k` tokens at each of them, and the rest as one class [ours].
    """

    sinkhorn_weight: float = field(default=0.8, metadata={"help": "Weight of the Sinkhorn distance."})
    kd_weight: float = field(default=0.9, metadata={"help": "Weight of the softened cross-entropy with the teacher."})
    ce_weight: float = field(default=0.1, metadata={"help": "Weight of the labels' cross-entropy."})
    temperature: float = field(default=2.0, metadata={"help": "Of the distance."})
    kd_temperature: float = field(default=2.0, metadata={"help": "Of the softened cross-entropy."})
    epsilon: float = field(default=0.1, metadata={"help": "Strength of the plan's entropy."})
    iterations: int = field(default=20, metadata={"help": "Of Sinkhorn."})
    debiased: bool = field(default=True, metadata={"help": "Whether the distance is zero at equality."})
    official_scale: bool = field(default=False, metadata={"help": "0.001 times a sum over rows in place of a mean."})
    max_tokens: int = field(default=256, metadata={"help": "Tokens that are compared in a batch."})
    top_k: int = field(default=8, metadata={"help": "Tokens of the vocabulary, by the teacher, of each of them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sinkhorn_weight", "kd_weight", "ce_weight"):
            check_number(name, getattr(self, name), minimum=0.0)
        for name in ("temperature", "kd_temperature", "epsilon"):
            check_number(name, getattr(self, name), minimum=0.0, above=True)
        for name in ("iterations", "max_tokens", "top_k"):
            check_count(name, getattr(self, name), minimum=1)


class SinkhornDistillationTrainer(DistillationTrainer):
    """Cross-entropies with the labels and the teacher, and the Sinkhorn distance between both models' batches, from [Sinkhorn
    Distance Minimization for Knowledge Distillation](https://huggingface.co/papers/2402.17110) (SinKD).

    The released code's distance is [`sinkhorn_kd_loss`] with `debiased=False, official_scale=True`; its loop for classifiers adds it
    under a flag that does not define it, and its code for generation normalises over tokens and batch in turns, so the form for
    tokens here is ours: up to `max_tokens` of a batch, drawn by the seed and the step alone.

    The distance is one of a whole micro-batch and process: it changes with their size, as the paper's does with its batch. It is 0
    nowhere near the right order alone, since it does not know which rows belong together; keep one of the cross-entropies.

    Logged under `distillation/`: `cross_entropy`, `soft_cross_entropy`, `sinkhorn`, and the common meters. Arguments as in
    [`~hf_logits.distillation.DistillationTrainer`].
    """

    args: SinkhornDistillationConfig
    between = ("sinkhorn",)
    _config = SinkhornDistillationConfig
    _name = "Sinkhorn distillation"
    _tag_names = ["hf_logits", "sinkhorn-distillation"]
    _paper = {
        "title": "Sinkhorn Distance Minimization for Knowledge Distillation",
        "id": "2402.17110",
        # docstyle-ignore
        "citation": """\
@inproceedings{cui2024sinkhorn,
    title     = {{Sinkhorn Distance Minimization for Knowledge Distillation}},
    author    = {Xiao Cui and Yulei Qin and Yuting Gao and Enwei Zhang and Zihan Xu and Tong Wu and Ke Li and Xing Sun and Wengang Zhou and Houqiang Li},
    year      = 2024,
    booktitle = {Proceedings of the Joint International Conference on Computational Linguistics, Language Resources and Evaluation}
}""",
    }

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        assert teacher is not None
        softened = (teacher / self.args.kd_temperature).softmax(-1)
        return {
            "cross_entropy": cross_entropy(student, labels, reduction="none"),
            "soft_cross_entropy": -expected(softened, (student / self.args.kd_temperature).log_softmax(-1)),
        }

    def term_weights(self) -> dict[str, float]:
        weights = {"cross_entropy": self.args.ce_weight, "soft_cross_entropy": self.args.kd_weight}
        return weights | ({"sinkhorn": self.args.sinkhorn_weight} if self.args.sinkhorn_weight else {})

    def compared(self, rows: int) -> Int[Tensor, " M"] | None:
        if not self.args.sinkhorn_weight:
            return None
        if self.task not in (*LANGUAGE, "token_classification") or rows <= self.args.max_tokens:
            return torch.arange(rows)
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + self.state.global_step)
        return torch.randperm(rows, generator=generator)[: self.args.max_tokens]

    def terms_between(
        self, student: Float[Tensor, "M C"], teacher: Float[Tensor, "M C"] | None, labels: Int[Tensor, " M"]
    ) -> dict[str, Float[Tensor, ""]]:
        assert teacher is not None
        probs = [(logits / self.args.temperature).softmax(-1) for logits in (student, teacher)]
        if self.task in LANGUAGE:
            probs = list(shortlist(*probs, top_k=self.args.top_k))
        distance = transport_loss(
            *probs, epsilon=self.args.epsilon, iterations=self.args.iterations, debiased=self.args.debiased
        )
        return {"sinkhorn": distance * (OFFICIAL_SCALE * len(student)) if self.args.official_scale else distance}
