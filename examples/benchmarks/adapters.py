"""The base and two LoRA experts of one model: one forward with three adapters against three forwards."""

import warnings
from typing import Any

from common import NEW, alternate, decode, model, prompts, ratio, row, seconds, table
from peft import LoraConfig, get_peft_model

from hf_logits import AuxiliaryLM
from hf_logits.auxiliary import BASE, Context


TARGET = 0.70
TARGETS = {"queries and values": ["q_proj", "v_proj"]}


def measure(lora: LoraConfig, new: int, repeats: int) -> dict[str, list[float]]:
    lm: Any = get_peft_model(model(), lora, adapter_name="first")
    lm.add_adapter("second", lora)
    lm.eval()
    ids, names = prompts(1), (BASE, "first", "second")
    text = decode(lm, ids, new=new)

    def follow(*adapters: str) -> None:
        """Read the prompt and then token by token."""
        engine = AuxiliaryLM(lm, [Context(adapter=adapter) for adapter in adapters])
        for length in range(ids.shape[1], text.shape[1]):
            engine(text[:, :length])

    def plain() -> None:
        with lm.disable_adapter():
            decode(lm, ids, new=new)
        for name in names[1:]:
            lm.set_adapter(name)
            decode(lm, ids, new=new)

    def three() -> None:
        """No adapter at all: what three rows cost on this machine."""
        with lm.disable_adapter():
            decode(lm, prompts(3), new=new)

    return alternate({"together": lambda: follow(*names), "plain": plain, "three rows": three}, repeats)


def run(quick: bool = False) -> str:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    lines = []
    for what, targets in TARGETS.items():
        lora = LoraConfig(r=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        times = measure(lora, 16 if quick else NEW, 1 if quick else 5)
        together, name = times["together"], f"LoRA on {what}"
        lines.append(
            row(f"{name} / plain generate() of each", ratio(together, times["plain"]), TARGET, seconds(together))
        )
        floor = ratio(times["three rows"], times["plain"])
        lines.append(
            row("the floor: the base alone on three rows / the same", floor, None, seconds(times["three rows"]))
        )
    return table(["base and two adapters in one forward", "time"], lines)


if __name__ == "__main__":
    print(run())
