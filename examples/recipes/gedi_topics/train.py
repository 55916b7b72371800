"""Train a guide that knows whether a text is about a word, any word: GeDi's losses, LoRA on SmolLM2-135M-Instruct, texts with topics.

    python examples/recipes/gedi_topics/train.py      # hours on two cores, minutes on a GPU

Writes the recipe (`logits_processor.json` and the adapter) into this folder, or into `--output`.
"""

import random
import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import halve, models, parser, schedule
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from topics import TOPICS, pieces
from transformers import PreTrainedTokenizerBase, set_seed

from hf_logits.processors import GeDiLogitsProcessor
from hf_logits.trainers import GeDiConfig, GeDiTrainer, gedi_topics


CODES = ("true", "false")
STRENGTH, FILTER_P = 30.0, 0.0
"""Chosen by evaluate.py on the validation part."""


def as_code(topic: str) -> str:
    """How a topic is written behind the control code: as in the middle of a text, where most words are one token."""
    return f" {topic}"


def about_or_not(part: str, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, draws: int, seed: int) -> Dataset:
    """Each text once with its own topic and once with another, for each of the draws of the other ones."""
    texts = [{"text": text, "topic": as_code(topic)} for text, topic in pieces(part)]
    texts = random.Random(seed).sample(texts, min(rows or len(texts), len(texts)))
    topics = [as_code(topic) for topic in TOPICS[part]]
    drawn = [gedi_topics(Dataset.from_list(texts), topics=topics, seed=seed + draw) for draw in range(draws)]
    # texts of a batch are alike in length
    return concatenate_datasets(drawn).map(lambda row: {"length": len(tokenizer(row["text"])["input_ids"])})


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--rows", type=int, help="texts that are learned; all if left out")
    made.add_argument("--epochs", type=int, default=6, help="how often; other topics are drawn anew each time")
    made.add_argument("--batch", type=int, default=32, help="rows in a step, two a text")
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.add_argument("--generative-weight", type=float, default=0.6, help="the paper's lambda")
    made.add_argument("--rank", type=int, default=4, help="of the adapter")
    made.add_argument("--bf16", action="store_true", help="autocast: quicker where the processor knows bfloat16")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    model, tokenizer = models(options)
    rows = about_or_not("train", tokenizer, rows=options.rows, draws=options.epochs, seed=options.seed)
    unseen = about_or_not("validation", tokenizer, rows=options.rows, draws=1, seed=0)
    print(f"{len(rows)} rows of {len(TOPICS['train'])} topics; {len(unseen)} of other topics to try", flush=True)
    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    guide = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = GeDiConfig(
            folder,
            codes=list(CODES),
            generative_weight=options.generative_weight,
            scale_learning_rate=0.05,
            max_length=80,
            num_train_epochs=1.0,
            per_device_eval_batch_size=options.batch,
            train_sampling_strategy="group_by_length",
            bf16=options.bf16,
            **schedule(options),
        )
        trainer = GeDiTrainer(guide, settings, train_dataset=rows, eval_dataset=unseen, processing_class=tokenizer)
        trainer.train()
        # saved before it is measured: what has been learned is not to be lost
        processor = GeDiLogitsProcessor(
            guide.eval(),
            **trainer.guide_settings(CODES[0]),
            strength=STRENGTH,
            filter_p=FILTER_P,
            secondary_code=as_code(next(iter(TOPICS["train"]))),
            tokenizer=tokenizer,
        )
        halve(guide)
        processor.save_pretrained(options.output, main_model=guide.get_base_model())
        print(f"the recipe is in {options.output}", flush=True)
        guide.float()
        found = trainer.evaluate()
    print({name: round(value, 4) for name, value in found.items() if "gedi" in name or name == "eval_loss"})


if __name__ == "__main__":
    main()
