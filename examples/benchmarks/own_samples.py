"""What an objective on the model's own samples costs beside stock GRPO: a step that generates and trains on as many tokens.

python examples/benchmarks/own_samples.py [--quick]
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import in_turns, llama, ready, stepper, tokenizer
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hf_logits.trainers import TRICEConfig, TRICETrainer


class Row(NamedTuple):
    """A trainer, the settings with which it generates and trains on `rows` completions a step, and the largest ratio that we aim at."""

    label: str
    trainer: type
    config: type
    settings: Callable[[int], dict[str, Any]]
    time: float
    prepare: Callable[[Any], Any] = lambda trainer: None


def grpo(rows: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": rows, "num_generations": 2, "loss_type": "dr_grpo"}


def trice(rows: int) -> dict[str, Any]:
    """Half of a generation batch are proposals; as many of its rows are trained on."""
    return {"per_device_train_batch_size": 2 * rows, "subsample_size": rows}


STOCK = Row("GRPO", GRPOTrainer, GRPOConfig, grpo, 1.05)
ROWS = [
    STOCK._replace(label="the stock trainer itself"),
    Row("TRICE", TRICETrainer, TRICEConfig, trice, 1.05, lambda trainer: trainer.init_memory()),
]


def verifier(completions: list[str], **_: Any) -> list[float]:
    """Right or wrong by the last letter: about half of each."""
    return [float(text[-1:] in "02468") for text in completions]


def build(row: Row, size: dict[str, int], folder: str) -> Any:
    vocabulary, draw = size["vocabulary"], random.Random(0)
    model = llama(vocabulary, size["width"], size["layers"], 0)
    made = row.trainer(
        model=model,
        reward_funcs=verifier,
        args=row.config(
            folder,
            max_completion_length=size["length"],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            **row.settings(size["batch"]),
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(size["length"]))}
                for _ in range(4 * size["batch"])
            ]
        ),
        processing_class=tokenizer(vocabulary),
    )
    row.prepare(made)
    return ready(made)


class Tokens:
    """Counts what is generated, and what is learned from, in the backbone's forwards."""

    def __init__(self, trainer: Any):
        self.generated = self.trained = 0
        trainer.model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if torch.is_grad_enabled():
            self.trained += ids.numel()
        else:
            self.generated += ids.numel()


def compare(row: Row, size: dict[str, int], rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        trainers = [build(one, size, folder) for one in (STOCK, row)]
        counts, steps = [Tokens(one) for one in trainers], [stepper(one) for one in trainers]
        for step in steps:  # warm up
            step()
            step()
        for count in counts:
            count.generated = count.trained = 0
        times = in_turns(steps, rounds)
    stock, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(after / before for before, after in times)
    tokens = [getattr(counts[1], kind) / getattr(counts[0], kind) for kind in ("generated", "trained")]
    cells = [f"{stock * 1e3:.0f} ms", f"{ours * 1e3:.0f} ms", f"{ratio:.3f}", f"{row.time:.2f}"]
    return " | ".join(["", row.label, f"{tokens[0]:.2f}", f"{tokens[1]:.2f}", *cells, ""]).strip()


def run(quick: bool = False) -> str:
    """The measured table, in Markdown. `quick` only shows that it runs."""
    size = {"vocabulary": 512, "width": 32, "layers": 2, "batch": 8, "length": 6}
    if not quick:
        size = {"vocabulary": 4096, "width": 128, "layers": 4, "batch": 16, "length": 48}
    head = ["trainer", "tokens generated", "tokens trained on", "GRPO's step", "our step", "ratio", "aim"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    return "\n".join(lines + [compare(row, size, 3 if quick else 20) for row in ROWS])


if __name__ == "__main__":
    print(run(quick="--quick" in sys.argv[1:]))
