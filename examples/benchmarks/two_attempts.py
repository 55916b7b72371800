"""What learning from two attempts costs: a whole step, rollouts and verifier included, beside stock GRPO at equal numbers of tokens.

python examples/benchmarks/two_attempts.py [--quick]

Nobody ends early, so that every row generates and trains the same number of tokens. Stock GRPO is given the same two turns by a
rollout function; the third column lets it write them in one go, without reading a second prompt.
"""

import random
import statistics
import sys
import tempfile
import warnings
from typing import Any

import torch
from common import in_turns, llama, ready, stepper, tokenizer
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hf_logits.trainers import SCoReConfig, SCoReTrainer


RETRY = "w5 w6 w7 w8"
AIM = 1.05


def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def two_turns(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """What a user of stock GRPO would write."""
    starts, _, _ = trainer._tokenize_prompts(prompts)
    middle = trainer.processing_class(RETRY)["input_ids"]
    first, _ = trainer._generate_single_turn(starts, None, {}, trainer.num_generations)
    again = [start + one + middle for start, one in zip(starts, first, strict=True)]
    second, _ = trainer._generate_single_turn(again, None, {}, 1)
    answers = list(zip(first, second, strict=True))
    return {
        "prompt_ids": starts,
        "completion_ids": [one + middle + two for one, two in answers],
        "logprobs": None,
        "env_mask": [[1] * len(one) + [0] * len(middle) + [1] * len(two) for one, two in answers],
    }


def build(trainer: type, config: type, size: dict[str, int], length: int, rollout: Any = None, **settings: Any) -> Any:
    vocabulary, draw = size["vocabulary"], random.Random(0)
    folder = tempfile.mkdtemp()
    model = llama(vocabulary, size["width"], size["layers"], 0)
    model.save_pretrained(folder)  # where the reference is loaded from
    model.config._name_or_path = folder
    lengths = [draw.randint(size["length"] // 2, size["length"]) for _ in range(8 * size["batch"])]
    prompts = [" ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(words)) for words in lengths]
    made = trainer(
        model,
        verifier,
        args=config(
            folder,
            per_device_train_batch_size=size["batch"],
            num_generations=4,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            beta=0.01,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(vocabulary),
    )
    if rollout is not None:  # given to __init__, it warns that it is experimental
        made.rollout_func = rollout
    return ready(made)


def run(quick: bool = False) -> str:
    """The measured table, in Markdown. `quick` only shows that it runs."""
    size = {"vocabulary": 512, "width": 32, "layers": 2, "batch": 4, "length": 12}
    length, rounds = 6, 2
    if not quick:
        size = {"vocabulary": 4096, "width": 256, "layers": 6, "batch": 8, "length": 48}
        length, rounds = 32, 15
    stock = {"loss_type": "luspo", "scale_rewards": "none", "use_bias_correction_kl": True}
    own = {"score_correction_prompt": RETRY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = {
            "stock, two turns": build(GRPOTrainer, GRPOConfig, size, length, two_turns, **stock),
            "stock, one turn": build(GRPOTrainer, GRPOConfig, size, 2 * length, **stock),
            "SCoRe, stage 1": build(SCoReTrainer, SCoReConfig, size, length, score_stage=1, **own),
            "SCoRe, stage 2": build(SCoReTrainer, SCoReConfig, size, length, score_stage=2, **own),
        }
    steps = {name: stepper(trainer) for name, trainer in made.items()}
    for step in steps.values():  # warm up
        step()
    columns = zip(*in_turns(list(steps.values()), rounds), strict=True)
    times = dict(zip(steps, columns, strict=True))
    head = [
        "trainer",
        "step",
        "/ stock GRPO with the same two turns",
        "aim",
        "/ stock GRPO, as many tokens in one turn",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, own_times in times.items():
        ratios = [
            statistics.median(ours / theirs for ours, theirs in zip(own_times, times[other], strict=True))
            for other in ("stock, two turns", "stock, one turn")
        ]
        aim = f"{AIM:.2f}" if name.startswith("SCoRe") else ""
        lines.append(
            f"| {name} | {statistics.median(own_times) * 1e3:.0f} ms | {ratios[0]:.3f} | {aim} | {ratios[1]:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(run(quick="--quick" in sys.argv[1:]))
