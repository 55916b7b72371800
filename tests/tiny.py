"""Tiny random models, built in memory.

Their weights are drawn far wider than usual, so that logits differ by nats from token to token: with the default
initialisation every next-token distribution is nearly flat, and a stale cache would go unnoticed.
"""

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)


VOCAB = 64
PAD, BOS, EOS = 0, 1, 2
WINDOW = 6
"""Of the sliding-window model: shorter than every prompt of the tests."""

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Redraw the matrices with a wide normal distribution, and put the model into eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    # Sequences of tests have a fixed length: the end of text would cut them short.
    model.generation_config.eos_token_id = None
    return model.eval()


def llama(seed: int = 0, vocab_size: int = VOCAB, **config) -> LlamaForCausalLM:
    """Rotary positions."""
    return spread(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(_SMALL | _IDS | config))), seed)


def tied_llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """The input embeddings are the output ones."""
    return llama(seed, tie_word_embeddings=True, **config)


def gpt2(seed: int = 0, vocab_size: int = VOCAB, **config) -> GPT2LMHeadModel:
    """Learned absolute positions."""
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | _IDS | config
    return spread(GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **settings)), seed)


def mistral(seed: int = 0, **config) -> MistralForCausalLM:
    """A sliding window shorter than the prompts."""
    return spread(
        MistralForCausalLM(MistralConfig(vocab_size=VOCAB, sliding_window=WINDOW, **(_SMALL | _IDS | config))), seed
    )


def mamba(seed: int = 0, **config) -> MambaForCausalLM:
    """A state-space model: its cache can't be cropped."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8} | _IDS | config
    return spread(MambaForCausalLM(MambaConfig(vocab_size=VOCAB, **settings)), seed)


def bamba(seed: int = 0, **config) -> BambaForCausalLM:
    """A hybrid of attention and state-space layers."""
    settings = {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    }
    return spread(BambaForCausalLM(BambaConfig(vocab_size=VOCAB, **(_SMALL | _IDS | settings | config))), seed)


def t5(seed: int = 0, **config) -> T5ForConditionalGeneration:
    """An encoder-decoder."""
    settings = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": EOS,
    }
    return spread(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **(settings | config))), seed)


DECODERS = {
    "llama": llama,
    "gpt2": gpt2,
    "mistral": mistral,
    "mamba": mamba,
    "bamba": bamba,
    "tied_llama": tied_llama,
}
"""The auxiliary models that every processor must be right with."""


def prompts(batch: int = 2, length: int = 9, seed: int = 0, padded: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids of shape `[batch, length]` and their attention mask; every row but the last is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if padded:
        for row in range(batch - 1):
            ids[row, : 2 + row] = PAD
    return ids, (ids != PAD).long()


@torch.no_grad()
def recomputed(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """The slow obvious path, and the judge of all fast ones: each row alone, from scratch, without cache or padding."""
    return torch.stack([model(torch.tensor([row])).logits[0, -1].float().log_softmax(-1) for row in rows])
