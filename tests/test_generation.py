"""`hf_logits.generate`: what surrounds its loop, and the loop in which only the picked model runs.

That mixing methods choose the same tokens through it is in test_generation_contract.py.
"""

import copy
import math
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from test_auxiliary import two_adapters
from test_processor_contract import Judge, adaptive_case, auxiliary, draft_model
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import hf_logits
import tiny
from hf_logits import AuxiliaryLM, generation
from hf_logits.auxiliary import BASE, Context
from hf_logits.generation import CACHE
from hf_logits.logits import entropy
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    MixtureTerm,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
)
from oracles import word_tokenizer


OTHER = list(range(8, 20))
"""A prompt that is longer than those of the tests."""


def cfg(model: Any, **settings: Any) -> MixtureLogitsProcessor:
    return MixtureLogitsProcessor.cfg(model, OTHER, scale=1.5, **settings)


def decode(model: Any, *processors: LogitsProcessor, loop: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    if "input_ids" not in settings:
        settings["input_ids"], settings["attention_mask"] = tiny.prompts()
    settings = {"max_new_tokens": 10, "do_sample": False} | settings
    if loop:
        settings["custom_generate"] = hf_logits.generate
    return model.generate(logits_processor=list(processors), **settings)


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says."""
    lines: list[str] = []
    monkeypatch.setattr(generation.logger, "warning_once", lines.append)
    return lines


class Counter:
    """Counts the forwards of a model, and the tokens of each."""

    def __init__(self, model: torch.nn.Module):
        self.tokens: list[int] = []
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.tokens.append(kwargs["input_ids"].shape[1])


# --- what surrounds the loop -----------------------------------------------------------------------------------------


def test_what_is_returned():
    model = tiny.llama()
    details = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
    }
    plain, ours = (decode(model, cfg(model), loop=loop, **details) for loop in (False, True))
    assert type(plain) is type(ours) and torch.equal(plain.sequences, ours.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == 10
        for expected, values in zip(plain[name], ours[name], strict=True):
            torch.testing.assert_close(values, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_holds_the_generating_models_rows(static):
    """The contexts' rows, and the padding that their longer prompts cause, are not in it: a chat goes on from it."""
    model, ids = tiny.llama(), tiny.prompts(padded=False)[0]
    given = StaticCache(model.config, max_cache_len=40) if static else DynamicCache()
    first = decode(model, cfg(model), input_ids=ids, **{CACHE: given}, return_dict_in_generate=True)
    assert first[CACHE] is given and int(given.get_seq_length()) == ids.shape[1] + 9
    again = decode(model, cfg(model), input_ids=ids, loop=False, return_dict_in_generate=True)
    for ours, theirs in zip(given.layers, again[CACHE].layers, strict=True):
        keys = ours.keys[:, :, : theirs.keys.shape[2]]
        torch.testing.assert_close(keys, theirs.keys, rtol=0.0, atol=1e-5)
    turn = torch.cat([first.sequences, torch.tensor([[40, 41]] * 2)], dim=1)
    settings = {"input_ids": turn, "disable_compile": True}
    continued = decode(model, cfg(model), **{CACHE: given}, **settings)
    assert torch.equal(continued, decode(model, cfg(model), loop=False, **settings))


def test_a_cache_of_padded_rows_alone():
    """Contexts that are shorter than a padded prompt: the cache has the prompt's columns, padding included."""
    model = tiny.llama()
    ids, mask = torch.tensor([[0, 0, 0, 9, 10, 11, 12, 13, 14]]), torch.tensor([[0] * 3 + [1] * 6])
    cache = DynamicCache()
    make = lambda: MixtureLogitsProcessor.cfg(model, [8, 9], scale=1.5)  # noqa: E731
    first = decode(model, make(), input_ids=ids, attention_mask=mask, **{CACHE: cache})
    assert cache.get_seq_length() == 9 + 9
    # The new ids alone, with the mask of everything: as `generate` allows it.
    whole = torch.nn.functional.pad(mask, (0, 12), value=1)
    turn = torch.cat([first, torch.tensor([[40, 41]])], dim=1)
    continued = model.generate(turn[:, 18:], attention_mask=whole, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    again = model.generate(turn, attention_mask=whole, max_new_tokens=5, do_sample=False)
    assert torch.equal(continued[:, 3:], again[:, 21:])


@pytest.mark.parametrize("settings", [{"threshold": 5.0}, {"threshold": -1.0, "start": "large"}])
def test_the_cache_is_whole_where_the_model_did_not_always_run(settings):
    small, cache = tiny.llama(), DynamicCache()
    processor = EntropyAdaptiveLogitsProcessor(tiny.llama(1), window=1, min_stay=2, **settings)
    output = decode(small, processor, **{CACHE: cache}, return_dict_in_generate=True)
    assert output[CACHE] is cache and cache.get_seq_length() == output.sequences.shape[1] - 1
    other = decode(
        small,
        input_ids=output.sequences,
        max_new_tokens=1,
        return_dict_in_generate=True,
        loop=False,
        attention_mask=torch.nn.functional.pad(tiny.prompts()[1], (0, 10), value=1),
    )
    for ours, theirs in zip(cache.layers, other[CACHE].layers, strict=True):
        torch.testing.assert_close(ours.keys[1], theirs.keys[1, :, :-1], rtol=0.0, atol=1e-5)


def test_stopping_criteria():
    model = tiny.llama()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            assert scores is not None and len(scores) == input_ids.shape[1] - 9
            return torch.tensor([input_ids.shape[1] >= 12, input_ids.shape[1] >= 14])

    details = {
        "stopping_criteria": StoppingCriteriaList([Stop()]),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    plain, ours = (decode(model, cfg(model), loop=loop, **details) for loop in (False, True))
    assert torch.equal(ours.sequences, plain.sequences) and ours.sequences.shape == (2, 14)
    free = decode(model, cfg(model))
    ended = decode(model, cfg(model), eos_token_id=int(free[0, 11]), pad_token_id=tiny.PAD)
    assert ended[0, 12:].eq(tiny.PAD).all() and not ended[1].eq(ended[0]).all()
    assert torch.equal(ended, decode(model, cfg(model), eos_token_id=int(free[0, 11]), loop=False))


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("own", [True, False])
def test_streamers(own):
    """Under their own name, in the loop and beside it."""
    model, streamer, (ids, _) = tiny.llama(), Streamer(), tiny.prompts(batch=1, padded=False)
    processor = cfg(model if own else tiny.llama(3))
    output = decode(model, processor, input_ids=ids, text_streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended == 1
    with pytest.raises(ValueError, match="num_beams=1"):
        decode(model, processor, input_ids=ids, text_streamer=streamer, num_beams=2)


def test_a_pipeline(complaints):
    model, tokenizer = tiny.llama(), word_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12", "w13"]
    settings = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2, "return_tensors": True}
    plain = pipe(texts, logits_processor=[cfg(model)], **settings)
    processor = cfg(model)
    ours = pipe(texts, logits_processor=[processor], custom_generate=hf_logits.generate, **settings)
    assert ours == plain and processor.stats.forwards == 0 and processor.stats.calls == 12 and not complaints


def test_prompts_are_read_in_chunks_where_generate_does():
    model = tiny.llama()
    plain, counter = decode(model, cfg(model), loop=False), Counter(model)
    assert torch.equal(decode(model, cfg(model), prefill_chunk_size=5), plain)
    assert counter.tokens == [5, 5, 2] + [1] * 9


def test_a_prompt_repeated_from_an_earlier_output_needs_no_reset():
    """The loop knows where a generation begins."""
    model, processor = tiny.llama(), cfg(tiny.llama())
    processor = cfg(model)
    first = decode(model, processor)
    mask = torch.nn.functional.pad(tiny.prompts()[1], (0, 3), value=1)
    again = {"input_ids": first[:, :12], "attention_mask": mask}
    output = decode(model, processor, **again)
    assert processor.stats.trace["kl"].shape == (2, 10)
    assert torch.equal(output, decode(model, cfg(model), loop=False, **again))


def test_a_failure_leaves_the_processors_as_they_were():
    model, processor = tiny.llama(), cfg(tiny.llama())
    processor = cfg(model)
    engines = list(processor.engines)

    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("somebody else's bug")

    with pytest.raises(RuntimeError, match="somebody else's bug"):
        decode(model, processor, fail, cache_implementation="static")
    assert processor.engines == engines and engines[0].reserved is None
    assert torch.equal(decode(model, processor, loop=False), decode(model, cfg(model)))


def test_a_bound_mask_must_be_that_of_the_generation():
    model, (ids, mask) = tiny.llama(), tiny.prompts()
    processor = cfg(model)
    processor.bind(attention_mask=mask, input_ids=ids)
    assert torch.equal(decode(model, processor), decode(model, cfg(model)))
    with pytest.raises(ValueError, match="another attention_mask"):
        decode(model, processor, input_ids=ids, attention_mask=torch.ones_like(mask))
    processor.bind(attention_mask=torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"shape \(3, 7\)"):
        decode(model, processor)


def test_nan_of_a_context_is_refused():
    """Where the generating model's own rows are sound."""
    model = tiny.llama(vocab_size=70)
    model.model.embed_tokens.weight.data[64:] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(model, MixtureLogitsProcessor.cfg(model, [64, 65], scale=1.5))


def test_without_a_processor_of_ours_nothing_changes(complaints):
    model = tiny.llama()
    assert torch.equal(decode(model), decode(model, loop=False))
    assert torch.equal(decode(model, cfg(tiny.llama(3))), decode(model, cfg(tiny.llama(3)), loop=False))
    assert not complaints


# --- what the loop leaves to generate's own ------------------------------------------------------------------------------


def with_cache(model: PreTrainedModel) -> dict[str, Any]:
    ids, cache = tiny.prompts(padded=False)[0], DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], **{CACHE: cache})
    return {"input_ids": ids, CACHE: cache}


ELSEWHERE: dict[str, tuple[Any, str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 2, "input_ids": tiny.prompts(1, padded=False)[0]}, "assisted"),
    "hidden_states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
    "no_cache": ({"use_cache": False}, "use_cache"),
    "a_filled_cache": (with_cache, "already holds tokens"),
    "an_offloaded_cache": ({CACHE: lambda: DynamicCache(offloading=True)}, "cache is"),
    "positions": ({"position_ids": torch.arange(9).expand(2, 9) + 3}, "position_ids"),
    "token_types": ({"token_type_ids": torch.zeros(2, 9, dtype=torch.long)}, "token_type_ids"),
    "padding_on_the_right": (
        {"input_ids": tiny.prompts(padded=False)[0], "attention_mask": torch.tensor([[1] * 7 + [0] * 2, [1] * 9])},
        "padded elsewhere",
    ),
    "an_empty_prompt": (
        {"input_ids": tiny.prompts(padded=False)[0], "attention_mask": torch.tensor([[0] * 9, [1] * 9])},
        "nothing but padding",
    ),
    "a_long_prompt": ({"input_ids": tiny.prompts(1, length=33, padded=False)[0]}, "window"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_other_modes_run_as_without_the_loop(complaints, case):
    details, reason = ELSEWHERE[case]
    model = tiny.gpt2() if case == "token_types" else tiny.llama(max_position_embeddings=32)
    if case == "an_offloaded_cache":
        details = {CACHE: DynamicCache()}
        details[CACHE].offloading = True
    outputs = []
    for loop in (False, True):
        settings = dict(details(model) if callable(details) else details)
        if case == "an_offloaded_cache":
            # Offloading needs an accelerator: the choice alone is looked at.
            reasons = generation._other_mode(
                model, tiny.prompts()[0], copy.deepcopy(model.generation_config), None, settings
            )
            assert reasons is not None and reason in reasons
            return
        # Guidance by a short prompt, because one is longer than the window.
        processor = MixtureLogitsProcessor.cfg(model, scale=1.5)
        outputs.append(decode(model, processor, loop=loop, max_new_tokens=5, **settings))
    sequences = [output if isinstance(output, Tensor) else output.sequences for output in outputs]
    assert torch.equal(*sequences)
    assert len(complaints) == 1 and reason in complaints[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_rows_under_adapters_of_their_own(complaints):
    model = two_adapters()
    settings = {"adapter_names": ["east", "west"], "return_dict_in_generate": True, "output_logits": True}
    plain = decode(model, loop=False, **settings)
    ours = decode(model, LQCDLogitsProcessor(tiny.llama(3), OTHER), cfg(tiny.llama(4)), **settings)
    torch.testing.assert_close(ours.logits[0], plain.logits[0], rtol=0.0, atol=1e-5)
    processor = EntropyAdaptiveLogitsProcessor(tiny.llama(1), threshold=math.inf)
    assert torch.equal(decode(model, processor, **settings).sequences, plain.sequences)
    assert "adapter_names" in complaints[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_a_prompt_learning_adapter(complaints):
    torch.manual_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config).eval()
    make = lambda: cfg(model.get_base_model())  # noqa: E731
    assert torch.equal(decode(model, make()), decode(model, make(), loop=False))
    assert "prompt-learning" in complaints[0]


def test_positions_that_do_not_begin_at_zero(complaints):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=66, is_decoder=True, pad_token_id=0, **sizes)
    model = tiny.spread(RobertaForCausalLM(config), 0)
    ids = tiny.prompts(padded=False)[0]
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(decode(model, cfg(model), **settings), decode(model, cfg(model), loop=False, **settings))
    assert "counts positions" in complaints[0]


@pytest.mark.parametrize("kind", ["mamba", "bamba"])
def test_a_recurrent_state_is_not_handed_over(complaints, kind):
    model = tiny.DECODERS[kind]()
    make = lambda: EntropyAdaptiveLogitsProcessor(tiny.llama(1), threshold=2.5, min_stay=2)  # noqa: E731
    plain, ours = (decode(model, make(), loop=loop, return_dict_in_generate=True) for loop in (False, True))
    assert torch.equal(plain.sequences, ours.sequences) and "recurrent" in complaints[0]
    complaints.clear()
    assert torch.equal(decode(model, make()), plain.sequences) and not complaints

    ids = tiny.prompts(padded=False)[0]
    for filled, reason in ((False, "recurrent"), (True, "already holds tokens")):
        outputs, complaints[:] = [], []
        for loop in (False, True):
            cache = DynamicCache(config=model.config)
            if filled:
                with torch.no_grad():
                    model(ids[:, :4], **{AuxiliaryLM(model)._cache_name: cache}, use_cache=True)
            outputs.append(decode(model, make(), input_ids=ids, **{CACHE: cache}, loop=loop))
        assert torch.equal(*outputs) and reason in complaints[0]


def test_a_draft_model_of_another_vocabulary_is_refused(complaints):
    model, ids = tiny.llama(), tiny.prompts(1, padded=False)[0]
    with pytest.raises(ValueError, match="different tokenizers"):
        decode(model, cfg(model), input_ids=ids, assistant=tiny.llama(1, vocab_size=80))


def test_a_model_in_training_mode_is_left_in_it(complaints):
    model = tiny.llama(attention_dropout=0.0).train()
    decode(model, cfg(model))
    assert model.training and "training mode" in complaints[0]


def test_draft_models(complaints):
    model, ids = tiny.llama(), tiny.prompts(1, padded=False)[0]
    plain = decode(model, cfg(model), loop=False, input_ids=ids)
    counter = Counter(draft_model())
    assert torch.equal(decode(model, cfg(model), input_ids=ids, assistant=draft_model()), plain)
    assert counter.tokens and "assisted" in complaints[0]


def test_two_ways_to_decode_are_refused():
    model = tiny.llama()
    with pytest.raises(ValueError, match="only one can decode"):
        decode(model, cfg(model), penalty_alpha=0.6, top_k=4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["steer", "mixture", "fusion", "inner"])
def test_adapters_share_the_forward(name, mode):
    """The base and its adapters, and the generating one among them, in one forward a token."""
    model = two_adapters()
    make: Any = {
        "steer": lambda: SteerLogitsProcessor(model=model, negatives=OTHER, contrast=0.4, repulsion=0.3),
        "mixture": lambda: MixtureLogitsProcessor(
            [MixtureTerm(model, 0.5, adapter="west"), MixtureTerm(model, -0.5, OTHER, adapter=BASE)]
        ),
        "fusion": lambda: DynamicFusionLogitsProcessor(model, ["east", "west"], weight=0.5),
        # Whoever holds the model inside means it as it is, with its active adapter.
        "inner": lambda: LQCDLogitsProcessor(model.get_base_model(), OTHER, contrast=0.7),
    }[name]
    plain = decode(model, make(), loop=False, **mode)
    processor, counter = make(), Counter(model.get_base_model())
    assert torch.equal(decode(model, processor, **mode), plain)
    assert len(counter.tokens) == 10 and processor.stats.forwards == 0
    assert model.active_adapter == "east"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_several_active_adapters_stay_apart():
    """One forward cannot read rows under two adapters at once beside others: the processor's own engine reads the base."""
    model = two_adapters()
    model.base_model.set_adapter(["east", "west"])
    processors = [SteerLogitsProcessor(model=model, contrast=0.4, repulsion=0.0) for _ in range(2)]
    plain, ours = (decode(model, p, loop=loop) for p, loop in zip(processors, (False, True), strict=True))
    assert torch.equal(plain, ours) and processors[1].stats.forwards == 10


# --- static caches and compilation ---------------------------------------------------------------------------------------


def test_engines_get_a_static_cache_where_the_model_has_one(monkeypatch):
    """And compiled forwards where `generate` compiles; the others stay as they are."""
    model, other = tiny.llama(), tiny.llama(3)
    settings = CompileConfig(backend="eager", mode=None, fullgraph=False)
    settings._compile_all_devices = True
    compiled: list[int] = []
    for each in (model, other):
        call = each.get_compiled_call

        def counting(config: Any, call: Any = call, each: Any = each) -> Any:
            compiled.append(id(each))
            return call(config)

        monkeypatch.setattr(each, "get_compiled_call", counting)
    processor = SteerLogitsProcessor(model=model, base_model=other, negatives=OTHER, contrast=0.4, repulsion=0.3)
    plain = decode(model, copy.copy(processor), loop=False)
    torch.compiler.reset()
    output = decode(model, processor, cache_implementation="static", compile_config=settings)
    assert torch.equal(output, plain)
    assert compiled.count(id(model)) == compiled.count(id(other)) == 9
    assert all(engine.reserved is None for engine in processor.engines)


def test_models_beside_the_loop_get_one_too(complaints):
    """Also where no context can join: the generating model is decoded by `generate`'s own loop, nothing is said."""
    model, other, rooms = tiny.llama(), tiny.llama(3), []
    processor = cfg(other)

    def look(input_ids: Tensor, scores: Tensor) -> Tensor:
        rooms.append(processor.engines[0]._state.room)
        return scores

    settings = {"cache_implementation": "static", "disable_compile": True}
    output = decode(model, processor, look, **settings)
    assert rooms == [len(OTHER) + 10] * 10 and processor.engines[0].reserved is None and not complaints
    assert torch.equal(output, decode(model, cfg(other), loop=False, **settings))


def test_the_same_processor_twice():
    model = tiny.llama()
    plain, counter = decode(model, *[cfg(model)] * 2, loop=False), Counter(model)
    assert torch.equal(decode(model, *[cfg(model)] * 2), plain) and len(counter.tokens) == 10


def test_a_static_cache_by_hand():
    """Rows may move, tokens be taken back, and what does not fit is read again into a larger cache."""
    model, (ids, _) = tiny.llama(), tiny.prompts(padded=False)
    engine, judge = AuxiliaryLM(model, [Context(), Context(lambda ids, row, rows: OTHER)]), AuxiliaryLM(model)
    engine.reserve(4)

    def compare(ids: Tensor) -> None:
        torch.testing.assert_close(engine(ids)[0], judge(ids)[0], rtol=0.0, atol=1e-5)
        rows = [[*OTHER, *row[9:]] for row in ids.tolist()]
        torch.testing.assert_close(engine(ids)[1], tiny.recomputed(model, rows), rtol=0.0, atol=1e-5)

    compare(ids)
    room = engine._state.room
    cache = engine._state.cache
    for token in (5, 6, 7):
        ids = torch.cat([ids, torch.tensor([[token], [token + 10]])], dim=1)
        compare(ids)
    compare(ids.flip(0))
    ids = ids.flip(0)[:, :-2]
    compare(ids)
    assert engine._state.cache is cache
    for token in range(20, 20 + room):
        ids = torch.cat([ids, torch.tensor([[token % 60], [30]])], dim=1)
        compare(ids)
    assert engine._state.room > room
    engine.reserve(None)
    compare(ids)
    assert engine._state.room is None


# --- only the model at work runs -------------------------------------------------------------------------------------


class Deciding(Judge):
    """Judges what the loop shows behind the choice: the small model's scores must be worked out anew."""

    def __init__(self, small: PreTrainedModel, *args: Any):
        super().__init__(*args)
        self.small = small

    def compare(self, input_ids: Tensor, scores: Tensor, output: Tensor) -> None:
        small = self.view(input_ids, scores.shape[-1]).read(self.small)
        super().compare(input_ids, small, output.log_softmax(-1))


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mamba", "bamba"])
@pytest.mark.parametrize("timing", ["now", "next"])
def test_every_choice_agrees_with_recomputing(timing, kind, mode):
    small = tiny.llama()
    processor, reference = adaptive_case(small, lambda seed: auxiliary(kind, seed), timing=timing)
    judge = Deciding(small, reference, *tiny.prompts())
    decode(small, *judge.around(processor), **mode)
    assert len(judge.lengths) == 10
    beside, _ = adaptive_case(small, lambda seed: auxiliary(kind, seed), timing=timing)
    assert torch.equal(decode(small, processor, **mode), decode(small, beside, loop=False, **mode))
    for name in ("entropy", "large", "stay", "next_large"):
        torch.testing.assert_close(processor.stats.trace[name], beside.stats.trace[name], rtol=0.0, atol=1e-4)
    assert 0 < float(processor.stats.trace["large"].mean()) < 1


@pytest.mark.parametrize("timing", ["now", "next"])
@pytest.mark.parametrize("seed", range(4))
def test_only_the_model_at_work_runs(timing, seed):
    """And reads what it has missed in one forward."""
    small, large = tiny.llama(), tiny.llama(1)
    ids = tiny.prompts(1, padded=False, seed=seed)[0]
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=5.0, window=1, min_stay=2, timing=timing)
    counters = [Counter(small), Counter(large)]
    decode(small, processor, input_ids=ids, max_new_tokens=24)
    chose = processor.stats.trace["large"][0].bool().tolist()
    # With "now" the model that is left has read the token too: it was its entropy that made the change.
    before = [False, *chose[:-1]] if timing == "now" else chose
    for model, counter in enumerate(counters):
        runs = [at for at, (now, then) in enumerate(zip(chose, before, strict=True)) if model in (now, then)]
        missed = [at - last for at, last in zip(runs, [-1, *runs[:-1]], strict=True)]
        assert counter.tokens == [n + (8 if i == 0 else 0) for i, n in enumerate(missed)]
    assert any(chose) and not all(chose) and max(counters[0].tokens[1:] + counters[1].tokens[1:]) > 1
    cost = processor.cost(small)
    size = small.num_parameters()
    assert cost.large_forwards == len(counters[1].tokens)
    assert math.isclose(cost.share, sum(chose) / 24, rel_tol=1e-6)
    assert math.isclose(cost.flops, 2 * size * sum(counters[0].tokens + counters[1].tokens))
    assert math.isclose(cost.relative_cost_here, sum(len(c.tokens) for c in counters) / 24)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"threshold": math.inf}, 1),
        ({"threshold": -1.0, "start": "large"}, 0),
        ({"threshold": -1.0, "start": "large", "timing": "next"}, 0),
    ],
)
def test_a_model_that_never_works_never_runs(settings, idle):
    models = [tiny.llama(), tiny.llama(1)]
    counters = [Counter(model) for model in models]
    processor = EntropyAdaptiveLogitsProcessor(models[1], **settings)
    output = decode(models[0], processor)
    assert not counters[idle].tokens and counters[1 - idle].tokens == [9] + [1] * 9
    assert torch.equal(output, decode(models[1 - idle], loop=False))


def test_the_small_models_entropy_needs_the_small_model():
    small, large = tiny.llama(), tiny.llama(1)
    make = lambda: EntropyAdaptiveLogitsProcessor(large, threshold=2.5, window=1, min_stay=1, entropy_of="small")  # noqa: E731
    counter, processor = Counter(small), make()
    ours = decode(small, processor)
    assert counter.tokens == [9] + [1] * 9
    assert torch.equal(ours, decode(small, make(), loop=False))


def test_penalties_and_bans_hold_for_whichever_model_chose():
    """Beside `generate` they reach the small model alone."""
    small, large = tiny.llama(), tiny.llama(1)
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0, start="large")
    settings = {"repetition_penalty": 5.0, "suppress_tokens": [5, 6, 7], "no_repeat_ngram_size": 2}
    assert torch.equal(decode(small, processor, **settings), decode(large, loop=False, **settings))
    # Other processors of ours act on the chosen logits as well, wherever they stand.
    refusal = RefusalTokenLogitsProcessor(refuse=30, respond=31, threshold=0.0)
    for order in ([processor, refusal], [refusal, processor]):
        assert decode(small, *order)[:, 9].tolist() == [30, 30]


@pytest.mark.parametrize("vocab", [48, 80])
def test_vocabularies_may_differ_at_the_end(vocab):
    small, large = tiny.llama(), tiny.llama(1, vocab_size=vocab)
    ids = tiny.prompts(padded=False)[0] % 40
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=0, start="large")
    seen: list[Tensor] = []

    def look(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores)
        return scores

    output = decode(small, processor, look, input_ids=ids)
    shared = min(vocab, 64)
    assert seen[0].shape == (2, 64) and seen[0][:, shared:].isneginf().all()
    expected = tiny.recomputed(large, output[:, :-1].tolist())[:, :shared].log_softmax(-1)
    torch.testing.assert_close(seen[-1][:, :shared].log_softmax(-1), expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(processor.stats.trace["entropy"][:, -1], entropy(expected), rtol=0.0, atol=1e-4)


def test_a_large_model_that_returns_nan_is_refused():
    large = tiny.llama(1)
    large.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(tiny.llama(), EntropyAdaptiveLogitsProcessor(large, start="large"))


def test_one_door_after_the_other():
    """What the loop did is no memory of the processor beside it."""
    small, large = tiny.llama(), tiny.llama(1)
    make = lambda: EntropyAdaptiveLogitsProcessor(large, threshold=2.5, min_stay=2, window=3)  # noqa: E731
    processor, (other, mask) = make(), tiny.prompts(3, seed=9)
    first = decode(small, processor, loop=False)
    decode(small, processor, input_ids=other, attention_mask=mask)
    assert "kl" not in processor.stats.trace and processor.stats.trace["large"].shape == (3, 10)
    in_the_loop = processor.cost(small)
    half = {"input_ids": first[:, :12], "attention_mask": torch.nn.functional.pad(tiny.prompts()[1], (0, 3), value=1)}
    assert torch.equal(decode(small, processor, loop=False, **half), decode(small, make(), loop=False, **half))
    fresh = make()
    decode(small, fresh, input_ids=other, attention_mask=mask)
    assert in_the_loop == fresh.cost(small)
    decode(small, processor, loop=False, input_ids=other, attention_mask=mask)
    decode(small, fresh := make(), loop=False, input_ids=other, attention_mask=mask)
    assert processor.cost(small) == fresh.cost(small) != in_the_loop


def test_rows_that_have_ended_wake_no_model():
    """Nor does a model that worked for them keep running."""
    small, large = tiny.llama(), tiny.llama(1)
    counters = [Counter(small), Counter(large)]

    def end_the_first(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 12:
            scores = scores.clone()
            scores[0] = -math.inf
            scores[0, tiny.EOS] = 0.0
        return scores

    threshold = torch.tensor([-1.0, math.inf])  # the first row's large model, the second row's small one
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=threshold, min_stay=0, eos_token_id=tiny.EOS)
    output = decode(small, processor, end_the_first, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    assert output[0, 12] == tiny.EOS and output[0, 13:].eq(tiny.PAD).all()
    # That a row has ended shows in its first padding.
    assert len(counters[1].tokens) == 5 and len(counters[0].tokens) == 10
    large_share = processor.stats.trace["large"]
    assert large_share[0, :5].eq(1).all() and large_share[0, 5:].isnan().all() and large_share[1].eq(0).all()


def test_a_large_model_is_shown_no_ids_that_it_does_not_have():
    small, large = tiny.llama(), tiny.llama(1, vocab_size=48)
    force = lambda ids, scores: torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([60]), 0.0)  # noqa: E731
    processor = EntropyAdaptiveLogitsProcessor(large, threshold=-1.0, min_stay=2)
    with pytest.raises(ValueError, match="Token id 60"):
        decode(small, processor, force, input_ids=tiny.prompts(padded=False)[0] % 40)


def test_two_that_pick_are_left_to_generate(complaints):
    small, large = tiny.llama(), tiny.llama(1)
    make = lambda: [EntropyAdaptiveLogitsProcessor(large, threshold=2.5, min_stay=s) for s in (1, 3)]  # noqa: E731
    assert torch.equal(decode(small, *make()), decode(small, *make(), loop=False))
    assert "two processors" in complaints[0]
