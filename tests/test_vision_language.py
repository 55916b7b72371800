"""Contrast between two questions about images, on tiny random vision-language models.

The judge is a copy of the model that reads prompt, images and generated tokens from scratch, one row at a time, without
cache or padding. A copy, because these models keep the position offset of the last prompt as module state.
"""

import copy

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import tiny
from hf_logits.auxiliary import AuxiliaryLM
from hf_logits.processors import LQCDLogitsProcessor


VIDEO, START, END, IMAGE = 60, 61, 62, 63
TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
BANNED = (IMAGE, VIDEO)
"""A random model would also write images, and the judge could not show it any."""
SMALL, WIDE, TALL = (1, 4, 4), (1, 4, 8), (1, 8, 4)  # patches; four of them are one token
FIRST, SECOND = (SMALL, [5, 9]), (WIDE, [7, 8, 11, 4])
"""What the two items of a batch show and ask. Their position offsets differ, -2 and -4, and so do their lengths."""


def rope(**more) -> dict:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], **more}


def qwen2_5() -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope()},
        vision_config={**VISION, "window_size": 8, "fullatt_block_indexes": [1]},
        **TOKENS,
    )
    return tiny.spread(Qwen2_5_VLForConditionalGeneration(config), 0)


def qwen3() -> PreTrainedModel:
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope(mrope_interleaved=True)},
        vision_config={**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **TOKENS,
    )
    return tiny.spread(Qwen3VLForConditionalGeneration(config), 0)


MODELS = {"qwen2.5": qwen2_5, "qwen3": qwen3}


def question(items: list[tuple[tuple[int, int, int], list[int]]], seed: int = 0, side: str = "left") -> dict:
    """What a multimodal processor returns: images, their sizes, and padded prompts that hold their tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[START, *[IMAGE] * (grid[1] * grid[2] // 4), END, *text] for grid, text in items]
    width = max(len(row) for row in rows)
    pads = [[tiny.PAD] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)])
    patches = sum(grid[1] * grid[2] for grid, _ in items)
    return {
        "input_ids": ids,
        "attention_mask": (ids != tiny.PAD).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([grid for grid, _ in items]),
    }


def item_of(inputs: dict, index: int) -> dict:
    """One item of a batch, without its padding."""
    grids = inputs["image_grid_thw"]
    sizes = grids.prod(-1).tolist()
    seen = inputs["attention_mask"][index].bool()
    return {
        "input_ids": inputs["input_ids"][index : index + 1, seen],
        "mm_token_type_ids": inputs["mm_token_type_ids"][index : index + 1, seen],
        "pixel_values": inputs["pixel_values"].split(sizes)[index],
        "image_grid_thw": grids[index : index + 1],
    }


@torch.no_grad()
def judged(judge: PreTrainedModel, inputs: dict, generated: torch.Tensor, *banned: int) -> torch.Tensor:
    """Next-token log-probabilities behind each row of `generated`, from scratch; rows are spread over the items."""
    items, logits = len(inputs["input_ids"]), []
    for row, tokens in enumerate(generated):
        item = item_of(inputs, row // (len(generated) // items))
        for name, more in (("input_ids", tokens), ("mm_token_type_ids", torch.zeros_like(tokens).int())):
            item[name] = torch.cat([item[name], more[None]], dim=1)
        logits.append(judge(**item, use_cache=False).logits[0, -1].float())
    scores = torch.stack(logits)
    scores[:, list(banned)] = -torch.inf
    return scores.log_softmax(-1)


class Recorder(LogitsProcessor):
    """Calls another processor and keeps what went in and came out."""

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        out = self.processor(input_ids, scores)
        self.calls.append((input_ids, scores, out))
        return out


def contrasted(neutral: torch.Tensor, leading: torch.Tensor, contrast: float, plausibility: float) -> torch.Tensor:
    scores = (1 + contrast) * neutral - contrast * leading
    kept = neutral.exp() >= plausibility * neutral.exp().amax(-1, keepdim=True)
    return torch.where(kept, scores, -torch.inf).log_softmax(-1)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    # log-probabilities beyond 4, times 1 + contrast: other batches round the sixth digit otherwise
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=5e-6)


def check_generation(model, inputs, other, *, side="left", steps=6, **settings) -> LQCDLogitsProcessor:
    """Generate under contrast, and hold every call against the judge."""
    judge, width = copy.deepcopy(model), inputs["input_ids"].shape[1]
    processor = LQCDLogitsProcessor(model, other, contrast=0.8, plausibility=0.02)
    recorder = Recorder(processor)
    model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=list(BANNED),
        logits_processor=[recorder],
        **settings,
    )
    assert len(recorder.calls) == steps
    for input_ids, scores, out in recorder.calls:
        generated = input_ids[:, width:]
        neutral = judged(judge, inputs, generated, *BANNED)
        same(scores.log_softmax(-1), neutral)
        same(out, contrasted(neutral, judged(judge, other, generated), 0.8, 0.02))
    assert processor.stats.forwards == steps
    return processor


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("items", [[FIRST], [FIRST, SECOND]], ids=["one", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_contrast_equals_recomputation(name, items, beams):
    other = question([(grid, [12, 13, 14, *text]) for grid, text in items])
    processor = check_generation(MODELS[name](), question(items), other, num_beams=beams)
    assert processor.stats.prefill_rows == len(items)  # images are read once, whatever the number of beams


@pytest.mark.parametrize("side", ["left", "right"])
def test_other_images_of_other_sizes(side):
    # Other images have other offsets, and a prompt that is shorter for one item and longer for the other.
    other = question([(TALL, [12]), (SMALL, [13, 14])], seed=1, side=side)
    check_generation(qwen2_5(), question([FIRST, SECOND]), other, num_beams=2)


def test_returned_sequences_and_a_second_generation():
    model = qwen2_5()
    judge, inputs, other = copy.deepcopy(model), question([FIRST, SECOND]), question([(TALL, [12]), (SMALL, [13, 14])])
    recorder = Recorder(LQCDLogitsProcessor(model, other, contrast=0.5, plausibility=0.0))
    for returned in (2, 1):
        recorder.calls.clear()
        torch.manual_seed(0)
        model.generate(
            **inputs,
            do_sample=True,
            num_return_sequences=returned,
            max_new_tokens=4,
            suppress_tokens=list(BANNED),
            logits_processor=[recorder],
        )
        for input_ids, _, out in recorder.calls:
            generated = input_ids[:, inputs["input_ids"].shape[1] :]
            assert len(generated) == 2 * returned
            same(out, contrasted(judged(judge, inputs, generated, *BANNED), judged(judge, other, generated), 0.5, 0.0))


def test_a_prompt_that_ends_with_its_image():
    """Its last token cannot be read once more without the image, as that of a text could."""
    model, inputs, other = qwen2_5(), question([FIRST, SECOND]), question([(SMALL, []), (SMALL, [])], seed=1)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        other[name] = other[name][:, :-1]
    judge, engine = copy.deepcopy(model), LQCDLogitsProcessor(model, other).engines[0]
    for tokens in ([], [5], [5, 6], []):  # and a second generation begins
        generated = torch.tensor([tokens] * 2, dtype=torch.long)
        found = engine(torch.cat([inputs["input_ids"], generated], dim=1))
        same(found[0], judged(judge, other, generated))


@pytest.mark.parametrize("name", MODELS)
def test_rope_deltas_of_the_main_prompt_survive(name):
    model, inputs = MODELS[name](), question([FIRST])
    plain = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    offset = model.model.rope_deltas.clone()
    other = question([(WIDE, [12, 13])], seed=1)
    # A contrast too small to change a token: the auxiliary prefill runs all the same.
    processor = LQCDLogitsProcessor(model, other, contrast=1e-9, plausibility=0.0)
    steered = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[processor],
    )
    assert processor.stats.forwards == 5
    assert torch.equal(model.model.rope_deltas, offset)
    assert torch.equal(steered.sequences, plain.sequences)
    for ours, theirs in zip(steered.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    # The other question has another offset, so the test above can fail.
    model.generate(**other, max_new_tokens=1, do_sample=False)
    assert not torch.equal(model.model.rope_deltas, offset)


def test_zero_contrast_is_the_plain_model():
    model, inputs = qwen2_5(), question([FIRST, SECOND])
    processor = LQCDLogitsProcessor(model, question([FIRST, SECOND], seed=1), contrast=0.0, plausibility=0.0)
    plain = model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False)
    steered = model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False, logits_processor=[processor])
    assert torch.equal(plain, steered)
    assert processor.stats.forwards == 0


def test_tokens_without_types_are_read_as_text():
    """As `generate` itself reads them, whatever offset an earlier prompt has left on the model."""
    model = qwen2_5()
    untyped = question([(TALL, [12]), (SMALL, [13, 14])], seed=1)
    del untyped["mm_token_type_ids"]
    plain = model.generate(
        **untyped, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    inputs = question([FIRST, SECOND])
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    engine = LQCDLogitsProcessor(model, untyped).engines[0]
    for step, logits in enumerate(plain.logits):
        generated = plain.sequences[:, untyped["input_ids"].shape[1] :][:, :step]
        same(engine(torch.cat([inputs["input_ids"], generated], dim=1))[0], logits.log_softmax(-1))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_an_image_is_encoded_once_for_both_questions(name, beams):
    model = MODELS[name]()
    items, leading = [FIRST, SECOND], [(FIRST[0], [12, 13]), (SECOND[0], [14])]
    inputs, other = question(items), question(leading)
    judge, encoded = copy.deepcopy(model), []
    model.model.visual.register_forward_hook(lambda *_: encoded.append(1))
    with torch.no_grad():
        image = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    shared, other_shared = (
        {key: value for key, value in given.items() if key != "pixel_values"}
        | {"mm_encoder_outputs": {"image": image}}
        for given in (inputs, other)
    )
    recorder = Recorder(LQCDLogitsProcessor(model, other_shared, contrast=1.0, plausibility=0.0))
    model.generate(
        **shared,
        max_new_tokens=4,
        num_beams=beams,
        do_sample=False,
        suppress_tokens=list(BANNED),
        logits_processor=[recorder],
    )
    assert len(encoded) == 1
    assert len(recorder.calls) == 4
    for input_ids, _, out in recorder.calls:
        generated = input_ids[:, inputs["input_ids"].shape[1] :]
        same(out, contrasted(judged(judge, inputs, generated, *BANNED), judged(judge, other, generated), 1.0, 0.0))


def test_a_text_question_beside_an_image():
    model, inputs, text = qwen2_5(), question([FIRST, SECOND]), [12, 13, 14]
    judge = copy.deepcopy(model)
    recorder = Recorder(LQCDLogitsProcessor(model, text, contrast=1.0, plausibility=0.0))
    model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=2,
        do_sample=False,
        suppress_tokens=list(BANNED),
        logits_processor=[recorder],
    )
    for input_ids, _, out in recorder.calls:
        generated = input_ids[:, inputs["input_ids"].shape[1] :]
        unseen = tiny.recomputed(judge, [text + row for row in generated.tolist()])
        same(out, contrasted(judged(judge, inputs, generated, *BANNED), unseen, 1.0, 0.0))


def test_image_tokens_without_an_image_are_refused():
    model, inputs = qwen2_5(), question([FIRST])
    with pytest.raises(ValueError, match="pass the processor's whole output"):
        AuxiliaryLM(model)(inputs["input_ids"])
    processor = LQCDLogitsProcessor(model, [START, IMAGE, END, 5])
    with pytest.raises(ValueError, match="pass the processor's whole output"):
        model.generate(**inputs, max_new_tokens=2, logits_processor=[processor])


def test_images_for_another_number_of_items_are_refused():
    model = qwen2_5()
    processor = LQCDLogitsProcessor(model, question([FIRST, SECOND]))
    with pytest.raises(ValueError, match="inputs for each item|2 items"):
        model.generate(**question([FIRST]), max_new_tokens=2, logits_processor=[processor])


def test_llava():
    """Another family: whole pictures in, ordinary positions, and no way to hand in encoded images."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 4,
        "patch_size": 2,
        "projection_dim": 32,
    }
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    torch.manual_seed(0)  # of what is no matrix
    model = tiny.spread(LlavaForConditionalGeneration(config), 0)
    pictures = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def asked(texts: list[list[int]]) -> dict:
        rows = [[IMAGE] * 4 + text for text in texts]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "pixel_values": pictures}

    @torch.no_grad()
    def alone(inputs: dict, generated: torch.Tensor, *banned: int) -> torch.Tensor:
        logits = []
        for row, tokens in enumerate(generated):
            item = row // (len(generated) // 2)
            ids = inputs["input_ids"][item][inputs["attention_mask"][item].bool()]
            seen = model(input_ids=torch.cat([ids, tokens])[None], pixel_values=pictures[item : item + 1])
            logits.append(seen.logits[0, -1])
        scores = torch.stack(logits)
        scores[:, list(banned)] = -torch.inf
        return scores.log_softmax(-1)

    inputs, other = asked([[5, 6], [7, 8, 9, 10]]), asked([[12, 5, 6], [13]])
    recorder = Recorder(LQCDLogitsProcessor(model, other, contrast=0.5, plausibility=0.0))
    model.generate(
        **inputs, max_new_tokens=4, num_beams=3, do_sample=False, suppress_tokens=[IMAGE], logits_processor=[recorder]
    )
    for input_ids, _, out in recorder.calls:
        generated = input_ids[:, inputs["input_ids"].shape[1] :]
        same(out, contrasted(alone(inputs, generated, IMAGE), alone(other, generated), 0.5, 0.0))
