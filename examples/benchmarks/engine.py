"""What the engine does besides forwards: time, tokens fed, memory."""

import time
from typing import Any

import torch
from common import NEW, Clock, PeakMemory, model, prompts, row, table
from overhead import processors

from hf_logits.processors import MixtureLogitsProcessor


def bookkeeping(lm: Any, batch: int, length: int, steps: int) -> list[float]:
    """Of each step of a processor: the share that is neither the generating model's forward nor the auxiliary one's."""
    ids = prompts(batch, length=length)
    processor, clock = (
        MixtureLogitsProcessor.cfg(lm, prompts(1, length=length, seed=1)[0].tolist(), scale=1.5),
        Clock(lm),
    )
    scores, shares = torch.randn(batch, lm.config.vocab_size), []
    for step in range(steps + 1):
        before, start = clock.seconds, time.perf_counter()
        processor(ids, scores)
        called, forward = time.perf_counter() - start, clock.seconds - before
        if step:  # the first call reads the prompt
            shares.append((called - forward) / (2 * forward))
        ids = torch.cat([ids, torch.randint(100, 40_000, (batch, 1))], dim=1)
    return shares


def memory(lm: Any, processor: Any, batch: int, steps: int = 4) -> int:
    """Peak bytes in the calls of a processor, its engine's logits and all else that lives outside of models and caches."""
    ids, scores, peak = prompts(batch), torch.randn(batch, lm.config.vocab_size), 0
    processor(ids, scores)
    for _ in range(steps):
        ids = torch.cat([ids, torch.randint(100, 40_000, (batch, 1))], dim=1)
        with PeakMemory(lm) as meter:
            processor(ids, scores)
        meter.close()
        peak = max(peak, meter.peak)
    return peak


def run(quick: bool = False) -> str:
    lm = model()
    lines = []
    length = 256 if quick else 1000
    shares = sorted(bookkeeping(lm, 8, length, 4 if quick else 20))
    middle = shares[len(shares) // 2]
    lines.append(
        row(f"bookkeeping / a step of two models, batch 8, {length} ids", (middle, shares[0], shares[-1]), 0.02)
    )

    ids, fed = prompts(1), []
    for name, (processor, forwards) in processors(lm).items():
        if name == "context-aware decoding" or name == "contrastive decoding":
            continue  # their other prompt is shorter
        scores = torch.randn(1, lm.config.vocab_size)
        for _ in range(8 if quick else NEW):
            processor(ids, scores)
            ids = torch.cat([ids, torch.randint(100, 40_000, (1, 1))], dim=1)
        read = processor.stats.tokens / sum(forwards)
        fed.append(read / (ids.shape[1] - 1 + (1 if name == "GeDi" else 0)))
        ids = prompts(1)
        if quick and name == "CFG":
            break
    lines.append(row("auxiliary tokens fed / (prompt + new tokens)", (max(fed), min(fed), max(fed)), 1.0))

    for name, (processor, forwards) in processors(lm).items():
        rows = 8 * (1 + sum(forwards))
        peak = memory(lm, processor, 8) / (rows * lm.config.vocab_size * 4)
        lines.append(row(f"peak memory of {name} / [rows, V] in float32, batch 8", (peak, peak, peak), 4.0))
        if quick and name == "CFG":
            break
    return table(["engine"], lines)


if __name__ == "__main__":
    print(run())
