"""What an objective costs beside the stock trainer: time and peak memory of a step, both in turns on the same batches.

python examples/benchmarks/trainers.py [--quick]
"""

import random
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import torch
from common import in_turns, llama, peak_memory, ready, stepper, tokenizer
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from hf_logits.trainers import FDPOConfig, FDPOTrainer, RPOConfig, RPOTrainer
from hf_logits.trainers.bco import BCOConfig, BCOTrainer
from hf_logits.trainers.entanglement import EntanglementConfig, EntanglementTrainer


class Row(NamedTuple):
    """A trainer, the stock one that it is compared with, and the largest ratios of time and memory that we aim at."""

    label: str
    ours: tuple[type, type, dict[str, Any]]
    stock: tuple[type, type, dict[str, Any]]
    time: float
    memory: float


DPO: tuple[type, type, dict[str, Any]] = (DPOTrainer, DPOConfig, {})
UNPAIRED = {
    "train_sampling_strategy": "sequential",
    "loss_type": "apo_zero_unpaired",
}  # no KL pairs, so no third forward
KTO: tuple[type, type, dict[str, Any]] = (KTOTrainer, KTOConfig, UNPAIRED)
ROWS = [
    Row("the stock trainer itself", DPO, DPO, 1.03, 1.02),
    Row("f-DPO, forward KL", (FDPOTrainer, FDPOConfig, {"divergence": "forward_kl"}), DPO, 1.03, 1.02),
    Row("f-DPO, JS", (FDPOTrainer, FDPOConfig, {"divergence": "js"}), DPO, 1.03, 1.02),
    Row("RPO, sum", (RPOTrainer, RPOConfig, {}), DPO, 1.03, 1.02),
    Row("RPO, token mean", (RPOTrainer, RPOConfig, {"rpo_reduction": "token_mean"}), DPO, 1.03, 1.02),
    Row("BCO", (BCOTrainer, BCOConfig, UNPAIRED), KTO, 1.03, 1.02),
    Row("normalised gradients, hidden", (EntanglementTrainer, EntanglementConfig, {}), DPO, 1.25, 1.02),
]


def preferences(rows: int, vocabulary: int, length: int) -> Dataset:
    """Prompts and completions of up to `length` words each."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(draw.randint(length // 2, length)))

    return Dataset.from_list([{"prompt": text() + " ", "chosen": text(), "rejected": text()} for _ in range(rows)])


def build(kind: tuple[type, type, dict[str, Any]], size: dict[str, int], folder: str) -> Any:
    trainer, config, settings = kind
    vocabulary = size["vocabulary"]
    made = trainer(
        model=llama(vocabulary, size["width"], size["layers"], 0),
        ref_model=llama(vocabulary, size["width"], size["layers"], 1),
        args=config(
            folder,
            per_device_train_batch_size=size["batch"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=preferences(8 * size["batch"], vocabulary, size["length"]),
        processing_class=tokenizer(vocabulary),
    )
    return ready(made)


def compare(row: Row, size: dict[str, int], rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        steps = [stepper(build(kind, size, folder), counted=True) for kind in (row.stock, row.ours)]
    for step in steps:  # warm up
        step()
        step()
    times = in_turns(steps, rounds)
    stock, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(after / before for before, after in times)
    memory = [peak_memory(step) for step in steps]
    cells = [
        f"{stock * 1e3:.0f} ms", f"{ours * 1e3:.0f} ms", f"{ratio:.3f}", f"{row.time:.2f}",
        f"{memory[0]:.1f} MiB", f"{memory[1]:.1f} MiB", f"{memory[1] / memory[0]:.3f}", f"{row.memory:.2f}",
    ]  # fmt: skip
    return " | ".join(["", row.label, row.stock[0].__name__, *cells, ""]).strip()


def run(quick: bool = False) -> str:
    """The measured table, in Markdown. `quick` only shows that it runs."""
    size = {"vocabulary": 512, "width": 32, "layers": 2, "batch": 2, "length": 12}
    if not quick:
        size = {"vocabulary": 4096, "width": 128, "layers": 4, "batch": 4, "length": 48}
    head = ["trainer", "stock", "stock's step", "our step", "ratio", "aim", "stock's peak", "our peak", "ratio", "aim"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    return "\n".join(lines + [compare(row, size, 3 if quick else 30) for row in ROWS])


if __name__ == "__main__":
    print(run(quick="--quick" in sys.argv[1:]))
