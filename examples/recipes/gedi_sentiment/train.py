"""Train a guide that knows positive from negative sentences: GeDi's losses, LoRA on SmolLM2-135M-Instruct, rated sentences.

    python examples/recipes/gedi_sentiment/train.py      # half an hour of CPU time for 4,800 sentences

Writes the recipe (`logits_processor.json` and the adapter) into this folder, or into `--output`.
"""

import random
import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import halve, models, parser, schedule
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentiment import sentences
from transformers import set_seed

from hf_logits.processors import GeDiLogitsProcessor
from hf_logits.trainers import GeDiConfig, GeDiTrainer


CODES = ["negative", "positive"]
STRENGTH, FILTER_P = 30.0, 0.0
"""Chosen by evaluate.py on the validation part."""


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--rows", type=int, help="sentences that are learned, half of each sentiment; all if left out")
    made.add_argument("--epochs", type=float, default=2.0)
    made.add_argument("--batch", type=int, default=32, help="sentences in a step")
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--generative-weight", type=float, default=0.3, help="lambda; the paper has 0.6")
    made.add_argument("--bf16", action="store_true", help="autocast: quicker where the processor knows bfloat16")
    made.add_argument("--rank", type=int, default=8, help="of the adapter")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    own = {code: [text for text, label in sentences("train") if label == code] for code in CODES}
    half = min(options.rows // 2 if options.rows else sys.maxsize, *map(len, own.values()))
    rows = []
    for code, texts in own.items():
        rows += [{"text": text, "label": code} for text in random.Random(options.seed).sample(texts, half)]
    held_out = [{"text": text, "label": label} for text, label in sentences("validation")]
    held_out = random.Random(0).sample(held_out, min(256, len(held_out), len(rows)))
    print(f"{len(rows)} sentences, half of each sentiment", flush=True)

    model, tokenizer = models(options)
    for row in rows + held_out:
        row["length"] = len(tokenizer(row["text"])["input_ids"])  # texts of a batch are alike in length
    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    guide = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = GeDiConfig(
            folder,
            codes=CODES,
            generative_weight=options.generative_weight,
            scale_learning_rate=0.05,
            max_length=64,
            num_train_epochs=options.epochs,
            per_device_eval_batch_size=options.batch,
            train_sampling_strategy="group_by_length",
            bf16=options.bf16,
            **schedule(options),
        )
        trainer = GeDiTrainer(
            guide,
            settings,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out),
            processing_class=tokenizer,
        )
        trainer.train()
        # saved before it is measured: what has been learned is not to be lost
        settings_of_guide = trainer.guide_settings("positive")
        processor = GeDiLogitsProcessor(guide.eval(), **settings_of_guide, strength=STRENGTH, filter_p=FILTER_P)
        halve(guide)
        processor.save_pretrained(options.output, main_model=guide.get_base_model())
        print(f"the recipe is in {options.output}", flush=True)
        guide.float()
        found = trainer.evaluate()
    print({name: round(value, 4) for name, value in found.items() if "gedi" in name or name == "eval_loss"})


if __name__ == "__main__":
    main()
