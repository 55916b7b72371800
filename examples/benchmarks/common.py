"""What the benchmarks share: the model, times taken in alternation, memory, tables.

These machines are noisy, so a time alone says little. All candidates of a table run in turn, in one process, as often as asked
for; medians of the same turns are divided.
"""

import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2 import load  # noqa: E402


PROMPT, NEW = 128, 64
"""Tokens of a prompt, and tokens generated behind it."""


def model() -> PreTrainedModel:
    """SmolLM2-135M, which never ends a text."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded, _ = load()
    loaded.generation_config.update(eos_token_id=None, pad_token_id=2, do_sample=False, temperature=None, top_p=None)
    return loaded


def llama(vocabulary: int, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **heads))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """As many whole words as the vocabulary has."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(3, vocabulary))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts(rows: int, *, length: int = PROMPT, seed: int = 0) -> Tensor:
    """Random ids: nothing that a benchmark measures here depends on what they mean."""
    return torch.randint(100, 40_000, (rows, length), generator=torch.Generator().manual_seed(seed))


def decode(generating: Any, ids: Tensor, *processors: Any, new: int = NEW, **settings: Any) -> Tensor:
    for processor in processors:
        processor.reset()  # the engine knows the prompt from the turn before, which a user's next prompt would not be
    return generating.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        logits_processor=list(processors),
        **settings,
    )


def alternate(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other and again, after a first turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def in_turns(steps: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each step, round by round, every other round from the last to the first. Steps warm up before."""
    times = []
    for index in range(rounds):
        taken = [0.0] * len(steps)
        for place in range(len(steps)) if index % 2 else reversed(range(len(steps))):
            start = time.perf_counter()
            steps[place]()
            taken[place] = time.perf_counter() - start
        times.append(tuple(taken))
    return times


def ready(trainer: Any) -> Any:
    """As the trainer's own `train` makes it ready for a step."""
    trainer.model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def stepper(trainer: Any, *, counted: bool = False) -> Callable[[], None]:
    """A call: whatever a training step does up to its backward, on the same batches in the same order.

    Args:
        counted: whether the trainer counts what a loss is divided by, as `train` would have it.
    """
    batches = list(trainer.get_train_dataloader())
    count = -1

    def step() -> None:
        nonlocal count
        count += 1
        batch, items = batches[count % len(batches)], None
        if counted:
            (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batch, items)
        trainer.model.zero_grad(set_to_none=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def ratio(above: list[float], *below: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest over the turns of `above` divided by the sum of the others in the same turn."""
    turns = [a / sum(rest) for a, *rest in zip(above, *below, strict=True)]
    return statistics.median(turns), min(turns), max(turns)


def seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.3g} s"


def row(what: str, measured: tuple[float, float, float], target: float | None, *details: str) -> list[str]:
    """A line: ratio, spread, target, and whether it is met; further columns stand before them."""
    middle, low, high = measured
    verdict = "" if target is None else "met" if middle <= target else "missed"
    return [
        what,
        *details,
        f"**{middle:#.3g}**",
        f"{low:#.3g} to {high:#.3g}",
        "" if target is None else f"≤ {target:g}",
        verdict,
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    columns = [*head, "ratio", "spread", "target", ""]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def peak_memory(step: Callable[[], None]) -> float:
    """MiB that a step allocates at its peak beyond what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


class Clock:
    """Time spent in the forwards of some models."""

    def __init__(self, *models: Any):
        self.seconds, self._depth, self._start = 0.0, 0, 0.0
        for each in models:
            each.register_forward_pre_hook(self._enter)
            each.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._start = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._start


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made in this scope held at once; what a model makes inside its forward is left out."""

    def __init__(self, *models: Any):
        super().__init__()
        self.now = self.peak = 0
        self._inside = 0
        self._known: set[int] = set()
        self._handles = [h for each in models for h in self._watch(each)]

    def _watch(self, each: Any) -> Iterator[Any]:
        yield each.register_forward_pre_hook(lambda *_: setattr(self, "_inside", self._inside + 1))

        def leave(module: Any, inputs: Any, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                self._count(output.logits)

        yield each.register_forward_hook(leave)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._inside:
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage.data_ptr() in self._known:
            return
        key, size = storage.data_ptr(), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
