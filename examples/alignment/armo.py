"""ArmoRM: rate sentences for praise, complaint and length, and let the prompt decide what is wanted.

    accelerate launch examples/alignment/armo.py --config examples/alignment/armo.yaml

Stage 1 fits the heads in closed form on people's ratings. Stage 2 trains the gate on preferences: after one kind of prompt praise
is chosen over complaint, after the other complaint over praise. No objective alone gets both right.
"""

import random
from pathlib import Path

import torch
from common import PROMPTS, finish, model_path, opinions, parse, rated_sentences
from datasets import Dataset
from transformers import AutoTokenizer

from hf_logits.reply import reply_pattern
from hf_logits.ridge import fit_ridge
from hf_logits.trainers import (
    MultiObjectiveGateConfig,
    MultiObjectiveGateTrainer,
    MultiObjectiveRewardModel,
    cache_embeddings,
    embed_ratings,
)


ASK = {"praise": "Say something nice about it.", "complaint": "Say what is wrong with it."}
OBJECTIVES = ["praise", "complaint", "length"]


def chat(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def ratings(rows: int, seed: int = 0) -> Dataset:
    """Sentences with the three ratings in [0, 1]; every other one was only rated for length."""
    rng = random.Random(seed)
    found = []
    for text, rating in rng.sample([row for rows in rated_sentences(PROMPTS).values() for row in rows], rows):
        known = len(found) % 4 > 0
        found.append(
            {
                "prompt": chat("user", rng.choice(list(ASK.values()))),
                "completion": chat("assistant", text),
                "praise": max(rating, 0) / 4 if known else None,
                "complaint": max(-rating, 0) / 4 if known else None,
                "length": min(len(text.split()) / 40, 1.0),
            }
        )
    return Dataset.from_list(found)


def preferences(rows: int) -> Dataset:
    """Half of the prompts ask for praise, half for complaint."""
    found = []
    for index, row in enumerate(opinions().select(range(rows))):
        wanted, other = (row["chosen"], row["rejected"])[:: 1 if index % 2 else -1]
        prompt = chat("user", ASK["praise" if index % 2 else "complaint"])
        found.append({"prompt": prompt, "chosen": chat("assistant", wanted), "rejected": chat("assistant", other)})
    return Dataset.from_list(found)


def main() -> None:
    script, args, settings = parse(MultiObjectiveGateConfig)
    path = model_path(settings)
    tokenizer = AutoTokenizer.from_pretrained(path)
    small = args.max_steps < 10  # a try
    with args.main_process_first():
        rated, pairs = ratings(64 if small else 1000), preferences(32 if small else 400)

    model = MultiObjectiveRewardModel.from_backbone(
        path, objectives=OBJECTIVES, prompt_pattern=reply_pattern(tokenizer), gate_hidden_size=64, gate_temperature=1.0
    )
    fit = fit_ridge(embed_ratings(model, tokenizer, rated, batch_size=16), names=OBJECTIVES)
    model.set_heads(fit)
    print("held-out squared errors:", dict(zip(OBJECTIVES, fit.errors.tolist(), strict=True)))

    cached = cache_embeddings(model, tokenizer, pairs, batch_size=16).train_test_split(test_size=0.25, seed=0)
    print("shares of length taken off:", model.debias(torch.tensor(cached["train"]["chosen_embedding"]), "length"))
    trainer = MultiObjectiveGateTrainer(
        model, args, train_dataset=cached["train"], eval_dataset=cached["test"], processing_class=tokenizer
    )
    finish(trainer, script)
    print("saved:", Path(args.output_dir).resolve())


if __name__ == "__main__":
    main()
