"""What a processor adds to the models that it reads: time a token against the plain models, run alone one after the other."""

from functools import partial
from typing import Any

from common import NEW, alternate, decode, model, prompts, ratio, row, seconds, table

from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    GeDiLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    SteerLogitsProcessor,
)


TARGET = 1.05
SAME = ("context-aware decoding", "contrastive decoding", "DExperts, one expert")
"""Mixtures like CFG."""


def processors(lm: Any) -> dict[str, tuple[Any, list[int]]]:
    """Each with the contexts of each of its forwards: GeDi's two codes are two rows of one forward."""
    other = prompts(1, seed=1)[0].tolist()
    return {
        "CFG": (MixtureLogitsProcessor.cfg(lm, other, scale=1.5), [1]),
        "context-aware decoding": (MixtureLogitsProcessor.context_aware(lm, other[:64], contrast=0.5), [1]),
        "contrastive decoding": (MixtureLogitsProcessor.contrastive(lm), [1]),
        "DExperts, one expert": (MixtureLogitsProcessor.dexperts(lm, None, weight=2.0), [1]),
        "LQCD": (LQCDLogitsProcessor(lm, other), [1]),
        "STEER, base and negatives": (SteerLogitsProcessor(model=lm, base_model=lm, negatives=other), [2]),
        "GeDi": (GeDiLogitsProcessor(lm, desired=1000, undesired=2000), [2]),
        "dynamic fusion, exact": (DynamicFusionLogitsProcessor(lm, [lm], solver="exact"), [2]),
        "dynamic fusion, grid": (DynamicFusionLogitsProcessor(lm, [lm]), [2]),
    }


def measure(lm: Any, chosen: dict[str, tuple[Any, list[int]]], batch: int, new: int, repeats: int) -> list[list[str]]:
    ids = prompts(batch)
    sizes = sorted({batch, *(rows * batch for _, forwards in chosen.values() for rows in forwards)})
    candidates: dict[str, Any] = {f"plain {rows}": partial(decode, lm, prompts(rows), new=new) for rows in sizes}
    candidates |= {name: partial(decode, lm, ids, processor, new=new) for name, (processor, _) in chosen.items()}
    times = alternate(candidates, repeats)
    lines = []
    for name, (_, forwards) in chosen.items():
        alone = [times[f"plain {batch}"], *(times[f"plain {rows * batch}"] for rows in forwards)]
        lines.append(row(name, ratio(times[name], *alone), TARGET, str(batch), seconds(times[name])))
    return lines


def run(quick: bool = False) -> str:
    lm = model()
    chosen = processors(lm)
    shown = ("CFG", "GeDi") if quick else [name for name in chosen if name not in SAME]
    chosen = {name: chosen[name] for name in shown}
    lines = measure(lm, chosen, 1, 16 if quick else NEW, 1 if quick else 5)
    if not quick:  # in a batch the arithmetic weighs more: the cheapest and the dearest
        chosen = {name: chosen[name] for name in ("CFG", "dynamic fusion, exact")}
        lines += measure(lm, chosen, 8, NEW, 5)
    return table(["processor", "batch", "time"], lines)


if __name__ == "__main__":
    print(run())
