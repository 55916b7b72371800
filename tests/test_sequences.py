"""The shift, the mask and the averages, by hand."""

import pytest
import torch

from hf_logits.sequences import completion_lengths, mean_log_prob, sequence_log_probs


MASK = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
TOKENS = -torch.tensor([[0.0, 1, 2, 0], [1, 2, 3, 4], [0, 5, 0, 0], [6, 7, 0, 0]])


def test_sums_and_lengths():
    assert completion_lengths(MASK).tolist() == [2, 4, 1, 2]
    assert sequence_log_probs(TOKENS, MASK, tail_weight=None).tolist() == [-3, -10, -5, -13]


def test_virtual_tokens_in_front_are_left_out():
    padded = torch.cat([torch.full((4, 3), -100.0), TOKENS], 1)
    assert sequence_log_probs(padded, MASK, tail_weight=None).tolist() == [-3, -10, -5, -13]


@pytest.mark.parametrize(
    ("tail", "expected"), [(1.0, [-3, -10, -5, -13]), (0.5, [-2, -6.5, -5, -13]), (0.0, [-1, -3, -5, -13])]
)
def test_the_tail_is_what_the_longer_completion_has_beyond_the_shorter(tail, expected):
    # rows 0 and 2 share 1 token, rows 1 and 3 share 2
    assert sequence_log_probs(TOKENS, MASK, tail_weight=tail).tolist() == expected


def test_the_averages():
    sums, lengths = torch.tensor([-3.0, -10.0]), torch.tensor([2, 4])
    assert mean_log_prob(sums, lengths, reduction="sum").item() == -6.5
    assert mean_log_prob(sums, lengths, reduction="mean").item() == -2
    assert mean_log_prob(sums, lengths, reduction="token_mean").item() == pytest.approx(-13 / 6)
    assert mean_log_prob(sums, lengths, reduction="token_mean", items=5.0).item() == pytest.approx(-13 / 5)


def test_micro_batches_of_unequal_lengths_add_up_to_the_mean_of_all_tokens():
    sums, lengths = torch.tensor([-3.0, -10.0]), torch.tensor([2, 4])
    parts = [mean_log_prob(sums[i : i + 1], lengths[i : i + 1], reduction="token_mean", items=3.0) for i in (0, 1)]
    assert torch.stack(parts).mean().item() == pytest.approx(-13 / 6)


def test_an_empty_completion_counts_as_zero():
    nothing = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for reduction in ("sum", "mean", "token_mean"):
        assert mean_log_prob(*nothing, reduction=reduction).item() == 0


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="token_mean"):
        mean_log_prob(torch.zeros(1), torch.ones(1, dtype=torch.long), reduction="median")
