"""Heal SmolLM2-135M-Instruct without half of its layers: the whole model teaches what is left of it, on sentences
and on answers that it wrote itself.

    python examples/recipes/entropy_adaptive/train.py --bf16 --batch-size 1024 --chunk 4096      # four minutes on an H200
    python examples/recipes/entropy_adaptive/train.py --conversations 256 --sentences 2400 --tokens 40 --epochs 1 --batch 16
                                                                                    # a smaller one: 11 minutes on two cores

The adapter and the list of layers go into `healed/` in this folder, or in `--output`, and the recipe beside it: the small model writes, the
large one takes over where it is unsure.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import BATCH_SIZE, models, parser, save_adapter, schedule
from conversations import answers, chats
from datasets import Dataset
from healed import LAYERS
from peft import LoraConfig, get_peft_model
from sentiment import sentences
from transformers import DataCollatorForSeq2Seq, set_seed

from hf_logits.fewer_layers import keep_layers
from hf_logits.processors import EntropyAdaptiveLogitsProcessor
from hf_logits.trainers import LogitDistillationConfig, LogitDistillationTrainer


DROPPED = (5, 20)
"""Of six blocks of fifteen layers the one without which, unhealed, the model was least unlike itself on twelve validation sentences: 4.5 nats a token; without
every other layer it was 9.8."""
THRESHOLD = 2.0
"""Bits; chosen by evaluate.py on the validation part."""


def to_learn(model, tokenizer, options) -> Dataset:
    """Sentences, and prompts with the model's own answers, of which the answers are learned."""
    prompts = chats(tokenizer, "train", options.conversations)
    pairs = []
    for place, temperature in enumerate(options.temperatures):
        own = prompts[place :: len(options.temperatures)]
        limits = {"tokens": options.tokens, "batch_size": options.batch_size}
        written = answers(model, tokenizer, own, temperature=temperature, **limits)
        pairs += [(tokenizer(prompt)["input_ids"], answer) for prompt, answer in zip(own, written, strict=True)]
    texts = [text for text, _ in sentences("train", clear=0.0) if len(text.split()) >= 8]
    texts = random.Random(options.seed).sample(texts, min(options.sentences, len(texts)))
    pairs += [([], ids) for ids in tokenizer(texts, truncation=True, max_length=96)["input_ids"]] if texts else []
    return Dataset.from_list(
        [
            {
                "input_ids": begin + rest,
                "attention_mask": [1] * len(begin + rest),
                "labels": [-100] * len(begin) + rest,
                "length": len(begin + rest),
            }
            for begin, rest in pairs
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument(
        "--dropped", type=int, nargs=2, default=DROPPED, help="the first layer that goes, and the first that stays"
    )
    made.add_argument("--sentences", type=int, default=8000, help="to learn from, at most")
    made.add_argument("--conversations", type=int, default=16000, help="to learn from")
    made.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    made.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.5], help="of the answers, in turn")
    made.add_argument("--epochs", type=float, default=3.0)
    made.add_argument("--batch", type=int, default=128, help="texts in a step")
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="answers that are written at once")
    made.add_argument("--learning-rate", type=float, default=1.5e-3)
    made.add_argument("--rank", type=int, default=20, help="of the adapter")
    made.add_argument("--stored-rank", type=int, default=20, help="of what is kept of it")
    made.add_argument("--bf16", action="store_true", help="autocast: quicker where the processor knows bfloat16")
    made.add_argument("--chunk", type=int, default=256, help="tokens whose logits exist at once")
    options = made.parse_args(arguments)
    set_seed(options.seed)

    model, tokenizer = models(options)
    deep = model.config.num_hidden_layers
    kept = [layer for layer in range(deep) if not options.dropped[0] <= layer < options.dropped[1]]
    start = time.perf_counter()
    rows = to_learn(model, tokenizer, options)
    print(f"{sum(rows['length'])} tokens to learn from, written in {time.perf_counter() - start:.0f} s", flush=True)
    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    student = get_peft_model(keep_layers(model, kept, share=False), adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = LogitDistillationConfig(
            folder,
            temperature=1.0,
            kd_weight=1.0,
            ce_weight=0.0,
            chunk_size=options.chunk,
            num_train_epochs=options.epochs,
            train_sampling_strategy="group_by_length",
            bf16=options.bf16,
            **schedule(options),
        )
        trainer = LogitDistillationTrainer(
            student,
            model,
            settings,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        trainer.train()
    target = options.output / "healed"
    save_adapter(student, target, rank=options.stored_rank)
    (target / LAYERS).write_text(json.dumps({"kept_layers": kept}) + "\n", encoding="utf-8")
    # the model that is asked when the small one is unsure is the one that the reader has
    EntropyAdaptiveLogitsProcessor(model, threshold=THRESHOLD, window=1, min_stay=1).save_pretrained(
        options.output, main_model=model
    )
    print(f"the small model is in {target}, trained in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
