"""The relatives: guidance, context-aware decoding, proxy-tuning, DExperts and contrastive decoding, by their numbers."""

import math

import pytest
import torch

import tiny
from hf_logits.logits import keep, top_p
from hf_logits.processors.mixture import MixtureLogitsProcessor, MixtureTerm, mixture
from oracles import (
    ATOL,
    CONTRASTIVE,
    CONTRASTIVE_AMATEUR,
    CONTRASTIVE_EXPERT,
    CONTRASTIVE_STRENGTH,
    DEXPERTS,
    FUSION_BASE,
    FUSION_BIG,
    FUSION_EXPERT,
    FUSION_MOVED,
    FUSION_SMALL,
    GUIDANCE,
    GUIDANCE_CONDITIONAL,
    GUIDANCE_UNCONDITIONAL,
    answer,
    normalised,
    row,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(seed=1)


@pytest.fixture(scope="module")
def second():
    return tiny.llama(seed=2)


@pytest.fixture(scope="module")
def third():
    return tiny.llama(seed=3)


# --- classifier-free guidance and context-aware decoding -------------------------------------------------------------------


@pytest.mark.parametrize("scale", GUIDANCE)
def test_guidance(scale, model):
    moved = answer(MixtureLogitsProcessor.cfg(model, [3], scale=scale), GUIDANCE_CONDITIONAL, GUIDANCE_UNCONDITIONAL)
    torch.testing.assert_close(moved, GUIDANCE[scale], atol=ATOL, rtol=0)


@pytest.mark.parametrize("scale", GUIDANCE)
def test_context_aware_decoding_is_guidance_with_one_less(scale, model):
    processor = MixtureLogitsProcessor.context_aware(model, [3], contrast=scale - 1)
    moved = answer(processor, GUIDANCE_CONDITIONAL, GUIDANCE_UNCONDITIONAL)
    torch.testing.assert_close(moved, GUIDANCE[scale], atol=ATOL, rtol=0)
    guided = answer(MixtureLogitsProcessor.cfg(model, [3], scale=scale), GUIDANCE_CONDITIONAL, GUIDANCE_UNCONDITIONAL)
    torch.testing.assert_close(moved, guided)


def test_a_scale_of_zero_is_the_negative_prompt_alone(model):
    moved = answer(MixtureLogitsProcessor.cfg(model, [3], scale=0.0), GUIDANCE_CONDITIONAL, GUIDANCE_UNCONDITIONAL)
    torch.testing.assert_close(moved, GUIDANCE_UNCONDITIONAL.softmax(-1))


def test_scales_for_each_row(model):
    processor = MixtureLogitsProcessor.cfg(model, [3], scale=torch.tensor([1.5, 2.0, 1.0]).double())
    moved = answer(processor, GUIDANCE_CONDITIONAL.expand(3, -1), GUIDANCE_UNCONDITIONAL.expand(3, -1))
    table = torch.cat([GUIDANCE[1.5], GUIDANCE[2.0], GUIDANCE_CONDITIONAL.softmax(-1)])
    torch.testing.assert_close(moved, table, atol=ATOL, rtol=0)
    processor = MixtureLogitsProcessor.context_aware(model, [3], contrast=torch.tensor([0.5, 1.0]).double())
    moved = answer(processor, GUIDANCE_CONDITIONAL.expand(4, -1), GUIDANCE_UNCONDITIONAL.expand(4, -1))
    table = torch.cat([GUIDANCE[1.5], GUIDANCE[2.0]]).repeat_interleave(2, 0)
    torch.testing.assert_close(moved, table, atol=ATOL, rtol=0)


def test_banned_tokens_stay_banned_at_any_scale(model):
    banned = GUIDANCE_CONDITIONAL.clone()
    banned[:, 1] = -torch.inf
    for scale in (-1.0, 0.0, 1.5):
        moved = answer(MixtureLogitsProcessor.cfg(model, [3], scale=scale), banned, GUIDANCE_UNCONDITIONAL)
        assert moved.isfinite().all() and moved[0, 1] == 0
        plain = (scale * GUIDANCE_CONDITIONAL + (1 - scale) * GUIDANCE_UNCONDITIONAL)[:, [0, 2, 3, 4]].softmax(-1)
        torch.testing.assert_close(moved[:, [0, 2, 3, 4]], plain)


# --- proxy-tuning and DExperts -------------------------------------------------------------------------------------------------


def test_proxy_tuning(model, second):
    for weight, table in ((1.0, FUSION_MOVED), (0.0, FUSION_BASE)):
        processor = MixtureLogitsProcessor.proxy(model, second, weight=weight)
        terms = (FUSION_EXPERT, FUSION_SMALL) if processor.engines else ()
        torch.testing.assert_close(answer(processor, FUSION_BIG, *terms), table, atol=ATOL, rtol=0)


def test_proxy_tuning_identities(model, second):
    processor = MixtureLogitsProcessor.proxy(model, second)
    plain = FUSION_BIG.softmax(-1)
    torch.testing.assert_close(answer(processor, FUSION_BIG, FUSION_EXPERT, FUSION_EXPERT), plain)
    becomes = answer(processor, FUSION_SMALL, FUSION_EXPERT, FUSION_SMALL)
    torch.testing.assert_close(becomes, FUSION_EXPERT.softmax(-1))


def test_dexperts(model, second):
    processor = MixtureLogitsProcessor.dexperts(model, second, weight=2.0)
    torch.testing.assert_close(answer(processor, FUSION_BIG, FUSION_EXPERT, FUSION_SMALL), DEXPERTS, atol=ATOL, rtol=0)


def test_dexperts_filters_the_base_and_not_the_mixture(model, second):
    (mixed,) = normalised(FUSION_BIG + 2 * (FUSION_EXPERT - FUSION_SMALL))
    after = keep(mixed, top_p(mixed, 0.9)).softmax(-1)
    assert (after > 0).sum() != (DEXPERTS > 0).sum()
    unfiltered = MixtureLogitsProcessor.dexperts(model, second, weight=2.0, filter_p=None)
    torch.testing.assert_close(answer(unfiltered, FUSION_BIG, FUSION_EXPERT, FUSION_SMALL), mixed.exp())


def test_a_negative_weight_turns_the_direction(model, second):
    there = MixtureLogitsProcessor.dexperts(model, second, weight=-2.0)
    back = MixtureLogitsProcessor.dexperts(second, model, weight=2.0)
    torch.testing.assert_close(
        answer(there, FUSION_BIG, FUSION_EXPERT, FUSION_SMALL), answer(back, FUSION_BIG, FUSION_SMALL, FUSION_EXPERT)
    )


@pytest.mark.parametrize("weight", [2.0, -1.5, torch.tensor([2.0, -1.5]).double()], ids=str)
@pytest.mark.parametrize("missing", ["expert", "antiexpert"])
def test_a_missing_model_is_the_base_before_its_filter(missing, weight, model):
    models = {"expert": model, "antiexpert": model} | {missing: None}
    processor = MixtureLogitsProcessor.dexperts(**models, weight=weight)
    base, other = FUSION_BIG.expand(2, -1), FUSION_EXPERT.expand(2, -1)
    moved = answer(processor, base, other)
    column = torch.as_tensor(weight).double().expand(2)[:, None]
    expert, antiexpert = (base, other) if missing == "expert" else (other, base)
    scores = base + column * (expert - antiexpert)
    scores[:, 3:] = -torch.inf  # outside the nucleus
    assert moved.isfinite().all()
    torch.testing.assert_close(moved, scores.softmax(-1))


# --- contrastive decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", CONTRASTIVE)
def test_contrastive(temperature, model):
    processor = MixtureLogitsProcessor.contrastive(model, amateur_temperature=temperature)
    torch.testing.assert_close(
        answer(processor, CONTRASTIVE_EXPERT, CONTRASTIVE_AMATEUR), CONTRASTIVE[temperature], atol=ATOL, rtol=0
    )


def test_contrastive_with_strength(model):
    processor = MixtureLogitsProcessor.contrastive(model, strength=0.5)
    moved = answer(processor, CONTRASTIVE_EXPERT, CONTRASTIVE_AMATEUR)
    torch.testing.assert_close(moved, CONTRASTIVE_STRENGTH, atol=ATOL, rtol=0)


def test_the_amateurs_temperature_divides_log_probabilities(model):
    """It acts after the softmax: across rows, whose normalisers differ, that is another score."""
    amateur = CONTRASTIVE_AMATEUR.log_softmax(-1)
    processor = MixtureLogitsProcessor.contrastive(model, amateur_temperature=0.5)
    scores = processor.combine(CONTRASTIVE_EXPERT.log_softmax(-1), amateur)
    expected = CONTRASTIVE_EXPERT.log_softmax(-1) - amateur / 0.5
    assert torch.equal(scores[:, :4], expected[:, :4])
    assert not torch.allclose(
        scores[:, :4], (CONTRASTIVE_EXPERT.log_softmax(-1) - (amateur / 0.5).log_softmax(-1))[:, :4]
    )


def test_an_amateur_equal_to_the_expert(model):
    uniform = answer(MixtureLogitsProcessor.contrastive(model), CONTRASTIVE_EXPERT, CONTRASTIVE_EXPERT)
    torch.testing.assert_close(uniform, row(0.25, 0.25, 0.25, 0.25, 0))
    plain = answer(MixtureLogitsProcessor.contrastive(model, strength=0.5), CONTRASTIVE_EXPERT, CONTRASTIVE_EXPERT)
    torch.testing.assert_close(plain, keep(CONTRASTIVE_EXPERT, plain > 0).softmax(-1))
    assert (plain > 0).tolist() == [[True, True, True, True, False]]


def test_the_weight_of_the_amateur(model):
    moved = answer(MixtureLogitsProcessor.contrastive(model, weight=0.8), CONTRASTIVE_EXPERT, CONTRASTIVE_AMATEUR)
    scores = CONTRASTIVE_EXPERT - 0.8 * CONTRASTIVE_AMATEUR
    scores[:, 4] = -torch.inf
    torch.testing.assert_close(moved, scores.softmax(-1))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_beams_need_more_than_one_token(kept, model):
    processor = MixtureLogitsProcessor.contrastive(model, plausibility=1.0, min_tokens_to_keep=kept)
    moved = answer(processor, CONTRASTIVE_EXPERT, CONTRASTIVE_AMATEUR)
    assert (moved > 0).tolist() == [[i < kept for i in range(5)]]


def test_plausibility_for_each_row(model):
    processor = MixtureLogitsProcessor.contrastive(model, plausibility=torch.tensor([0.1, 1.0]).double())
    moved = answer(processor, CONTRASTIVE_EXPERT.expand(2, -1), CONTRASTIVE_AMATEUR.expand(2, -1))
    torch.testing.assert_close(moved, torch.cat([CONTRASTIVE[1.0], row(1, 0, 0, 0, 0)]), atol=ATOL, rtol=0)


# --- the sum itself ------------------------------------------------------------------------------------------------------------


def test_a_sum_by_hand():
    main, first, second = row(1, 2, -math.inf), row(3, 5, 7), row(11, 13, 17)
    scores = mixture(main, [first, second], main_weight=2.0, weights=[-1.0, 0.5])
    assert scores.tolist() == [[2 - 3 + 5.5, 4 - 5 + 6.5, -math.inf]]


def test_a_ban_under_a_weight_of_zero_or_less_is_no_nan_and_no_plus_infinity():
    main = row(1, -math.inf, 0)
    for weight in (0.0, -1.0):
        scores = mixture(main, [], main_weight=weight, weights=[])
        assert scores.tolist() == [[weight, -math.inf, 0]]


def test_without_terms_the_filters_still_act(model):
    by_nucleus = answer(MixtureLogitsProcessor([], base_filter_p=0.9), FUSION_BIG)
    torch.testing.assert_close(
        by_nucleus, row(*FUSION_BASE[0, :3] / FUSION_BASE[0, :3].sum(), 0, 0), atol=ATOL, rtol=0
    )
    # .110746 is less than a quarter of .496331
    by_fraction = answer(MixtureLogitsProcessor([], plausibility=0.25), FUSION_BIG)
    assert (by_fraction > 0).tolist() == [[True, True, False, False, False]]
    sharper = answer(MixtureLogitsProcessor([], main_weight=2.0), FUSION_BIG)
    torch.testing.assert_close(sharper, (2 * FUSION_BIG).softmax(-1))
    torch.testing.assert_close(answer(MixtureLogitsProcessor([]), FUSION_BIG), FUSION_BIG.softmax(-1))


# --- in a generation -------------------------------------------------------------------------------------------------------------


def check_generation(model, processor, right, **settings):
    """Compare every step's scores with `right(prompts, new tokens)`, which reads everything from scratch."""
    ids, mask = tiny.prompts()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    prompts = [r[r != tiny.PAD].tolist() for r in ids]
    for step, scores in enumerate(out.scores):
        new = out.sequences[:, ids.shape[1] : ids.shape[1] + step].tolist()
        torch.testing.assert_close(scores, right(prompts, new).log_softmax(-1), atol=2e-5, rtol=0)


def read(model, prompts, new):
    return tiny.recomputed(model, [p + n for p, n in zip(prompts, new, strict=True)])


def test_guidance_with_a_negative_prompt(model):
    processor = MixtureLogitsProcessor.cfg(model, "w20 w21", scale=1.7, tokenizer=word_tokenizer())
    check_generation(
        model, processor, lambda p, new: 1.7 * read(model, p, new) - 0.7 * read(model, [[20, 21]] * 2, new)
    )


def test_guidance_without_one_begins_with_the_last_token(model):
    processor = MixtureLogitsProcessor.cfg(model, scale=1.7)
    check_generation(
        model, processor, lambda p, new: 1.7 * read(model, p, new) - 0.7 * read(model, [x[-1:] for x in p], new)
    )


def test_proxy_tuning_with_the_experts_own_prompt(model, second, third):
    processor = MixtureLogitsProcessor.proxy(second, third, weight=0.8, prompt=[[20, 21, 22], [23]])
    check_generation(
        model,
        processor,
        lambda p, new: read(model, p, new) + 0.8 * (read(second, [[20, 21, 22], [23]], new) - read(third, p, new)),
    )


@pytest.mark.parametrize("ignore_prompt", [False, True])
def test_contrastive_decoding(ignore_prompt, model, second):
    processor = MixtureLogitsProcessor.contrastive(
        second, amateur_temperature=0.5, ignore_prompt=ignore_prompt, plausibility=0.3
    )

    def right(prompts, new):
        main = read(model, prompts, new)
        scores = main - read(second, [p[-1:] for p in prompts] if ignore_prompt else prompts, new) / 0.5
        return scores.masked_fill(main < main.amax(-1, keepdim=True) + math.log(0.3), -math.inf)

    check_generation(model, processor, right)


def test_terms_of_ones_own(model, second, third):
    terms = [MixtureTerm(second, 0.5, [30, 31]), MixtureTerm(third, -0.25, None, None, 2.0), MixtureTerm(third, 0.0)]
    processor = MixtureLogitsProcessor(terms, main_weight=0.75)
    check_generation(
        model,
        processor,
        lambda p, new: (
            0.75 * read(model, p, new) + 0.5 * read(second, [[30, 31]] * 2, new) - 0.125 * read(third, p, new)
        ),
    )
    assert len(processor.engines) == 2


def test_a_scale_of_one_is_the_plain_model_at_no_cost(model, second):
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, **settings)
    for processor in (
        MixtureLogitsProcessor.cfg(model, scale=1.0),
        MixtureLogitsProcessor.context_aware(model, [3], contrast=0.0),
        MixtureLogitsProcessor.proxy(second, second, weight=0.0),
    ):
        assert torch.equal(model.generate(ids, logits_processor=[processor], **settings), plain)
        assert processor.stats.forwards == 0
