"""Leading query contrastive decoding: the numbers in both layouts, the mask, and the rewriting of questions."""

import math

import pytest
import torch

import tiny
from hf_logits.processors.lqcd import LQCDLogitsProcessor, leading_query_contrast, neutralize
from oracles import (
    ATOL,
    LQCD,
    LQCD_LEADING,
    LQCD_LEADING_PROBS,
    LQCD_NEUTRAL,
    LQCD_NEUTRAL_PROBS,
    answer,
    normalised,
    row,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(seed=1)


def contrasted(model, main, neutral=LQCD_NEUTRAL, leading=LQCD_LEADING, **settings):
    given, other = (neutral, leading) if main == "neutral" else (leading, neutral)
    processor = LQCDLogitsProcessor(model, [3, 4], main=main, **settings)
    return answer(processor, given, *([other] if processor.engines else []))


@pytest.mark.parametrize("main", ["neutral", "leading"])
@pytest.mark.parametrize("case", LQCD, ids=str)
def test_the_table_in_both_layouts(case, main, model):
    contrast, plausibility = case
    moved = contrasted(model, main, contrast=contrast, plausibility=plausibility)
    torch.testing.assert_close(moved, LQCD[case], atol=ATOL, rtol=0)


def test_the_two_questions_by_themselves(model):
    plain = contrasted(model, "neutral", contrast=0.0, plausibility=0.0)
    torch.testing.assert_close(plain, LQCD_NEUTRAL_PROBS, atol=ATOL, rtol=0)
    # the given question is the leading one, but without contrast the neutral one speaks
    torch.testing.assert_close(contrasted(model, "leading", contrast=0.0, plausibility=0.0), plain)
    torch.testing.assert_close(LQCD_LEADING.softmax(-1), LQCD_LEADING_PROBS, atol=ATOL, rtol=0)


def test_raw_logits_give_the_same_distribution_as_log_probabilities():
    raw = leading_query_contrast(LQCD_NEUTRAL + 4.0, LQCD_LEADING - 2.0, contrast=1.0, plausibility=0.1)
    torch.testing.assert_close(raw.softmax(-1), LQCD[(1.0, 0.1)], atol=ATOL, rtol=0)


@pytest.mark.parametrize("main", ["neutral", "leading"])
@pytest.mark.parametrize("contrast", [0.5, 1.0, 20.0])
def test_equal_questions_only_mask(main, contrast, model):
    moved = contrasted(model, main, leading=LQCD_NEUTRAL, contrast=contrast)
    torch.testing.assert_close(moved, LQCD[(0.0, 0.1)], atol=ATOL, rtol=0)
    unmasked = contrasted(model, main, leading=LQCD_NEUTRAL, contrast=contrast, plausibility=0.0)
    torch.testing.assert_close(unmasked, LQCD_NEUTRAL.softmax(-1))


def test_plausibility_of_one_keeps_the_best_tokens_and_bounds_are_inclusive(model):
    assert contrasted(model, "neutral", plausibility=1.0).tolist() == [[1, 0, 0, 0, 0]]
    tied = row(2, 0, 2, -1, 0.5)
    assert (contrasted(model, "neutral", neutral=tied, plausibility=1.0) > 0).tolist() == [
        [True, False, True, False, False]
    ]
    halves = row(math.log(4), math.log(2), math.log(1.9), 0, 0)
    assert (contrasted(model, "neutral", neutral=halves, plausibility=0.5) > 0).tolist() == [
        [True, True, False, False, False]
    ]


@pytest.mark.parametrize("main", ["neutral", "leading"])
def test_a_banned_token_stays_banned_in_both_layouts(main, model):
    settings = {"neutral": LQCD_NEUTRAL.clone(), "leading": LQCD_LEADING.clone()}
    settings[main][:, 1] = -math.inf
    for plausibility in (0.0, 0.1):
        moved = contrasted(model, main, plausibility=plausibility, **settings)
        assert moved.isfinite().all() and moved[0, 1] == 0
        # the others keep the proportions that they have without the ban, however much the leading question wanted it
        expected = (2 * LQCD_NEUTRAL - LQCD_LEADING).masked_fill(
            torch.tensor([False, True, False, False, False]), -1e9
        )
        if plausibility:
            expected[:, 3] = -1e9
        torch.testing.assert_close(moved, expected.softmax(-1))


def test_a_ban_in_both_questions_is_no_nan(model):
    neutral, leading = LQCD_NEUTRAL.clone(), LQCD_LEADING.clone()
    neutral[:, 1], leading[:, [1, 2]] = -math.inf, -math.inf
    scores = leading_query_contrast(*normalised(neutral, leading), contrast=1.0, plausibility=0.0)
    assert scores.isneginf().tolist() == [[False, True, False, False, False]]
    assert not scores.isnan().any()
    # where only the leading question bans, the neutral one speaks alone
    assert scores[0, 2] == neutral.log_softmax(-1)[0, 2]


def test_the_mask_is_of_the_neutral_question(model):
    # under the leading question token 0 is implausible, under the neutral one the best
    neutral, leading = row(3, 0, 2.9), row(-9, 3, 0)
    for main in ("neutral", "leading"):
        moved = contrasted(model, main, neutral=neutral, leading=leading, contrast=0.1, plausibility=0.5)
        assert (moved > 0).tolist() == [[True, False, True]]


def test_values_for_each_row(model):
    cases = [(0.0, 0.1), (1.0, 0.25), (0.5, 0.1)]
    contrast, plausibility = (torch.tensor(values).double() for values in zip(*cases, strict=True))
    for main in ("neutral", "leading"):
        moved = contrasted(
            model,
            main,
            neutral=LQCD_NEUTRAL.expand(3, -1),
            leading=LQCD_LEADING.expand(3, -1),
            contrast=contrast,
            plausibility=plausibility,
        )
        torch.testing.assert_close(moved, torch.cat([LQCD[case] for case in cases]), atol=ATOL, rtol=0)


# --- in a generation -------------------------------------------------------------------------------------------------------


def prompts_of_both_kinds():
    """Neutral and leading questions of unequal lengths."""
    neutral, _ = tiny.prompts(length=8, seed=1)
    leading, _ = tiny.prompts(length=12, seed=2)
    return neutral, leading


def plain_rows(ids):
    return [r[r != tiny.PAD].tolist() for r in ids]


@pytest.mark.parametrize("settings", [{}, {"suppress_tokens": list(range(30, 50))}, {"num_beams": 3}], ids=str)
def test_both_layouts_generate_the_same_tokens(settings, model):
    neutral, leading = prompts_of_both_kinds()
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | settings
    new = []
    for main, given, other in (("neutral", neutral, leading), ("leading", leading, neutral)):
        processor = LQCDLogitsProcessor(model, plain_rows(other), main=main, contrast=0.7, plausibility=0.2)
        out = model.generate(
            given,
            attention_mask=(given != tiny.PAD).long(),
            logits_processor=[processor],
            output_scores=True,
            **settings,
        )
        new.append((out.sequences[:, given.shape[1] :], torch.stack(out.scores).exp()))
    assert torch.equal(new[0][0], new[1][0])
    if "num_beams" not in settings:
        torch.testing.assert_close(new[0][1], new[1][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("main", ["neutral", "leading"])
def test_generation_equals_recomputation(main, model):
    neutral, leading = prompts_of_both_kinds()
    given, other = (neutral, leading) if main == "neutral" else (leading, neutral)
    processor = LQCDLogitsProcessor(model, plain_rows(other), main=main)
    out = model.generate(
        given,
        attention_mask=(given != tiny.PAD).long(),
        max_new_tokens=5,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    for step, scores in enumerate(out.scores):
        new = out.sequences[:, given.shape[1] : given.shape[1] + step].tolist()
        said = {
            name: tiny.recomputed(model, [p + n for p, n in zip(plain_rows(ids), new, strict=True)])
            for name, ids in (("neutral", neutral), ("leading", leading))
        }
        right = 2 * said["neutral"] - said["leading"]
        bound = said["neutral"].max(-1, keepdim=True).values + math.log(0.1)
        right = right.masked_fill(said["neutral"] < bound, -math.inf).log_softmax(-1)
        torch.testing.assert_close(scores, right, atol=2e-5, rtol=0)


def test_a_prompt_keyed_mapping_is_the_list_of_its_values(model):
    neutral, leading = prompts_of_both_kinds()
    pairs = {tuple(n): o for n, o in zip(plain_rows(neutral), plain_rows(leading), strict=True)}
    settings = {"attention_mask": (neutral != tiny.PAD).long(), "max_new_tokens": 5, "do_sample": False}
    by_item = model.generate(neutral, logits_processor=[LQCDLogitsProcessor(model, plain_rows(leading))], **settings)
    by_content = model.generate(neutral, logits_processor=[LQCDLogitsProcessor(model, pairs)], **settings)
    assert torch.equal(by_item, by_content)


def test_a_question_as_text(model):
    neutral, _ = prompts_of_both_kinds()
    settings = {"attention_mask": (neutral != tiny.PAD).long(), "max_new_tokens": 5, "do_sample": False}
    as_text = LQCDLogitsProcessor(model, "w20 w21 w22", tokenizer=word_tokenizer())
    as_ids = LQCDLogitsProcessor(model, [20, 21, 22])
    assert torch.equal(
        model.generate(neutral, logits_processor=[as_text], **settings),
        model.generate(neutral, logits_processor=[as_ids], **settings),
    )


# --- questions without their cues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leading", "neutral"),
    [
        ("What is the capital of France? I think the answer is Lyon.", "What is the capital of France?"),
        ("I think the answer is Lyon. What is the capital of France?", "What is the capital of France?"),
        ("Is it B? Are you sure?", "Is it B?"),
        ("I really believe it is red. Which colour is it?", "Which colour is it?"),
        ("I'm pretty sure it is red. Which colour is it?", "Which colour is it?"),
        ("My teacher said it is red. Which colour is it?", "Which colour is it?"),
        ("I don't think it is red. Which colour is it?", "Which colour is it?"),
        ("It is red, isn't it right? Which colour is it?", "It is red, Which colour is it?"),
        ("Which colour is it?", "Which colour is it?"),
        ("I think it is red.", "I think it is red."),  # nothing else is left
        ("What do you think of the sky?", "What do you think of the sky?"),
        ("Thinking of Lyon, name a city.", "Thinking of Lyon, name a city."),
    ],
)
def test_neutralize(leading, neutral):
    assert neutralize(leading) == neutral


def test_neutralize_with_a_rewriter():
    assert neutralize("I think it is red. Which colour?", rewrite=str.upper) == "I THINK IT IS RED. WHICH COLOUR?"
