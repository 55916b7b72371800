"""SCoRe: a model learns to correct itself, in two stages that follow each other.

    accelerate launch examples/alignment/score.py --config examples/alignment/score.yaml

Without --dataset_name it answers sums. A dataset of yours needs the columns `prompt` (messages) and `answer`; an attempt is right if the last
number in it is the answer. Stage 1 lies in `stage_1` below the output folder, merged; its weights are the start and the reference of stage 2. A run
that was broken off goes on from a checkpoint of either stage: --resume_from_checkpoint examples/output/score/stage_1/checkpoint-...
"""

import copy
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import finish, model_path, parse, splits
from datasets import Dataset
from trl import get_peft_config

from hf_logits.trainers import SCoReConfig, SCoReTrainer


def sums(rows: int = 512, seed: int = 0) -> Dataset:
    """Two numbers below fifty to be added."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(2, 50), draw.randrange(2, 50)) for _ in range(rows)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)} for a, b in pairs]
    )


def last_number(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 if the last number is the answer, else 0."""
    found = [re.findall(r"-?\d+(?:\.\d+)?", one[0]["content"].replace(",", "")) for one in completions]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]


def main() -> None:
    script, args, model = parse(SCoReConfig)
    train_dataset, eval_dataset = splits(script, args, sums)

    def trainer(path: str, stage: int, folder: str) -> SCoReTrainer:
        settings = copy.copy(args)
        settings.score_stage, settings.output_dir = stage, folder
        settings.push_to_hub = args.push_to_hub and stage == 2
        return SCoReTrainer(
            path,
            last_number,
            settings,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model),
        )

    merged = Path(args.output_dir, "stage_1")
    checkpoint = args.resume_from_checkpoint
    in_first = checkpoint is not None and Path(checkpoint).resolve().parent == merged.resolve()
    if checkpoint is None or in_first:
        train_first_stage(trainer(model_path(model), 1, str(merged)), merged, checkpoint)
    second = trainer(str(merged), 2, args.output_dir)
    if in_first:
        second.args.resume_from_checkpoint = None
    finish(second, script)


def train_first_stage(first: SCoReTrainer, merged: Path, checkpoint: str | None) -> None:
    """Leaves the trained model, without an adapter, in the folder `merged`."""
    first.train(resume_from_checkpoint=checkpoint)
    trained = first.accelerator.unwrap_model(first.model)
    if first.accelerator.is_main_process:
        (trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained).save_pretrained(merged)
        first.processing_class.save_pretrained(merged)
    first.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
