"""USKD: soft labels without a teacher, from the student's own logits and from weak ones of an intermediate feature."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.class_logits import check_logits, expected, label_mask, log_softmax_without, widen


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


def soft_targets(log_probs: Float[Tensor, "N C"], values: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """`v + p(y)^2 - mean p(y)^2` at the labels, 0 elsewhere: more weight for rows that the student is sure of.

    The mean is over the batch, for each of two labels (the larger, the smaller) its own, over the rows that have it. A target may
    exceed 1. Detached.
    """
    squares = log_probs.detach().exp().square()
    first = label_mask(values.argmax(-1), values.size(-1))
    result = torch.zeros_like(squares)
    for mask in (first, (values > 0) & ~first):
        mean = torch.where(mask, squares, 0.0).sum() / mask.sum().clamp(min=1)
        result = torch.where(mask, values + squares - mean, result)
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
) -> dict[str, Float[Tensor, " N"]]:
    """The three parts of [`uskd_loss`] before their weights, one value a row: `target`, `non_target`, `weak`."""
    values = label_values(labels, student_logits.size(-1)).to(student_logits.dtype)
    is_label = values > 0
    student, weak = student_logits.log_softmax(-1), weak_logits.log_softmax(-1)
    scores = rank_scores(student, weak, is_label, ranking=ranking)
    scores = scores.masked_fill(student_logits.isneginf(), -math.inf)
    weights = zipf_weights(scores, is_label, zipf=zipf, limit=limit)
    smooth = (1 - SMOOTHING) * values + SMOOTHING / values.size(-1)
    return {
        "target": -expected(soft_targets(student, values), student),
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
