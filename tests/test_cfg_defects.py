"""Classifier-free guidance where transformers' own is wrong or crashes.

Each test holds ours against a recomputation from scratch at every call, and shows in the same breath that the built-in still
fails. When the second half of a test fails, transformers has been repaired: then that half can go.
"""

import pytest
import torch
from transformers import LogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor

import tiny
from hf_logits.processors import MixtureLogitsProcessor


SCALE, STEPS = 1.8, 7
NEGATIVE = [[7, 8, 9, 4, 11]]


class FromScratch(LogitsProcessor):
    """Guidance without any state: both branches are read anew for every row at every call."""

    def __init__(self, model, negatives: list[list[int]], width: int):
        self.model, self.negatives, self.width = model, negatives, width

    def __call__(self, input_ids, scores):
        share = len(input_ids) // len(self.negatives)
        rows = [self.negatives[r // share] + row[self.width :] for r, row in enumerate(input_ids.tolist())]
        return (SCALE * scores.log_softmax(-1) + (1 - SCALE) * tiny.recomputed(self.model, rows)).log_softmax(-1)


class Compared(LogitsProcessor):
    """Lets `processor` decide and keeps how far from `reference` it was at each call."""

    def __init__(self, processor, reference):
        self.processor, self.reference = processor, reference
        self.errors: list[float] = []

    def __call__(self, input_ids, scores):
        out = self.processor(input_ids, scores)
        error = out.log_softmax(-1) - self.reference(input_ids, scores)
        self.errors.append(error.abs().max().item())
        return out


def generate(model, ids, processor=None, **settings) -> torch.Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "attention_mask": (ids != tiny.PAD).long()} | settings
    torch.manual_seed(0)
    return model.generate(ids, logits_processor=[] if processor is None else [processor], **settings)


def check_ours(processor, reference, model, ids, **settings) -> None:
    """Right at every call, and the same tokens as a guided decode from scratch."""
    compared = Compared(processor, reference)
    tokens = generate(model, ids, compared, **settings)
    assert len(compared.errors) == STEPS
    assert max(compared.errors) < 1e-5
    assert torch.equal(tokens, generate(model, ids, reference, **settings))
    assert torch.equal(tokens, generate(model, ids, processor, **settings))  # and once more with the same object


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_beams_with_one_negative_prompt(build):
    model, (ids, _) = build(), tiny.prompts(1)
    ours = MixtureLogitsProcessor.cfg(model, NEGATIVE, scale=SCALE)
    check_ours(ours, FromScratch(model, NEGATIVE, 9), model, ids, num_beams=4)
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors"):  # the negative prompt is not repeated for the beams
        generate(model, ids, num_beams=4, guidance_scale=SCALE, negative_prompt_ids=torch.tensor(NEGATIVE))


@pytest.mark.parametrize("negative", ["default", "repeated by hand"])
def test_beams_change_places(negative):
    model, (ids, _) = tiny.llama(), tiny.prompts(2)
    negatives = ids[:, -1:].tolist() if negative == "default" else [NEGATIVE[0], [12, 4, 13, 5, 6]]
    ours = MixtureLogitsProcessor.cfg(model, None if negative == "default" else negatives, scale=SCALE)
    reference = FromScratch(model, negatives, 9)
    check_ours(ours, reference, model, ids, num_beams=4)
    repeated = None if negative == "default" else torch.tensor(negatives).repeat_interleave(4, 0)
    compared = Compared(UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, repeated), reference)
    tokens = generate(model, ids, compared, num_beams=4)
    assert max(compared.errors[:2]) < 1e-5 < 1e-2 < max(compared.errors)  # its cache stays behind when beams move
    assert not torch.equal(tokens, generate(model, ids, reference, num_beams=4))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_returned_sequences(build):
    model, (ids, _) = build(), tiny.prompts(1)
    settings = {"do_sample": True, "num_return_sequences": 3}
    ours = MixtureLogitsProcessor.cfg(model, NEGATIVE, scale=SCALE)
    check_ours(ours, FromScratch(model, NEGATIVE, 9), model, ids, **settings)
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors"):
        generate(model, ids, guidance_scale=SCALE, negative_prompt_ids=torch.tensor(NEGATIVE), **settings)


def test_padded_negative_prompts_of_absolute_positions():
    model, (ids, _) = tiny.gpt2(), tiny.prompts(2)
    negatives = [[7, 8], [12, 4, 13, 5, 6]]
    padded = torch.tensor([[tiny.PAD] * 3 + negatives[0], negatives[1]])
    mask = (padded != tiny.PAD).long()
    reference = FromScratch(model, negatives, 9)
    ours = MixtureLogitsProcessor.cfg(model, {"input_ids": padded, "attention_mask": mask}, scale=SCALE)
    check_ours(ours, reference, model, ids)
    builtin = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, padded, mask)
    compared = Compared(builtin, reference)
    generate(model, ids, compared)
    assert min(compared.errors) > 1e-2  # it passes a mask but no positions


def test_one_object_for_two_generations():
    model = tiny.llama()
    first, second = tiny.prompts(2, seed=0)[0], tiny.prompts(2, seed=1)[0]
    ours = MixtureLogitsProcessor.cfg(model, scale=SCALE)
    builtin = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model)
    errors = []
    for ids in (first, second):
        reference = FromScratch(model, ids[:, -1:].tolist(), 9)
        check_ours(ours, reference, model, ids)
        compared = Compared(builtin, reference)
        generate(model, ids, compared)
        errors.append(max(compared.errors))
    assert errors[0] < 1e-5 < 1e-2 < errors[1]  # it goes on where the first generation ended
