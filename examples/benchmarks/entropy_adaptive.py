"""Entropy-adaptive decoding where only the model at work runs, against what its share of either model would cost alone.

For batches there are two policies. *Catch-all*: as soon as one row needs a model, it reads all rows. *Regrouping*: a model reads
the rows that need it, each from where it was left. Here both are played again from one recorded run, forward by forward;
regrouping gets its moving of caches for nothing.
"""

from typing import Any

import torch
from common import NEW, alternate, decode, model, prompts, ratio, row, seconds, table
from torch import Tensor
from transformers import DynamicCache

import hf_logits
from hf_logits import AuxiliaryLM
from hf_logits.fewer_layers import keep_layers
from hf_logits.generation import CACHE
from hf_logits.processors import EntropyAdaptiveLogitsProcessor


TARGET = 1.10
Forwards = list[tuple[int, list[int]]]
"""Model (1: the large one), and how many tokens each of its rows reads."""


def schedule(chose: Tensor, prompt: int, *, everybody: bool) -> Forwards:
    """The forwards that a run with these choices `[R, T]` needs."""
    forwards: Forwards = []
    read = torch.zeros(2, len(chose), dtype=torch.long)
    before = torch.zeros(len(chose), dtype=torch.bool)
    for at, now in enumerate(chose.bool().T):
        for which in (0, 1):
            # The model that is left reads the token too: its entropy made the change.
            wanted = (now == bool(which)) | (before == bool(which))
            if wanted.any():
                rows = torch.ones_like(wanted) if everybody else wanted
                forwards.append((which, (prompt + at - read[which][rows]).tolist()))
                read[which][rows] = prompt + at
        before = now
    return forwards


def player(models: list[Any], forwards: Forwards, length: int) -> Any:
    """Runs such forwards on caches of about their length; rows that miss less than others are padded, as they would be."""
    caches: dict[tuple[int, int], DynamicCache] = {}

    @torch.no_grad()
    def play() -> None:
        for which, missing in forwards:
            rows, width = len(missing), max(missing)
            cache = caches.setdefault((which, rows), DynamicCache())
            past = 0 if width >= length // 2 else length
            if past and cache.get_seq_length() == 0:
                models[which](prompts(rows, length=past), **{CACHE: cache}, logits_to_keep=1)
            own = cache if past else DynamicCache()
            models[which](prompts(rows, length=width), **{CACHE: own}, logits_to_keep=1)
            if past:
                cache.crop(-width)

    return play


def run(quick: bool = False) -> str:
    large = model()
    small, new = keep_layers(large, range(10), share=False), 16 if quick else NEW
    lines = []
    for batch in (1,) if quick else (1, 8):
        ids = prompts(batch)
        free = EntropyAdaptiveLogitsProcessor(large, threshold=0.0, window=1, min_stay=1, entropy_of="small")
        decode(small, ids, free, new=new)
        settings = {"threshold": float(free.stats.trace["entropy"].median()), "window": 5, "min_stay": 5}
        processor = EntropyAdaptiveLogitsProcessor(large, **settings)
        beside = EntropyAdaptiveLogitsProcessor(large, **settings)
        output = decode(small, ids, processor, new=new, custom_generate=hf_logits.generate)
        chose = processor.stats.trace["large"]
        share, here = processor.cost(small).share, f"batch {batch}, share {processor.cost(small).share:.2f}"
        together = schedule(chose, ids.shape[1], everybody=True)

        def replay(together: Forwards = together, output: Tensor = output, ids: Tensor = ids) -> None:
            """The forwards of the loop and nothing else."""
            engines, length = [AuxiliaryLM(small), AuxiliaryLM(large)], [0, 0]
            for which, missing in together:
                length[which] += missing[0]
                engines[which](output[:, : length[which]])

        candidates: dict[str, Any] = {
            "large": lambda ids=ids: decode(large, ids, new=new),
            "small": lambda ids=ids: decode(small, ids, new=new),
            "loop": lambda ids=ids, p=processor: decode(small, ids, p, new=new, custom_generate=hf_logits.generate),
            "beside": lambda ids=ids, p=beside: decode(small, ids, p, new=new),
            "forwards": replay,
            "large prompt": lambda ids=ids: decode(large, ids, new=1),
            "small prompt": lambda ids=ids: decode(small, ids, new=1),
        }
        if batch > 1:
            candidates.clear()
            apart = schedule(chose, ids.shape[1], everybody=False)
            candidates["catch-all"] = player([small, large], together, ids.shape[1] + new // 2)
            candidates["regrouped"] = player([small, large], apart, ids.shape[1] + new // 2)
        times = alternate(candidates, 1 if quick else 5)
        if batch > 1:
            lines.append(row("catch-all / regrouping", ratio(times["catch-all"], times["regrouped"]), None, here, ""))
            continue
        alone = [share * a + (1 - share) * b for a, b in zip(times["large"], times["small"], strict=True)]
        # Both models read the prompt, and alone only one does: the same without the prompts.
        both = [a + b for a, b in zip(times["large prompt"], times["small prompt"], strict=True)]
        behind = {
            name: [t - p for t, p in zip(times[name], prompt, strict=True)]
            for name, prompt in (
                ("large", times["large prompt"]),
                ("small", times["small prompt"]),
                ("loop", both),
                ("forwards", both),
            )
        }
        tokens = [share * a + (1 - share) * b for a, b in zip(behind["large"], behind["small"], strict=True)]
        lines += [
            row("behind the prompt: the loop / its shares", ratio(behind["loop"], tokens), TARGET, here, ""),
            row("behind the prompt: its forwards alone / the same", ratio(behind["forwards"], tokens), None, here, ""),
            row(
                "the loop / its shares of both models alone",
                ratio(times["loop"], alone),
                TARGET,
                here,
                seconds(times["loop"]),
            ),
            row("its forwards alone / the same (the floor)", ratio(times["forwards"], alone), None, here, ""),
            row("the loop / its forwards alone", ratio(times["loop"], times["forwards"]), None, here, ""),
            row("the loop / the processor beside generate()", ratio(times["loop"], times["beside"]), None, here, ""),
            row("the loop / the large model alone", ratio(times["loop"], times["large"]), None, here, ""),
        ]
    return table(["entropy-adaptive decoding", "", "time"], lines)


if __name__ == "__main__":
    print(run())
