"""STEER: the published numbers, its identities, and generation against recomputation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from hf_logits.logits import entropy
from hf_logits.processors.steer import SteerLogitsProcessor, steer
from oracles import (
    ATOL,
    STEER,
    STEER_BASE,
    STEER_ENTROPY,
    STEER_NEGATIVE,
    STEER_NORMALISED,
    STEER_PLAUSIBLE,
    STEER_TUNED,
    answer,
    normalised,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def tuned():
    return tiny.llama(seed=1)


@pytest.fixture(scope="module")
def base():
    return tiny.llama(seed=2)


def mixed(contrast, repulsion, *, normalise=False, rows=(STEER_TUNED, STEER_BASE, STEER_NEGATIVE)):
    scores = steer(*normalised(*rows), contrast=contrast, repulsion=repulsion, normalise=normalise)
    return scores.softmax(-1)


def steered(model, base, main=STEER_TUNED, other=STEER_BASE, negative=STEER_NEGATIVE, **settings):
    processor = SteerLogitsProcessor(model=model, base_model=base, negatives=[3, 4], **settings)
    wanted = [logits for logits, used in ((other, processor._contrasts), (negative, processor._repels)) if used]
    return answer(processor, main, *wanted)


@pytest.mark.parametrize("weights", STEER, ids=str)
def test_the_table(weights, tuned, base):
    contrast, repulsion = weights
    torch.testing.assert_close(mixed(contrast, repulsion), STEER[weights], atol=ATOL, rtol=0)
    torch.testing.assert_close(
        steered(tuned, base, contrast=contrast, repulsion=repulsion), STEER[weights], atol=ATOL, rtol=0
    )


def test_weights_that_sum_to_one(tuned, base):
    torch.testing.assert_close(mixed(0.2, 0.6, normalise=True), STEER_NORMALISED, atol=ATOL, rtol=0)
    torch.testing.assert_close(steered(tuned, base, normalise=True), STEER_NORMALISED, atol=ATOL, rtol=0)


def test_the_default_weights_move_the_best_token_and_spread_the_rest(tuned, base):
    plain, moved = STEER_TUNED.softmax(-1), steered(tuned, base)
    assert (plain.argmax().item(), moved.argmax().item()) == (0, 1)
    bits = torch.cat([entropy(plain.log()), entropy(moved.log())])
    torch.testing.assert_close(bits, bits.new_tensor(STEER_ENTROPY), atol=ATOL, rtol=0)


@pytest.mark.parametrize("fraction", STEER_PLAUSIBLE)
def test_plausibility_is_of_the_tuned_model(fraction, tuned, base):
    torch.testing.assert_close(
        steered(tuned, base, plausibility=fraction), STEER_PLAUSIBLE[fraction], atol=ATOL, rtol=0
    )


def test_raw_logits_give_the_same_distribution_as_log_probabilities():
    shifted = [logits + shift for logits, shift in ((STEER_TUNED, 3.0), (STEER_BASE, -7.0), (STEER_NEGATIVE, 0.5))]
    raw = steer(*shifted, contrast=0.2, repulsion=0.6, normalise=False).softmax(-1)
    torch.testing.assert_close(raw, mixed(0.2, 0.6))


@pytest.mark.parametrize("contrast", [0.2, 1.0, 50.0])
def test_a_base_equal_to_the_tuned_model_pushes_nowhere(contrast, tuned):
    plain = STEER_TUNED.softmax(-1)
    torch.testing.assert_close(mixed(contrast, 0.0, rows=(STEER_TUNED, STEER_TUNED, STEER_NEGATIVE)), plain)
    torch.testing.assert_close(steered(tuned, tuned, other=STEER_TUNED, contrast=contrast, repulsion=0.0), plain)


@pytest.mark.parametrize("repulsion", [0.3, 0.6, 1.0])
def test_negatives_that_say_what_the_model_says_only_flatten(repulsion):
    same = (STEER_TUNED, STEER_TUNED, STEER_TUNED)
    flat = ((1 - repulsion) * STEER_TUNED.log_softmax(-1)).softmax(-1)
    torch.testing.assert_close(mixed(0.2, repulsion, rows=same), flat)
    torch.testing.assert_close(mixed(0.2, repulsion, normalise=True, rows=same), STEER_TUNED.softmax(-1))


@pytest.mark.parametrize("missing", ["base", "negative"])
def test_a_missing_term_is_a_weight_of_zero(missing):
    tuned, base, negative = normalised(STEER_TUNED, STEER_BASE, STEER_NEGATIVE)
    terms = (tuned, None, negative) if missing == "base" else (tuned, base, None)
    table = STEER[(0.0, 0.6)] if missing == "base" else STEER[(0.2, 0.0)]
    scores = steer(*terms, contrast=0.2, repulsion=0.6, normalise=False)
    torch.testing.assert_close(scores.softmax(-1), table, atol=ATOL, rtol=0)


def test_zero_weights_return_the_tuned_scores_bit_for_bit():
    tuned, base, negative = normalised(STEER_TUNED, STEER_BASE, STEER_NEGATIVE)
    assert torch.equal(steer(tuned, base, negative, contrast=0.0, repulsion=0.0, normalise=False), tuned)


def test_banned_tokens_stay_banned_and_leave_no_nan(tuned, base):
    banned = STEER_TUNED.clone()
    banned[:, 1] = -torch.inf
    moved = steered(tuned, base, main=banned)
    # the ban only takes its token out: the others keep their proportions
    expected = STEER[(0.2, 0.6)].clone()
    expected[:, 1] = 0
    torch.testing.assert_close(moved, expected / expected.sum(), atol=2e-6, rtol=0)
    everything = steered(tuned, base, main=banned, other=banned, negative=banned)
    assert everything.isfinite().all() and everything[0, 1] == 0


def test_a_ban_in_all_models_is_a_ban_and_no_nan():
    banned = torch.tensor([[0.5, -torch.inf, 0.5]]).double().log_softmax(-1)
    for normalise in (False, True):
        scores = steer(banned, banned, banned, contrast=0.2, repulsion=0.6, normalise=normalise)
        assert scores.isneginf().tolist() == [[False, True, False]]
        assert not scores.isnan().any()


def test_a_protected_token_is_not_pushed_by_the_negatives(tuned, base):
    # logits of token 0: as if the negatives had said of it what the tuned model says
    tuned_lp, base_lp, negative_lp = normalised(STEER_TUNED, STEER_BASE, STEER_NEGATIVE)
    scores = 1.2 * tuned_lp - 0.2 * base_lp - 0.6 * negative_lp
    scores[:, 0] = 1.2 * tuned_lp[:, 0] - 0.2 * base_lp[:, 0] - 0.6 * tuned_lp[:, 0]
    torch.testing.assert_close(steered(tuned, base, protect_ids=[0]), scores.softmax(-1))
    assert not torch.allclose(steered(tuned, base), scores.softmax(-1), atol=1e-3)


def test_one_weight_for_each_row_equals_each_row_alone(tuned, base):
    contrasts, repulsions = torch.tensor([0.0, 0.2, 0.2]).double(), torch.tensor([0.6, 0.0, 0.6]).double()
    three = [logits.expand(3, -1) for logits in (STEER_TUNED, STEER_BASE, STEER_NEGATIVE)]
    moved = steered(tuned, base, *three, contrast=contrasts, repulsion=repulsions)
    table = torch.cat([STEER[(0.0, 0.6)], STEER[(0.2, 0.0)], STEER[(0.2, 0.6)]])
    torch.testing.assert_close(moved, table, atol=ATOL, rtol=0)


def test_per_row_weights_follow_the_rows_of_beams(tuned, base):
    rows = [logits.expand(4, -1) for logits in (STEER_TUNED, STEER_BASE, STEER_NEGATIVE)]
    moved = steered(tuned, base, *rows, contrast=torch.tensor([0.2, 0.0]).double(), repulsion=0.6)
    table = torch.cat([STEER[(0.2, 0.6)], STEER[(0.0, 0.6)]]).repeat_interleave(2, 0)
    torch.testing.assert_close(moved, table, atol=ATOL, rtol=0)


def judged(tuned, base, ids, mask, negatives, output):
    """Steered probabilities of every step, each model read from scratch for each row."""
    steps = []
    for length in range(ids.shape[1], output.shape[1]):
        prompts = [
            row[:length][keep_from:].tolist() for row, keep_from in zip(output, (mask == 0).sum(-1), strict=True)
        ]
        behind = [n + row[ids.shape[1] : length].tolist() for n, row in zip(negatives, output, strict=True)]
        scores = 1.2 * tiny.recomputed(tuned, prompts) - 0.2 * base(prompts) - 0.6 * tiny.recomputed(tuned, behind)
        steps.append(scores.log_softmax(-1))
    return torch.stack(steps)


@pytest.mark.parametrize("form", ["texts", "texts of each row", "ids"])
def test_generation_equals_recomputation(form, tuned, base):
    tokenizer = word_tokenizer()
    ids, mask = tiny.prompts()
    shared = [10, 11, 12, 13]
    negatives, expected = {
        "texts": (["w10 w11", "w12 w13"], [shared, shared]),
        "texts of each row": ([["w10 w11", "w12"], ["w20"]], [[10, 11, 12], [20]]),
        "ids": (shared, [shared, shared]),
    }[form]
    processor = SteerLogitsProcessor(model=tuned, base_model=base, negatives=negatives, tokenizer=tokenizer)
    out = tuned.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    right = judged(tuned, lambda rows: tiny.recomputed(base, rows), ids, mask, expected, out.sequences)
    torch.testing.assert_close(torch.stack(out.scores), right, atol=1e-5, rtol=0)
    assert processor.stats.trace["kl"].shape == (2, 5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_without_a_base_model_the_adapters_are_switched_off():
    torch.manual_seed(0)
    plain = tiny.llama(seed=1)
    model = get_peft_model(tiny.llama(seed=1), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.5)
    ids, mask = tiny.prompts()
    processor = SteerLogitsProcessor(model=model, negatives=[10, 11, 12])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    right = judged(
        model, lambda rows: tiny.recomputed(plain, rows), ids, mask, [[10, 11, 12], [10, 11, 12]], out.sequences
    )
    torch.testing.assert_close(torch.stack(out.scores), right, atol=1e-5, rtol=0)


def test_zero_weights_generate_as_the_plain_model_at_no_cost(tuned, base):
    ids, mask = tiny.prompts()
    processor = SteerLogitsProcessor(model=tuned, base_model=base, negatives=[10], contrast=0.0, repulsion=0.0)
    plain = tuned.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    same = tuned.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, logits_processor=[processor])
    assert torch.equal(plain, same)
    assert (processor.stats.calls, processor.stats.forwards) == (6, 0)


@pytest.mark.parametrize(("settings", "forwards"), [({"contrast": 0.0}, 4), ({"repulsion": 0.0}, 4), ({}, 8)])
def test_a_term_of_weight_zero_is_not_read(settings, forwards, tuned, base):
    ids, mask = tiny.prompts()
    processor = SteerLogitsProcessor(model=tuned, base_model=base, negatives=[10, 11], **settings)
    tuned.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, logits_processor=[processor])
    assert processor.stats.forwards == forwards


def test_what_the_models_said_is_left_alone(tuned, base):
    processor = SteerLogitsProcessor(model=tuned, base_model=base, negatives=[3], protect_ids=[0], plausibility=0.1)
    said = normalised(STEER_TUNED, STEER_BASE, STEER_NEGATIVE)
    before = [values.clone() for values in said]
    processor.combine(*said)
    assert all(torch.equal(old, new) for old, new in zip(before, said, strict=True))


def test_the_given_scores_are_left_alone(tuned, base):
    before = STEER_TUNED.clone()
    steered(tuned, base, main=STEER_TUNED, plausibility=0.1, protect_ids=[0])
    assert torch.equal(STEER_TUNED, before)
