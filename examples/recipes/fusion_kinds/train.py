"""Fine-tune a small model, so that a large one can follow it: which kind of text is it, and is it positive or negative?

    python examples/recipes/fusion_kinds/train.py      # half an hour on two cores, minutes on a GPU

The small model is the healed one of `../entropy_adaptive`. Its expert goes on from there, by TRL's SFTTrainer. The recipe goes into this folder
or into `--output`: what was healed and the expert, two adapters of some layers of the large model. In `direct/` is what it is measured against, the large
model fine-tuned itself.
"""

import sys
import tempfile
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))

from common import halve, models, parser, save_adapter, schedule
from datasets import Dataset
from healed import HEALED, kept_layers
from peft import LoraConfig, PeftModel, get_peft_model
from task import answer, examples
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_logits.fewer_layers import keep_layers
from hf_logits.processors import DynamicFusionLogitsProcessor


def tune(model: PeftModel, tokenizer, options) -> PeftModel:
    rows = [
        {"prompt": row["question"], "completion": answer(row)} for row in examples("train", options.rows, options.seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=256,
            num_train_epochs=options.epochs,
            bf16=options.bf16,
            gradient_checkpointing=False,
            **schedule(options),
        )
        SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--small", type=Path, default=HEALED, help="the folder of the healed adapter")
    made.add_argument("--rows", type=int, default=1200)
    made.add_argument("--epochs", type=float, default=1.0)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--rank", type=int, default=4, help="of the large model's adapter; the small one's is given")
    made.add_argument("--bf16", action="store_true", help="autocast: quicker where the processor knows bfloat16")
    options = made.parse_args(arguments)
    set_seed(options.seed)
    model, tokenizer = models(options)

    part = keep_layers(model, kept_layers(options.small))
    small = PeftModel.from_pretrained(part, str(options.small), adapter_name="expert", is_trainable=True)
    tune(small, tokenizer, options)
    small.load_adapter(str(options.small), adapter_name="healed")
    halve(small)
    DynamicFusionLogitsProcessor(small, "expert", small_adapter="healed").save_pretrained(
        options.output, main_model=model
    )
    print(f"the recipe is in {options.output}", flush=True)

    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    direct = tune(get_peft_model(model, adapter), tokenizer, options)
    save_adapter(direct, options.output / "direct")


if __name__ == "__main__":
    main()
