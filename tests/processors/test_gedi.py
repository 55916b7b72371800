"""GeDi: the published numbers, the filter against a loop, and the class posterior of a real generation."""

import math

import pytest
import torch

import tiny
from hf_logits.auxiliary import AuxiliaryLM
from hf_logits.processors.gedi import GeDiLogitsProcessor, class_log_posterior, gedi_filter
from oracles import (
    ATOL,
    GEDI_BIAS,
    GEDI_CUMULATIVE,
    GEDI_DESIRED,
    GEDI_FILTERED,
    GEDI_LENGTH,
    GEDI_MAIN,
    GEDI_ORDER,
    GEDI_POSTERIOR,
    GEDI_POSTERIOR_CLASS_BIAS,
    GEDI_RUNNING,
    GEDI_SCALE,
    GEDI_TARGET_MOVED,
    GEDI_UNDESIRED,
    GEDI_WEIGHTED,
    normalised,
    word_tokenizer,
)


GOOD, BAD, OTHER = 40, 41, 42  # control codes
CODES = {"desired": GOOD, "undesired": BAD}


@pytest.fixture(scope="module")
def guide():
    return tiny.llama(seed=3)


@pytest.fixture(scope="module")
def main():
    return tiny.llama(seed=1)


def posterior(class_bias=0.0, **settings):
    conditional = torch.stack(normalised(GEDI_DESIRED, GEDI_UNDESIRED))
    bias = torch.tensor([GEDI_BIAS[0] + class_bias, GEDI_BIAS[1]]).double()
    running, length = torch.tensor(GEDI_RUNNING).double()[:, None], torch.tensor([GEDI_LENGTH])
    settings = {"scale": GEDI_SCALE, "bias": bias, "length_normalise": True} | settings
    return class_log_posterior(conditional, running, length, **settings)


def guided(monkeypatch, guide, scores=GEDI_MAIN, swap=False, **settings):
    """Probabilities after one call whose models, and whose token scores so far, are those of the table."""
    processor = GeDiLogitsProcessor(guide, **({"scale": GEDI_SCALE} | CODES | settings))
    spread = torch.tensor(
        [[-50.0, -1.0, -2.0, -3.0], [-70.0, -2.0, -2.0, -2.3]]
    ).double()  # the code's own comes first
    said = normalised(GEDI_DESIRED, GEDI_UNDESIRED)
    order = [1, 0] if swap else [0, 1]
    monkeypatch.setattr(AuxiliaryLM, "token_log_probs", spread[order][:, None].expand(-1, scores.shape[0], -1))
    lengths = torch.full((2, scores.shape[0]), 1 + GEDI_LENGTH)
    monkeypatch.setattr(AuxiliaryLM, "lengths", lengths, raising=False)
    processor.auxiliary_log_probs = lambda step, vocab: [said[i].expand_as(scores) for i in order]
    return processor(torch.tensor([[5, 6, 7]]).expand(scores.shape[0], -1), scores).exp()


LEARNED = {GOOD: GEDI_BIAS[0], BAD: GEDI_BIAS[1]}


def test_the_posterior():
    torch.testing.assert_close(posterior().exp(), GEDI_POSTERIOR, atol=ATOL, rtol=0)
    torch.testing.assert_close(posterior(class_bias=2.0).exp(), GEDI_POSTERIOR_CLASS_BIAS, atol=ATOL, rtol=0)


@pytest.mark.parametrize("strength", GEDI_WEIGHTED)
def test_the_weighted_probabilities(strength, monkeypatch, guide):
    moved = guided(monkeypatch, guide, strength=strength, bias=LEARNED, filter_p=0.0)
    torch.testing.assert_close(moved, GEDI_WEIGHTED[strength], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", GEDI_FILTERED, ids=str)
def test_the_filtered_probabilities(case, monkeypatch, guide):
    strength, filter_p, target_p = case
    moved = guided(monkeypatch, guide, strength=strength, bias=LEARNED, filter_p=filter_p, target_p=target_p)
    torch.testing.assert_close(moved, GEDI_FILTERED[case], atol=ATOL, rtol=0)


def test_the_order_of_the_filter():
    order = posterior().argsort(-1)[0]
    assert tuple(order.tolist()) == GEDI_ORDER
    torch.testing.assert_close(GEDI_WEIGHTED[5.0][:, order].cumsum(-1), GEDI_CUMULATIVE, atol=3 * ATOL, rtol=0)
    # each step of the sum that the filter passes bans one token more
    for step, passed in enumerate([0.0, *GEDI_CUMULATIVE[0, :-1].tolist()]):
        kept = gedi_filter(GEDI_WEIGHTED[5.0].log(), posterior(), filter_p=passed + 1e-4, target_p=0.999)
        assert kept[0].isneginf().nonzero()[:, 0].tolist() == sorted(GEDI_ORDER[:step])


def test_a_class_bias_is_the_desired_class_alone_and_nothing_is_banned(monkeypatch, guide):
    moved = guided(monkeypatch, guide, strength=5.0, bias=LEARNED, class_bias=2.0)
    weighted = (GEDI_MAIN.log_softmax(-1) + 5.0 * GEDI_POSTERIOR_CLASS_BIAS.log()).softmax(-1)
    torch.testing.assert_close(moved, weighted, atol=1e-5, rtol=0)


def test_the_target_that_undoes_a_class_bias():
    target, class_bias, moved = GEDI_TARGET_MOVED
    conditional = torch.tensor([[[target]], [[1 - target]]]).double().log()
    settings = {"scale": 1.0, "length_normalise": True}
    bias = torch.tensor([class_bias, 0.0]).double()
    found = class_log_posterior(conditional, torch.zeros(2, 1).double(), torch.tensor([0]), bias=bias, **settings)
    torch.testing.assert_close(found.exp(), torch.tensor([[moved]]).double(), atol=ATOL, rtol=0)


def test_a_bias_belongs_to_its_code_whichever_is_desired(monkeypatch, guide):
    uniform = torch.zeros_like(GEDI_MAIN)
    settings = {"strength": 1.0, "filter_p": 0.0, "bias": LEARNED}
    first = guided(monkeypatch, guide, uniform, **settings)
    second = guided(monkeypatch, guide, uniform, swap=True, desired=BAD, undesired=GOOD, **settings)
    torch.testing.assert_close(first, GEDI_POSTERIOR / GEDI_POSTERIOR.sum(), atol=2e-6, rtol=0)
    rest = 1 - GEDI_POSTERIOR
    torch.testing.assert_close(second, rest / rest.sum(), atol=2e-6, rtol=0)


def test_without_strength_and_filter_it_is_the_plain_model(monkeypatch, guide, main):
    plain = GEDI_MAIN.softmax(-1)
    torch.testing.assert_close(guided(monkeypatch, guide, strength=0.0, filter_p=0.0), plain)
    processor = GeDiLogitsProcessor(guide, strength=0.0, filter_p=0.0, **CODES)
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(main.generate(ids, **settings), main.generate(ids, logits_processor=[processor], **settings))
    assert processor.stats.forwards == 0


@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_classes_that_agree_leave_the_plain_model(strength):
    conditional = torch.stack(normalised(GEDI_DESIRED, GEDI_DESIRED))
    settings = {"scale": GEDI_SCALE, "bias": torch.zeros(2).double(), "length_normalise": True}
    flat = class_log_posterior(conditional, torch.full((2, 1), -6.0).double(), torch.tensor([3]), **settings)
    torch.testing.assert_close(flat.exp(), torch.full_like(GEDI_MAIN, 0.5))
    main = GEDI_MAIN.log_softmax(-1)
    kept = gedi_filter(main + strength * flat, flat, filter_p=0.8, target_p=0.5)
    torch.testing.assert_close(kept.log_softmax(-1), main)


def test_length_normalisation():
    conditional = torch.stack(normalised(GEDI_DESIRED, GEDI_UNDESIRED))
    totals = torch.tensor(GEDI_RUNNING).double()[:, None, None] + conditional
    bias = torch.tensor(GEDI_BIAS).double()[:, None, None]
    for divide, by in ((True, GEDI_LENGTH + 1), (False, 1)):
        odds = (GEDI_SCALE * totals / by + bias).diff(dim=0)[0]  # undesired minus desired
        torch.testing.assert_close(posterior(length_normalise=divide).exp(), 1 / (1 + odds.exp()))


# --- the filter ------------------------------------------------------------------------------------------------------------


def slow_filter(scores, log_posterior, filter_p, target_p):
    """The same, token by token."""
    kept = scores.clone()
    for row in range(len(scores)):
        probs = scores[row].softmax(-1).tolist()
        order = sorted(range(len(probs)), key=lambda w: float(log_posterior[row, w]))  # noqa: B023
        last = [w for w in order if not scores[row, w].isneginf()][-1]
        cumulative = 0.0
        for w in order:
            cumulative += probs[w]
            if cumulative < filter_p and float(log_posterior[row, w]) < math.log(target_p) and w != last:
                kept[row, w] = -math.inf
    return kept


@pytest.mark.parametrize("filter_p", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("target_p", [0.2, 0.5, 0.8, 1.0])
def test_the_filter_equals_a_loop(filter_p, target_p):
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(60, 12, generator=generator).double()
    scores[torch.rand(60, 12, generator=generator) < 0.2] = -math.inf
    scores[:, 0] = 0.0
    # few distinct values: many ties
    log_posterior = (torch.randint(1, 8, (60, 12), generator=generator) / 8).double().log()
    fast = gedi_filter(scores, log_posterior, filter_p=filter_p, target_p=target_p)
    assert torch.equal(fast, slow_filter(scores, log_posterior, filter_p, target_p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_filter_of_a_whole_vocabulary_equals_a_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    main = 3 * torch.randn(4, 20_000, generator=generator, dtype=dtype)
    main[torch.rand(4, 20_000, generator=generator) < 0.1] = -math.inf
    log_posterior = torch.randn(4, 20_000, generator=generator, dtype=dtype).sigmoid().log()
    # as they are, and with thousands of ties
    for posterior in (log_posterior, (20 * log_posterior.exp()).ceil().div(20).log()):
        for strength in (0.0, 30.0):
            scores = main + strength * posterior
            ordered, order = posterior.sort(dim=-1, stable=True)
            reached = scores.softmax(-1).gather(-1, order).cumsum(-1)
            for filter_p, target_p in ((0.8, 0.8), (0.3, 0.6), (0.95, 0.9), (0.0, 0.5)):
                removed = (reached < filter_p) & (ordered < math.log(target_p))
                slow = scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)
                apart = slow != gedi_filter(scores, posterior, filter_p=filter_p, target_p=target_p)
                # single precision: sums of thousands of tokens end with an error, and so does the sort's
                assert scores.softmax(-1)[apart].sum() < 1e-5 if dtype == torch.float32 else not apart.any()


def test_both_bounds_of_the_filter_are_inclusive():
    scores = torch.zeros(1, 4).double()  # a quarter each
    rising = torch.tensor([[0.1, 0.2, 0.3, 0.5]]).double().log()
    banned = gedi_filter(scores, rising, filter_p=0.5, target_p=0.9).isneginf()
    assert banned.tolist() == [[True, False, False, False]]  # the second token brings the sum to 0.5, not below it
    banned = gedi_filter(scores, rising, filter_p=0.99, target_p=0.2).isneginf()
    assert banned.tolist() == [[True, False, False, False]]  # the second token has just the target


def test_of_equal_posteriors_the_first_token_goes_first():
    scores = torch.tensor([[0.3, 0.3, 0.4]]).double().log()
    banned = gedi_filter(scores, torch.full_like(scores, -0.5), filter_p=0.5, target_p=0.8).isneginf()
    assert banned.tolist() == [[True, False, False]]


def test_a_filter_of_everything_keeps_the_best_token_that_is_not_banned():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 50, generator=generator)
    log_posterior = torch.rand(200, 50, generator=generator).log()
    best = log_posterior.argmax(-1)
    scores[torch.arange(100), best[:100]] = -torch.inf
    live = log_posterior.masked_fill(scores.isneginf(), -torch.inf).argmax(-1)
    kept = ~gedi_filter(scores, log_posterior, filter_p=1.0, target_p=1.0).isneginf()
    # the cumulative sum may round up to 1 early, so the best one has company at times, but is never missing
    assert kept[torch.arange(200), live].all()
    assert not (kept & scores.isneginf()).any()
    assert kept.sum() < 400


def test_a_target_of_zero_bans_nothing():
    scores = torch.zeros(1, 4).double()
    assert not gedi_filter(scores, torch.full_like(scores, -9.0), filter_p=1.0, target_p=0.0).isneginf().any()


def test_banned_tokens_stay_banned(monkeypatch, guide):
    scores = GEDI_MAIN.clone()
    scores[:, 4] = -torch.inf  # the token of highest posterior
    for filter_p in (0.0, 0.8, 1.0):
        moved = guided(monkeypatch, guide, scores, strength=5.0, bias=LEARNED, filter_p=filter_p, target_p=1.0)
        assert moved[0, 4] == 0 and moved.isfinite().all()
        torch.testing.assert_close(moved.sum(), torch.tensor(1.0).double())


def test_one_strength_and_scale_for_each_row(monkeypatch, guide):
    moved = guided(
        monkeypatch,
        guide,
        GEDI_MAIN.expand(2, -1),
        strength=torch.tensor([1.0, 5.0]).double(),
        scale=torch.tensor([2.0, 2.0]).double(),
        bias=LEARNED,
        filter_p=0.0,
    )
    torch.testing.assert_close(moved, torch.cat([GEDI_WEIGHTED[1.0], GEDI_WEIGHTED[5.0]]), atol=ATOL, rtol=0)
    halves = guided(monkeypatch, guide, GEDI_MAIN.expand(2, -1), scale=torch.tensor([2.0, 0.0]).double())
    assert not torch.allclose(halves[0], halves[1])


# --- a real generation: the posterior of the whole token string ------------------------------------------------------------


@torch.no_grad()
def class_logits(guide, texts, code, *, scale, bias, length_normalise=True):
    """a_c(w) of each text, by one forward over the whole string for each."""
    logits = []
    for secondary, text in texts:
        begin = [tiny.BOS] if text[:1] == [tiny.BOS] else []
        counted = [*secondary, *text[len(begin) :]]
        said = guide(torch.tensor([[*begin, code, *counted]])).logits[0].log_softmax(-1)[len(begin) :]
        running = sum(float(said[i, token]) for i, token in enumerate(counted))
        length = len(counted) + 1 if length_normalise else 1
        logits.append(scale * (running + said[-1]) / length + bias)
    return torch.stack(logits)


def check_generation(main, guide, ids, mask, secondary, codes, biases, *, repeat=1, normalise=True, **settings):
    """Generate, and compare every step's scores and posterior with recomputation."""
    processor = GeDiLogitsProcessor(
        guide,
        desired=codes[0],
        undesired=codes[1] if len(codes) == 2 else codes[1:],
        strength=4.0,
        filter_p=0.6,
        target_p=0.7,
        scale=1.5,
        bias=dict(zip(codes, biases, strict=True)),
        length_normalise=normalise,
        **settings,
    )
    out = main.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=repeat > 1,
        num_return_sequences=repeat,
        top_k=0,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = []
    starts = (mask == 0).sum(-1).repeat_interleave(repeat)
    for step, scores in enumerate(out.scores):
        rows = [row[: ids.shape[1] + step][start:].tolist() for row, start in zip(out.sequences, starts, strict=True)]
        texts = [(secondary[i // repeat], row) for i, row in enumerate(rows)]
        log_posterior = torch.stack(
            [
                class_logits(guide, texts, code, scale=1.5, bias=bias, length_normalise=normalise)
                for code, bias in zip(codes, biases, strict=True)
            ]
        ).log_softmax(0)[0]
        weighted = tiny.recomputed(main, rows) + 4.0 * log_posterior
        right = slow_filter(weighted.double(), log_posterior.double(), 0.6, 0.7).float().log_softmax(-1)
        torch.testing.assert_close(scores, right, atol=5e-5, rtol=0)
        expected.append((right.exp() * log_posterior.exp()).sum(-1))
    torch.testing.assert_close(processor.stats.trace["posterior"], torch.stack(expected, 1), atol=1e-5, rtol=0)
    return processor


@pytest.mark.parametrize("bos", [False, True])
def test_the_posterior_of_a_generation(bos, main, guide):
    ids, mask = tiny.prompts()
    if bos:
        ids[0, 2], ids[1, 0] = tiny.BOS, tiny.BOS
    check_generation(main, guide, ids, mask, [[], []], [GOOD, BAD], [0.3, -0.2])


def test_a_prompt_of_nothing_but_a_bos(main, guide):
    ids = torch.full((2, 1), tiny.BOS)
    check_generation(main, guide, ids, torch.ones_like(ids), [[], []], [GOOD, BAD], [0.0, 0.0])


@pytest.mark.parametrize(
    ("given", "secondary"), [([20, 21], [[20, 21], [20, 21]]), ([[20, 21, 22], [23]], [[20, 21, 22], [23]])]
)
def test_a_secondary_code_shared_or_one_for_each_row(given, secondary, main, guide):
    ids, mask = tiny.prompts()
    ids[1, 0] = tiny.BOS
    check_generation(main, guide, ids, mask, secondary, [GOOD, BAD], [0.0, 0.0], secondary_code=given)


def test_secondary_codes_follow_returned_sequences(main, guide):
    torch.manual_seed(0)
    ids, mask = tiny.prompts()
    secondary = [[20, 21, 22], [23]]
    check_generation(main, guide, ids, mask, secondary, [GOOD, BAD], [0.1, 0.0], secondary_code=secondary, repeat=3)


def test_three_classes(main, guide):
    ids, mask = tiny.prompts()
    processor = check_generation(main, guide, ids, mask, [[], []], [GOOD, BAD, OTHER], [0.3, -0.2, 0.1])
    assert processor.stats.forwards == 5  # all classes are read together


def test_without_length_normalisation(main, guide):
    ids, mask = tiny.prompts()
    check_generation(main, guide, ids, mask, [[], []], [GOOD, BAD], [0.3, -0.2], normalise=False)


def test_codes_and_secondary_code_as_text(main, guide):
    tokenizer = word_tokenizer(["good", "bad", "sports"])
    as_text = GeDiLogitsProcessor(
        guide, desired="good", undesired=["bad"], secondary_code="sports", bias={"bad": 0.5}, tokenizer=tokenizer
    )
    as_ids = GeDiLogitsProcessor(guide, desired=4, undesired=5, secondary_code=[6], bias={5: 0.5})
    assert as_text.codes == as_ids.codes == [4, 5]
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "output_scores": True}
    first, second = (
        main.generate(ids, logits_processor=[p], return_dict_in_generate=True, **settings) for p in (as_text, as_ids)
    )
    torch.testing.assert_close(torch.stack(first.scores), torch.stack(second.scores))


def test_a_secondary_code_as_text_has_no_bos_of_its_own(main, guide):
    tokenizer = word_tokenizer(["good", "bad", "sports"], bos=True)
    settings = {"desired": 4, "undesired": 5, "tokenizer": tokenizer}
    as_text, as_ids = (GeDiLogitsProcessor(guide, secondary_code=code, **settings) for code in ("sports", [6]))
    ids = torch.tensor([[tiny.BOS, 20, 21]])
    for processor in (as_text, as_ids):
        main.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, logits_processor=[processor])
    assert as_text.engines[0].lengths.tolist() == as_ids.engines[0].lengths.tolist() == [[5], [5]]
    torch.testing.assert_close(as_text.stats.trace["posterior"], as_ids.stats.trace["posterior"])


def test_the_wanted_class_is_made_likelier(main, guide):
    ids, mask = tiny.prompts()
    posteriors = []
    for strength in (0.0, 1.0, 30.0):
        processor = GeDiLogitsProcessor(guide, strength=strength, filter_p=0.1, target_p=0.0, **CODES)
        main.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, logits_processor=[processor])
        posteriors.append(processor.stats.trace["posterior"][:, 0])
    assert (posteriors[0] < posteriors[1]).all() and (posteriors[1] < posteriors[2]).all()
