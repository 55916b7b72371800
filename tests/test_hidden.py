"""The hidden states in front of the head are those that the head reads."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from hf_logits.hidden import backbone, embed_texts, watch_hidden
from oracles import word_tokenizer
from tiny import VOCAB, llama, prompts
from tiny import gpt2 as tiny_gpt2


@pytest.mark.parametrize("build", [llama, tiny_gpt2])
def test_the_head_on_the_backbone_is_the_model(build):
    model = build()
    ids, mask = prompts(padded=False)
    hidden = backbone(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, attention_mask=mask).logits)


def test_adapters_stay_in_the_backbone():
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    ids, _ = prompts(padded=False)
    hidden = backbone(model)(input_ids=ids).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids).logits)
    with model.disable_adapter():
        assert not torch.equal(backbone(model)(input_ids=ids).last_hidden_state, hidden)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no backbone in front of a head"):
        backbone(llama().base_model)


def test_watching_takes_part_in_the_graph_and_ends_with_the_block():
    model = llama()
    ids, _ = prompts(padded=False)
    with watch_hidden(model) as seen:
        logits = model(input_ids=ids).logits
    model(input_ids=ids)
    assert len(seen) == 1
    (gradient,) = torch.autograd.grad(logits.sum(), seen[0])
    assert torch.allclose(gradient, model.lm_head.weight.sum(0).expand_as(gradient), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_texts_are_embedded_alone_as_in_batches(kind, side):
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model: nn.Module = llama() if kind == "decoder" else BertModel(BertConfig(vocab_size=VOCAB, **size))
    model.train()
    texts = ["w4 w5 w6", "w7", "w8 w9 w10 w11 w12"]
    together = embed_texts(texts, model=model, tokenizer=tokenizer)
    assert model.training
    model.eval()
    alone = torch.cat([embed_texts([text], model=model, tokenizer=tokenizer) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3))
    body = backbone(model) if kind == "decoder" else model
    mean = body(input_ids=torch.tensor([tokenizer(texts[2]).input_ids])).last_hidden_state.mean(1)
    assert torch.allclose(together[2], nn.functional.normalize(mean[0], dim=-1), atol=1e-5)
