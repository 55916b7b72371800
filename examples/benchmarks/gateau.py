"""Attention of a response on its context: read behind a cached prompt, against all of it written out.

SmolLM2-135M, a context of 2,048 tokens, a response of 64, eight segments. "Eager" writes `[tokens, tokens]` in each layer and
drops it before the next one, which is the best that it can do; keeping all layers, as `output_attentions=True` does, would take
as much again for each of them. Plain SDPA over the same tokens, which shows no attention, is the floor.
"""

from collections.abc import Callable
from typing import Any

import common
import torch
from common import alternate, peak_memory, prompts, ratio, row, seconds, table
from torch import Tensor

from hf_logits.trainers.gateau import segment_attention


TARGETS = {"behind a cached prompt": (1.0, 0.5)}


@torch.no_grad()
def written_out(model: Any, ids: Tensor, response: int, segments: list[tuple[int, int]]) -> Tensor:
    found: list[Tensor] = []

    def look(module: Any, args: Any, output: Any) -> None:
        found.append(output[1][0, :, -response:].float().mean((0, 1)))

    handles = [layer.self_attn.register_forward_hook(look) for layer in model.model.layers]
    model.set_attn_implementation("eager")
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    mean = torch.stack(found).mean(0)
    return torch.stack([mean[start:end].mean() for start, end in segments])


def run(quick: bool = False) -> str:
    length, response = (256, 16) if quick else (2048, 64)
    model: Any = common.model()
    ids = prompts(1, length=length + response)
    size = length // 8
    segments = [(start, start + size) for start in range(0, length, size)]
    given = ids[0].tolist()

    def floor() -> None:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)

    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: written_out(model, ids, response, segments),
        "behind a cached prompt": lambda: segment_attention(model, given[:length], given[length:], segments),
        "SDPA, no attention shown": floor,
    }
    expected, found = ways["eager"]().double(), ways["behind a cached prompt"]()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-3, error
    memory = {name: peak_memory(way) for name, way in ways.items()}
    times = alternate(ways, 1 if quick else 3)
    lines = []
    for name, taken in times.items():
        target, largest = TARGETS.get(name, (None, None))
        share = memory[name] / memory["eager"]
        aim = "" if largest is None else f" (≤ {largest:g})"
        lines.append(
            row(
                name,
                ratio(taken, times["eager"]),
                target,
                seconds(taken),
                f"{memory[name]:.1f} MiB",
                f"{share:.2f}{aim}",
            )
        )
    return table(["attention of the response", "time", "peak memory", "memory / eager"], lines)


if __name__ == "__main__":
    print(run())
