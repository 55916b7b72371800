"""Train an expert that writes sentences of film reviews: TRL's SFT with LoRA on SmolLM2-135M-Instruct, for STEER to push further.

    python examples/recipes/steer_reviews/train.py      # an hour or two on two cores, a minute or two on a GPU

Writes the recipe (`logits_processor.json` and the adapter) into this folder, or into `--output`.
"""

import random
import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import halve, models, parser, schedule
from datasets import Dataset
from domains import PROMPT, films
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_logits.processors import SteerLogitsProcessor


CONTRAST, REPULSION = 0.2, 0.6
"""The published code's."""


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--rows", type=int, help="sentences that are learned; all if left out")
    made.add_argument("--epochs", type=float, default=2.0)
    made.add_argument("--batch", type=int, default=32, help="sentences in a step")
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.add_argument("--bf16", action="store_true", help="autocast: quicker where the processor knows bfloat16")
    made.add_argument("--rank", type=int, default=8, help="of the adapter")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    own, held_out = films("train"), films("validation")
    own = random.Random(options.seed).sample(own, min(options.rows or len(own), len(own)))
    held_out = random.Random(0).sample(held_out, min(256, len(held_out), len(own)))
    print(f"{len(own)} sentences to learn, {len(held_out)} held out, on {options.device}", flush=True)

    model, tokenizer = models(options)
    adapter = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    expert = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=96,
            num_train_epochs=options.epochs,
            per_device_eval_batch_size=options.batch,
            bf16=options.bf16,
            gradient_checkpointing=False,
            **schedule(options),
        )
        trainer = SFTTrainer(
            expert,
            settings,
            train_dataset=Dataset.from_list([{"prompt": PROMPT, "completion": text} for text in own]),
            eval_dataset=Dataset.from_list([{"prompt": PROMPT, "completion": text} for text in held_out]),
            processing_class=tokenizer,
        )
        trainer.train()
        # saved before it is measured: what has been learned is not to be lost
        halve(expert.eval())
        # the examples to stay away from are given when it is loaded: `from_pretrained(..., negatives=pool.draw())`
        SteerLogitsProcessor(model=expert, contrast=CONTRAST, repulsion=REPULSION).save_pretrained(
            options.output, main_model=expert.get_base_model()
        )
        print(f"the recipe is in {options.output}", flush=True)
        expert.float()
        tuned = trainer.evaluate()["eval_loss"]
        with expert.disable_adapter():
            plain = trainer.evaluate()["eval_loss"]
    print({"eval_loss": round(tuned, 4), "eval_loss of the base": round(plain, 4)})


if __name__ == "__main__":
    main()
