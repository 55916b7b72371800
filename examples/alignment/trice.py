"""TRICE: learn to reason from right answers alone; here sums of digits, whose rationales nobody wrote.

    accelerate launch examples/alignment/trice.py --config examples/alignment/trice.yaml

Other data: --dataset_name with the columns `prompt` and `answer`. An answer is right if it is the last number of the text.
"""

import random
import re
from typing import Any

from common import finish, model_path, parse, splits
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config

from hf_logits.trainers import TRICEConfig, TRICETrainer


def sums(count: int = 512, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    digits = [[rng.randint(1, 9) for _ in range(3)] for _ in range(count)]
    asked = ["Question: What is {} + {} + {}? Add them one by one.\nAnswer:".format(*three) for three in digits]
    return Dataset.from_list([{"prompt": p, "answer": str(sum(d))} for p, d in zip(asked, digits, strict=True)])


def verifier(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """Whether the last number is the answer."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(re.findall(r"-?\d+", text)[-1:] == [str(right)]) for text, right in zip(texts, answer, strict=True)]


def guide(row: dict[str, Any]) -> Any:
    """The prompt with the answer in it, with which the memory begins."""
    hint = f"(The answer is {row['answer']}.) "
    if isinstance(row["prompt"], str):
        return hint + row["prompt"]
    *before, last = row["prompt"]
    return [*before, last | {"content": hint + last["content"]}]


def main() -> None:
    script, args, settings = parse(TRICEConfig)
    train_dataset, eval_dataset = splits(script, args, sums)
    path = model_path(settings)
    trainer = TRICETrainer(
        AutoModelForCausalLM.from_pretrained(path),
        verifier,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(settings),
    )
    if args.resume_from_checkpoint is None:
        share = trainer.init_memory(guide)
        print(f"The guide filled the memories of {share:.0%} of the examples.")
    finish(trainer, script)


if __name__ == "__main__":
    main()
