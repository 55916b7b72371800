"""Log-sigmoid-centred rewards in GRPO: sentences that are kind AND short, where neither makes up for the other.

    accelerate launch examples/alignment/conjunction.py --config examples/alignment/conjunction.yaml

Kindness is rated by a reward model (any with one label; without --reward_model a list of words does it), and its reference is
what the model itself earns at each prompt: the 85th percentile of its samples.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import OPPOSITES, PROMPTS, finish, model_path
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from hf_logits.completions import sample_completions
from hf_logits.trainers import (
    ConjunctionReward,
    LogSigmoidCenteredReward,
    add_reference_rewards,
    reward_model_as_function,
)


@dataclass
class Choice:
    reward_model: str | None = field(default=None, metadata={"help": "A reward model for kindness."})
    reference_samples: int = field(default=8, metadata={"help": "Samples of a prompt, for its reference reward."})


def kindness(completions: Sequence[str], **_: Any) -> list[float]:
    """Kind words minus unkind ones."""
    good, bad = set(OPPOSITES), set(OPPOSITES.values()) - set(OPPOSITES)
    found = [re.findall(r"[a-z]+", text.lower()) for text in completions]
    return [2.0 * sum((word in good) - (word in bad) for word in words) for words in found]


def shortness(completions: Sequence[str], **_: Any) -> list[float]:
    """One for each word below twelve."""
    return [12.0 - len(text.split()) for text in completions]


def main() -> None:
    script, args, settings, choice = TrlParser(
        (ScriptArguments, GRPOConfig, ModelConfig, Choice)
    ).parse_args_and_config()
    path = model_path(settings)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    kind = kindness
    if choice.reward_model:
        judge = AutoModelForSequenceClassification.from_pretrained(choice.reward_model, num_labels=1)
        kind = reward_model_as_function(judge, AutoTokenizer.from_pretrained(choice.reward_model), name="kindness")
    data = Dataset.from_dict({"prompt": [*PROMPTS.values()] * 8})
    generate = functools.partial(sample_completions, model, tokenizer, max_new_tokens=args.max_completion_length)
    data = add_reference_rewards(data, generate, kind, num_samples=choice.reference_samples, column="kind_enough")
    both = ConjunctionReward(
        [LogSigmoidCenteredReward(kind, reference="kind_enough"), LogSigmoidCenteredReward(shortness, reference=0.0)],
        name="kind_and_short",
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=both,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=tokenizer,
        peft_config=get_peft_config(settings),
    )
    finish(trainer, script)


if __name__ == "__main__":
    main()
