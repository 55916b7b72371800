"""What SCoRe does, seen on a toy: sums of two digits, modulo ten, answered twice, with a verifier that knows the answer.

    python examples/alignment/self_correction.py

A small language model, trained here from scratch, answers right every other time; asked again, it mostly repeats itself. From there
SCoRe in its two stages is compared with stage 2 alone, and with plain reinforcement of both attempts (no reward for progress), for as
many steps, with several seeds. About ten minutes on two cores; leaves a table and a figure.
"""  # the README beside this file shows both

import argparse
import os
import random
import statistics
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_logits.trainers import SCoReConfig, SCoReTrainer


RETRY = "again"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LEARNING_RATES = {1: 1e-3, 2: 2e-4}
"""Of each stage. Were the second one faster, every first attempt would be right before anything else happens."""
ARMS = {
    "SCoRe": "stage 1, then stage 2",
    "stage 2 alone": "both attempts, progress pays",
    "plain RL": "both attempts, progress does not pay",
}
COLUMNS = {
    "accuracy_1": "first attempt right",
    "accuracy_2": "second attempt right",
    "delta": "difference",
    "incorrect_to_correct": "mended",
    "correct_to_incorrect": "spoilt",
    "edit_ratio": "changed",
}


# --- the toy -------------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", "+", RETRY, *map(str, range(10))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    found.chat_template = TEMPLATE
    return found


def sums() -> Dataset:
    """All hundred."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{a} + {b}"}], "answer": str((a + b) % 10)} for a, b in pairs]
    )


def verifier(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(one[0]["content"].strip() == right) for one, right in zip(completions, answer, strict=True)]


def start(folder: Path, seed: int, steps: int) -> Path:
    """The model before: right half of the time, and when asked again it says the same in four of five cases."""
    draw, made = random.Random(seed), tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(made), "pad_token_id": made.pad_token_id, "eos_token_id": made.eos_token_id}
    # Five times the usual spread: from small weights so small a model takes long to find out that both digits matter.
    shape = {"num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, **shape))

    def guess(right: int) -> int:
        return right if draw.random() < 0.45 else draw.randrange(10)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps)
        texts = []
        for _ in range(128):
            a, b = draw.randrange(10), draw.randrange(10)
            first = guess((a + b) % 10)
            second = first if draw.random() < 0.8 else guess((a + b) % 10)
            turns = (f"user {a} + {b}", f"assistant {first}", f"user {RETRY}", f"assistant {second}")
            texts.append(" <eos> ".join(turns) + " <eos>")  # as the template writes it, only sooner
        batch = torch.tensor(made(texts)["input_ids"])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


# --- training ------------------------------------------------------------------------------------------------------------


def stage(
    number: int, source: Path, folder: Path, seed: int, steps: int, repeats: int, **more: Any
) -> list[dict[str, float]]:
    """One stage from the weights in `source`; saves its own in `folder`. Returns what was measured on the way."""
    args = SCoReConfig(
        output_dir=str(folder),
        score_stage=number,
        score_correction_prompt=RETRY,
        per_device_train_batch_size=64,
        num_generations=8,
        per_device_eval_batch_size=100,
        num_generations_eval=1,
        max_completion_length=2,
        max_steps=steps,
        learning_rate=LEARNING_RATES[number],
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        eval_on_start=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=max(steps // 10, 1),
        disable_tqdm=True,
        seed=seed,
        **more,
    )
    trainer = SCoReTrainer(
        str(source), verifier, args, train_dataset=sums(), eval_dataset=sums().select([*range(100)] * repeats)
    )
    trainer.train()
    trainer.save_model(str(folder))
    log = [entry for entry in trainer.state.log_history if "eval_score/delta" in entry]
    return [{name: entry[f"eval_score/{name}"] for name in COLUMNS} | {"step": entry["step"]} for entry in log]


def arms(source: Path, folder: Path, seed: int, steps: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every arm takes `2 * steps` steps."""
    first = stage(1, source, folder / "first", seed, steps, repeats, score_beta2=1.0)
    second = stage(2, folder / "first", folder / "second", seed, steps, repeats)
    for row in second:
        row["step"] += steps
    return {
        "SCoRe": first + second[1:],
        "stage 2 alone": stage(2, source, folder / "alone", seed, 2 * steps, repeats),
        "plain RL": stage(2, source, folder / "plain", seed, 2 * steps, repeats, score_alpha=0.0),
    }


# --- table and figure ----------------------------------------------------------------------------------------------------


def table(results: list[dict[str, list[dict[str, float]]]], steps: int) -> str:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "--:|" * len(COLUMNS)]
    rows = [("before", "SCoRe", 0), ("SCoRe, after stage 1", "SCoRe", steps)]
    for label, arm, step in [*rows, *((arm, arm, 2 * steps) for arm in ARMS)]:
        cells = []
        for name in COLUMNS:
            values = [next(row[name] for row in found[arm] if row["step"] == step) for found in results]
            spread = f" ± {100 * statistics.stdev(values):.0f}" if len(values) > 1 else ""
            cells.append(f"{100 * statistics.mean(values):.0f}{spread}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, list[dict[str, float]]]], steps: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, (arm, title) in zip(axes, ARMS.items(), strict=True):
        for found in results:
            for name, color in (("accuracy_1", "#7f8c8d"), ("accuracy_2", "#1e8449"), ("edit_ratio", "#d68910")):
                label = COLUMNS[name] if found is results[0] and axis is axes[1] else None
                at = [row["step"] for row in found[arm]]
                axis.plot(at, [row[name] for row in found[arm]], color=color, label=label, linewidth=1.3)
        if arm == "SCoRe":
            axis.axvline(steps, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(f"{arm}: {title}", fontsize=10)
        axis.set_xlabel("step")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("share of the answers")
    axes[1].legend(frameon=False, fontsize=9, loc="center")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output" / "self_correction")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps of a stage; the other arms take twice as many"
    )
    parser.add_argument("--start-steps", type=int, default=800, help="optimizer steps of the model before")
    parser.add_argument("--repeats", type=int, default=4, help="answers to each sum in an evaluation")
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        folder = options.output / f"seed{seed}"
        results.append(
            arms(start(folder / "start", seed, options.start_steps), folder, seed, options.steps, options.repeats)
        )
    text = table(results, options.steps)
    print(text)
    (options.output / "self_correction.md").write_text(text + "\n")
    draw(results, options.steps, options.output / "self_correction.png")
    print(f"figure: {options.output / 'self_correction.png'}")


if __name__ == "__main__":
    main()
