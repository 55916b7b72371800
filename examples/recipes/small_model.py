"""A small model for the methods that need a pair: some layers of the large one, and an adapter that heals the cut."""

import json
import random
from pathlib import Path

from common import continue_prompts
from harmful_requests import requests
from peft import PeftModel
from sentiment import sentences
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_logits.fewer_layers import keep_layers


HEALED = Path(__file__).parent / "entropy_adaptive" / "healed"
"""The adapter of train.py there, and `layers.json`."""
LAYERS = "layers.json"
WISHES = (
    "What does this mean? {whole}",
    "Say this in other words: {whole}",
    "What do you think of this? {whole}",
    "Explain this to a child: {whole}",
    "Who could have written this, and why? {whole}",
    "Go on from here: {opening}",
    "Write a short story that begins so: {opening}",
)


def kept_layers(folder: Path) -> list[int]:
    return json.loads((folder / LAYERS).read_text(encoding="utf-8"))["kept_layers"]


def healed(model: PreTrainedModel, folder: Path = HEALED) -> PreTrainedModel:
    """The small model, with weights of its own."""
    part = keep_layers(model, kept_layers(folder), share=False)
    return PeftModel.from_pretrained(part, str(folder)).merge_and_unload().eval()


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
) -> list[list[int]]:
    """What the model itself says, drawn from its own distribution, with the end of the text where it came to one."""
    written = continue_prompts(
        model, tokenizer, prompts, tokens=tokens, batch_size=batch_size, do_sample=True, top_k=0, temperature=1.0
    )
    return [[*row, tokenizer.eos_token_id] if len(row) < tokens else row for row in written]
