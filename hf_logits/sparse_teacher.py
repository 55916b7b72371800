"""What is left of a teacher of whom only the best tokens were kept, and how a student learns from that."""

import math
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_logits.checks import check_choice
from hf_logits.class_logits import widen


MODES = ("tail", "renorm", "zero")
"""How to read a truncated teacher, see [`sparse_kd`]."""


def top_log_probs(logits: Float[Tensor, "N V"], k: int) -> tuple[Float[Tensor, "N k"], Integer[Tensor, "N k"]]:
    """The `k` largest log-probabilities of each row, at least in float32, and where they are; all of them if there are fewer.

    Only the sum of the row is worked out beside them, so no second `[N, V]` tensor in a wider dtype lives on.
    """
    wide = widen(logits)
    best, ids = wide.topk(min(k, wide.size(-1)), dim=-1)
    return best - wide.logsumexp(-1, keepdim=True), ids


def log_tail(log_probs: Float[Tensor, "N k"]) -> Float[Tensor, " N"]:
    """The logarithm of what the kept tokens leave over, `log(1 - sum p)`: `-inf` where rounding has them sum to 1 or more."""
    rest = -torch.expm1(log_probs.logsumexp(-1).clamp(max=0.0))
    return rest.log()


class _Buckets(torch.autograd.Function):
    """sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest); one `[N, V]` tensor in each direction."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Float[Tensor, "N V"],
        ids: Integer[Tensor, "N k"],
        log_probs: Float[Tensor, "N k"],
        log_rest: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        kept = student_logits.gather(-1, ids).to(log_probs.dtype)
        # exp(s - top) of what was not kept. Its own maximum keeps a tail exact that the kept tokens would round away.
        rest = student_logits.to(log_probs.dtype, copy=True).scatter_(-1, ids, -math.inf)
        top = rest.amax(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
        rest.sub_(top).exp_()
        log_q_rest = rest.sum(-1).log() + top[:, 0]
        log_z = torch.logaddexp(kept.logsumexp(-1), log_q_rest)
        log_q_rest = log_q_rest - log_z
        # A student that can't predict anything else has no tail, and what the teacher's rounding left in it is dealt out.
        closed = log_q_rest.isneginf()
        log_probs = torch.where(closed[:, None], log_probs.log_softmax(-1), log_probs)
        log_rest = torch.where(closed, -math.inf, log_rest)

        log_q = kept - log_z[:, None]
        p, p_rest = log_probs.exp(), log_rest.exp()
        loss = torch.where(p > 0, p * (log_probs - log_q), 0.0).sum(-1)
        loss += torch.where(p_rest > 0, p_rest * (log_rest - log_q_rest), 0.0)
        # dL/ds: q_i - p_i where kept, elsewhere q_j - p_rest q_j / q_rest
        scale = (top[:, 0] - log_z).exp() - (log_rest - log_q_rest - log_z + top[:, 0]).exp()
        ctx.save_for_backward(rest, torch.where(closed, 0.0, scale), ids, log_q.exp() - p)
        ctx.dtype = student_logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " N"]) -> Any:
        rest, scale, ids, inside = ctx.saved_tensors
        gradient = rest * (scale * grad)[:, None]
        return gradient.scatter_(-1, ids, inside * grad[:, None]).to(ctx.dtype), None, None, None


def sparse_kd(
    student_logits: Float[Tensor, "N V"],
    ids: Integer[Tensor, "N k"],
    log_probs: Float[Tensor, "N k"],
    *,
    mode: str,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """The forward KL of a teacher of whom only `k` tokens a row are known, row by row. See [`sparse_kd_loss`]."""
    check_choice("mode", mode, *MODES)
    check_sparse_temperature(temperature)
    if ids.size(-1) > student_logits.size(-1):
        raise ValueError(
            f"The teacher has {ids.size(-1)} tokens a row and the student only {student_logits.size(-1)}: they have different classes."
        )
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    ids, log_probs = ids.long(), log_probs.detach().to(wide)
    renormalised = log_probs.log_softmax(-1)
    if mode == "renorm":
        p = renormalised.exp()
        log_q = student_logits.gather(-1, ids).to(wide).log_softmax(-1)
        return torch.where(p > 0, p * (renormalised - log_q), 0.0).sum(-1)
    if mode == "zero":
        nothing = torch.full_like(log_probs[:, 0], -math.inf)
        return _Buckets.apply(student_logits, ids, renormalised, nothing)
    # Rounded log-probs may sum to a little more than 1, and a divergence of such a teacher to less than 0.
    log_probs = torch.where(log_probs.logsumexp(-1, keepdim=True) > 0, renormalised, log_probs)
    return _Buckets.apply(student_logits, ids, log_probs, log_tail(log_probs))


def sparse_kd_loss(
    student_logits: Float[Tensor, "N V"],
    ids: Integer[Tensor, "N k"],
    log_probs: Float[Tensor, "N k"],
    *,
    mode: str,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """The forward KL of a truncated teacher, averaged over the rows.

    Beside the gradient only one tensor of the logits' size is made, in float32 or better.

    Args:
        student_logits: of the student, in any floating dtype.
        ids: which tokens were kept, each at most once in a row.
        log_probs: the teacher's log-probabilities of these tokens, out of the whole vocabulary.
        mode: `"tail"`: all other tokens are one token more, with what the kept ones leave over. Never more than the full KL,
            and equal to it with `k = V` or `k = V - 1`. `"renorm"`: among the kept tokens only, renormalised on both sides; the student
            may put any mass on others. `"zero"`: the teacher is renormalised and the student is not, which teaches it to
            give others no mass.
        temperature: of the softmax. Only 1 is possible.

    Raises:
        ValueError: the mode is another one, `temperature` is not 1, or there are more tokens than the student has.
    """
    return sparse_kd(student_logits, ids, log_probs, mode=mode, temperature=temperature).mean()


def check_sparse_temperature(temperature: float) -> None:
    """Refuse a temperature that a truncated teacher can't be brought to."""
    if temperature != 1.0:
        raise ValueError(
            f"A stored teacher has its best tokens at temperature 1, and temperature={temperature} needs the logits of all "
            "the others: their mass changes by sum p^(1/T), which is not known. Set temperature=1, or give the teacher itself."
        )
