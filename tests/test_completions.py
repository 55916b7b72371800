"""Prompts as ids, and the first token of their answers, against the slow obvious path."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from trl import apply_chat_template

import tiny
from hf_logits.completions import conversation_text, first_token_logits, prompt_ids
from oracles import word_tokenizer


CHAT = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}
TOOL = {"role": "tool", "content": "w6"}


def tokenizer() -> Any:
    made = word_tokenizer(["user", "assistant", "tool"], bos=True)
    made.chat_template = CHAT
    return made


@pytest.mark.parametrize("messages", [[USER], [USER, ASSISTANT], [USER, ASSISTANT, USER], [USER, ASSISTANT, TOOL]])
def test_chats_are_written_as_trl_writes_them(messages: list) -> None:
    words = tokenizer()
    text = apply_chat_template({"prompt": messages}, words)["prompt"]
    # the template writes the special tokens itself
    assert prompt_ids(messages, words) == words(text, add_special_tokens=False)["input_ids"]
    whole = apply_chat_template({"messages": [*messages, ASSISTANT]}, words)["text"]
    assert conversation_text(messages, [ASSISTANT], words) == whole


def test_text_gets_the_special_tokens() -> None:
    assert prompt_ids("w9 w8", tokenizer()) == [1, 9, 8]


def test_prompts_that_cannot_be_answered() -> None:
    with pytest.raises(ValueError, match="not from 'system'"):
        prompt_ids([{"role": "system", "content": "w9"}], tokenizer())
    with pytest.raises(ValueError, match="at least one token"):
        prompt_ids("", word_tokenizer())


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_first_tokens_in_padded_batches(name: str) -> None:
    model, words = tiny.DECODERS[name](seed=1), word_tokenizer()
    model.train()
    prompts = ["w10 w11 w12 w13", "w20", "w30 w31 w32", "w40 w41", "w50 w51 w52 w53 w54 w55 w56 w57"]
    found = {}
    for places, logits in first_token_logits(model, words, prompts, batch_size=3):
        assert logits.dtype == torch.float32 and not logits.requires_grad and not model.training
        found |= dict(zip(places, logits.log_softmax(-1), strict=True))
    assert model.training
    model.eval()
    expected = tiny.recomputed(model, [words(text)["input_ids"] for text in prompts])
    torch.testing.assert_close(torch.stack([found[place] for place in range(5)]), expected, atol=1e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was_found_where_the_caller_stops() -> None:
    model = tiny.llama()
    model.train()
    batches = first_token_logits(model, word_tokenizer(), ["w9", "w8"], batch_size=1)
    next(batches)
    assert not model.training
    batches.close()
    assert model.training


def test_neither_completions_nor_judges_need_trl() -> None:
    code = "import sys, hf_logits.completions, hf_logits.metrics.judges; sys.exit('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
