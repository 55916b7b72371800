"""Bad input: every wrong argument is refused with an error that names it, what was given, and what to do.

The shape checks that run with the other tests are off here: users do not have them, and they would come before our own errors.
"""

import math

import jaxtyping
import pytest
import torch

import tiny
from hf_logits.checks import check_number
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    GeDiLogitsProcessor,
    GeDiRepetitionPenaltyLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    MixtureTerm,
    NegativePool,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
)
from hf_logits.prompts import check_same_tokenizer
from oracles import word_tokenizer


MODEL = tiny.llama(seed=1)
OTHER = tiny.llama(seed=2)
TEXT_MODEL = tiny.t5(seed=1)


@pytest.fixture(autouse=True)
def without_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def steer(**settings):
    return SteerLogitsProcessor(**({"model": MODEL, "base_model": OTHER, "negatives": [3, 4]} | settings))


def gedi(**settings):
    return GeDiLogitsProcessor(**({"guide": OTHER, "desired": 40, "undesired": 41} | settings))


def refusal(**settings):
    return RefusalTokenLogitsProcessor(**({"refuse": 50, "respond": 51} | settings))


def bias(**settings):
    return refusal(mode="bias", **settings)


def categories(**settings):
    given = {"refuse": {"a": 50, "b": 52}, "respond": 51, "mode": "category", "threshold": 0.5}
    return RefusalTokenLogitsProcessor(**(given | settings))


def adaptive(**settings):
    return EntropyAdaptiveLogitsProcessor(**({"large_model": OTHER} | settings))


def lqcd(**settings):
    return LQCDLogitsProcessor(**({"model": MODEL, "other_prompt": [3, 4]} | settings))


def fusion(**settings):
    return DynamicFusionLogitsProcessor(**({"small_model": OTHER, "experts": [tiny.llama(seed=3)]} | settings))


def sum_of(**settings):
    return MixtureLogitsProcessor(**({"terms": [MixtureTerm(OTHER, 0.5)]} | settings))


def term(**settings):
    return MixtureLogitsProcessor([MixtureTerm(**({"model": OTHER, "weight": 0.5} | settings))])


def cfg(**settings):
    return MixtureLogitsProcessor.cfg(MODEL, [3], **settings)


def context_aware(**settings):
    return MixtureLogitsProcessor.context_aware(MODEL, [3], **settings)


def proxy(**settings):
    return MixtureLogitsProcessor.proxy(OTHER, MODEL, **settings)


def dexperts(**settings):
    return MixtureLogitsProcessor.dexperts(**({"expert": OTHER, "antiexpert": MODEL, "weight": 2.0} | settings))


def contrastive(**settings):
    return MixtureLogitsProcessor.contrastive(OTHER, **settings)


def pool(**settings):
    return NegativePool(**({"examples": ["a", "b"]} | settings))


def penalty(**settings):
    return GeDiRepetitionPenaltyLogitsProcessor(**settings)


NOT = "not NaN"
ABOVE_ZERO = "(0.0, inf)"
FROM_ZERO = "[0.0, inf)"
FRACTION = "[0.0, 1.0]"
ANY = "[-inf, inf)"

NUMBERS = [  # what is built, the argument, what it allows, and a number outside of it
    (steer, "contrast", FROM_ZERO, -0.1),
    (steer, "repulsion", FROM_ZERO, -0.1),
    (steer, "plausibility", FRACTION, 1.1),
    (gedi, "strength", FROM_ZERO, -1.0),
    (gedi, "filter_p", FRACTION, 1.5),
    (gedi, "target_p", FRACTION, -0.5),
    (gedi, "scale", ANY, math.inf),
    (gedi, "class_bias", ANY, -math.inf),
    (penalty, "penalty", ABOVE_ZERO, 0.0),
    (penalty, "scale", FROM_ZERO, -1.0),
    (refusal, "threshold", FROM_ZERO, -0.2),
    (refusal, "softmax_temperature", ABOVE_ZERO, 0.0),
    (bias, "bias", ANY, math.inf),
    (adaptive, "threshold", ANY, None),
    (lqcd, "contrast", FROM_ZERO, -1.0),
    (lqcd, "plausibility", FRACTION, 2.0),
    (fusion, "weight", FROM_ZERO, -1.0),
    (fusion, "max_weight", ABOVE_ZERO, 0.0),
    (fusion, "step", "(0.0, 2.0]", 2.5),
    (sum_of, "main_weight", ANY, math.inf),
    (sum_of, "plausibility", FRACTION, -0.1),
    (sum_of, "base_filter_p", "(0.0, 1.0]", 0.0),
    (term, "weight", ANY, math.inf),
    (term, "temperature", ABOVE_ZERO, 0.0),
    (cfg, "scale", ANY, math.inf),
    (context_aware, "contrast", FROM_ZERO, -0.5),
    (proxy, "weight", ANY, math.inf),
    (dexperts, "weight", ANY, -math.inf),
    (contrastive, "plausibility", FRACTION, 1.5),
    (contrastive, "weight", FROM_ZERO, -1.0),
    (contrastive, "strength", FROM_ZERO, -1.0),
]
PER_ROW = [
    (steer, "contrast"),
    (steer, "repulsion"),
    (gedi, "strength"),
    (gedi, "scale"),
    (refusal, "threshold"),
    (bias, "bias"),
    (adaptive, "threshold"),
    (lqcd, "contrast"),
    (lqcd, "plausibility"),
    (fusion, "weight"),
    (sum_of, "main_weight"),
    (sum_of, "plausibility"),
    (term, "weight"),
]
IDS = [f"{build.__name__}-{name}" for build, name, *_ in NUMBERS]


def name_of(value):
    """The builders by their names, everything else as it is printed."""
    return value.__name__ if callable(value) else str(value)


def refused(error, *parts):
    """An error whose message has all the parts, in this order."""
    pattern = ".*".join(str(part).translate({ord(c): f"\\{c}" for c in "()[]{}.+*?|^$"}) for part in parts)
    return pytest.raises(error, match=f"(?s){pattern}")


# --- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "name", "allowed", "bad"), NUMBERS, ids=IDS)
def test_a_number_out_of_range_or_nan(build, name, allowed, bad):
    wrong = [math.nan] if bad is None else [math.nan, bad]
    if (build, name) in PER_ROW:
        wrong += [torch.tensor([0.5, value]) for value in wrong]
    for value in wrong:
        with refused(ValueError, f"{name} must be in {allowed}, {NOT}", "got ", repr(value)):
            build(**{name: value})


@pytest.mark.parametrize(("build", "name", "allowed", "bad"), NUMBERS, ids=IDS)
@pytest.mark.parametrize("value", [True, "0.5", [0.5]], ids=repr)
def test_what_is_no_number(value, build, name, allowed, bad):
    with refused(TypeError, f"{name} must be a number", "got ", repr(value)):
        build(**{name: value})


@pytest.mark.parametrize(("build", "name"), PER_ROW, ids=name_of)
@pytest.mark.parametrize("value", [torch.ones(2, 1) / 2, torch.ones(0), torch.tensor([True, False])], ids=str)
def test_a_tensor_that_is_not_one_number_for_each_row(value, build, name):
    with refused(ValueError, f"{name} must be a number or a tensor of shape [batch]", str(tuple(value.shape))):
        build(**{name: value})


@pytest.mark.parametrize(
    ("build", "name"),
    [
        pytest.param(build, name, id=f"{build.__name__}-{name}")
        for build, name, *_ in NUMBERS
        if build in (steer, gedi, refusal, fusion, sum_of, term, penalty)
    ],
)
def test_one_number_for_each_row_only_where_it_is_understood(build, name):
    value = torch.tensor([0.5, 0.75])
    if (build, name) in PER_ROW:
        assert build(**{name: value}) is not None
    else:
        with refused((TypeError, ValueError), name, "number"):
            build(**{name: value})


def test_the_smallest_and_largest_numbers_are_allowed():
    for value in (0.0, 1.0, 0, 1):
        assert check_number("x", value, minimum=0.0, maximum=1.0) == value
    assert check_number("x", math.inf, infinite=True) == math.inf
    found = check_number("x", torch.tensor(0.5), minimum=0.0)
    assert isinstance(found, float) and found == 0.5
    with refused(ValueError, "x must be in (0.0, 1.0]"):
        check_number("x", 0, minimum=0.0, maximum=1.0, above=True)
    with refused(ValueError, "x must be in [-inf, inf)", "finite"):
        check_number("x", math.inf)
    assert refusal(threshold=1.5).threshold == 1.5  # never refuses


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (steer, "contrast"),
        (gedi, "strength"),
        (lqcd, "contrast"),
        (fusion, "weight"),
        (cfg, "scale"),
        (adaptive, "threshold"),
    ],
    ids=name_of,
)
def test_the_wrong_number_of_values(build, name):
    processor = build(**{name: torch.tensor([0.5, 0.6, 0.7])})
    ids, mask = tiny.prompts()
    with refused(ValueError, "3 per-row values", "2 rows", "one number, or one value for each prompt"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[processor])


@pytest.mark.parametrize("build", [refusal, categories])
def test_the_wrong_number_of_thresholds(build):
    ids, mask = tiny.prompts()
    processor = build(threshold=torch.tensor([0.5, 0.6, 0.7]))
    with refused(ValueError, "3 per-row values", "2 rows", "one value for each prompt"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[processor])


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"], ids=repr)
@pytest.mark.parametrize(
    ("build", "name", "least"),
    [
        (adaptive, "window", 1),
        (sum_of, "min_tokens_to_keep", 1),
        (pool, "k", 1),
        (contrastive, "min_tokens_to_keep", 1),
    ],
    ids=name_of,
)
def test_whole_numbers(build, name, least, value):
    with refused((TypeError, ValueError), name, f"at least {least}", "got", repr(value)):
        build(**{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"], ids=repr)
def test_a_minimum_stay(value):
    with refused((TypeError, ValueError), "min_stay must be a whole number of at least 0", "got", repr(value)):
        adaptive(min_stay=value)


# --- choices -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name", "value", "allowed"),
    [
        (adaptive, "timing", "later", "'now' or 'next'"),
        (adaptive, "entropy_of", "both", "'current' or 'small'"),
        (adaptive, "start", "medium", "'small' or 'large'"),
        (lqcd, "main", "other", "'neutral' or 'leading'"),
        (refusal, "mode", "two", "'single', 'category', 'sum' or 'bias'"),
        (fusion, "solver", "newton", "'grid' or 'exact'"),
        (fusion, "combine", "all", "'single' or 'joint'"),
    ],
    ids=name_of,
)
def test_words_that_are_no_choice(build, name, value, allowed):
    with refused(ValueError, name, allowed, "got", repr(value)):
        build(**{name: value})


# --- STEER ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [[], ()], ids=repr)
def test_no_negatives(negatives):
    with refused(ValueError, "negatives is empty", "give at least one example, or None"):
        steer(negatives=negatives)


@pytest.mark.parametrize("negatives", [[[3, 4], []], torch.ones(2, 0).long(), [["w10"], []]], ids=str)
def test_an_empty_negative_among_others(negatives):
    with refused(ValueError, "negatives", "empty", "at least one token"):
        steer(negatives=negatives, tokenizer=word_tokenizer())


@pytest.mark.parametrize("negatives", [[3, -1], [3.5], 7, [True, False], [[3], [None]]], ids=repr)
def test_negatives_that_are_no_ids(negatives):
    with refused(TypeError, "negatives must be text or a flat list of token ids", "got"):
        steer(negatives=negatives)


def test_no_base_model_and_no_model():
    with refused(ValueError, "contrast > 0", "pass base_model=, or as model= the PeftModel"):
        steer(base_model=None)
    with refused(ValueError, "negatives are read by the fine-tuned model: pass model="):
        steer(model=None)
    with refused(ValueError, "negatives", "decoder-only"):
        steer(model=TEXT_MODEL)


@pytest.mark.parametrize("protected", [[64], [-1], [3, 1000]], ids=str)
def test_a_protected_id_that_no_model_has(protected):
    ids, mask = tiny.prompts()
    with refused(ValueError, "protect_ids"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[steer(protect_ids=protected)])


# --- GeDi ------------------------------------------------------------------------------------------------------------------------


def test_control_codes():
    with refused(ValueError, "different codes", "40"):
        gedi(undesired=40)
    with refused(ValueError, "undesired", "different codes"):
        gedi(undesired=[])
    with refused(ValueError, "control code was given as text", "'good'", "pass tokenizer="):
        gedi(desired="good")
    with refused(TypeError, "control code must be a token id or a text", "None"):
        gedi(desired=None)
    for code in (True, -1, 1.5):
        with refused(TypeError, "control code must be a token id or a text", repr(code)):
            gedi(desired=code)
    with refused(ValueError, "control code '' has no tokens"):
        gedi(desired="", tokenizer=word_tokenizer())


def test_a_bias_for_an_unknown_code():
    with refused(ValueError, "bias names codes [39]", "[40, 41]"):
        gedi(bias={39: 0.5})


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True, None], ids=repr)
def test_a_bias_that_is_no_number(value):
    with refused((TypeError, ValueError), "bias", "must be"):
        gedi(bias={40: value})


def test_a_guide_that_has_an_encoder():
    with refused(ValueError, "decoder-only model"):
        gedi(guide=TEXT_MODEL)


def test_a_code_that_the_guide_does_not_embed():
    ids, mask = tiny.prompts()
    with refused(ValueError, "Token id 999", "embeds 64 ids", "resize_token_embeddings"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[gedi(desired=999)])


def test_an_empty_secondary_code():
    with refused(ValueError, "secondary_code is empty", "at least one token"):
        gedi(secondary_code=[])


# --- refusal tokens ------------------------------------------------------------------------------------------------------------------


def test_a_token_that_is_not_one_token():
    tokenizer = word_tokenizer(["[refuse]"])
    with refused(ValueError, "refuse='[refuse] now' is 2 tokens", "not one", "add it with tokenizer.add_tokens", "id"):
        refusal(refuse="[refuse] now", tokenizer=tokenizer)
    with refused(ValueError, "respond='' is 0 tokens", "add it"):
        refusal(respond="", tokenizer=tokenizer)
    with refused(ValueError, "refuse was given as text", "pass tokenizer="):
        refusal(refuse="[refuse]")
    with refused(ValueError, "refuse must be a token id >= 0", "-3"):
        refusal(refuse=-3)
    for value in (True, 1.5, None):
        with refused(TypeError, "respond must be a token id or a token's text", repr(value)):
            refusal(respond=value)


def test_an_unknown_word_is_no_refusal_token():
    with refused(ValueError, "refuse='[refuse]'", "unknown"):
        refusal(refuse="[refuse]", tokenizer=word_tokenizer())


def test_tokens_that_coincide():
    with refused(ValueError, "different tokens", "51, 51"):
        refusal(refuse=51)
    with refused(ValueError, "different tokens"):
        categories(refuse={"a": 50, "b": 50})
    with refused(ValueError, "at least one to refuse"):
        categories(refuse={})


def test_modes_and_what_they_take():
    with refused(ValueError, "mode='single' has one refusal token, got 2", "'category' or 'sum'"):
        categories(mode="single")
    with refused(ValueError, "mode='bias' takes bias="):
        bias()
    with refused(ValueError, "mode='bias' takes bias= and no threshold="):
        bias(bias=1.0, threshold=0.5)
    with refused(ValueError, "the others no bias="):
        refusal(bias=1.0)
    for mode in ("category", "sum"):
        with refused(ValueError, f"mode='{mode}' needs a threshold"):
            categories(mode=mode, threshold=None)
    with refused(ValueError, "mode='sum' compares one probability", "one threshold, or use mode='category'"):
        categories(mode="sum", threshold={"a": 0.5})


def test_thresholds_and_biases_by_category():
    with refused(ValueError, "threshold names ['c']", "['a', 'b']"):
        categories(threshold={"c": 0.5})
    with refused(ValueError, "threshold['a'] must be in [0.0, inf)", NOT):
        categories(threshold={"a": math.nan})
    with refused(TypeError, "threshold['a'] must be a number", "'x'"):
        categories(threshold={"a": "x"})
    with refused((TypeError, ValueError), "bias['b'] must be"):
        categories(mode="bias", threshold=None, bias={"b": torch.tensor([0.5, 0.5])})


def test_a_token_beyond_the_logits():
    ids, mask = tiny.prompts()
    with refused(ValueError, "Token 64 is beyond the model's 64 logits", "resize_token_embeddings"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[refusal(refuse=64)])


# --- fusion, leading queries, mixtures, the pool -----------------------------------------------------------------------------------------


def test_experts():
    with refused(ValueError, "experts is empty", "at least one fine-tuned small model"):
        fusion(experts=[])
    with refused(ValueError, "to the power of 4", "'single' above 3"):
        fusion(experts=[OTHER] * 4, combine="joint")
    with refused(ValueError, "Adapters", "'sums'", "pass a PeftModel"):
        fusion(experts="sums")


def test_no_other_question():
    with refused(ValueError, "other_prompt is missing"):
        lqcd(other_prompt=None)
    with refused(ValueError, "other_prompt was given as text", "pass tokenizer="):
        lqcd(other_prompt="I think it is red.")
    with refused(ValueError, "other_prompt is empty", "at least one token"):
        lqcd(other_prompt=[])


def test_a_prompt_that_is_not_in_the_mapping():
    ids, mask = tiny.prompts()
    with refused(ValueError, "other_prompt has no entry for the prompt with ids", "tokenize exactly"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[lqcd(other_prompt={(9, 9): [3]})])


def test_the_wrong_number_of_prompts():
    ids, mask = tiny.prompts()
    with refused(ValueError, "other_prompt holds 3 prompts", "2 rows", "one for each item of the batch"):
        MODEL.generate(
            ids, attention_mask=mask, max_new_tokens=1, logits_processor=[lqcd(other_prompt=[[3], [4], [5]])]
        )


def test_dexperts_without_any():
    with refused(ValueError, "dexperts needs an expert, an antiexpert, or both"):
        dexperts(expert=None, antiexpert=None)


def test_pools():
    with refused(ValueError, "examples must be a list with at least one text", "[]"):
        pool(examples=[])
    with refused(ValueError, "examples must be a list with at least one text", "'abc'"):
        pool(examples="abc")
    with refused((TypeError, ValueError), "examples must be", "3"):
        pool(examples=["a", 3])
    with refused((TypeError, ValueError), "example", "text", "3"):
        pool().add("a", 3)
    with refused(ValueError, "max_tokens", "pass tokenizer="):
        pool(max_tokens=10)
    for value in (0, -1, True, 1.5, "9"):
        with refused((TypeError, ValueError), "max_tokens", "at least 1", repr(value)):
            pool(max_tokens=value, tokenizer=word_tokenizer())


# --- models and tokenizers that do not fit -------------------------------------------------------------------------------------------


def test_tokenizers_that_disagree():
    ours, theirs = word_tokenizer(["red", "green"]), word_tokenizer(["red", "blue"])
    with refused(ValueError, "disagree", "id 5 is 'green'", "'blue'", "same family"):
        check_same_tokenizer(ours, theirs)
    for build in (steer, gedi, adaptive, lqcd, fusion, sum_of):
        with refused(ValueError, "id 5 is 'green' for the main model and 'blue' for the auxiliary"):
            build(tokenizer=ours, auxiliary_tokenizer=theirs)
    theirs = word_tokenizer(["red", "green"])
    theirs.add_tokens(["[more]"])
    check_same_tokenizer(ours, theirs)
    check_same_tokenizer(theirs, ours)


def auxiliaries(model, prompt=None):
    """One processor of each kind that reads `model`."""
    yield SteerLogitsProcessor(base_model=model, negatives=None)
    yield GeDiLogitsProcessor(model, desired=3, undesired=4)
    yield EntropyAdaptiveLogitsProcessor(model, threshold=-1.0, min_stay=0)
    yield DynamicFusionLogitsProcessor(model, model)
    yield MixtureLogitsProcessor([MixtureTerm(model, 0.5, prompt)])


NAMES = ["steer", "gedi", "adaptive", "fusion", "mixture"]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_an_auxiliary_with_too_few_embeddings(index):
    processor = list(auxiliaries(tiny.llama(seed=5, vocab_size=32)))[index]
    ids = torch.tensor([[7, 40, 9]])
    with refused(ValueError, "Token id 40 is unknown", "embeds 32 ids", "same family", "suppress_tokens"):
        MODEL.generate(ids, max_new_tokens=1, logits_processor=[processor])


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_an_auxiliary_that_says_nan(index):
    broken = tiny.llama(seed=5)
    broken.model.norm.weight.data.fill_(math.nan)
    processor = list(auxiliaries(broken))[index]
    with refused(ValueError, "LlamaForCausalLM returned NaN logits", "bfloat16 or float32"):
        MODEL.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=1, logits_processor=[processor])


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_an_auxiliary_prompt_longer_than_the_window(index):
    processor = list(auxiliaries(tiny.gpt2(seed=5, n_positions=8)))[index]
    ids = torch.arange(3, 15)[None]
    with refused(ValueError, f"has {13 if index == 1 else 12} tokens", "holds 8", "shorten the prompt"):
        MODEL.generate(ids, max_new_tokens=1, logits_processor=[processor])


def test_negatives_longer_than_the_window():
    small = tiny.gpt2(seed=5, n_positions=8)
    processor = SteerLogitsProcessor(model=small, negatives=list(range(3, 13)), contrast=0.0)
    with refused(ValueError, "has 10 tokens", "holds 8", "negative examples"):
        MODEL.generate(torch.tensor([[7, 8]]), max_new_tokens=1, logits_processor=[processor])


def test_a_generation_that_leaves_the_window():
    processor = SteerLogitsProcessor(base_model=tiny.gpt2(seed=5, n_positions=8))
    with refused(
        ValueError, "has read 8 tokens", "generate fewer tokens, or use an auxiliary model with a longer window"
    ):
        MODEL.generate(torch.tensor([[7, 8, 9, 10]]), max_new_tokens=9, logits_processor=[processor])


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_prompt_of_embeddings_alone(index):
    processor = list(auxiliaries(OTHER))[index]
    embeddings = MODEL.get_input_embeddings()(torch.tensor([[7, 8, 9]]))
    with refused(ValueError, "inputs_embeds without input_ids", "Pass input_ids"):
        MODEL.generate(inputs_embeds=embeddings, max_new_tokens=1, logits_processor=[processor])


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_one_token_of_each_request_as_paged_batching_shows_it(index):
    processor = list(auxiliaries(OTHER))[index]
    assert not processor.supports_continuous_batching
    with refused(ValueError, "input_ids of shape (3,)", "continuous batching", "dynamic or static cache"):
        processor(torch.tensor([7, 8, 9]), torch.zeros(3, tiny.VOCAB))


def test_an_encoder_decoder_without_encoder_inputs():
    processor = SteerLogitsProcessor(base_model=TEXT_MODEL)
    with refused(ValueError, "T5ForConditionalGeneration is an encoder-decoder", "encoder_inputs="):
        TEXT_MODEL.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=1, logits_processor=[processor])
    with refused(ValueError, "has no encoder"):
        SteerLogitsProcessor(base_model=OTHER, encoder_inputs={"input_ids": torch.tensor([[7]])})
    with refused(ValueError, "prompt of an encoder-decoder must be text (with tokenizer=)"):
        MixtureLogitsProcessor.cfg(TEXT_MODEL, "be rude", scale=1.5)


def test_attention_masks_that_can_not_be_continued():
    processor = adaptive()
    with refused(ValueError, "0 after a 1", "padding_side='left'"):
        processor.bind(attention_mask=torch.tensor([[1, 1, 0]]))
    with refused(ValueError, "shape [batch, length]", "(3,)"):
        processor.bind(attention_mask=torch.tensor([1, 1, 1]))
    processor.bind(attention_mask=torch.tensor([[1, 1, 1]]))
    with refused(ValueError, "attention_mask of shape (1, 3)", "call bind() again"):
        MODEL.generate(torch.tensor([[7, 8]]), max_new_tokens=1, logits_processor=[processor])
