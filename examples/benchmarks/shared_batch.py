"""Contexts in the generating model's own batch, against the floor (a plain batch of two) and transformers' built-in guidance."""

from typing import Any

from common import NEW, alternate, decode, model, prompts, ratio, row, seconds, table

import hf_logits
from hf_logits.processors import LQCDLogitsProcessor, MixtureLogitsProcessor


TARGET, FASTER = 1.06, 1.3


def run(quick: bool = False) -> str:
    lm, ids, negative = model(), prompts(1), prompts(1, seed=1)
    other, new = negative[0].tolist(), 16 if quick else NEW
    ours = {
        "CFG": MixtureLogitsProcessor.cfg(lm, other, scale=1.5),
        "LQCD": LQCDLogitsProcessor(lm, other),
        "context-aware decoding": MixtureLogitsProcessor.context_aware(lm, other[:64], contrast=0.5),
    }
    candidates: dict[str, Any] = {
        "one row": lambda: decode(lm, ids, new=new),
        "two rows": lambda: decode(lm, prompts(2), new=new),
        "built-in": lambda: decode(lm, ids, new=new, guidance_scale=1.5, negative_prompt_ids=negative),
    }
    for name, processor in ours.items():
        candidates[name] = lambda processor=processor: decode(
            lm, ids, processor, new=new, custom_generate=hf_logits.generate
        )
    times = alternate(candidates, 1 if quick else 5)
    lines = [row("a plain batch of two / of one", ratio(times["two rows"], times["one row"]), None, "")]
    lines.append(row("built-in guidance / a batch of one", ratio(times["built-in"], times["one row"]), None, ""))
    # No loop can be faster beside the built-in guidance than a batch of two is on this machine.
    lines.append(
        row("the floor: a batch of two / built-in guidance", ratio(times["two rows"], times["built-in"]), None, "")
    )
    for name in ours:
        lines.append(
            row(f"{name} / a batch of two", ratio(times[name], times["two rows"]), TARGET, seconds(times[name]))
        )
        lines.append(
            row(f"{name} / built-in guidance", ratio(times[name], times["built-in"]), round(1 / FASTER, 3), "")
        )
    return table(["`custom_generate=hf_logits.generate`", "time"], lines)


if __name__ == "__main__":
    print(run())
