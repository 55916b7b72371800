"""What a distillation step costs: our trainer's against one on all logits, and its head against TRL's chunked kernel.

python examples/benchmarks/distillation.py [--quick]

Random Llamas with SmolLM2's vocabulary and 1,000 tokens that are learned. Time and memory are those of one forward and backward;
the candidates run in turns, in one process.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, llama, peak_memory, ratio, row, seconds, table
from torch import Tensor
from torch.nn import functional
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from hf_logits.fused_head import fused_loss
from hf_logits.trainers import LogitDistillationConfig, LogitDistillationTrainer
from hf_logits.trainers.logit_distillation import kd_rows


SIZE = {"vocabulary": 49_152, "student": 192, "teacher": 256, "rows": 2, "valid": 500}
QUICK = {"vocabulary": 512, "student": 32, "teacher": 32, "rows": 2, "valid": 20}
TEMPERATURE = 2.0


def batch(size: dict[str, int], prompt: float) -> dict[str, Tensor]:
    """Random ids; the first `prompt` of each row's positions is not learned."""
    length = round(size["valid"] / (1.0 - prompt)) + 1
    ids = torch.randint(3, size["vocabulary"], (size["rows"], length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length - size["valid"]] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def naive(student: Any, teacher: Any, inputs: dict[str, Tensor]) -> None:
    """KL and cross-entropy by autograd on the logits of all positions."""
    ids, labels = {name: inputs[name] for name in ("input_ids", "attention_mask")}, inputs["labels"][:, 1:]
    ours = student(**ids, use_cache=False).logits[:, :-1]
    with torch.no_grad():
        theirs = teacher(**ids, use_cache=False).logits[:, :-1]
    valid = (labels != -100).float()
    log_probs, target = ((logits / TEMPERATURE).log_softmax(-1) for logits in (ours, theirs))
    kl = functional.kl_div(log_probs, target, log_target=True, reduction="none").sum(-1) * TEMPERATURE**2
    ce = functional.cross_entropy(ours.flatten(0, 1), labels.flatten())
    (0.5 * (kl * valid).sum() / valid.sum() + 0.5 * ce).backward()


def steps(size: dict[str, int], prompt: float) -> dict[str, Callable[[], None]]:
    inputs = batch(size, prompt)
    student, teacher = (llama(size["vocabulary"], size[name], 1, i) for i, name in enumerate(("student", "teacher")))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"kd_weight": 0.5, "ce_weight": 0.5, "temperature": TEMPERATURE}
        arguments = LogitDistillationConfig(folder, use_cpu=True, report_to=[], **settings)  # type: ignore[arg-type]
        trainer = LogitDistillationTrainer(student, teacher, arguments)
    items = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))

    def ours() -> None:
        student.zero_grad()
        trainer.training_step(student, inputs, items)

    def stock() -> None:
        student.zero_grad()
        naive(student.train(), teacher, inputs)

    ours()
    mine = {name: value.grad.clone() for name, value in student.named_parameters()}
    stock()
    for name, value in student.named_parameters():
        torch.testing.assert_close(mine[name], value.grad, rtol=1e-3, atol=1e-6)
    return {"ours": ours, "stock": stock}


def heads(size: dict[str, int]) -> dict[str, Callable[[], None]]:
    """The KL of what two heads make of hidden states, as TRL has it: at temperature 1, without labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = size["rows"] * size["valid"]
    hidden, taught = (torch.randn(tokens, size[name], generator=generator) for name in ("student", "teacher"))
    head, teacher = (torch.nn.Linear(size[name], size["vocabulary"], bias=False) for name in ("student", "teacher"))
    hidden.requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long)

    def loss(student: Tensor, target: Tensor | None, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert target is not None
        return kd_rows(student, target, divergence="forward_kl", temperature=1.0).sum(), {}

    def ours() -> None:
        head.weight.grad = hidden.grad = None
        total, _ = fused_loss(hidden, head, labels, loss, chunk_size=128, teacher_hidden=taught, teacher_head=teacher)
        total.backward()

    def stock() -> None:
        head.weight.grad = hidden.grad = None
        found, _ = ChunkedDivergenceFunction.apply(hidden, head.weight, None, taught, teacher.weight, None, 0.0)
        found.sum().backward()

    return {"ours": ours, "stock": stock}


def lines(
    what: str, candidates: dict[str, Callable[[], None]], repeats: int, aims: tuple[float, float]
) -> list[list[str]]:
    times = alternate(candidates, repeats)
    memory = {name: peak_memory(run) for name, run in candidates.items()}
    share = memory["ours"] / memory["stock"]
    spent = [seconds(times[name]) for name in ("stock", "ours")]
    held = [f"{memory[name]:.1f} MiB" for name in ("stock", "ours")]
    return [
        row(f"{what}, time", ratio(times["ours"], times["stock"]), aims[0], *spent),
        row(f"{what}, extra memory", (share, share, share), aims[1], *held),
    ]


def run(quick: bool = False) -> str:
    """The measured table, in Markdown. `quick` only shows that it runs."""
    size, repeats = (QUICK, 1) if quick else (SIZE, 5)
    found = []
    for prompt in (0.4, 0.0):
        what = f"KD + CE step, {prompt:.0%} of the tokens a prompt, against all logits"
        found += lines(what, steps(size, prompt), repeats, (0.60, 0.20))
    found += lines("KL through the heads alone, against TRL's kernel", heads(size), repeats, (0.60, 0.40))
    return table(["what", "theirs", "ours"], found)


if __name__ == "__main__":
    print(run(quick="--quick" in sys.argv[1:]))
