"""What embeddings of texts say about a set of them, and about two: spread, centroids, and MAUVE's area on their clusters."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Num
from numpy import ndarray


Embed = Callable[[list[str]], Any]
"""Texts to an array or tensor of shape `[N, D]`, as [`~hf_logits.hidden.embed_texts`] with a model and its tokenizer."""


def embedded(embed: Embed, texts: Sequence[str]) -> Float64[ndarray, "N D"]:
    """What `embed` makes of the texts, on the CPU and checked."""
    if not texts:
        return np.zeros((0, 1))
    rows = torch.as_tensor(embed(list(texts))).double().cpu().numpy()
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ValueError(
            f"embed made an array of shape {rows.shape} of {len(texts)} texts; it must be [texts, width]."
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"embed made numbers that are not finite of {int((~np.isfinite(rows)).any(1).sum())} texts.")
    return rows


def mean_cosine(rows: Float64[ndarray, "N D"]) -> float:
    """Cosine of two different rows, averaged over all pairs, in one pass. NaN with fewer than two, or with a row of zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if len(rows) < 2 or not lengths.all():
        return float("nan")
    total = (rows / lengths).sum(0)
    return float((total @ total - len(rows)) / (len(rows) * (len(rows) - 1)))


def centroid_cosine(first: Float64[ndarray, "N D"], second: Float64[ndarray, "M D"]) -> float:
    """Cosine of the two means. NaN where there are no rows, or a mean is 0."""
    if not len(first) or not len(second):
        return float("nan")
    one, other = first.mean(0), second.mean(0)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else float("nan")


def mauve(real: Num[ndarray, " K"], made: Num[ndarray, " K"], *, scale: float = 5.0) -> float:
    """Area under the divergence curve of two distributions P and Q (Pillutla et al. 2021, https://arxiv.org/abs/2102.01454).

    With `R = m P + (1 - m) Q`, the curve is `(exp(-scale KL(Q | R)), exp(-scale KL(P | R)))` for m from 0 to 1, and its ends are
    (1, 0) and (0, 1). The area is exact to six digits; the released code joins 25 points. 1 where P is Q; where they have nothing
    in common, `scale! scale! / (2 scale)!` for a whole scale, and not 0. NaN where either has no counts.

    Args:
        real, made (arrays of shape `[K]`): counts or probabilities of the same K clusters.
        scale (`float`, *optional*, defaults to 5.0): c.
    """
    if (real < 0).any() or (made < 0).any():
        raise ValueError(f"Counts must not be below 0; got {real.tolist()} and {made.tolist()}.")
    if not np.sum(real) or not np.sum(made):
        return float("nan")
    p, q = (np.asarray(values, dtype=np.float64) / np.sum(values) for values in (real, made))
    p, q = p[(p > 0) | (q > 0)], q[(p > 0) | (q > 0)]
    # Over the log-odds t of m the curve is smooth and ends slowly, and a plain sum is as good as exact.
    t = np.linspace(-40, 40, 1001)[:, None]
    m, rest = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(t))
    mixture = m * p + rest * q
    x, y = (np.exp(-scale * (side * np.log(np.where(side > 0, side, mixture) / mixture)).sum(1)) for side in (q, p))
    slope = scale * x * (q * (q - p) * (m * rest / mixture)).sum(1)  # -dx/dt
    return float(np.trapezoid(y * slope, t[:, 0]) + x[-1])
