"""Entropy-adaptive decoding: the switching tables, a token-by-token simulation, and the meters by hand."""

import functools
import itertools
import math

import pytest
import torch

import tiny
from hf_logits.auxiliary import EngineStats
from hf_logits.logits import entropy
from hf_logits.processors.entropy_adaptive import EntropyAdaptiveLogitsProcessor, switch
from oracles import COSTS, SWITCH_ENTROPIES, SWITCH_MEANS_2, SWITCHES


WORDS = 16


@pytest.fixture(scope="module")
def small():
    return tiny.llama(seed=1)


@pytest.fixture(scope="module")
def large():
    return tiny.llama(seed=2, num_hidden_layers=3)


def simulate(small, large, *, threshold, window, min_stay, timing="now", entropy_of="current", start="small"):
    """Token by token, from the entropies of both models: who chooses, and the entropies that were looked at."""
    at_work, stayed, seen, chosen = start, 0, [], ""
    for of_small, of_large in zip(small, large, strict=True):
        seen.append(of_large if at_work == "large" and entropy_of == "current" else of_small)
        recent = seen[-window:]
        wanted = "large" if sum(recent) / len(recent) > threshold else "small"
        if timing == "now":
            if wanted != at_work and stayed >= min_stay:
                at_work, stayed = wanted, 0
            chosen += at_work[0].upper()
            stayed += 1
        else:
            chosen += at_work[0].upper()
            stayed += 1
            if wanted != at_work and stayed >= min_stay:
                at_work, stayed = wanted, 0
    return chosen, seen


@functools.cache
def with_entropy(bits):
    """Log-probabilities of that entropy: one token apart, the others alike."""
    low, high = 0.0, 1 - 1 / WORDS
    for _ in range(60):
        rest = (low + high) / 2
        probs = torch.tensor([[1 - rest] + [rest / (WORDS - 1)] * (WORDS - 1)]).double()
        low, high = (rest, high) if float(entropy(probs.log())) < bits else (low, rest)
    return probs.log()


def driven(small_model, entropies, **settings):
    """Who chooses, for given entropies of both models: the large one is known by its reversed distribution."""
    processor = EntropyAdaptiveLogitsProcessor(small_model, **settings)
    chosen = ""
    for t, bits in enumerate(entropies):
        scores = with_entropy(bits)
        answered = scores.flip(-1)
        processor.auxiliary_log_probs = lambda step, vocab, answered=answered: [answered]
        result = processor(torch.full((1, 3 + t), 7), scores)
        is_large = torch.allclose(result, answered)
        assert is_large != torch.allclose(result, scores)
        chosen += "L" if is_large else "S"
    return chosen, processor


@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_the_tables(case, small):
    window, threshold, min_stay, timing = case
    # bisection leaves an entropy a hair beside the tie at exactly 1.6
    bound = threshold + 1e-9 if threshold == 1.6 else threshold
    settings = {"window": window, "min_stay": min_stay, "timing": timing}
    chosen, processor = driven(small, SWITCH_ENTROPIES, threshold=bound, **settings)
    assert chosen == SWITCHES[case]
    trace = processor.stats.trace
    assert trace["large"][0].tolist() == [float(letter == "L") for letter in SWITCHES[case]]
    torch.testing.assert_close(trace["entropy"][0], trace["entropy"].new_tensor(SWITCH_ENTROPIES), atol=1e-6, rtol=0)
    assert simulate(SWITCH_ENTROPIES, SWITCH_ENTROPIES, threshold=threshold, **settings)[0] == SWITCHES[case]


def test_the_means_of_the_window(small):
    """Each mean is where the threshold begins to matter."""
    for t, mean in enumerate(SWITCH_MEANS_2):
        for delta, letter in ((-1e-6, "L"), (1e-6, "S")):
            chosen, _ = driven(small, SWITCH_ENTROPIES[: t + 1], threshold=mean + delta, window=2, min_stay=0)
            assert chosen[-1] == letter


def test_one_decision_by_hand():
    large = torch.tensor([False, False, False, True, True, True])
    mean = torch.tensor([1.0, 1.1, 1.1, 1.0, 0.9, 1.1])
    stay = torch.tensor([9.0, 2.0, 1.0, 2.0, 1.0, 9.0])
    after, stayed = switch(large, stay, mean, threshold=1.0, min_stay=2)
    # equal is small, too early is no switch, and a switch begins to count anew
    assert after.tolist() == [False, True, False, False, True, True]
    assert stayed.tolist() == [9.0, 0.0, 1.0, 0.0, 1.0, 9.0]
    column = torch.tensor([1.0, 1.2, 1.0, 0.9, 0.8, 1.2])
    after, _ = switch(large, stay, mean, threshold=column, min_stay=0)
    assert after.tolist() == [False, False, True, True, True, False]


SETTINGS = list(itertools.product(["now", "next"], ["current", "small"], ["small", "large"]))


@pytest.mark.parametrize(("timing", "entropy_of", "start"), SETTINGS)
def test_a_generation_equals_the_simulation(timing, entropy_of, start, small, large):
    ids, mask = tiny.prompts()
    rules = {"window": 2, "min_stay": 2, "timing": timing, "entropy_of": entropy_of, "start": start}
    threshold = torch.tensor([5.2, 5.25])
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=threshold, **rules)
    out = small.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    trace = processor.stats.trace
    letters = ""
    for r, (sequence, first) in enumerate(zip(out.sequences, (mask == 0).sum(-1), strict=True)):
        texts = [sequence[first : ids.shape[1] + t].tolist() for t in range(16)]
        said = {name: torch.cat([tiny.recomputed(m, [x]) for x in texts]) for name, m in (("S", small), ("L", large))}
        bits = {name: [float(-(p.exp() * p).sum() / math.log(2)) for p in values] for name, values in said.items()}
        chosen, seen = simulate(bits["S"], bits["L"], threshold=float(threshold[r]), **rules)
        assert trace["large"][r].tolist() == [float(letter == "L") for letter in chosen]
        torch.testing.assert_close(trace["entropy"][r], torch.tensor(seen), atol=1e-4, rtol=0)
        right = torch.stack([said[letter][t] for t, letter in enumerate(chosen)])
        torch.testing.assert_close(torch.stack(out.scores)[:, r], right, atol=1e-5, rtol=0)
        letters += chosen + " "
    assert "SL" in letters and "LS" in letters


def test_an_infinite_threshold_is_the_small_model_at_no_cost(small, large):
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=math.inf, min_stay=0)
    assert torch.equal(small.generate(ids, logits_processor=[processor], **settings), small.generate(ids, **settings))
    assert processor.stats.forwards == 0


def test_a_negative_threshold_is_the_large_model_from_the_first_token(small, large):
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0)
    assert torch.equal(small.generate(ids, logits_processor=[processor], **settings), large.generate(ids, **settings))
    assert processor.stats.trace["large"].all()


@pytest.mark.parametrize("threshold", [-1.0, 5.2, 9.0])
def test_two_equal_models_are_one(threshold, small):
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    processor = EntropyAdaptiveLogitsProcessor(small, threshold=threshold, min_stay=1)
    assert torch.equal(small.generate(ids, logits_processor=[processor], **settings), small.generate(ids, **settings))


def test_banned_tokens_stay_banned_and_leave_the_entropy(small, large):
    logits = torch.randn(1, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    banned = logits.clone()
    banned[:, 5:20] = -math.inf
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0)
    result = processor(torch.tensor([[4, 5, 6]]), banned)
    right = tiny.recomputed(large, [[4, 5, 6]]).masked_fill(banned.isneginf(), -math.inf).log_softmax(-1)
    torch.testing.assert_close(result, right, atol=1e-5, rtol=0)
    # the small model is at work when the decision is made
    kept = banned[:, [*range(5), *range(20, tiny.VOCAB)]].log_softmax(-1)
    torch.testing.assert_close(
        processor.stats.trace["entropy"][:, 0], -(kept.exp() * kept).sum(-1) / math.log(2), atol=1e-5, rtol=0
    )


def test_finished_rows_never_ask_for_the_large_model(small, large):
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0, eos_token_id=tiny.EOS)
    ids = torch.tensor([[7, 8, 9], [10, 11, 12]])
    flat = torch.zeros(2, tiny.VOCAB)
    for column in ([20, tiny.EOS], [21, tiny.PAD], [tiny.EOS, tiny.PAD], [tiny.PAD, tiny.PAD]):
        processor(ids, flat)
        ids = torch.cat([ids, torch.tensor(column)[:, None]], dim=1)
    forwards = processor.stats.forwards
    processor(ids, flat)
    # NaN behind the end: those positions are nobody's
    assert processor.stats.trace["large"].nan_to_num(-1).tolist() == [[1, 1, 1, 1, -1], [1, 1, -1, -1, -1]]
    assert processor.cost(10).share == 1
    assert processor.stats.forwards == forwards


# --- meters ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COSTS, ids=str)
def test_the_savings_of_a_processor(case, small, large):
    """A trace of a hundred tokens of which `share` are the large model's."""
    _, size, share = case
    millions = int(large.num_parameters() * case[0] / size)
    processor = EntropyAdaptiveLogitsProcessor(large)
    chosen = (torch.arange(100) < 100 * share).float()[None]
    stats = processor.stats
    stats.trace["large"] = chosen
    processor._begun = EngineStats(), 0
    type_with_trace = type("Traced", (EntropyAdaptiveLogitsProcessor,), {"stats": property(lambda self: stats)})
    processor.__class__ = type_with_trace
    cost = processor.cost(millions)
    paper, here = COSTS[case]
    assert abs(cost.share - share) < 1e-6
    assert abs(1 - cost.relative_cost - paper) < 2e-4
    assert abs(1 - cost.relative_cost_here - here) < 6e-4


@pytest.mark.parametrize("padded", [True, False])
def test_the_flops_of_one_generation(small, large, padded):
    """Of the last generation alone, whatever ran before: both models read the prompts and each chosen token but the last."""
    ids, mask = tiny.prompts(padded=padded)
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0, pad_token_id=tiny.PAD)
    for _ in range(2):
        small.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, logits_processor=[processor])
        # the second time the large model finds the prompts in its cache
        processor.engines[0].reset()
        read = int(mask.sum()) + ids.shape[0] * 3
        cost = processor.cost(small)
        assert cost.flops == 2.0 * read * (small.num_parameters() + large.num_parameters())
        assert cost.relative_flops == pytest.approx(1 + small.num_parameters() / large.num_parameters())
        assert cost.large_forwards == 4


def test_the_meters_of_a_generation(small, large):
    ids, mask = tiny.prompts()
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=3)
    small.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, logits_processor=[processor])
    # three tokens by the small model, then five by the large one: the prompts and three tokens are caught up at once
    assert processor.stats.trace["large"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2
    cost = processor.cost(small)
    ours, theirs = small.num_parameters(), large.num_parameters()
    fed = int(mask.sum()) + 2 * 7  # every token but the last one of each row
    assert processor.stats.tokens == fed
    assert cost.large_forwards == 5
    assert cost.share == 5 / 8
    torch.testing.assert_close(cost.relative_cost, (5 * theirs + 3 * ours) / 8 / theirs)
    torch.testing.assert_close(cost.relative_cost_here, (5 * theirs + 8 * ours) / 8 / theirs)
    assert cost == processor.cost(ours)


def test_no_cost_before_a_generation(large):
    with pytest.raises(RuntimeError, match="generate with the processor first"):
        EntropyAdaptiveLogitsProcessor(large).cost(1000)
