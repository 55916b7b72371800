"""The engine itself: contexts, token scores, caches that can and cannot be taken back, adapters, encoders, refusals.

Everything is held against a recomputation from scratch; what it costs is held against a count by hand.
"""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import (
    BartConfig,
    BartForCausalLM,
    LogitsProcessor,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import tiny
from hf_logits.auxiliary import BASE, AuxiliaryLM, Context
from hf_logits.prefix import PromptTracker
from hf_logits.processors import SteerLogitsProcessor


OTHER, CODE = [9, 4, 4, 7], [5, 6, 7]
RECURRENT = {"mamba": tiny.mamba, "bamba": tiny.bamba}


def fixed(prompt: list[int]):
    return lambda main, row, rows: prompt


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def padded_prompts() -> tuple[torch.Tensor, list[list[int]]]:
    """Two prompts, the first of them padded by two, and what they are without padding."""
    ids, mask = tiny.prompts(2, 6)
    return ids, [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]


def appended(ids: torch.Tensor, *tokens: int) -> torch.Tensor:
    return torch.cat([ids, torch.tensor(tokens)[:, None]], dim=1)


@torch.no_grad()
def scored(model, row: list[int]) -> torch.Tensor:
    """Log-probability of each id given those before it; the first has none."""
    log_probs = model(torch.tensor([row])).logits[0].float().log_softmax(-1)
    return torch.tensor([0.0] + [log_probs[t, i].item() for t, i in enumerate(row[1:])])


def right_aligned(scores: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([torch.zeros(width - len(scores)), scores])


# --- contexts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_contexts_of_different_lengths_in_one_forward(name):
    model, (ids, rows) = tiny.DECODERS[name](), padded_prompts()
    contexts = [None, fixed(OTHER), lambda main, row, rows: CODE + main, lambda main, row, rows: main[-1:]]
    engine = AuxiliaryLM(model, [Context(prompt) for prompt in contexts])
    for tokens in ((), (11, 12), (0, 13), (14, 2)):
        ids = appended(ids, *tokens) if tokens else ids
        rows = [[*row, *tokens[r : r + 1]] for r, row in enumerate(rows)]
        found = engine(ids)
        new = ids[:, 6:].tolist()
        prompts = [row[: len(row) - len(new[0])] for row in rows]
        for c, made in enumerate([lambda p: p, lambda p: OTHER, lambda p: CODE + p, lambda p: p[-1:]]):
            close(found[c], tiny.recomputed(model, [made(p) + n for p, n in zip(prompts, new, strict=True)]))
    assert engine.stats.forwards == 4
    # what was fed: each prompt once (two pairs of rows have equal prompts), then a token a row
    assert engine.stats.tokens == (4 + 6) + len(OTHER) + (7 + 9) + 2 + 3 * 8


def test_what_rows_share_is_read_once():
    model, (ids, _) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model, [Context(), Context(), Context(fixed(OTHER))])
    found = engine(ids.repeat_interleave(3, 0))
    assert engine.stats.prefill_rows == 3  # two prompts in two equal contexts, and one other prompt
    close(found[0], found[1], 0.0)
    close(found[2], tiny.recomputed(model, [OTHER]).expand(6, -1))
    found = engine(appended(ids.repeat_interleave(3, 0), 3, 4, 5, 6, 7, 8))  # and then they part
    close(found[2], tiny.recomputed(model, [[*OTHER, t] for t in range(3, 9)]))
    assert engine.stats.forwards == 2


def test_lengths_and_shape():
    model, (ids, _) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model, [Context(), Context(fixed(OTHER))])
    assert engine(ids).shape == (2, 2, tiny.VOCAB)
    assert engine.lengths.tolist() == [[4, 6], [4, 4]]
    assert engine(appended(ids, 3, 3), vocab_size=50).shape == (2, 2, 50)
    assert engine.lengths.tolist() == [[5, 7], [5, 5]]


def test_vocabularies_are_cut_before_the_softmax():
    model, (ids, rows) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model)
    whole = engine(ids)
    cut = engine(ids, vocab_size=40)  # the same ids again: nothing of the wider softmax may be left
    close(cut.logsumexp(-1), torch.zeros(1, 2))
    close(cut[0], tiny.recomputed(model, rows)[:, :40].log_softmax(-1))
    close(engine(ids, vocab_size=1000), whole)


# --- token scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1024, 3, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", *RECURRENT])
def test_token_scores(name, chunk):
    model, (ids, rows) = tiny.DECODERS[name](), padded_prompts()
    engine = AuxiliaryLM(model, [Context(), Context(fixed(OTHER))], score_tokens=True, prefill_chunk=chunk)

    def check(ids: torch.Tensor, generated: list[list[int]]) -> None:
        engine(ids)
        width = ids.shape[1]
        for c, prompts in enumerate([rows, [OTHER, OTHER]]):
            for r, prompt in enumerate(prompts):
                expected = scored(model, prompt + generated[r])
                close(engine.token_log_probs[c, r], right_aligned(expected, width))

    check(ids, [[], []])
    longer = appended(appended(ids, 11, 12), 13, 14)
    check(appended(ids, 11, 12), [[11], [12]])
    check(longer, [[11, 13], [12, 14]])
    check(appended(ids, 11, 12), [[11], [12]])  # one token back: its prediction is no longer there
    check(appended(appended(ids, 11, 12), 15, 16), [[11, 15], [12, 16]])
    check(appended(ids, 17, 18), [[17], [18]])


def test_token_scores_follow_beams():
    model, (ids, rows) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model, score_tokens=True)
    engine(ids)
    engine(appended(ids, 11, 12))
    engine(appended(appended(ids, 11, 12)[[1, 1]], 13, 14))
    for r, last in enumerate((13, 14)):
        close(engine.token_log_probs[0, r], right_aligned(scored(model, [*rows[1], 12, last]), 8))


def test_ids_of_the_main_model_alone_score_zero():
    model = tiny.llama()
    engine = AuxiliaryLM(model, score_tokens=True)
    engine(torch.tensor([[5, 6, 50, 7]]), vocab_size=40)
    scores = engine.token_log_probs[0, 0]
    assert scores[0] == 0 and scores[2] == 0 and scores[1] < 0 and scores[3] < 0


def test_no_scores_unless_asked_for():
    engine = AuxiliaryLM(tiny.llama())
    engine(torch.tensor([[5, 6]]))
    with pytest.raises(RuntimeError, match="score_tokens=True"):
        _ = engine.token_log_probs


# --- caches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "tied_llama"])
def test_long_prompts_are_read_in_chunks(name):
    model, (ids, mask) = tiny.DECODERS[name](), tiny.prompts(3, 10)
    engine = AuxiliaryLM(model, prefill_chunk=3)
    rows = [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]
    close(engine(ids)[0], tiny.recomputed(model, rows))
    assert engine.stats.forwards == 4
    assert engine.stats.tokens == mask.sum()
    close(
        engine(appended(ids, 5, 6, 7))[0],
        tiny.recomputed(model, [[*r, t] for r, t in zip(rows, (5, 6, 7), strict=True)]),
    )


def test_ids_that_are_views_of_one_buffer():
    """Somebody else writes into what an engine was shown: it has its own copy of what it compares."""
    model, engine = tiny.llama(), AuxiliaryLM(tiny.llama())
    buffer = torch.zeros(1, 20, dtype=torch.long)
    buffer[0, :9] = tiny.prompts(1, padded=False)[0]
    engine(buffer[:, :9])
    buffer[0, 9] = 5
    engine(buffer[:, :10])
    buffer[0, 9], buffer[0, 10] = 33, 7
    close(engine(buffer[:, :11])[0], tiny.recomputed(model, buffer[:, :11].tolist()))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_that_were_switched_are_noticed():
    model, (ids, rows) = two_adapters(), padded_prompts()
    engine = AuxiliaryLM(model)
    close(engine(ids)[0], tiny.recomputed(model, rows))
    with model.disable_adapter():
        engine.tracker.reset()
        close(engine(ids)[0], tiny.recomputed(model, rows))
    for change in (lambda: model.set_adapter("west"), lambda: scale_adapters(model)):
        change()
        engine.tracker.reset()
        close(engine(ids)[0], tiny.recomputed(model, rows))


def scale_adapters(model) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(0.5)


def test_scoring_a_long_prompt_holds_few_logits(monkeypatch):
    model, (ids, mask) = tiny.llama(), tiny.prompts(3, 10)
    whole, pieces = AuxiliaryLM(model, score_tokens=True), AuxiliaryLM(model, score_tokens=True)
    monkeypatch.setattr(AuxiliaryLM, "_SCORED", 3 * 4 * model.config.vocab_size)
    first = pieces(ids)
    monkeypatch.undo()
    close(first, whole(ids))
    close(pieces.token_log_probs, whole.token_log_probs)
    assert pieces.stats.forwards == 3 and int(mask.sum()) == pieces.stats.tokens


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_contexts_of_very_unequal_length_are_not_padded(monkeypatch, name, score):
    """They are read one by one, and go on together; equal rows are read once here too."""
    model, (ids, mask) = tiny.DECODERS[name](), tiny.prompts(3, 10)
    ids[1], mask[1] = ids[2], mask[2]
    contexts = [
        Context(),
        Context(lambda main, row, rows: [*range(8, 48)]),
        Context(lambda main, row, rows: main[-1:]),
    ]
    apart, padded = (AuxiliaryLM(model, contexts, score_tokens=score) for _ in range(2))
    fed: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for step in range(4):
        monkeypatch.setattr(AuxiliaryLM, "_WASTE", 20)
        found = apart(ids)
        monkeypatch.undo()
        close(found, padded(ids))
        if score:
            close(apart.token_log_probs, padded.token_log_probs)
        ids = appended(ids.flip(0), 5 + step, 6, 7)
    assert fed[:3] == [(2, 10), (1, 40), (2, 1)]
    assert apart.stats.tokens == padded.stats.tokens and apart.stats.prefill_rows == padded.stats.prefill_rows


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_an_engine_asked_now_and_then_catches_up(name):
    model, (ids, rows) = tiny.DECODERS[name](), padded_prompts()
    engine, tracker = AuxiliaryLM(model), PromptTracker(tiny.PAD)
    close(engine(ids, step=tracker.observe(ids))[0], tiny.recomputed(model, rows))
    for step in range(1, 10):
        ids = appended(ids, 10 + step, 30 + step)
        place = tracker.observe(ids)
        rows = [[*rows[0], 10 + step], [*rows[1], 30 + step]]
        if step % 3 == 0:
            before = engine.stats.forwards
            close(engine(ids, step=place)[0], tiny.recomputed(model, rows))
            assert engine.stats.forwards - before == (3 if name in RECURRENT else 1)
    assert engine.stats.tokens == 4 + 6 + 2 * 9  # no token was fed twice
    assert engine.stats.prefill_rows == 2


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_tokens_are_taken_back(name):
    model, (ids, rows) = tiny.DECODERS[name](), padded_prompts()
    engine, tracker = AuxiliaryLM(model), PromptTracker(tiny.PAD)
    longer = appended(appended(appended(ids, 11, 12), 13, 14), 15, 16)
    for width in range(6, 10):
        engine(longer[:, :width], step=tracker.observe(longer[:, :width]))
    fed = engine.stats.tokens
    shorter = appended(longer[:, :7], 21, 22)
    found = engine(shorter, step=tracker.observe(shorter))
    close(found[0], tiny.recomputed(model, [[*rows[0], 11, 21], [*rows[1], 12, 22]]))
    assert engine.stats.tokens - fed == (6 + 8 if name in RECURRENT else 2)  # what cannot be taken back starts again
    assert engine.stats.prefill_rows == (4 if name in RECURRENT else 2)


def test_a_single_row_remembers_its_last_positions():
    model, ids = tiny.llama(), torch.tensor([[5, 6, 7, 8, 9, 10]])
    engine, tracker = AuxiliaryLM(model), PromptTracker(tiny.PAD)

    def ask(row: torch.Tensor) -> torch.Tensor:
        return engine(row, step=tracker.observe(row))[0]

    for width in range(3, 7):
        ask(ids[:, :width])
    forwards = engine.stats.forwards
    for width in (4, 5, 6):  # the draft is verified: nothing is read twice
        close(ask(ids[:, :width]), tiny.recomputed(model, [ids[0, :width].tolist()]))
    assert engine.stats.forwards == forwards


@pytest.mark.parametrize("rows", [1, 2])
def test_what_was_remembered_of_a_rejected_draft_is_forgotten(rows):
    model, tracker = tiny.llama(), PromptTracker(tiny.PAD)
    engine = AuxiliaryLM(model)
    draft = torch.tensor([[5, 6, 7, 8, 9, 10]] * rows)
    for width in range(3, 7):
        engine(draft[:, :width], step=tracker.observe(draft[:, :width]))
    taken = torch.tensor([[5, 6, 7, 20, 21, 22]] * rows)
    for width in (4, 5, 6):  # another continuation, asked for at its end only ...
        step = tracker.observe(taken[:, :width])
    engine(taken, step=step)
    for width in (5, 4):  # ... and then one token earlier, where the draft had been
        found = engine(taken[:, :width], step=tracker.observe(taken[:, :width]))
        close(found[0], tiny.recomputed(model, taken[:, :width].tolist()))


def test_a_longer_prompt_feeds_only_what_is_new():
    model, (ids, rows) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model)
    engine(ids)
    fed = engine.stats.tokens
    longer = appended(appended(appended(ids, 11, 12), 13, 14), 15, 16)
    close(engine(longer)[0], tiny.recomputed(model, [[*rows[0], 11, 13, 15], [*rows[1], 12, 14, 16]]))
    assert engine.stats.tokens - fed == 6
    assert engine.stats.prefill_rows == 2


def test_reset_forgets():
    model, (ids, rows) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model)
    engine(ids)
    engine.reset()
    close(engine(ids)[0], tiny.recomputed(model, rows))
    assert engine.stats.prefill_rows == 4


def test_a_bfloat16_model_is_read_in_float32():
    model, (ids, rows) = tiny.llama().to(torch.bfloat16), padded_prompts()
    engine = AuxiliaryLM(model)
    for tokens in ((), (11, 12), (13, 14)):
        ids = appended(ids, *tokens) if tokens else ids
        rows = [[*row, *tokens[r : r + 1]] for r, row in enumerate(rows)]
        found = engine(ids)[0]
        assert found.dtype == torch.float32
        close(found.logsumexp(-1), torch.zeros(2))  # a softmax in bfloat16 would be off by hundredths
        close(found, tiny.recomputed(model, rows), 0.15)


# --- a forward that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["prompt", "step", "beams", "catching up", "taking back"])
@pytest.mark.parametrize("name", ["llama", *RECURRENT])
def test_a_failed_forward_leaves_the_engine_right(name, when):
    model, (ids, rows) = tiny.DECODERS[name](), padded_prompts()
    engine, tracker = (
        AuxiliaryLM(model, [Context(), Context(fixed(OTHER))], score_tokens=True),
        PromptTracker(tiny.PAD),
    )
    if when != "prompt":
        first = appended(ids, 11, 12)
        engine(ids, step=tracker.observe(ids))
        engine(first, step=tracker.observe(first))
        ids = {
            "step": appended(first, 13, 14),
            "beams": appended(first[[1, 1]], 13, 14),
            "catching up": appended(appended(first, 13, 14), 15, 16),
            "taking back": appended(ids, 13, 14),
        }[when]
        if when == "catching up":
            tracker.observe(ids[:, :-1])
    step = tracker.observe(ids)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    hook = model.get_output_embeddings().register_forward_hook(interrupt)  # the cache has moved by then
    with pytest.raises(KeyboardInterrupt):
        engine(ids, step=step)
    hook.remove()
    found = engine(ids, step=step)
    new = ids[:, 6:].tolist()
    known = rows if when != "beams" else [rows[1], rows[1]]
    close(found[0], tiny.recomputed(model, [p + n for p, n in zip(known, new, strict=True)]))
    close(found[1], tiny.recomputed(model, [OTHER + n for n in new]))
    for r in range(2):
        close(engine.token_log_probs[0, r], right_aligned(scored(model, known[r] + new[r]), ids.shape[1]))


def test_nan_logits_are_refused_and_do_no_harm():
    model, (ids, rows) = tiny.llama(), padded_prompts()
    engine = AuxiliaryLM(model)
    engine(ids)
    weight = model.lm_head.weight
    saved = weight.detach().clone()
    weight.data[3] = torch.nan
    longer = appended(ids, 11, 12)
    with pytest.raises(ValueError, match="returned NaN logits"):
        engine(longer)
    weight.data.copy_(saved)
    close(engine(longer)[0], tiny.recomputed(model, [[*rows[0], 11], [*rows[1], 12]]))


# --- adapters --------------------------------------------------------------------------------------------------------------


# Raised inside of PEFT, which asks the transformers model by an old name whether it saves memory.
builds_peft_model = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def two_adapters(base=tiny.llama) -> PeftModel:
    """Two LoRA adapters that differ from the base and from each other."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base(), config, adapter_name="east")
    model.add_adapter("west", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3)
    return model.eval()


def separately(model: PeftModel, adapter: str, rows: list[list[int]]) -> torch.Tensor:
    active = model.active_adapter
    if adapter == BASE:
        with model.disable_adapter():
            return tiny.recomputed(model, rows)
    model.set_adapter(adapter)
    try:
        return tiny.recomputed(model, rows)
    finally:
        model.set_adapter(active)


@builds_peft_model
@pytest.mark.parametrize(
    "adapters", [(BASE, "east", "west"), ("west", None), (None, BASE), ("west",), (BASE,), (None,)]
)
def test_adapters_share_one_forward(adapters):
    model, (ids, rows) = two_adapters(), padded_prompts()
    # The two of a kind read different prompts, so that rows of one adapter differ too.
    engine = AuxiliaryLM(model, [Context(None if c != 1 else fixed(OTHER), name) for c, name in enumerate(adapters)])
    expected = {name: separately(model, name, rows) for name in (BASE, "east", "west")}
    assert (expected["east"] - expected["west"]).abs().max() > 0.1 < (expected["east"] - expected[BASE]).abs().max()
    generated: list[list[int]] = [[], []]
    for parents, tokens in (((0, 1), ()), ((0, 1), (11, 12)), ((1, 0), (13, 14)), ((0, 0), (15, 16))):
        order = list(parents)
        rows, generated = [rows[p] for p in order], [generated[p] for p in order]
        ids = appended(ids[order], *tokens) if tokens else ids
        generated = [[*row, *tokens[r : r + 1]] for r, row in enumerate(generated)]
        found = engine(ids)
        for c, name in enumerate(adapters):
            prompts = [OTHER, OTHER] if c == 1 else rows
            whole = [p + g for p, g in zip(prompts, generated, strict=True)]
            close(found[c], separately(model, name or "east", whole))
        assert model.active_adapter == "east"
        assert all(layer.active_adapters == ["east"] for layer in _lora_layers(model))
        assert not any(layer.disable_adapters for layer in _lora_layers(model))
    assert engine.stats.forwards == 4


def _lora_layers(model: PeftModel) -> list:
    return [module for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]


@builds_peft_model
def test_the_active_adapter_is_looked_up_at_every_call():
    model, (ids, rows) = two_adapters(), padded_prompts()
    engine = AuxiliaryLM(model)
    close(engine(ids)[0], separately(model, "east", rows))
    model.set_adapter("west")
    engine.reset()
    close(engine(ids)[0], separately(model, "west", rows))


@builds_peft_model
def test_prompt_tuning_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(ValueError, match="Prompt-learning adapters"):
        AuxiliaryLM(model)
    ids, rows = padded_prompts()
    with model.disable_adapter():
        expected = tiny.recomputed(model, rows)
    close(AuxiliaryLM(model, [Context(adapter=BASE)])(ids)[0], expected)  # the model below it is as good as any


@builds_peft_model
def test_adapters_that_are_not_there():
    with pytest.raises(ValueError, match=r"Unknown adapters \['north'\]; the model has \['east', 'west'\]"):
        AuxiliaryLM(two_adapters(), [Context(adapter="east"), Context(adapter="north")])
    with pytest.raises(ValueError, match="LlamaForCausalLM: pass a PeftModel"):
        AuxiliaryLM(tiny.llama(), [Context(adapter="east")])


# --- encoder-decoders --------------------------------------------------------------------------------------------------------


def encoder_inputs(*rows: list[int]) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}


@torch.no_grad()
def answered(model, sources: list[list[int]], rows: list[list[int]]) -> torch.Tensor:
    logits = [
        model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([row])).logits[0, -1]
        for source, row in zip(sources, rows, strict=True)
    ]
    return torch.stack(logits).log_softmax(-1)


def test_encoder_contexts_with_beams_and_rollback():
    model = tiny.t5()
    first, second = [[5, 6, 7, 8], [9, 10]], [[11, 12], [13, 14, 15, 16, 17]]
    engine = AuxiliaryLM(
        model,
        [Context(inputs=encoder_inputs(*first), items=2), Context(inputs=encoder_inputs(*second), items=2)],
    )
    start = torch.full((4, 1), tiny.PAD)  # two beams an item
    calls = [
        start,
        appended(start, 3, 4, 5, 6),
        appended(appended(start, 4, 4, 6, 5), 7, 8, 9, 10),
        appended(start, 3, 3, 6, 6),  # taken back
        start,
    ]
    for ids in calls:
        found = engine(ids)
        for c, sources in enumerate((first, second)):
            close(found[c], answered(model, [sources[r // 2] for r in range(4)], ids.tolist()))


def test_encoder_inputs_are_bound_batch_by_batch():
    model, own = tiny.t5(), [[11, 12]]
    engine = AuxiliaryLM(model, [Context(), Context(inputs=encoder_inputs(*own), items=1)])
    start = torch.full((2, 1), tiny.PAD)
    with pytest.raises(ValueError, match="needs its own encoder inputs"):
        engine(start)
    for sources in ([[5, 6, 7], [8, 9]], [[10], [11, 12, 13, 14]]):  # the decoder ids do not show the difference
        engine.bind(encoder_inputs(*sources))
        for ids in (start, appended(start, 3, 4)):
            found = engine(ids)
            close(found[0], answered(model, sources, ids.tolist()))
            close(found[1], answered(model, own * 2, ids.tolist()))


def test_encoder_inputs_where_they_make_no_sense():
    with pytest.raises(ValueError, match="has no encoder"):
        AuxiliaryLM(tiny.llama()).bind(encoder_inputs([5, 6]))
    engine = AuxiliaryLM(tiny.t5(), [Context(inputs=encoder_inputs([5], [6]), items=2)])
    with pytest.raises(ValueError, match="inputs for 2 items, but generation runs 3 rows"):
        engine(torch.full((3, 1), tiny.PAD))


# --- what cannot be right is refused -----------------------------------------------------------------------------------------


def test_ids_beyond_the_vocabulary():
    engine = AuxiliaryLM(tiny.llama())
    with pytest.raises(ValueError, match="Token id 64 is unknown to the auxiliary LlamaForCausalLM, which embeds 64"):
        engine(torch.tensor([[5, 64]]))
    engine(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="Token id 70 is unknown"):
        engine(torch.tensor([[5, 6, 70]]), vocab_size=100)
    close(engine(torch.tensor([[5, 6, 7]]))[0], tiny.recomputed(engine.model, [[5, 6, 7]]))


def test_prompts_longer_than_the_window():
    model = tiny.gpt2(n_positions=8)
    engine = AuxiliaryLM(model, [Context(lambda main, row, rows: CODE + main)])
    with pytest.raises(ValueError, match="auxiliary prompt has 9 tokens, but GPT2LMHeadModel holds 8"):
        engine(torch.arange(3, 9)[None])
    close(engine(torch.arange(3, 8)[None])[0], tiny.recomputed(model, [[*CODE, 3, 4, 5, 6, 7]]))


@pytest.mark.parametrize("jump", [1, 3])
def test_generation_beyond_learned_positions(jump):
    model, tracker = tiny.gpt2(n_positions=8), PromptTracker(tiny.PAD)
    engine = AuxiliaryLM(model)
    row = torch.arange(3, 20)[None]
    for width in range(6, 9):
        close(
            engine(row[:, :width], step=tracker.observe(row[:, :width]))[0],
            tiny.recomputed(model, [row[0, :width].tolist()]),
        )
    for width in range(9, 9 + jump):
        step = tracker.observe(row[:, :width])
    with pytest.raises(ValueError, match="has read 8 tokens and has no further positions"):
        engine(step.input_ids, step=step)


def test_generation_beyond_a_rotary_window_goes_on():
    model = tiny.llama(max_position_embeddings=8)
    engine, row = AuxiliaryLM(model), torch.arange(3, 20)[None]
    for width in range(6, 12):
        close(engine(row[:, :width])[0], tiny.recomputed(model, [row[0, :width].tolist()]))


def rwkv():
    config = RwkvConfig(vocab_size=tiny.VOCAB, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    return tiny.spread(RwkvForCausalLM(config), 0)


def xlnet():
    return tiny.spread(
        XLNetLMHeadModel(XLNetConfig(vocab_size=tiny.VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64)), 0
    )


@pytest.mark.parametrize("build", [rwkv, xlnet])
def test_models_without_a_cache_object(build):
    with pytest.raises(ValueError, match="does not keep its state in a transformers `Cache`"):
        AuxiliaryLM(build())(torch.tensor([[9, 6, 7]]))


def test_no_contexts():
    with pytest.raises(ValueError, match="at least one Context"):
        AuxiliaryLM(tiny.llama(), [])


class Asking(LogitsProcessor):
    """Asks an engine and leaves the scores alone."""

    def __init__(self, engine: AuxiliaryLM):
        self.engine = engine
        self.calls: list[tuple[list[list[int]], torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), self.engine(input_ids)[0]))
        return scores


def test_generation_from_embeddings_alone():
    model, ids = tiny.llama(), tiny.prompts(2, padded=False)[0]
    embeddings = model.get_input_embeddings()(ids).detach()
    settings = {"inputs_embeds": embeddings, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
        model.generate(**settings, logits_processor=[Asking(AuxiliaryLM(model))])
    asking = Asking(AuxiliaryLM(model, [Context(fixed(OTHER))]))
    model.generate(**settings, num_beams=2, logits_processor=[asking])
    assert [len(rows[0]) for rows, _ in asking.calls] == [0, 1, 2, 3]
    for rows, found in asking.calls:
        close(found, tiny.recomputed(model, [OTHER + row for row in rows]))


# --- the model itself changes, or is one that needs care -------------------------------------------------------------------


def roberta(seed: int = 0) -> RobertaForCausalLM:
    """Counts positions from behind the embedding of its padding."""
    config = RobertaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        is_decoder=True,
    )
    return tiny.spread(RobertaForCausalLM(config), seed)


def bart(seed: int = 0) -> BartForCausalLM:
    """Counts positions without regard to the attention mask."""
    config = BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=tiny.PAD,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    return tiny.spread(BartForCausalLM(config), seed)


def test_positions_that_begin_behind_the_padding():
    model, ids = roberta(), torch.tensor([[1, 1, 7, 8, 9], [4, 5, 6, 7, 8]])
    engine = AuxiliaryLM(model, pad_token_id=1)
    for rows in ([[7, 8, 9], [4, 5, 6, 7, 8]], [[7, 8, 9, 5], [4, 5, 6, 7, 8, 6]]):
        torch.testing.assert_close(engine(ids)[0], tiny.recomputed(model, rows), atol=1e-5, rtol=0)
        ids = torch.cat([ids, torch.tensor([[5], [6]])], dim=1)


def test_a_model_that_cannot_be_padded_is_refused_only_where_it_would_be():
    model, ids = bart(), torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    torch.testing.assert_close(AuxiliaryLM(model)(ids)[0], tiny.recomputed(model, ids.tolist()), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot read prompts of unequal length.*one prompt at a time"):
        AuxiliaryLM(model, [Context(), Context(lambda main, row, rows: [5, 6])])(ids)


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_a_model_that_has_changed_is_read_anew(change):
    model, ids = tiny.llama(), torch.tensor([[4, 5, 6, 7]])
    engine = AuxiliaryLM(model)
    engine(ids)
    with torch.no_grad():
        if change == "weights":
            model.model.layers[0].mlp.up_proj.weight.mul_(-1)  # as an optimizer does it
        else:
            model.to(torch.float64)
    torch.testing.assert_close(engine(ids)[0], tiny.recomputed(model, ids.tolist()), atol=1e-5, rtol=0)


def test_a_model_in_training_is_read_in_eval_mode_and_left_in_training():
    judge = tiny.gpt2()
    model = tiny.gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(AuxiliaryLM(model)(ids)[0], tiny.recomputed(judge, ids.tolist()), atol=1e-5, rtol=0)
    assert [module.training for module in model.modules()] == modes


def test_what_is_returned_belongs_to_the_caller():
    engine, ids = AuxiliaryLM(tiny.llama()), torch.tensor([[4, 5, 6, 7]])
    first = engine(ids)
    kept = first.clone()
    first.fill_(0.0)
    assert torch.equal(engine(ids), kept)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in get_peft_model
def test_adapters_that_peft_cannot_mix_are_kept_apart():
    """LoHa layers take no adapter names and would silently give the tuned model for the base."""
    model = get_peft_model(
        tiny.llama(), LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    ).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    with pytest.raises(ValueError, match="Only plain LoRA.*Build one AuxiliaryLM"):
        AuxiliaryLM(model, [Context(adapter=BASE), Context()])
    with model.disable_adapter():
        base = tiny.recomputed(model, ids.tolist())
    tuned = tiny.recomputed(model, ids.tolist())
    assert (base - tuned).abs().max() > 0.05
    processor = SteerLogitsProcessor(model=model, negatives=[9, 10])
    scores = torch.zeros(1, tiny.VOCAB)
    processor(ids, scores)
    step = processor.tracker.observe(ids)
    torch.testing.assert_close(processor.auxiliary_log_probs(step, tiny.VOCAB)[0], base, atol=1e-5, rtol=0)
