"""Logit arithmetic that two methods or more share.

Every function is pure, takes and returns tensors and never writes in place. The letters in the shapes: `R` rows (batch items
times beams or returned sequences), `V` entries of the vocabulary. *Banned* means `-inf`: a token that an earlier processor has
forbidden.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


_PARTS = 8
"""Of a vocabulary, looked at one after the other where an index of 64 bits would be the largest tensor of all."""


def log_probs(scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """Normalised log-probabilities of `scores`, at least in float32.

    Scores at or below the smallest finite number of their dtype are bans in disguise (some processors write
    `torch.finfo.min`) and come back as `-inf`.
    """
    lowest = torch.finfo(scores.dtype).min
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return normalise(functional.threshold(wide, lowest, -math.inf))


def normalise(scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """`log_softmax`, except that a row in which everything is banned stays as it is (instead of NaN)."""
    dead = scores.amax(-1, keepdim=True).isneginf()
    return torch.where(dead, scores, scores.log_softmax(-1))


def entropy(log_probs: Float[Tensor, "*R V"]) -> Float[Tensor, "*R"]:
    """Shannon entropy in bits of normalised log-probabilities; banned tokens count as zero."""
    # H = -sum p log2 p, and 0 log 0 = 0
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1) / math.log(2.0)


def kl_divergence(p: Float[Tensor, "*R V"], q: Float[Tensor, "*R V"]) -> Float[Tensor, "*R"]:
    """KL(p || q) in nats of two normalised log-probabilities; infinite where `p` lives on what `q` bans."""
    # sum p (log p - log q) over the support of p
    mass = p.exp()
    return (mass * torch.where(mass > 0, p - q, 0.0)).sum(-1)


def plausible(
    log_probs: Float[Tensor, "R V"], beta: float | Tensor, *, min_tokens_to_keep: int = 1
) -> Bool[Tensor, "R V"]:
    """Adaptive plausibility: the tokens with `p >= beta * max p`, so that the most probable one always stays.

    `beta` is a number or one per row, of shape `[R, 1]`. `0` keeps everything that is not banned. At least
    `min_tokens_to_keep` of the most probable tokens stay. Contrastive Decoding, Li et al. 2022
    (https://huggingface.co/papers/2210.15097), letter alpha there.
    """
    bound = (
        log_probs.amax(-1, keepdim=True) + torch.as_tensor(beta, dtype=log_probs.dtype, device=log_probs.device).log()
    )
    if min_tokens_to_keep > 1:
        bound = torch.minimum(bound, log_probs.topk(min(min_tokens_to_keep, log_probs.shape[-1])).values[:, -1:])
    return (log_probs >= bound) & ~log_probs.isneginf()


def top_p(log_probs: Float[Tensor, "R V"], mass: float) -> Bool[Tensor, "R V"]:
    """Nucleus: the smallest set of most probable tokens that holds at least `mass`; of equal tokens the first are in it.

    `1` keeps everything that is not banned: a sum in floating point would reach it before the last token.
    """
    if mass >= 1.0:
        return ~log_probs.isneginf()
    # a token stays while the mass in front of it is below the wanted one: the first always does
    return leading(log_probs, log_probs.exp(), mass, descending=True, inclusive=False) & ~log_probs.isneginf()


def leading(
    values: Float[Tensor, "R V"], mass: Float[Tensor, "R V"], bound: float, *, descending: bool, inclusive: bool
) -> Bool[Tensor, "R V"]:
    """The first tokens by rising (or falling) `values`, of equal ones by index, as long as their mass is below `bound`.

    That is the mass in front of a token, with its own if `inclusive`. Never is all the mass below the bound, rounding or not.
    A sort would tell. Looking where the bound is reached, at 16 bits of the values after 16, takes a fraction of its time.
    """
    # Read as integers, floats keep their order once negative ones are turned round; + 0.0 makes -0.0 equal 0.0.
    ordered = values.neg().add_(0.0) if descending else values + 0.0
    key = ordered.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    bits = 8 * key.element_size()
    key.bitwise_xor_((key >> (bits - 1)).bitwise_and_(torch.iinfo(key.dtype).max))
    before, base = torch.zeros_like(mass[:, :1]), torch.full_like(key[:, :1], -(2**15))
    for shift in range(bits - 16, -1, -16):
        # The mass of each next digit; what differs in those so far goes into the bins at the ends.
        total = mass.new_zeros(len(mass), 2**16 + 2)
        for part, own in zip(key.chunk(_PARTS, dim=-1), mass.chunk(_PARTS, dim=-1), strict=True):
            digit = (part >> shift).sub_(base).clamp_(-1, 2**16).add_(1)
            total.scatter_add_(-1, digit.long(), own)
        total = total[:, 1:-1].cumsum(-1).add_(before)
        below = (total < total[:, -1:].clamp(max=bound)).sum(-1, keepdim=True)
        before = torch.where(below > 0, total.gather(-1, (below - 1).clamp(min=0)), before)
        reached = base + below.to(key.dtype)
        base = reached << 16
    tied = key == reached
    within = torch.where(tied, mass, 0.0).cumsum_(-1).add_(before)
    bounds = within[:, -1:].clamp(max=bound)
    if not inclusive:
        within.sub_(mass)  # right where it is asked for: at ties
    return (key < reached) | (tied & (within < bounds))


def keep(scores: Float[Tensor, "R V"], kept: Bool[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """Ban what is not kept. Also clears NaN and `+inf` out of the banned places."""
    return scores.masked_fill(~kept, -math.inf)


def difference(a: Float[Tensor, "R V"], b: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """`a - b`, and 0 where both are banned (instead of NaN)."""
    return (a - b).masked_fill(a.isneginf() & b.isneginf(), 0.0)


def row_column(value: float | Tensor, rows: int, like: Tensor) -> float | Tensor:
    """A hyper-parameter as arithmetic wants it: numbers stay, a `[B]` tensor becomes a column of `rows` rows.

    `generate` repeats each batch item for beams and returned sequences, next to each other; so do we.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value if not isinstance(value, Tensor) else value.item()
    return repeat_items(value.to(like), rows)[:, None]


def repeat_items(values: Float[Tensor, "B ..."], rows: int) -> Float[Tensor, "R ..."]:
    """What was given for each item of the batch, for each of `rows` rows."""
    if rows % values.shape[0]:
        raise ValueError(
            f"A hyper-parameter was given as {values.shape[0]} per-row values, but generation runs {rows} rows: pass one number, or "
            f"one value for each prompt of the batch."
        )
    return values.repeat_interleave(rows // values.shape[0], 0)
