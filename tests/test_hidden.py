"""The hidden states in front of the head are those that the head reads."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from hf_logits.hidden import backbone, embed_texts, pack_forks, reads_forks, watch_hidden
from oracles import word_tokenizer
from tiny import PAD, VOCAB, gpt2, llama, mamba, mistral, prompts


@pytest.mark.parametrize("build", [llama, gpt2])
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


def test_a_fork_is_packed_by_hand():
    inputs, first, second = pack_forks([([5, 6], [7, 8], [9]), ([4], [], [3, 2])], pad=PAD, dtype=torch.float32)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, PAD, PAD]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert (inputs["attention_mask"][0, 0] == 0).tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, False, False, True],  # the second continuation sees the prompt and itself
    ]
    assert first.tolist() == [[False, True, True, False, False], [False] * 5]
    assert second.tolist() == [[False, True, False, False, False], [True, True, False, False, False]]


def test_the_first_token_after_no_prompt_is_not_predicted():
    _, first, second = pack_forks([([], [7, 8], [9, 5])], pad=PAD, dtype=torch.float32)
    assert first.tolist() == [[True, False, False, False]]
    assert second.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("build", "fork", "expected"),
    [
        (llama, ([5, 6, 7], [8, 9, 10], [11, 12]), True),
        (gpt2, ([5, 6, 7], [8, 9, 10], [11, 12]), True),
        (gpt2, ([], [8, 9, 10], [11, 12]), True),
        (mistral, ([5], [8, 9], [11]), True),
        (mistral, ([5, 6, 7, 8], [8, 9, 10, 11], [11, 12, 13]), False),  # longer than its window
        (mamba, ([5, 6, 7], [8, 9, 10], [11, 12]), False),
    ],
)
def test_models_that_cannot_read_a_fork_are_found_out(build, fork, expected):
    assert reads_forks(backbone(build()), fork, pad=PAD) == expected


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
