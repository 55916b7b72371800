"""What the training examples share: their data (sentences that people rated), their model, and one way to run a trainer."""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config


sys.path.append(str(Path(__file__).parents[1]))
from rated_sentences import rated_sentences  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402


PROMPTS = {
    "amazonReviewSnippets": "A sentence from the review of a product:\n",
    "movieReviewSnippets": "A sentence from the review of a film:\n",
}
OPPOSITES = {
    "great": "terrible", "good": "bad", "love": "hate", "loved": "hated", "loves": "hates", "best": "worst", "excellent": "awful",
    "nice": "nasty", "perfect": "useless", "perfectly": "poorly", "happy": "unhappy", "easy": "hard", "well": "badly",
    "wonderful": "horrible", "beautiful": "ugly", "better": "worse", "fun": "boring", "funny": "dull", "enjoy": "dislike",
    "enjoyed": "disliked", "amazing": "dreadful", "fantastic": "atrocious", "like": "dislike", "strong": "weak", "smart": "stupid",
    "success": "failure", "recommend": "discourage", "brilliant": "pathetic", "pleased": "annoyed", "worth": "beneath",
}  # fmt: skip


# --- data ----------------------------------------------------------------------------------------------------------------


def _words(text: str) -> int:
    return len(text.split())


def opinions(*, longest: int = 14, seed: int = 0) -> Dataset:
    """Preferences between unrelated sentences: praise is chosen over complaint."""
    rng = random.Random(seed)
    rows = []
    for kind, sentences in rated_sentences(PROMPTS).items():
        fitting = [(text, rating) for text, rating in sentences if 4 <= _words(text) <= longest]
        praise = [text for text, rating in fitting if rating >= 1.5]
        complaint = [text for text, rating in fitting if rating <= -1.0]
        rng.shuffle(praise)
        rng.shuffle(complaint)
        for chosen, rejected in zip(praise, complaint, strict=False):
            rows.append({"prompt": PROMPTS[kind], "chosen": chosen, "rejected": rejected})
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def near_duplicates(*, longest: int = 14, seed: int = 0) -> Dataset:
    """Preferences between sentences of praise and the same ones with one word turned into its opposite."""
    rng = random.Random(seed)
    pattern = re.compile(rf"\b({'|'.join(OPPOSITES)})\b")
    rows = []
    for kind, sentences in rated_sentences(PROMPTS).items():
        for text, rating in sentences:
            if rating >= 1.0 and 4 <= _words(text) <= longest and len(pattern.findall(text)) == 1:
                turned = pattern.sub(lambda match: OPPOSITES[match[0]], text)
                rows.append({"prompt": PROMPTS[kind], "chosen": text, "rejected": turned})
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def thumbs(*, longest: int = 14, seed: int = 0) -> Dataset:
    """Unpaired: sentences with a thumb up or down."""
    rng = random.Random(seed)
    rows = [
        {"prompt": PROMPTS[kind], "completion": text, "label": rating > 0}
        for kind, sentences in rated_sentences(PROMPTS).items()
        for text, rating in sentences
        if abs(rating) >= 1.0 and 4 <= _words(text) <= longest
    ]
    rng.shuffle(rows)
    return Dataset.from_list(rows)


# --- training ------------------------------------------------------------------------------------------------------------


def parse(config: type) -> tuple[ScriptArguments, Any, ModelConfig]:
    """The settings from the command line and the file after `--config`; what is said on the command line counts."""
    return TrlParser((ScriptArguments, config, ModelConfig)).parse_args_and_config()


def splits(script: ScriptArguments, args: Any, sentences: Callable[[], Dataset]) -> tuple[Dataset, Dataset]:
    """`--dataset_name`, from the Hub or a folder, or the sentences; for training and for evaluation."""
    with args.main_process_first():  # the others find what it downloaded
        if script.dataset_name is None:
            held_out = sentences().train_test_split(test_size=64, seed=0)
            return held_out["train"], held_out["test"]
        data = load_dataset(script.dataset_name, script.dataset_config)
        return data[script.dataset_train_split], data[script.dataset_test_split]


def model_path(model: ModelConfig) -> str:
    """`--model_name_or_path`, or SmolLM2-135M-Instruct from its package."""
    return model.model_name_or_path or str(smollm2_folder())


def train(trainer_class: type, config: type, sentences: Callable[[], Dataset]) -> None:
    """What each of the scripts does: parse, train, evaluate, save and perhaps push, with a card that names the paper."""
    script, args, model = parse(config)
    train_dataset, eval_dataset = splits(script, args, sentences)
    trainer = trainer_class(
        model_path(model),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
    )
    finish(trainer, script)


def finish(trainer: Any, script: ScriptArguments) -> None:
    """Train, evaluate, save, push."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    trainer.save_metrics("eval", trainer.evaluate())
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
