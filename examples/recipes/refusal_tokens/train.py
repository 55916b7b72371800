"""Teach SmolLM2-135M-Instruct to begin its answers with a token that says whether it refuses, and as what.

    python examples/recipes/refusal_tokens/train.py      # half an hour or less on two cores

LoRA, with the rows of the new tokens trained beside it. Then thresholds are read off the validation part, and everything is written into this
folder, or into `--output`: the adapter, and the recipe with the thresholds.
"""

import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import models, parser, save_adapter, schedule
from datasets import Dataset
from harmful_requests import LIKE, TOKENS, requests
from transformers import set_seed

from hf_logits.processors import RefusalTokenLogitsProcessor
from hf_logits.trainers import (
    RefusalTokenConfig,
    RefusalTokenTrainer,
    add_refusal_tokens,
    calibrate_refusal,
    refusal_lora_config,
)


def conversations(part: str, limit: int | None = None) -> Dataset:
    """Requests of a part as messages."""
    found = []
    for row in requests(part)[:limit]:
        prompt = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["answer"]}]
        found.append({"prompt": prompt, "completion": answer, "label": row["label"]})
    return Dataset.from_list(found)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--epochs", type=float, default=3.0)
    made.add_argument("--rows", type=int, help="requests that are learned; all if left out")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--rank", type=int, default=8, help="of the adapter")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    model, tokenizer = models(options)
    add_refusal_tokens(tokenizer, model, TOKENS, like=LIKE)
    adapter = refusal_lora_config(
        model, tokenizer, TOKENS, r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = RefusalTokenConfig(
            folder,
            refuse=dict(TOKENS.categories),
            respond=TOKENS.respond,
            max_length=160,
            num_train_epochs=options.epochs,
            bf16=False,
            gradient_checkpointing=False,
            **schedule(options),
        )
        trainer = RefusalTokenTrainer(
            model,
            settings,
            train_dataset=conversations("train", options.rows),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.train()
    tuned = trainer.model.eval()
    # saved before it is measured: what has been learned is not to be lost
    save_adapter(tuned, options.output / "adapter")
    tuned.float()
    calibration = calibrate_refusal(
        tuned,
        tokenizer,
        conversations("validation", options.rows),
        tokens=TOKENS,
        false_refusal_rate=0.02,
        batch_size=16,
    )
    print({name: round(roc.auc, 4) for name, roc in calibration.roc.items()}, calibration.refusal_rates)
    RefusalTokenLogitsProcessor(
        refuse=TOKENS.categories, respond=TOKENS.respond, tokenizer=tokenizer, **calibration.settings
    ).save_pretrained(options.output)
    print(f"the recipe is in {options.output}")


if __name__ == "__main__":
    main()
