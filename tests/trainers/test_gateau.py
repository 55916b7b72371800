"""GATEAU: its numbers by hand, batches and cached attention against one sample at a time with everything written out."""

import math

import jaxtyping
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cosine_similarity

import tiny
from hf_logits.sequences import batches_of_like_size
from hf_logits.trainers.gateau import (
    cam_scores,
    combined_scores,
    contextual_awareness,
    hmg_scores,
    response_nll,
    segment_attention,
    select_top,
    tokenized,
)
from oracles import word_tokenizer
from preferences import LORA


SHORT, LONG = ((torch.tensor(values, dtype=torch.float64)).log() for values in ((20, 5, 12), (8, 4, 11)))
ATTENTION = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
SEGMENTS = torch.tensor([30, 4, 9], dtype=torch.float64).log()
TEMPLATE = "w10 w11 {context} w12 {instruction} w13 "


def words(first: int, number: int, step: int = 7) -> str:
    return " ".join(f"w{4 + (first + step * index) % 60}" for index in range(number))


def samples(rows: int = 5, context: int = 20, seed: int = 0) -> Dataset:
    """Of unequal lengths."""
    return Dataset.from_list(
        [
            {
                "context": words(seed + 3 * row, context + 3 * row),
                "instruction": words(row, 2 + row % 2, 5),
                "response": words(11 * row + seed, 3 + row % 4, 3),
            }
            for row in range(rows)
        ]
    )


@torch.no_grad()
def one_at_a_time(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """The slow obvious path: every sample alone, all logits."""
    found = []
    for prompt, response in rows:
        log_probs = model(torch.tensor([[*prompt, *response]])).logits[0, :-1].log_softmax(-1)
        found.append(-log_probs[range(len(prompt) - 1, len(prompt) + len(response) - 1), response].mean())
    return torch.stack(found)


@torch.no_grad()
def all_attention(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """The slow obvious path: all of `[T, T]` in every layer; mean attention of the response on each token."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    layers = model(torch.tensor([[*prompt, *response]]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(
        [layer[0, :, len(prompt) :].double().mean((0, 1)) for layer in layers if layer is not None]
    ).mean(0)


# --- the numbers ---------------------------------------------------------------------------------------------------------


def test_hmg_by_hand():
    difference = hmg_scores(SHORT, LONG)
    assert torch.equal(hmg_scores(SHORT.tolist(), LONG.tolist()), difference)
    assert difference.tolist() == pytest.approx([0.428571, 0.0, -0.533333], abs=1e-6)
    assert difference.softmax(0).tolist() == pytest.approx([0.491738, 0.320337, 0.187925], abs=1e-6)


def test_awareness_by_hand():
    found = [contextual_awareness(ATTENTION, SEGMENTS, importance=kind).item() for kind in ("softmax", "inverse")]
    assert found == pytest.approx([0.887612, 0.998630], abs=1e-6)


def test_identical_models_give_zero():
    assert hmg_scores(SHORT, SHORT).tolist() == [0.0, 0.0, 0.0]
    same = response_nll(tiny.llama(), samples(), word_tokenizer(), template=TEMPLATE)
    scores = hmg_scores(same, same)
    assert scores.tolist() == [0.0] * 5
    assert scores.softmax(0).tolist() == pytest.approx([0.2] * 5)


def test_a_model_that_finds_all_alike_adds_nothing():
    constant = torch.full((3,), 1.5)
    assert hmg_scores(SHORT, constant).tolist() == pytest.approx([1.0, 0.0, 7 / 15])
    assert hmg_scores(constant, constant).tolist() == [0.0, 0.0, 0.0]


def test_one_model_on_another_scale_of_perplexity_keeps_the_scores():
    scaled = (3 * LONG.exp() + 2).log()
    torch.testing.assert_close(hmg_scores(SHORT, scaled), hmg_scores(SHORT, LONG))


def test_what_has_no_score_does_not_move_the_others():
    missing = torch.tensor([math.nan])
    found = hmg_scores(torch.cat([SHORT, torch.tensor([9.0]), missing]), torch.cat([LONG, missing, missing]))
    assert found[3:].isnan().all() and torch.equal(found[:3], hmg_scores(SHORT, LONG))
    assert hmg_scores(missing, missing).isnan().all()


@pytest.mark.parametrize("importance", ["softmax", "inverse"])
def test_uniform_attention_tells_how_concentrated_the_importance_is(importance):
    ppl = SEGMENTS.exp()
    weight = (-ppl).softmax(0) if importance == "softmax" else 1 / ppl
    found = contextual_awareness(torch.full((3,), 0.2), SEGMENTS, importance=importance)
    torch.testing.assert_close(found, weight.sum() / (3**0.5 * weight.norm()))


@pytest.mark.parametrize("attention", [[1.0], [0.0, 0.0, 0.0]])
def test_without_a_choice_there_is_no_awareness(attention):
    nll = torch.ones(len(attention))
    assert contextual_awareness(torch.tensor(attention), nll, importance="softmax").isnan()


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_the_published_combination_ignores_hmg_and_ours_does_not():
    """10,000 samples, of which 1,000 are kept."""
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.rand(10_000, generator=generator, dtype=torch.float64) for _ in range(2))
    cam = 0.3 + 0.3 * torch.rand(10_000, generator=generator, dtype=torch.float64)
    hmg = short - long
    alone = set(cam.argsort(descending=True)[:1000].tolist())

    def shared(combine: str) -> int:
        scores = combined_scores(hmg, cam, hmg_weight=0.8, combine=combine)
        return len(alone & set(scores.argsort(descending=True)[:1000].tolist()))

    assert (0.8 * hmg.softmax(0)).std() < 5e-5 and (0.2 * cam).std() > 1.6e-2
    assert shared("official") >= 990
    assert shared("rank") < 300 and shared("zscore") < 300


def test_ranks_by_hand():
    hmg, cam = torch.tensor([0.3, -1.0, 0.3, 7.0]), torch.tensor([0.1, 0.9, 0.5, 0.2])
    found = combined_scores(hmg, cam, hmg_weight=0.75, combine="rank")
    assert found.tolist() == pytest.approx([2.125 / 4, 1.75 / 4, 2.625 / 4, 3.5 / 4])


def test_z_scores_by_hand():
    found = combined_scores(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0]), hmg_weight=0.5, combine="zscore")
    assert found.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("weight, order", [(1.0, [2, 1]), (0.0, [4, 0])])
@pytest.mark.parametrize("combine", ["rank", "zscore", "official"])
def test_the_best_come_first_with_their_scores(combine, weight, order, caplog):
    hmg, cam = [0.0, 1.0, 2.0, -1.0, -2.0, 9.0], [0.8, 0.1, 0.2, 0.3, 0.9, math.nan]
    chosen = select_top(samples(6), hmg, cam, keep_fraction=0.4, hmg_weight=weight, combine=combine)
    assert chosen["context"] == [samples(6)["context"][index] for index in order]
    assert chosen["hmg"] == [hmg[index] for index in order] and chosen["cam"] == [cam[index] for index in order]
    assert chosen["gateau_score"] == sorted(chosen["gateau_score"], reverse=True)


def test_dropped_samples_are_counted(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.trainers.gateau.logger.warning", seen.append)
    select_top(samples(3), [1.0, math.nan, 2.0], [1.0, 2.0, math.nan], keep_fraction=1.0)
    assert seen == ["2 of 3 samples have no score and are dropped."]


def test_a_second_choice_has_its_own_scores():
    first = select_top(samples(4), [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], keep_fraction=1.0)
    again = select_top(first, [9.0, 8.0, 7.0, 6.0], [0.4, 0.3, 0.2, 0.1], keep_fraction=0.5)
    assert again["context"] == first["context"][:2] and again["hmg"] == [9.0, 8.0] and again["cam"] == [0.4, 0.3]
    assert again["gateau_score"] == pytest.approx([1.0, 0.75])
    assert again.column_names == first.column_names


def test_what_are_no_scores():
    # these checks come before our own errors, and users do not have them
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(
            TypeError, match=r"long_nll must be numbers, NaN where a sample has none; got \[1.0, None\]"
        ):
            hmg_scores([1.0, 2.0], [1.0, None])
        with pytest.raises(TypeError, match="cam must be numbers, NaN where a sample has none; got 'high'"):
            select_top(samples(1), [1.0], "high", keep_fraction=1.0)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hmg": [1.0]}, "hmg has 1 values and cam 3: score the same samples"),
        ({"hmg": [1.0] * 2, "cam": [1.0] * 2}, "2 scores for 3 samples: score the dataset"),
        ({"hmg": [math.inf, 2.0, 3.0]}, "hmg is infinite for 1 samples: give finite scores, and NaN"),
        ({"cam": [-math.inf, math.inf, math.nan]}, "cam is infinite for 2 samples"),
        ({"keep_fraction": 0.0}, "keep_fraction must be in"),
        ({"keep_fraction": 0.1}, "keep_fraction=0.1 of 3 scored samples is none: raise it"),
        ({"hmg_weight": 1.5}, "hmg_weight must be in"),
        ({"combine": "sum"}, "combine must be 'rank', 'zscore' or 'official'"),
    ],
)
def test_a_choice_that_cannot_be_made(arguments, message):
    given = {"hmg": [1.0, 2.0, 3.0], "cam": [1.0, 2.0, 3.0], "keep_fraction": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        select_top(samples(3), **given)


# --- surprise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", tiny.DECODERS.values(), ids=tiny.DECODERS)
def test_batches_have_the_surprise_of_one_at_a_time(build):
    model, data = build(), samples()
    rows = [(sample.prompt, sample.response) for sample in tokenized(data, word_tokenizer(), TEMPLATE)]
    expected = one_at_a_time(model, rows)
    for budget, chunk in ((1, 1), (70, 3), (4096, 256)):
        found = response_nll(
            model, data, word_tokenizer(), template=TEMPLATE, tokens_per_batch=budget, chunk_size=chunk
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_parts_stand_where_the_template_says():
    tokenizer = word_tokenizer(bos=True)
    row = {"context": "w20 w21", "instruction": "w30", "response": "w40 w41"}
    (sample,) = tokenized(Dataset.from_list([row]), tokenizer, "w10 {instruction} w11 {context} w12")
    assert sample.prompt == [1, 10, 30, 11, 20, 21, 12] and sample.context == [20, 21] and sample.response == [40, 41]
    (chat,) = tokenized(Dataset.from_list([row]), tokenizer, "<bos> w10 {context} {instruction} w11")
    assert chat.prompt == [1, 10, 20, 21, 30, 11]  # and not two of the first token


def test_an_end_token_of_the_tokenizer_does_not_stand_in_front_of_the_context():
    tokenizer = word_tokenizer(bos=True)
    special = [("<bos>", 1), ("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    data = Dataset.from_list([{"context": "w20 w21", "instruction": "w30", "response": "w40 w41"}])
    assert tokenizer("w20")["input_ids"] == [1, 20, 2]
    for template, head in (("w10 {context} {instruction}", [1, 10]), ("{context} {instruction}", [1])):
        (sample,) = tokenized(data, tokenizer, template)
        assert sample.head == head and sample.prompt == [*head, 20, 21, 30]
    (own,) = tokenized(data, tokenizer, "w10 <eos> {context} {instruction}")
    assert own.head == [1, 10, 2]
    # a first token that is the end token too is no end
    first = [("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=first)
    (sample,) = tokenized(data, tokenizer, "{context} {instruction}")
    assert sample.head == [2]


def test_braces_in_a_text_are_text():
    row = {"context": "{instruction} {x}", "instruction": "w30 {context}", "response": "w40"}
    (sample,) = tokenized(Dataset.from_list([row]), word_tokenizer(), TEMPLATE)
    assert sample.context == [3, 3] and sample.tail == [12, 30, 3, 13]  # the unknown token


def test_a_head_that_does_not_run_alone_gives_the_same(monkeypatch):
    data, tokenizer = samples(), word_tokenizer()
    expected = response_nll(tiny.llama(), data, tokenizer, template=TEMPLATE)
    monkeypatch.setattr("hf_logits.fused_head.Head.fails", lambda *_: "for a test")
    torch.testing.assert_close(response_nll(tiny.llama(), data, tokenizer, template=TEMPLATE), expected)


def test_no_logits_of_all_tokens_exist():
    model = tiny.llama()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:-1].numel()))
    response_nll(model, samples(), word_tokenizer(), template=TEMPLATE, tokens_per_batch=4096, chunk_size=4)
    # the trial reads eight tokens; a forward forms the logits of its rows' first tokens
    assert max(seen) <= 8


def test_adapters_count_and_the_mode_is_kept():
    data, tokenizer = samples(2), word_tokenizer()
    plain = response_nll(tiny.llama(), data, tokenizer, template=TEMPLATE)
    fresh = get_peft_model(tiny.llama(), LoraConfig(**LORA)).train()
    assert torch.equal(response_nll(fresh, data, tokenizer, template=TEMPLATE), plain)
    assert fresh.training
    torch.manual_seed(0)
    other = get_peft_model(tiny.llama(), LoraConfig(init_lora_weights=False, **LORA))
    assert not torch.allclose(response_nll(other, data, tokenizer, template=TEMPLATE), plain)


def test_what_is_too_long_is_skipped_and_counted_cut_or_refused(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.trainers.gateau.logger.warning", seen.append)
    model, data, tokenizer = tiny.llama(), samples(4), word_tokenizer()
    parts = tokenized(data, tokenizer, TEMPLATE)
    limit = len(parts[1].prompt) + len(parts[1].response)
    plain = response_nll(model, data, tokenizer, template=TEMPLATE)
    skipped = response_nll(model, data, tokenizer, template=TEMPLATE, max_length=limit)
    assert skipped.isnan().tolist() == [False, False, True, True] and torch.equal(skipped[:2], plain[:2])
    assert (
        len(seen) == 1
        and f"2 of 4 samples have no score (NaN): they have no response, or more than {limit}" in seen[0]
    )
    cut = response_nll(model, data, tokenizer, template=TEMPLATE, max_length=limit, too_long="truncate")
    rows = []
    for sample in parts[2:]:
        excess = len(sample.prompt) + len(sample.response) - limit
        rows.append(([*sample.head, *sample.context[excess:], *sample.tail], sample.response))
    torch.testing.assert_close(cut, torch.cat([plain[:2], one_at_a_time(model, rows)]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"Sample 2 has {limit + 3} tokens, more than {limit}: pass max_length="):
        response_nll(model, data, tokenizer, template=TEMPLATE, max_length=limit, too_long="raise")
    # less than head, tail and response
    assert response_nll(model, data, tokenizer, max_length=5, too_long="truncate").isnan().all()


def test_the_window_of_the_model_is_the_limit_unless_it_may_be_stretched():
    data, tokenizer = samples(1, context=40), word_tokenizer()
    rotary, learned = tiny.llama(max_position_embeddings=32), tiny.gpt2(n_positions=32)
    for model in (rotary, learned):
        assert response_nll(model, data, tokenizer, template=TEMPLATE).isnan().all()
    assert response_nll(rotary, data, tokenizer, template=TEMPLATE, max_length=64).isfinite().all()
    with pytest.raises(ValueError, match="max_length=64, but GPT2LMHeadModel has 32 positions"):
        response_nll(learned, data, tokenizer, template=TEMPLATE, max_length=64)


def test_a_sample_without_a_response_has_no_score():
    data = samples(2).map(lambda row, index: {"response": row["response"] if index else ""}, with_indices=True)
    assert response_nll(tiny.llama(), data, word_tokenizer(), template=TEMPLATE).isnan().tolist() == [True, False]


def test_infinite_surprise_is_refused():
    with pytest.raises(ValueError, match="long_nll gives an infinite perplexity: it must be in nats per token"):
        hmg_scores(SHORT, torch.tensor([1.0, 800.0, 1.0]))
    with pytest.raises(ValueError, match="short_nll has 3 values and long_nll 2"):
        hmg_scores(SHORT, LONG[:2])


@pytest.mark.parametrize("score", [response_nll, cam_scores])
def test_what_cannot_be_read(score):
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="no column 'context'"):
        score(tiny.llama(), Dataset.from_list([{"instruction": "w5", "response": "w5"}]), tokenizer)
    with pytest.raises(ValueError, match="has no rows"):
        score(tiny.llama(), samples(1).select([]), tokenizer)
    with pytest.raises(TypeError, match="Column 'response' must hold text; got int"):
        score(tiny.llama(), samples(1).remove_columns("response").add_column("response", [3]), tokenizer)
    with pytest.raises(ValueError, match="template must have {context} and {instruction} once each"):
        score(tiny.llama(), samples(1), tokenizer, template="{context} and {context}")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        score(tiny.t5(), samples(1), tokenizer)
    virtual = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens of prompt learning"):
        score(virtual, samples(1), tokenizer)
    with pytest.raises(ValueError, match="too_long must be 'skip', 'truncate' or 'raise'"):
        score(tiny.llama(), samples(1), tokenizer, too_long="cut")
    with pytest.raises(ValueError, match="tokens_per_batch must be a whole number of at least 1"):
        score(tiny.llama(), samples(1, 300), tokenizer, tokens_per_batch=0)


def test_batches_stay_within_their_budget():
    sizes = [3, 50, 7, 7, 6, 1, 9]
    batches = list(batches_of_like_size(sizes, 18))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches == [[1], [6, 2], [3, 4], [0, 5]]
    assert list(batches_of_like_size([], 5)) == []


# --- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_cached_attention_is_that_of_all_tokens_at_once(name, rows):
    model = tiny.DECODERS[name]()
    (sample,) = tokenized(samples(1, context=40), word_tokenizer(), TEMPLATE)
    prompt, response = sample.prompt, [5, 9, 17, 40]
    spans = [(2, 12), (12, 30), (30, 42)]
    found = segment_attention(model, prompt, response, spans, rows_at_a_time=rows)
    everything = all_attention(model, prompt, response)
    expected = torch.stack([everything[start:end].mean() for start, end in spans])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    if name == "mistral":  # the window is shorter than what stands between
        assert found[0] == 0.0


def test_sinks_can_be_left_out():
    model = tiny.llama()
    prompt, response = list(range(4, 34)), [5, 9]
    spans = [(0, 10), (10, 20), (20, 30)]
    plain = segment_attention(model, prompt, response, spans)
    found = segment_attention(model, prompt, response, spans, sink_tokens=4)
    everything = all_attention(model, prompt, response)
    torch.testing.assert_close(found[0], everything[4:10].mean(), rtol=1e-4, atol=1e-7)
    assert torch.equal(found[1:], plain[1:]) and found[0] != plain[0]
    assert segment_attention(model, prompt, response, spans, sink_tokens=10)[0] == 0.0


def test_no_attention_of_the_prompt_is_written_out():
    """Nothing that the pass makes has as many entries as the square of the prompt, and the model is left as it was."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    self.size = max(self.size, value.numel())
            return result

    model = tiny.llama(max_position_embeddings=1024)
    prompt = [4 + index % 60 for index in range(600)]
    with Largest() as ours:
        segment_attention(model, prompt, [5, 6, 7], [(0, 300), (300, 600)])
    with Largest() as theirs:
        all_attention(model, prompt, [5, 6, 7])
    assert ours.size < 600**2 < theirs.size
    assert model.config._attn_implementation == "sdpa"


def test_the_implementation_comes_back_after_an_error():
    model = tiny.llama()
    model.model.layers[1].register_forward_hook(
        lambda *_: 1 / 0 if model.config._attn_implementation == "eager" else None
    )
    with pytest.raises(ZeroDivisionError):
        cam_scores(model, samples(1), word_tokenizer(), template=TEMPLATE, segment_length=8)
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_awareness_of_samples_is_that_of_their_parts():
    model, data, tokenizer = tiny.llama(), samples(3), word_tokenizer()
    found = cam_scores(model, data, tokenizer, template=TEMPLATE, segment_length=8, rows_at_a_time=2)
    for score, sample in zip(found, tokenized(data, tokenizer, TEMPLATE), strict=True):
        pieces = [sample.context[start : start + 8] for start in range(0, len(sample.context), 8)]
        assert len(pieces) > 2 and len(pieces[-1]) < 8
        everything = all_attention(model, sample.prompt, sample.response)[len(sample.head) :]
        attention = torch.stack([part.mean() for part in everything[: len(sample.context)].split(8)])
        alone = one_at_a_time(model, [([*sample.head, *p, *sample.tail], sample.response) for p in pieces])
        expected = cosine_similarity(attention, (-alone.double().exp()).softmax(0), dim=0)
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)


def test_single_segments_have_no_score_and_are_counted(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.trainers.gateau.logger.warning", seen.append)
    found = cam_scores(tiny.llama(), samples(3), word_tokenizer(), template=TEMPLATE, segment_length=23)
    assert found.isnan().tolist() == [True, True, False]
    assert seen == ["2 of 3 contexts are one segment of 23 tokens and have no score (NaN)."]


@pytest.mark.parametrize("build", [tiny.mamba, tiny.bamba])
def test_models_with_a_recurrent_state_are_refused(build):
    with pytest.raises(ValueError, match=f"{type(build()).__name__} has layers without attention"):
        cam_scores(build(), samples(1), word_tokenizer(), template=TEMPLATE, segment_length=8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"segment_length": 0}, "segment_length must be a whole number"),
        ({"rows_at_a_time": 0}, "rows_at_a_time must be a whole number"),
        ({"sink_tokens": -1}, "sink_tokens must be a whole number"),
        ({"importance": "rank"}, "importance must be 'softmax' or 'inverse'"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        cam_scores(tiny.llama(), samples(1), word_tokenizer(), template=TEMPLATE, **arguments)
