"""What a small model is healed on and measured with: questions and wishes, and what the large model itself answers."""

import random

from common import continue_prompts
from harmful_requests import requests
from sentiment import sentences
from transformers import PreTrainedModel, PreTrainedTokenizerBase


WISHES = (
    "What does this mean? {whole}",
    "Say this in other words: {whole}",
    "What do you think of this? {whole}",
    "Explain this to a child: {whole}",
    "Who could have written this, and why? {whole}",
    "Go on from here: {opening}",
    "Write a short story that begins so: {opening}",
)


def chats(tokenizer: PreTrainedTokenizerBase, part: str, count: int, seed: int = 0, *, longest: int = 60) -> list[str]:
    """Questions and wishes of a part, in the chat template: small talk, exam questions, and wishes about sentences.

    Args:
        longest: words that a sentence or question has at most.
    """
    rng = random.Random(seed)
    asked = [
        row["prompt"] for row in requests(part) if row["label"] == "respond" and len(row["prompt"].split()) <= longest
    ]
    texts = [text for text, _ in sentences(part, clear=0.0) if 6 <= len(text.split()) <= longest]
    found = rng.sample(asked, min(len(asked), count // 4))
    while len(found) < count and texts:
        text = rng.choice(texts)
        found.append(rng.choice(WISHES).format(whole=text, opening=" ".join(text.split()[:6])))
    rng.shuffle(found)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in found
    ]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    tokens: int,
    batch_size: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """What the model itself says, drawn from its own distribution, with the end of the text where it came to one."""
    drawn = {"do_sample": True, "top_k": 0, "temperature": temperature}
    written = continue_prompts(model, tokenizer, prompts, tokens=tokens, batch_size=batch_size, **drawn)
    return [[*row, tokenizer.eos_token_id] if len(row) < tokens else row for row in written]
