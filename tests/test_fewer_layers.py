"""Some layers of a model are a model of their own, over the same weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from hf_logits.fewer_layers import keep_layers


BUILD = {"llama": tiny.llama, "gpt2": tiny.gpt2, "mistral": tiny.mistral, "tied_llama": tiny.tied_llama}


def without(model, layers):
    """The slow way: the layers that are not kept do nothing."""
    blind = copy.deepcopy(model)
    decoder = blind.get_decoder()
    name = "layers" if hasattr(decoder, "layers") else "h"
    stack = getattr(decoder, name)
    setattr(decoder, name, nn.ModuleList(stack[index] for index in layers))
    return blind


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", BUILD)
def test_its_logits_are_those_without_the_other_layers(name, share):
    model = BUILD[name](num_hidden_layers=4)
    ids, _ = tiny.prompts(padded=False)
    before = model(ids).logits
    part = keep_layers(model, [0, 2, 3], share=share)
    assert part.config.num_hidden_layers == 3 and part.config.kept_layers == [0, 2, 3]
    assert torch.equal(part(ids, use_cache=False).logits, without(model, [0, 2, 3])(ids, use_cache=False).logits)
    assert torch.equal(model(ids).logits, before) and model.config.num_hidden_layers == 4
    # with a cache, as without
    written = part.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, part.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    assert (part.get_input_embeddings().weight is model.get_input_embeddings().weight) == share


def test_all_layers_are_the_model():
    model = tiny.llama(num_hidden_layers=3)
    ids, _ = tiny.prompts(padded=False)
    assert torch.equal(keep_layers(model, [0, 1, 2])(ids).logits, model(ids).logits)


def test_layers_of_layers_are_named_as_in_the_first_model():
    model = tiny.llama(num_hidden_layers=5)
    part = keep_layers(keep_layers(model, [0, 2, 4]), [1, 2])
    assert part.config.kept_layers == [2, 4]
    assert part.model.layers[0].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight


def test_types_of_layers_follow():
    model = tiny.mamba(num_hidden_layers=3)
    assert len(keep_layers(model, [0, 2]).config.layer_types) == 2
    mixed = tiny.bamba()
    with pytest.raises(TypeError, match="which layer is of which type"):
        keep_layers(mixed, [1])


def test_an_adapter_around_the_part_leaves_the_whole_alone():
    model = tiny.llama(num_hidden_layers=3)
    ids, _ = tiny.prompts(padded=False)
    before = model(ids).logits
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    part = get_peft_model(keep_layers(model, [0, 1]), config)
    assert not torch.equal(part(ids).logits, keep_layers(model, [0, 1])(ids).logits)
    assert torch.equal(model(ids).logits, before)


def test_saved_and_loaded_with_its_list(tmp_path):
    part = keep_layers(tiny.llama(num_hidden_layers=3), [0, 2])
    part.save_pretrained(tmp_path)
    again = type(part).from_pretrained(tmp_path).eval()
    ids, _ = tiny.prompts(padded=False)
    assert again.config.kept_layers == [0, 2] and torch.equal(again(ids).logits, part(ids).logits)


@pytest.mark.parametrize("layers", [[], [0, 0], [1, 0], [-1], [0, 2]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="some of 0 to 1, each once and in increasing order"):
        keep_layers(tiny.llama(), layers)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(TypeError, match="decoder-only"):
        keep_layers(tiny.t5(), [0])
