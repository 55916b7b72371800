"""GeDi's own repetition penalty, against a loop over the tokens."""

import pytest
import torch

import tiny
from hf_logits.processors.gedi import GeDiLogitsProcessor
from hf_logits.processors.gedi_repetition_penalty import GeDiRepetitionPenaltyLogitsProcessor


def slow_penalty(ids, scores, penalty, scale):
    result = scores - scores.amax(-1, keepdim=True) + scale
    for row, tokens in zip(result, ids.tolist(), strict=True):
        for token in set(tokens):
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    return result


def test_by_hand():
    scores = torch.tensor([[3.0, 1.0, -12.0, 2.0]])  # lifted by 7: 10, 8, -5, 9
    penalised = GeDiRepetitionPenaltyLogitsProcessor()(torch.tensor([[0, 2, 0]]), scores)
    torch.testing.assert_close(penalised, torch.tensor([[10 / 1.2, 8.0, -6.0, 9.0]]))


@pytest.mark.parametrize(("penalty", "scale"), [(1.2, 10.0), (3.0, 0.0), (0.5, 2.0)])
def test_it_equals_a_loop(penalty, scale):
    generator = torch.Generator().manual_seed(0)
    scores = 8 * torch.randn(20, 30, generator=generator).double()
    ids = torch.randint(0, 30, (20, 9), generator=generator)
    fast = GeDiRepetitionPenaltyLogitsProcessor(penalty, scale)(ids, scores)
    torch.testing.assert_close(fast, slow_penalty(ids, scores, penalty, scale))


def test_a_penalty_of_one_changes_no_distribution():
    scores = torch.tensor([[3.0, -torch.inf, -12.0, 2.0]])
    penalised = GeDiRepetitionPenaltyLogitsProcessor(1.0)(torch.tensor([[0, 1, 2]]), scores)
    torch.testing.assert_close(penalised.softmax(-1), scores.softmax(-1))


def test_banned_tokens_stay_banned_and_the_scores_are_left_alone():
    scores = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf]])
    before = scores.clone()
    penalised = GeDiRepetitionPenaltyLogitsProcessor()(torch.tensor([[1, 2]]), scores)
    assert penalised.isneginf().tolist() == [[False, True, False, True]]
    assert not penalised.isnan().any()
    assert torch.equal(scores, before)


def test_behind_gedi_in_a_generation():
    main, guide = tiny.llama(seed=1), tiny.llama(seed=3)
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    gedi = GeDiLogitsProcessor(guide, desired=40, undesired=41, strength=2.0)
    out = main.generate(
        ids, logits_processor=[gedi, GeDiRepetitionPenaltyLogitsProcessor(2.0)], output_scores=True, **settings
    )
    for step, scores in enumerate(out.scores):
        seen = out.sequences[:, : ids.shape[1] + step]
        guided = gedi(seen, main(seen, attention_mask=(seen != tiny.PAD).long()).logits[:, -1])
        torch.testing.assert_close(scores, slow_penalty(seen, guided, 2.0, 10.0), atol=1e-3, rtol=1e-3)
