"""Refusal tokens: the four modes by their numbers, thresholds to the last digit, and generation."""

import math

import pytest
import torch

import tiny
from hf_logits.processors.refusal_tokens import (
    RefusalTokenLogitsProcessor,
    choose_category,
    choose_single,
    choose_sum,
)
from oracles import (
    ATOL,
    CATEGORY_BEST,
    CATEGORY_FORCED,
    CATEGORY_GREEDY,
    CATEGORY_LOGITS,
    CATEGORY_PROBS,
    CATEGORY_SUM,
    REFUSAL_GREEDY_BIAS,
    REFUSAL_HALF_BIAS,
    REFUSAL_LOGITS,
    REFUSAL_ODDS,
    REFUSAL_PROBS,
    REFUSAL_PROBS_T2,
    REFUSAL_SINGLE,
    answer,
    row,
    word_tokenizer,
)


CATEGORIES = {"a": 0, "b": 1, "c": 2}


@pytest.fixture(scope="module")
def model():
    return tiny.llama(seed=1)


def single(**settings):
    return RefusalTokenLogitsProcessor(refuse=0, respond=1, **settings)


def categories(mode="category", **settings):
    return RefusalTokenLogitsProcessor(refuse=CATEGORIES, respond=3, mode=mode, **settings)


def forced(processor, logits):
    """The token that each row is forced to, after checking that it is certain."""
    probs = answer(processor, logits)
    assert ((probs == 0) | (probs == 1)).all() and (probs.sum(-1) == 1).all()
    return probs.argmax(-1).tolist()


@pytest.mark.parametrize("threshold", REFUSAL_SINGLE)
def test_a_single_token(threshold):
    processor = single(threshold=threshold)
    assert forced(processor, REFUSAL_LOGITS) == [REFUSAL_SINGLE[threshold]]
    torch.testing.assert_close(
        processor.stats.trace["refusal"], REFUSAL_PROBS[:, :1], atol=ATOL, rtol=0, check_dtype=False
    )


def test_without_a_threshold_the_two_tokens_are_compared_and_a_tie_refuses():
    assert forced(single(), row(0.7, 0.7, 3, 0)) == [0]
    assert forced(single(), row(0.69, 0.7, 3, 0)) == [1]
    assert forced(single(), row(0.7, 0.69, 3, 0)) == [0]


def test_thresholds_are_inclusive():
    quarters = row(0, 0, 0, 0)
    for mode, threshold in (("single", 0.25), ("category", 0.25), ("sum", 0.75)):
        above = math.nextafter(threshold, 1)
        processors = [
            single(threshold=bound) if mode == "single" else categories(mode, threshold=bound)
            for bound in (threshold, threshold + 1e-6)
        ]
        assert [forced(p, quarters) for p in processors] == [[0], [1 if mode == "single" else 3]]
        assert above > threshold
    probs = quarters.softmax(-1)
    assert choose_single(probs, refuse=0, respond=1, threshold=math.nextafter(0.25, 1)).item() == 1


def test_a_softmax_temperature_moves_the_probability_that_is_compared():
    refuse, respond = REFUSAL_PROBS_T2
    assert forced(single(threshold=refuse - ATOL, softmax_temperature=2.0), REFUSAL_LOGITS) == [0]
    assert forced(single(threshold=refuse + ATOL, softmax_temperature=2.0), REFUSAL_LOGITS) == [1]
    assert forced(single(threshold=refuse + ATOL), REFUSAL_LOGITS) == [0]
    # p(respond), seen by asking the other way round
    other = {"refuse": 1, "respond": 0, "softmax_temperature": 2.0}
    assert forced(RefusalTokenLogitsProcessor(threshold=respond - ATOL, **other), REFUSAL_LOGITS) == [1]
    assert forced(RefusalTokenLogitsProcessor(threshold=respond + ATOL, **other), REFUSAL_LOGITS) == [0]


def test_a_temperature_does_not_touch_the_bias_mode():
    tempered = answer(single(mode="bias", bias=0.5, softmax_temperature=2.0), REFUSAL_LOGITS)
    torch.testing.assert_close(tempered, answer(single(mode="bias", bias=0.5), REFUSAL_LOGITS))


def test_the_two_biases():
    greedy = [
        answer(single(mode="bias", bias=REFUSAL_GREEDY_BIAS + d), REFUSAL_LOGITS).argmax().item()
        for d in (-1e-4, 1e-4)
    ]
    assert greedy == [1, 0]
    # the same number, from the odds between the two tokens
    torch.testing.assert_close(math.log((1 - REFUSAL_ODDS) / REFUSAL_ODDS), REFUSAL_GREEDY_BIAS, atol=5e-6, rtol=0)
    probs = answer(single(mode="bias", bias=REFUSAL_HALF_BIAS), REFUSAL_LOGITS)
    expected = REFUSAL_PROBS / (1 - REFUSAL_PROBS[0, 0]) / 2
    expected[0, 0] = 0.5
    torch.testing.assert_close(probs, expected, atol=2e-6, rtol=0)


def test_a_bias_of_zero_is_the_plain_model_and_infinity_is_not_reached():
    torch.testing.assert_close(answer(single(mode="bias", bias=0.0), REFUSAL_LOGITS), REFUSAL_LOGITS.softmax(-1))
    huge = answer(single(mode="bias", bias=1e6), REFUSAL_LOGITS)
    assert huge[0, 0] == 1 and huge.isfinite().all()
    assert answer(single(mode="bias", bias=-1e6), REFUSAL_LOGITS)[0, 0] == 0


def test_a_bias_for_each_category():
    processor = categories("bias", bias={"a": 0.5, "c": -1.0})
    shifted = CATEGORY_LOGITS + row(0.5, 0, -1.0, 0, 0)
    probs = answer(processor, CATEGORY_LOGITS)
    torch.testing.assert_close(probs, shifted.softmax(-1))
    torch.testing.assert_close(processor.stats.trace["refusal"][:, 0], probs[:, :3].sum(-1))


@pytest.mark.parametrize("case", CATEGORY_FORCED, ids=str)
def test_categories(case):
    mode, threshold = case
    processor = categories(mode, threshold=threshold)
    assert forced(processor, CATEGORY_LOGITS) == [CATEGORY_FORCED[case]]
    refusal = processor.stats.trace["refusal"][0, 0].item()
    assert abs(refusal - CATEGORY_SUM) < ATOL
    torch.testing.assert_close(CATEGORY_LOGITS.softmax(-1), CATEGORY_PROBS, atol=ATOL, rtol=0)
    assert CATEGORY_LOGITS.argmax().item() == CATEGORY_GREEDY


@pytest.mark.parametrize(("mode", "value"), [("category", CATEGORY_BEST), ("sum", CATEGORY_SUM)])
def test_what_a_category_threshold_is_compared_with(mode, value):
    assert forced(categories(mode, threshold=value - 2 * ATOL), CATEGORY_LOGITS) == [0]
    assert forced(categories(mode, threshold=value + 2 * ATOL), CATEGORY_LOGITS) == [3]


def test_each_category_has_its_own_threshold():
    # category a is the best with p = .2288: only its own threshold matters
    assert forced(categories(threshold={"a": 0.2, "b": 0.9, "c": 0.9}), CATEGORY_LOGITS) == [0]
    assert forced(categories(threshold={"a": 0.3, "b": 0.0, "c": 0.0}), CATEGORY_LOGITS) == [3]
    b_first = CATEGORY_LOGITS[:, [1, 0, 2, 3, 4]]
    assert forced(categories(threshold={"a": 0.9, "b": 0.2, "c": 0.9}), b_first) == [1]
    assert forced(categories(threshold={"a": 0.0, "b": 0.3, "c": 0.0}), b_first) == [3]


def test_a_category_without_a_threshold_is_left_to_the_model():
    other_first = CATEGORY_LOGITS + row(0, 0, 0, 0, 3.0)  # the model's own most probable token is 4
    assert forced(categories(threshold={"b": 0.0}), other_first) == [4]
    assert forced(categories(threshold={}), other_first) == [4]
    assert forced(categories(threshold={"a": 0.9}), other_first) == [3]
    assert forced(categories(threshold={}), CATEGORY_LOGITS) == [CATEGORY_GREEDY]


def test_of_equal_categories_the_first_is_emitted():
    tied = row(0.5, 0.9, 0.9, 0, 0)
    assert forced(categories(threshold=0.1), tied) == [1]
    assert forced(categories("sum", threshold=0.1), tied) == [1]


@pytest.mark.parametrize("processor", [single, categories, lambda **s: categories("sum", **s)])
def test_a_threshold_of_zero_always_refuses_and_one_above_one_never(processor):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 6, generator=generator).double()
    answers = {t: forced(processor(threshold=t), logits) for t in (0.0, 0.2, 0.4, 0.6, 1.01)}
    responding = 1 if processor is single else 3
    assert responding not in answers[0.0]
    assert set(answers[1.01]) == {responding}
    # the set of refused prompts shrinks as the threshold grows
    refused = [{i for i, token in enumerate(found) if token != responding} for found in answers.values()]
    assert all(later <= earlier for earlier, later in zip(refused, refused[1:], strict=False))
    assert len({len(found) for found in refused}) > 2


def test_the_vectorised_choices_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(200, 7, generator=generator).double().softmax(-1)
    thresholds = torch.rand(200, 3, generator=generator).double() / 2
    thresholds[torch.rand(200, 3, generator=generator) < 0.2] = math.nan
    ids = torch.tensor([2, 5, 4])
    expected: dict[str, list[int]] = {"category": [], "sum": [], "single": []}
    for p, bounds in zip(probs.tolist(), thresholds.tolist(), strict=True):
        best = max(range(3), key=lambda c: p[ids[c]])  # noqa: B023
        bound = bounds[best]
        expected["category"].append(-1 if math.isnan(bound) else int(ids[best]) if p[ids[best]] >= bound else 0)
        expected["sum"].append(int(ids[best]) if sum(p[i] for i in ids) >= 0.4 else 0)
        expected["single"].append(2 if p[2] >= p[0] else 0)
    assert choose_category(probs, categories=ids, respond=0, thresholds=thresholds).tolist() == expected["category"]
    assert choose_sum(probs, categories=ids, respond=0, threshold=0.4).tolist() == expected["sum"]
    assert choose_single(probs, refuse=2, respond=0, threshold=None).tolist() == expected["single"]
    assert all(len(set(found)) >= 2 for found in expected.values())


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_threshold_for_each_row(repeats):
    logits = REFUSAL_LOGITS.expand(2 * repeats, -1)
    thresholds = torch.tensor([0.2, 0.4])
    assert forced(single(threshold=thresholds), logits) == [0] * repeats + [1] * repeats
    rows = CATEGORY_LOGITS.expand(2 * repeats, -1)
    assert forced(categories("sum", threshold=torch.tensor([0.5, 0.6])), rows) == [0] * repeats + [3] * repeats
    assert forced(categories(threshold=torch.tensor([0.2, 0.3])), rows) == [0] * repeats + [3] * repeats


def test_a_bias_for_each_row():
    probs = answer(single(mode="bias", bias=torch.tensor([0.0, 0.7])), REFUSAL_LOGITS.expand(2, -1))
    expected = torch.cat([REFUSAL_LOGITS, REFUSAL_LOGITS + row(0.7, 0, 0, 0, 0, 0)]).softmax(-1)
    torch.testing.assert_close(probs, expected, atol=ATOL, rtol=0)


def test_a_token_that_is_banned_is_not_forced():
    banned = REFUSAL_LOGITS.repeat(2, 1)
    banned[0, 0] = -math.inf
    probs = answer(single(threshold=0.0), banned)
    torch.testing.assert_close(probs[:1], banned[:1].softmax(-1))
    assert probs[1].tolist() == [1, 0, 0, 0, 0, 0]
    for mode, value in (("bias", {"bias": 5.0}), ("single", {"threshold": 0.9})):
        assert answer(single(mode=mode, **value), banned)[0, 0] == 0


# --- in a generation -------------------------------------------------------------------------------------------------------

REFUSE, RESPOND = 50, 51


def generated(model, ids, processor=None, **settings):
    settings = {"attention_mask": (ids != tiny.PAD).long(), "max_new_tokens": 5, "do_sample": False} | settings
    with_ours = {} if processor is None else {"logits_processor": [processor]}
    return model.generate(ids, **with_ours, **settings)


def test_only_the_first_token_is_chosen_and_on_every_generation(model):
    ids, _ = tiny.prompts()
    processor = RefusalTokenLogitsProcessor(refuse=REFUSE, respond=RESPOND, threshold=torch.tensor([0.0, 1.01]))
    for _ in range(2):  # a step counter that is never reset would do nothing the second time
        out = generated(model, ids, processor)
        assert out[:, ids.shape[1]].tolist() == [REFUSE, RESPOND]
        begun = torch.cat([ids, torch.tensor([[REFUSE], [RESPOND]])], dim=1)
        assert torch.equal(out, generated(model, begun, max_new_tokens=4))
    assert processor.stats.forwards == 0


def test_later_steps_are_the_plain_model(model):
    ids, _ = tiny.prompts()
    processor = RefusalTokenLogitsProcessor(refuse=REFUSE, respond=RESPOND, threshold=0.0)
    out = generated(model, ids, processor, output_scores=True, return_dict_in_generate=True)
    for step in range(1, 5):
        rows = [r[r != tiny.PAD].tolist() for r in out.sequences[:, : ids.shape[1] + step]]
        torch.testing.assert_close(out.scores[step], tiny.recomputed(model, rows), atol=1e-5, rtol=0)


def test_the_decision_is_the_models_own_probability(model):
    ids, _ = tiny.prompts()
    said = tiny.recomputed(model, [r[r != tiny.PAD].tolist() for r in ids]).exp()[:, REFUSE]
    for delta, token in ((-1e-6, REFUSE), (1e-6, RESPOND)):
        processor = RefusalTokenLogitsProcessor(refuse=REFUSE, respond=RESPOND, threshold=said + delta * said.sqrt())
        assert generated(model, ids, processor, max_new_tokens=1)[:, -1].tolist() == [token, token]


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_under_beams_forcing_a_token_is_putting_it_into_the_prompt(threshold, model):
    ids, _ = tiny.prompts()
    token = REFUSE if threshold == 0 else RESPOND
    processor = RefusalTokenLogitsProcessor(refuse=REFUSE, respond=RESPOND, threshold=threshold)
    settings = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    ours = generated(model, ids, processor, **settings)
    begun = torch.cat([ids, torch.full((2, 1), token)], dim=1)
    theirs = generated(model, begun, max_new_tokens=4, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    # the sums are divided by the number of generated tokens
    torch.testing.assert_close(ours.sequences_scores * 5, theirs.sequences_scores * 4, atol=1e-5, rtol=0)


def test_suppressed_tokens_are_not_forced(model):
    ids, _ = tiny.prompts()
    processor = RefusalTokenLogitsProcessor(refuse=REFUSE, respond=RESPOND, threshold=0.0)
    out = generated(model, ids, processor, suppress_tokens=[REFUSE])
    assert torch.equal(out, generated(model, ids, suppress_tokens=[REFUSE]))


def test_tokens_as_text(model):
    tokenizer = word_tokenizer(["[refuse]", "[respond]"])
    processor = RefusalTokenLogitsProcessor(
        refuse={"safety": "[refuse]"}, respond="[respond]", mode="category", threshold=0.0, tokenizer=tokenizer
    )
    ids, _ = tiny.prompts()
    assert generated(model, ids, processor, max_new_tokens=1)[:, -1].tolist() == [4, 4]
