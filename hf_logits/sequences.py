"""From log-probs of tokens to log-probs of completions: the shift, the mask, and how sequences are averaged and batched."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def completion_lengths(completion_mask: Integer[Tensor, "R L"]) -> Integer[Tensor, " R"]:
    """How many tokens of each completion are predicted. The first position of a row is never predicted."""
    return completion_mask[:, 1:].sum(1)


def sequence_log_probs(
    token_log_probs: Float[Tensor, "R T"], completion_mask: Integer[Tensor, "R L"], *, tail_weight: float | None
) -> Float[Tensor, " R"]:
    """Sum the log-probs of each completion's tokens.

    Args:
        token_log_probs: those of TRL's fused head, shifted (position i predicts token i + 1) and zero outside of the
            completion. Virtual tokens of prompt learning may stand in front.
        completion_mask: 1 on the tokens of the completion, not shifted.
        tail_weight: the weight of what the longer completion of a pair has beyond the shorter one (`ld_alpha` of LD-DPO);
            the first half of the rows are then the chosen completions, the second half the rejected ones.
            `None` for the plain sum.
    """
    mask = completion_mask[:, 1:]
    token_log_probs = token_log_probs[:, token_log_probs.size(1) - mask.size(1) :]
    if tail_weight is None:
        return token_log_probs.sum(1)
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    in_tail = mask.cumsum(1) > shared[:, None]
    return torch.where(in_tail, tail_weight * token_log_probs, token_log_probs).sum(1)


def mean_log_prob(
    log_probs: Float[Tensor, " B"],
    lengths: Integer[Tensor, " B"],
    *,
    reduction: str,
    items: float | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Average sequence log-probs over the batch.

    Args:
        log_probs: sums over the tokens of each sequence.
        lengths: how many tokens that are. A sequence without tokens counts as zero.
        reduction: `"sum"`: every sequence with its sum, so long ones weigh more. `"mean"`: every sequence with its mean
            per token. `"token_mean"`: every token alike.
        items: what `"token_mean"` divides by instead of the tokens in `lengths`: the number of tokens per micro-batch
            on average, so that micro-batches of unequal lengths add up to the mean over all of their tokens.
    """
    if reduction == "sum":
        return log_probs.mean()
    if reduction == "mean":
        return (log_probs / lengths.clamp(min=1)).mean()
    if reduction == "token_mean":
        return log_probs.sum() / (lengths.sum().clamp(min=1) if items is None else items)
    raise ValueError(f'reduction must be "sum", "mean" or "token_mean", got {reduction!r}.')


def batches_of_like_size(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, largest first and of like size, so that a batch stays within the budget, padding included.

    What is larger than the budget comes alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
