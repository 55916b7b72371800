"""What surrounds a generation: padding, reuse, vocabularies, bans, weight zero, pipelines, cost, encoder-decoders.

The table of processors, their references and the judge that compares every call are those of test_processor_contract.py.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from test_processor_contract import (
    GUIDED,
    MODES,
    NEW_TOKENS,
    TABLE,
    TOLERANCE,
    Case,
    Judge,
    View,
    auxiliary,
    build,
    draft_model,
    generate,
    judged,
    last_token,
    leading,
    main_model,
    redistribute,
    without_context,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast, pipeline

import tiny
from hf_logits import ResettingLogitsProcessorList
from hf_logits.processors.dynamic_fusion import DynamicFusionLogitsProcessor
from hf_logits.processors.entropy_adaptive import EntropyAdaptiveLogitsProcessor
from hf_logits.processors.gedi import GeDiLogitsProcessor
from hf_logits.processors.gedi_repetition_penalty import GeDiRepetitionPenaltyLogitsProcessor
from hf_logits.processors.lqcd import LQCDLogitsProcessor, leading_query_contrast
from hf_logits.processors.mixture import MixtureLogitsProcessor
from hf_logits.processors.refusal_tokens import RefusalTokenLogitsProcessor
from hf_logits.processors.steer import SteerLogitsProcessor, steer


def with_models(name: str, main: Any, aux: Callable[[int], Any], tolerance: float | None = None):
    """A processor of the table with its judge, on other models than the usual ones."""
    processor, reference = TABLE[name](main, aux)
    nothing = torch.empty(0, 0, dtype=torch.long)
    return processor, Judge(reference, nothing, nothing, tolerance=tolerance or TOLERANCE.get(name, 1e-5))


@functools.cache
def model_of(kind: str, seed: int, **settings: Any):
    return tiny.DECODERS[kind](seed, **settings)


# --- line 2: left padding --------------------------------------------------------------------------------------------

PADDINGS = {
    "pad_of_its_own": {},
    "pad_is_eos": {"pad_token_id": tiny.EOS},
    # GPT-2's way: padding cannot be told from the token that begins every text.
    "pad_is_bos_and_eos": {"pad_token_id": tiny.EOS, "bos_token_id": tiny.EOS},
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", GUIDED)
def test_a_padded_row_is_the_row_alone(name, kind, padding):
    settings = PADDINGS[padding]
    pad = settings.get("pad_token_id", tiny.PAD)
    texts = [[12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25, 26, 27, 28, 29]]
    if padding == "pad_is_bos_and_eos":
        texts = [[pad, *text] for text in texts]
    width = max(len(text) for text in texts)
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])

    main, aux = model_of(kind, 0, **settings), functools.partial(model_of, kind, **settings)
    processor, judge = with_models(name, main, aux)
    judge.prompt(ids, mask)
    together = generate(main, ids, mask, judge.around(processor))
    for row, text in enumerate(texts):
        processor, judge = with_models(name, main, aux)
        judge.prompt(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long))
        alone = generate(main, judge.ids, judge.mask, judge.around(processor))
        assert together[row, width:].tolist() == alone[0, len(text) :].tolist()


@pytest.mark.parametrize("name", TABLE)
def test_finished_rows_do_not_disturb_the_others(name):
    processor, judge = judged(name)
    judge.prompt(*tiny.prompts())
    width = judge.ids.shape[1]
    free = generate(main_model(), judge.ids, judge.mask, judge.around(processor))[:, width:].tolist()
    # Ends one row early, if the other one does not say the same.
    at, end = next((at, token) for at, token in enumerate(free[0]) if token not in free[1])
    processor, judge = judged(name)
    judge.prompt(*tiny.prompts())
    ended = generate(main_model(), judge.ids, judge.mask, judge.around(processor), eos_token_id=end)[:, width:]
    assert ended.tolist() == [free[0][: at + 1] + [tiny.PAD] * (NEW_TOKENS - at - 1), free[1]]


# --- line 3: one object, many generations ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mamba"])
@pytest.mark.parametrize("name", TABLE)
def test_an_object_serves_one_generation_after_another(name, kind):
    processor, judge = judged(name, kind)

    def run(ids: Tensor, mask: Tensor, wrap: Callable[[list], list] = list) -> Tensor:
        judge.prompt(ids, mask)
        output = generate(main_model(), ids, mask, wrap(judge.around(processor)))
        # The trace is that of this generation alone.
        assert processor.stats.trace["kl"].shape == (len(ids), NEW_TOKENS)
        return output

    ids, mask = tiny.prompts()
    first = run(ids, mask)
    assert torch.equal(run(ids, mask), first)
    run(*tiny.prompts(seed=1))
    assert torch.equal(run(ids, mask), first)

    # The next turn of a conversation begins with all of this one.
    turn = torch.cat([first, torch.tensor([[40, 41, 42]] * 2)], dim=1)
    run(turn, torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1))
    run(*tiny.prompts(batch=3, length=7, seed=2))
    run(*tiny.prompts(batch=1, length=5, seed=3))
    assert torch.equal(run(ids, mask), first)

    # Half of the old output as a prompt looks like a step back: somebody has to say that a generation begins.
    half = first[:, : ids.shape[1] + 3]
    half_mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    told = run(half, half_mask, ResettingLogitsProcessorList)
    run(ids, mask)
    processor.reset()
    assert torch.equal(run(half, half_mask), told)
    assert processor.stats.calls == 11 * NEW_TOKENS


def test_without_a_reset_a_repeated_beginning_is_taken_for_a_step_back():
    """The one thing that ids cannot show, as documented: this is what `reset` is for."""
    processor, _ = build("refusal_bias")
    ids, mask = tiny.prompts()
    first = generate(main_model(), ids, mask, [processor])
    half_mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    generate(main_model(), first[:, : ids.shape[1] + 3], half_mask, [processor])
    assert processor.stats.trace["kl"].shape == (2, 3 + NEW_TOKENS)


# --- line 4: other caches of the main model ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral"])
@pytest.mark.parametrize("name", TABLE)
def test_a_static_cache_of_the_main_model_changes_nothing(name, kind):
    outputs = []
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
        processor, judge = judged(name, kind)
        judge.prompt(*tiny.prompts())
        outputs.append(generate(main_model(), judge.ids, judge.mask, judge.around(processor), **settings))
        assert len(judge.lengths) == NEW_TOKENS
    assert torch.equal(*outputs)


# --- line 5: vocabularies, precisions, and the main model as its own auxiliary ------------------------------------------


def small_ids(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of ids that the smallest model knows, and no control codes of GeDi's."""
    ids, mask = tiny.prompts(seed=seed)
    return torch.where(mask.bool(), 8 + ids % 40, tiny.PAD), mask


@pytest.mark.parametrize("vocab", [48, 80])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", GUIDED)
def test_vocabularies_may_differ_at_the_end(name, kind, vocab):
    aux = functools.partial(model_of, kind, vocab_size=vocab)
    processor, judge = with_models(name, main_model(), aux)
    ids, mask = small_ids()
    judge.prompt(ids, mask)
    generator = torch.Generator().manual_seed(5)
    continued = torch.cat([ids, torch.randint(8, 48, (2, 5), generator=generator)], dim=1)
    for length in range(ids.shape[1], continued.shape[1] + 1):
        scores = 3.0 * torch.randn(2, tiny.VOCAB, generator=generator)
        output = processor(continued[:, :length], scores)
        judge.compare(continued[:, :length], scores, output)
        assert torch.equal(output[:, vocab:], scores.log_softmax(-1)[:, vocab:])
    # The same inside generate, which must not choose an id that the auxiliary model cannot read.
    unknown = list(range(vocab, tiny.VOCAB)) or None
    for mode in ("greedy", "beams"):
        generate(main_model(), ids, mask, judge.around(processor), suppress_tokens=unknown, **MODES[mode])
        processor.reset()


@pytest.mark.parametrize("name", GUIDED)
def test_an_auxiliary_in_bfloat16(name):
    """Half precision moves logits by hundredths, so a threshold can fall on the other side: compare probabilities."""

    @functools.cache
    def half(seed: int):
        return tiny.llama(seed).to(torch.bfloat16)

    processor, reference = TABLE[name](main_model(), half)
    judge = Judge(reference, *tiny.prompts())
    generator = torch.Generator().manual_seed(3)
    continued = torch.cat([judge.ids, torch.randint(8, tiny.VOCAB, (2, 5), generator=generator)], dim=1)
    for length in range(judge.ids.shape[1], continued.shape[1] + 1):
        scores = 3.0 * torch.randn(2, tiny.VOCAB, generator=generator)
        output = processor(continued[:, :length], scores)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.logsumexp(-1), torch.zeros(2), rtol=0.0, atol=1e-5)
        expected = judge.expected(continued[:, :length], scores)
        assert float((output.exp() - expected.exp()).abs().sum(-1).max()) < 0.05


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("name", GUIDED)
def test_the_auxiliary_may_be_the_main_model(name, mode):
    main = main_model()
    processor, judge = with_models(name, main, lambda seed: main)
    judge.prompt(*tiny.prompts())
    plain = generate(main, judge.ids, judge.mask, **MODES[mode])
    steered = generate(main, judge.ids, judge.mask, judge.around(processor), **MODES[mode])
    assert steered.shape == plain.shape and len(judge.lengths) == NEW_TOKENS
    assert torch.equal(generate(main, judge.ids, judge.mask, **MODES[mode]), plain)


# --- line 6: bans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_what_was_banned_stays_banned(name, mode):
    processor, judge = judged(name)
    judge.prompt(*tiny.prompts())
    width = judge.ids.shape[1]
    wanted = generate(main_model(), judge.ids, judge.mask, judge.around(processor), **MODES[mode])[:, width:]
    processor, judge = judged(name)
    judge.prompt(*tiny.prompts())
    # Ban what it would say: half of it outright, the rest as second words.
    said = wanted.unique().tolist()
    banned, second = said[::2], said[1::2]
    pairs = [[first, token] for first in range(tiny.VOCAB) for token in second[:2] if first != token]
    output = generate(
        main_model(),
        judge.ids,
        judge.mask,
        judge.around(processor),
        suppress_tokens=banned[1:],
        bad_words_ids=[[banned[0]], *pairs],
        repetition_penalty=1.3,
        **MODES[mode],
    )
    assert not torch.isin(output[:, width:], torch.tensor(banned)).any()
    assert not torch.isin(output[:, width + 1 :], torch.tensor(second[:2])).any() or not second
    assert len(judge.lengths) == NEW_TOKENS


@pytest.mark.parametrize("name", TABLE)
def test_the_smallest_finite_score_is_a_ban(name):
    ids, _ = tiny.prompts()
    scores = 3.0 * torch.randn(2, tiny.VOCAB, generator=torch.Generator().manual_seed(1))
    banned = torch.zeros_like(scores, dtype=torch.bool)
    banned[:, ::3] = True
    outputs = [
        build(name)[0](ids, scores.masked_fill(banned, value)) for value in (-math.inf, torch.finfo(scores.dtype).min)
    ]
    assert torch.equal(*outputs)
    assert outputs[0][banned].isneginf().all() and not outputs[0].isnan().any()


# --- line 7: weight zero -------------------------------------------------------------------------------------------------

ZERO: dict[str, Callable[[], LogitsProcessor]] = {
    "steer": lambda: SteerLogitsProcessor(
        model=auxiliary("llama", 1), base_model=auxiliary("llama", 2), negatives=[9], contrast=0.0, repulsion=0.0
    ),
    "gedi": lambda: GeDiLogitsProcessor(auxiliary("llama", 1), desired=5, undesired=6, strength=0.0, filter_p=0.0),
    "refusal": lambda: RefusalTokenLogitsProcessor(refuse=30, respond=31, mode="bias", bias=0.0),
    "adaptive_now": lambda: EntropyAdaptiveLogitsProcessor(auxiliary("llama", 1), threshold=math.inf),
    "adaptive_next": lambda: EntropyAdaptiveLogitsProcessor(
        auxiliary("llama", 1), threshold=math.inf, timing="next", entropy_of="small"
    ),
    "lqcd": lambda: LQCDLogitsProcessor(auxiliary("llama", 1), leading, contrast=0.0, plausibility=0.0),
    "fusion": lambda: DynamicFusionLogitsProcessor(auxiliary("llama", 1), auxiliary("llama", 2), weight=0.0),
    "cfg": lambda: MixtureLogitsProcessor.cfg(auxiliary("llama", 1), leading, scale=1.0),
    "context_aware": lambda: MixtureLogitsProcessor.context_aware(auxiliary("llama", 1), leading, contrast=0.0),
    "proxy": lambda: MixtureLogitsProcessor.proxy(auxiliary("llama", 1), auxiliary("llama", 2), weight=0.0),
    "dexperts": lambda: MixtureLogitsProcessor.dexperts(
        auxiliary("llama", 1), auxiliary("llama", 2), weight=0.0, filter_p=None
    ),
}

# These still act on the main scores alone (plausibility, nucleus), in the limit that keeps everything.
ALMOST_ZERO: dict[str, Callable[[], LogitsProcessor]] = {
    "dexperts_whole_nucleus": lambda: MixtureLogitsProcessor.dexperts(
        auxiliary("llama", 1), None, weight=0.0, filter_p=1.0
    ),
    "contrastive": lambda: MixtureLogitsProcessor.contrastive(auxiliary("llama", 1), plausibility=0.0, weight=0.0),
    "contrastive_strength": lambda: MixtureLogitsProcessor.contrastive(
        auxiliary("llama", 1), plausibility=0.0, strength=0.0
    ),
}


@pytest.mark.parametrize("mode", [*MODES, "assisted", "prompt_lookup"])
@pytest.mark.parametrize("name", ZERO | ALMOST_ZERO)
def test_weight_zero_is_the_plain_model(name, mode):
    processor = (ZERO | ALMOST_ZERO)[name]()
    ids, mask = tiny.prompts()
    settings = MODES.get(mode, {})
    if mode in ("assisted", "prompt_lookup"):
        ids, mask = ids[-1:], mask[-1:]
        settings = {"assistant_model": draft_model()} if mode == "assisted" else {"prompt_lookup_num_tokens": 3}
    plain = generate(main_model(), ids, mask, **settings)
    assert torch.equal(generate(main_model(), ids, mask, [processor], **settings), plain)
    assert processor.stats.forwards == 0 and processor.stats.calls >= NEW_TOKENS


@pytest.mark.parametrize("name", ZERO | ALMOST_ZERO)
def test_weight_zero_returns_the_plain_log_probabilities(name):
    ids, _ = tiny.prompts()
    scores = 3.0 * torch.randn(2, tiny.VOCAB, generator=torch.Generator().manual_seed(1))
    output = (ZERO | ALMOST_ZERO)[name]()(ids, scores)
    if name in ZERO:
        assert torch.equal(output, scores.log_softmax(-1))
    else:
        torch.testing.assert_close(output, scores.log_softmax(-1), rtol=0.0, atol=1e-6)


# --- line 8: what generate returns beside the tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_the_returned_logits_are_the_plain_ones(name):
    processor, _ = build(name)
    ids, mask = tiny.prompts()
    outputs = generate(
        main_model(), ids, mask, [processor], return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    seen = torch.nn.functional.pad(mask, (0, NEW_TOKENS), value=1)
    with torch.no_grad():
        logits = main_model()(
            outputs.sequences, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)
        ).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), logits, rtol=0.0, atol=1e-5)
    scores = torch.stack(outputs.scores, dim=1)
    torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(2, NEW_TOKENS), rtol=0.0, atol=1e-5)
    assert torch.equal(scores.argmax(-1), outputs.sequences[:, ids.shape[1] :])


# --- line 10: pipelines --------------------------------------------------------------------------------------------------


@functools.cache
def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "</s>": tiny.EOS} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("given", ["at_construction", "at_call"])
@pytest.mark.parametrize("name", TABLE)
def test_a_pipeline_steers_every_batch(name, given):
    """Batches of two and one: the second shows the same object fewer rows of another length."""
    texts = ["w12 w13 w14 w15 w16", "w21 w22 w23 w24 w25 w26 w27 w28", "w33 w34 w35 w36"]
    main = copy.deepcopy(main_model())  # a pipeline changes the generation config of its model
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    steering = {"logits_processor": [build(name)[0]]}
    pipe = pipeline("text-generation", main, tokenizer=words(), **(steering if given == "at_construction" else {}))
    found = pipe(texts, batch_size=2, **settings, **(steering if given == "at_call" else {}))
    for text, (answer,) in zip(texts, found, strict=True):
        ids = words()(text, return_tensors="pt")["input_ids"]
        output = generate(main_model(), ids, torch.ones_like(ids), [build(name)[0]])
        assert (
            answer["generated_text"].split()
            == words().decode(output[0, ids.shape[1] :], skip_special_tokens=True).split()
        )
    assert steering["logits_processor"][0].stats.calls == 2 * NEW_TOKENS


# --- line 11: paged batching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_one_dimensional_ids_are_refused(name):
    processor, _ = build(name)
    assert type(processor).supports_continuous_batching is False
    # The shape checks of the tests would speak first: users do not have them.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="Paged or continuous batching"):
            processor(torch.tensor([5, 6]), torch.randn(2, tiny.VOCAB))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# --- line 12: what it costs ----------------------------------------------------------------------------------------------

# For every method: the models it reads, each with the prompts of its contexts.
SECONDARY = [9, 10]
COST: dict[str, dict[int, list[Callable[[list[int]], list[int]]]]] = {
    "steer": {1: [list], 2: [lambda prompt: [20, 21, 22, 23, 24, 25, 26]]},
    "steer_normalised": {1: [list], 2: [leading]},
    "gedi": {1: [lambda prompt: [5, *prompt], lambda prompt: [6, *prompt]]},
    "gedi_three_codes": {1: [lambda prompt, code=code: [code, *SECONDARY, *prompt] for code in (5, 6, 7)]},
    "lqcd_neutral": {1: [leading]},
    "lqcd_leading": {1: [without_context]},
    "fusion_grid": {1: [list], 2: [list]},
    "fusion_exact": {1: [list], 2: [list]},
    "fusion_fixed": {1: [list], 2: [list]},
    "fusion_best_of_two": {1: [list], 2: [list], 3: [list]},
    "fusion_joint": {1: [list], 2: [list], 3: [list]},
    "cfg": {1: [last_token]},
    "cfg_negative": {1: [leading]},
    "context_aware": {1: [without_context]},
    "proxy": {1: [leading], 2: [list]},
    "dexperts": {1: [list], 2: [list]},
    "dexperts_one_model": {2: [list]},
    "contrastive": {1: [last_token]},
    "contrastive_strength": {1: [list]},
}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", "greedy"),
        ("llama", "returned_sequences"),
        ("llama", "beams"),
        ("gpt2", "beams"),
        ("mistral", "greedy"),
        ("mamba", "returned_sequences"),
        ("bamba", "beams"),
    ],
)
@pytest.mark.parametrize("name", COST)
def test_no_token_is_read_twice(name, mode, kind):
    processor, _ = build(name, kind)
    ids, mask = tiny.prompts(batch=3)
    ids[1], mask[1] = ids[2], mask[2]  # a prompt that is there twice is read once
    generate(main_model(), ids, mask, [processor], **MODES[mode])
    prompts = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    rows = len(ids) * (1 if mode == "greedy" else 3)
    read, started = 0, 0
    for contexts in COST[name].values():
        unique = {tuple(make(prompt)) for make in contexts for prompt in prompts}
        read += sum(len(prompt) for prompt in unique) + len(contexts) * rows * (NEW_TOKENS - 1)
        started += len(unique)
    stats = processor.stats
    assert (stats.calls, stats.forwards) == (NEW_TOKENS, NEW_TOKENS * len(COST[name]))
    assert (stats.tokens, stats.prefill_rows) == (read, started)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "tied_llama"])
@pytest.mark.parametrize("name", ["adaptive_now", "adaptive_next"])
def test_a_model_that_is_not_asked_costs_nothing(name, kind):
    processor, _ = build(name, kind)
    ids, mask = tiny.prompts()
    generate(main_model(), ids, mask, [processor])
    asked = processor.stats.trace["large"].amax(0).nonzero()[:, 0]
    everything = int(mask.sum()) + len(ids) * (NEW_TOKENS - 1)
    assert 0 < len(asked) <= processor.stats.forwards < NEW_TOKENS
    assert processor.stats.tokens <= everything and processor.stats.prefill_rows == len(ids)


# --- the rest of the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_the_face_of_a_processor(name):
    processor, _ = build(name)
    # generate counts the parameters of a processor, defaults included.
    assert list(inspect.signature(processor.__call__).parameters) == ["input_ids", "scores"]
    text = repr(processor)
    assert text.startswith(type(processor).__name__ + "(") and len(text) < 1500
    hidden = {"tokenizer", "auxiliary_tokenizer", "pad_token_id", "encoder_inputs", "self", "eos_token_id"}
    for parameter in set(inspect.signature(type(processor).__init__).parameters) - hidden:
        assert f"{parameter}=" in text, f"{parameter} is not in {text}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_the_trace_follows_the_rows(name, mode):
    processor, judge = judged(name)
    judge.prompt(*tiny.prompts())
    moved: dict[tuple, float] = {}
    last: list[View] = []

    class Meter(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            plain = judge.plain(judge.given[1]).double()
            live = ~scores.isneginf()
            # KL(steered || plain), with nothing where nothing is left
            values = (scores.double().exp() * torch.where(live, scores.double() - plain, 0.0)).sum(-1)
            last[:] = [judge.view(input_ids, tiny.VOCAB)]
            for (_, prompt, new), value in zip(last[0].rows, values.tolist(), strict=True):
                moved[tuple(prompt), tuple(new)] = value
            return scores

    generate(main_model(), judge.ids, judge.mask, [*judge.around(processor), Meter()], **MODES[mode])
    expected = [
        [moved[tuple(prompt), tuple(new[:length])] for length in range(len(new) + 1)]
        for _, prompt, new in last[0].rows
    ]
    trace = processor.stats.trace
    torch.testing.assert_close(trace["kl"].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert processor.stats.calls == NEW_TOKENS
    columns = {key: 1 if key == "refusal" else NEW_TOKENS for key in trace}
    assert {key: values.shape for key, values in trace.items()} == {
        key: (len(expected), columns[key]) for key in trace
    }
    assert all(values.isfinite().all() for values in trace.values())
    if mode != "greedy" and name.startswith("adaptive"):
        assert {0.0, 1.0} == set(trace["large"].unique().tolist()), "the table's threshold never switches"


PER_ROW: dict[str, tuple[Callable[[Any], LogitsProcessor], float, float]] = {
    "steer_contrast": (lambda v: SteerLogitsProcessor(base_model=auxiliary("llama", 1), contrast=v), 0.2, 1.5),
    "steer_repulsion": (
        lambda v: SteerLogitsProcessor(
            model=auxiliary("llama", 1), negatives=[9, 10, 11], contrast=0.0, repulsion=v, normalise=True
        ),
        0.0,
        1.2,
    ),
    "gedi_strength": (
        lambda v: GeDiLogitsProcessor(auxiliary("llama", 1), desired=5, undesired=6, strength=v, filter_p=0.3),
        0.0,
        8.0,
    ),
    "gedi_scale": (
        lambda v: GeDiLogitsProcessor(
            auxiliary("llama", 1), desired=5, undesired=6, strength=3.0, scale=v, filter_p=0.0
        ),
        0.5,
        2.0,
    ),
    "refusal_single": (lambda v: RefusalTokenLogitsProcessor(refuse=30, respond=31, threshold=v), 0.0, 0.99),
    "refusal_bias": (
        lambda v: RefusalTokenLogitsProcessor(refuse={"a": 30, "b": 33}, respond=31, mode="bias", bias=v),
        -2.0,
        9.0,
    ),
    "adaptive": (lambda v: EntropyAdaptiveLogitsProcessor(auxiliary("llama", 1), threshold=v, min_stay=0), 0.0, 9.0),
    "lqcd_contrast": (
        lambda v: LQCDLogitsProcessor(auxiliary("llama", 1), leading, contrast=v, plausibility=0.0),
        0.0,
        2.0,
    ),
    "lqcd_plausibility": (
        lambda v: LQCDLogitsProcessor(auxiliary("llama", 1), leading, contrast=2.0, plausibility=v),
        0.0,
        1.0,
    ),
    "fusion": (
        lambda v: DynamicFusionLogitsProcessor(auxiliary("llama", 1), auxiliary("llama", 2), weight=v),
        0.0,
        1.5,
    ),
    "cfg": (lambda v: MixtureLogitsProcessor.cfg(auxiliary("llama", 1), leading, scale=v), 0.5, 3.0),
    "context_aware": (
        lambda v: MixtureLogitsProcessor.context_aware(auxiliary("llama", 1), without_context, contrast=v),
        0.0,
        1.5,
    ),
    "proxy": (
        lambda v: MixtureLogitsProcessor.proxy(auxiliary("llama", 1), auxiliary("llama", 2), weight=v),
        -1.0,
        1.0,
    ),
    "dexperts": (
        lambda v: MixtureLogitsProcessor.dexperts(None, auxiliary("llama", 2), weight=v, filter_p=0.99),
        0.0,
        2.0,
    ),
    "contrastive_plausibility": (
        lambda v: MixtureLogitsProcessor.contrastive(auxiliary("llama", 1), plausibility=v),
        0.0,
        0.5,
    ),
    "contrastive_weight": (
        lambda v: MixtureLogitsProcessor.contrastive(auxiliary("llama", 1), weight=v, plausibility=0.01),
        0.0,
        1.5,
    ),
    "contrastive_strength": (
        lambda v: MixtureLogitsProcessor.contrastive(auxiliary("llama", 1), strength=v, plausibility=0.01),
        0.0,
        1.5,
    ),
}


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("name", PER_ROW)
def test_a_hyper_parameter_may_be_one_number_per_row(name, mode):
    make, *numbers = PER_ROW[name]
    ids, mask = tiny.prompts()
    details = {"return_dict_in_generate": True, "output_scores": True} | MODES[mode]
    batch = generate(main_model(), ids, mask, [make(torch.tensor(numbers))], **details)
    scores = torch.stack(batch.scores, dim=1).unflatten(0, (2, -1))
    for row, number in enumerate(numbers):
        own = ids[row : row + 1, mask[row].bool()]
        alone = generate(main_model(), own, torch.ones_like(own), [make(number)], **details)
        assert batch.sequences[row, ids.shape[1] :].tolist() == alone.sequences[0, own.shape[1] :].tolist()
        torch.testing.assert_close(scores[row], torch.stack(alone.scores, dim=1), rtol=0.0, atol=1e-4)
    # It would also pass if the numbers did nothing.
    scores = 3.0 * torch.randn(2, tiny.VOCAB, generator=torch.Generator().manual_seed(1))
    first = [make(torch.tensor(values))(ids, scores) for values in (numbers, numbers[::-1])]
    assert (first[0].exp() - first[1].exp()).abs().max() > 1e-2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_number_of_values_is_refused(rows):
    processor = MixtureLogitsProcessor.cfg(auxiliary("llama", 1), leading, scale=torch.tensor([1.5, 2.0]))
    ids, mask = tiny.prompts(batch=rows)
    with pytest.raises(ValueError, match="one value for each prompt"):
        generate(main_model(), ids, mask, [processor])


@pytest.mark.parametrize("mode", ["greedy", "sampling", "returned_sequences"])
def test_the_repetition_penalty_behind_gedi(mode):
    """No log-probabilities, so it has a reference of its own."""
    behind: list[tuple[Tensor, Tensor]] = []

    class Check(LogitsProcessor):
        def __init__(self, first: bool):
            self.first = first

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if self.first:
                behind.append((scores, scores.clone()))
                return scores
            given, before = behind[-1]
            assert torch.equal(given, before)
            for ids, row, output in zip(input_ids.tolist(), before.tolist(), scores, strict=True):
                lifted = [value - max(row) + 10.0 for value in row]
                for token in set(ids):
                    lifted[token] = lifted[token] / 1.2 if lifted[token] > 0 else lifted[token] * 1.2
                torch.testing.assert_close(output, torch.tensor(lifted), rtol=1e-5, atol=1e-5)
            assert not scores.isnan().any()
            assert torch.equal(scores.isneginf(), before.isneginf())
            return scores

    processor, judge = judged("gedi")
    penalty = GeDiRepetitionPenaltyLogitsProcessor(1.2)
    judge.prompt(*tiny.prompts())
    processors = [*judge.around(processor), Check(True), penalty, Check(False)]
    generate(main_model(), judge.ids, judge.mask, processors, suppress_tokens=[20, 21], **MODES[mode])
    assert len(behind) == NEW_TOKENS
    assert list(inspect.signature(penalty.__call__).parameters) == ["input_ids", "scores"]
    assert penalty.supports_continuous_batching is False


# --- encoder-decoders ----------------------------------------------------------------------------------------------------------

QUESTIONS = [[12, 13, 14, 15, 16, 17], [21, 22, 23, 24]]
NEGATIVES = [[33, 34, 35], [41, 42, 43, 44, 45]]


def encoder_inputs(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}


t5 = functools.cache(tiny.t5)


def _mixed(formula: Callable[..., Tensor], *reads: tuple[int, list[list[int]]]):
    return lambda view, plain: redistribute(plain, formula, *(view.read(t5(s), encoder=rows) for s, rows in reads))


ENCODER_DECODER: dict[str, Callable[[], Case]] = {
    "cfg": lambda: (
        MixtureLogitsProcessor.cfg(t5(0), encoder_inputs(NEGATIVES), scale=1.6),
        _mixed(lambda main, other: 1.6 * main - 0.6 * other, (0, NEGATIVES)),
    ),
    "context_aware": lambda: (
        MixtureLogitsProcessor.context_aware(t5(0), torch.tensor([row[2:4] for row in QUESTIONS]), contrast=0.5),
        _mixed(lambda main, other: 1.5 * main - 0.5 * other, (0, [row[2:4] for row in QUESTIONS])),
    ),
    "lqcd": lambda: (
        LQCDLogitsProcessor(t5(0), encoder_inputs(NEGATIVES), contrast=0.7, plausibility=0.05),
        _mixed(functools.partial(leading_query_contrast, contrast=0.7, plausibility=0.05), (0, NEGATIVES)),
    ),
    "proxy": lambda: (
        MixtureLogitsProcessor.proxy(t5(1), t5(2), weight=0.8, encoder_inputs=encoder_inputs(QUESTIONS)),
        _mixed(lambda main, expert, anti: main + 0.8 * (expert - anti), (1, QUESTIONS), (2, QUESTIONS)),
    ),
    "steer": lambda: (
        SteerLogitsProcessor(base_model=t5(1), contrast=0.6, encoder_inputs=encoder_inputs(QUESTIONS)),
        _mixed(
            lambda tuned, base: steer(tuned, base, None, contrast=0.6, repulsion=0.0, normalise=False), (1, QUESTIONS)
        ),
    ),
    "fusion": lambda: (
        DynamicFusionLogitsProcessor(t5(1), t5(2), weight=0.7, encoder_inputs=encoder_inputs(QUESTIONS)),
        _mixed(lambda main, small, tuned: main + 0.7 * (tuned - small), (1, QUESTIONS), (2, QUESTIONS)),
    ),
    "adaptive": lambda: (
        EntropyAdaptiveLogitsProcessor(t5(1), threshold=-1.0, min_stay=0, encoder_inputs=encoder_inputs(QUESTIONS)),
        _mixed(lambda main, large: large, (1, QUESTIONS)),
    ),
    "refusal": lambda: (
        RefusalTokenLogitsProcessor(refuse=30, respond=31, mode="bias", bias=1.0),
        lambda view, plain: plain if view.rows[0][2] else (plain + (torch.arange(tiny.VOCAB) == 30)).log_softmax(-1),
    ),
}


@pytest.mark.parametrize("mode", ["greedy", "returned_sequences", "beams"])
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoders(name, mode):
    processor, reference = ENCODER_DECODER[name]()
    # What the processor sees are the decoder's ids: one token that begins every answer.
    start = torch.full((2, 1), tiny.PAD)
    judge = Judge(reference, start, torch.ones_like(start))
    inputs = encoder_inputs(QUESTIONS)
    for _ in range(2):
        generate(t5(0), inputs["input_ids"], inputs["attention_mask"], judge.around(processor), **MODES[mode])
    assert len(judge.lengths) == 2 * NEW_TOKENS


def test_encoder_inputs_may_change_from_batch_to_batch():
    questions = [[51, 52, 53], [54, 55, 56]]
    processor = MixtureLogitsProcessor.proxy(t5(1), t5(2), encoder_inputs=encoder_inputs(QUESTIONS))
    reference = _mixed(lambda main, expert, anti: main + expert - anti, (1, questions), (2, questions))
    first, inputs = encoder_inputs(QUESTIONS), encoder_inputs(questions)
    generate(t5(0), first["input_ids"], first["attention_mask"], [processor])
    processor.bind(encoder_inputs=inputs)
    start = torch.full((2, 1), tiny.PAD)
    judge = Judge(reference, start, torch.ones_like(start))
    generate(t5(0), inputs["input_ids"], inputs["attention_mask"], judge.around(processor))
    assert len(judge.lengths) == NEW_TOKENS


def test_encoder_decoders_are_refused_where_they_make_no_sense():
    with pytest.raises(ValueError, match="decoder-only"):
        GeDiLogitsProcessor(t5(0), desired=5, undesired=6)
    with pytest.raises(ValueError, match="decoder-only"):
        SteerLogitsProcessor(model=t5(0), negatives=[5, 6], contrast=0.0)
    inputs = encoder_inputs(QUESTIONS)
    for processor in (
        SteerLogitsProcessor(base_model=t5(1)),
        MixtureLogitsProcessor.proxy(t5(1), t5(2)),
        MixtureLogitsProcessor.cfg(t5(0), scale=1.5),
        DynamicFusionLogitsProcessor(t5(1), t5(2)),
        EntropyAdaptiveLogitsProcessor(t5(1), threshold=-1.0, min_stay=0),
    ):
        with pytest.raises(ValueError, match="encoder_inputs"):
            generate(t5(0), inputs["input_ids"], inputs["attention_mask"], [processor])
