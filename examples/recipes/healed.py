"""The small model of the methods that need a pair: some layers of the large one, and an adapter that heals the cut."""

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from hf_logits.fewer_layers import keep_layers


HEALED = Path(__file__).parent / "entropy_adaptive" / "healed"
"""The adapter of train.py there, and `layers.json`."""
LAYERS = "layers.json"


def kept_layers(folder: Path) -> list[int]:
    return json.loads((folder / LAYERS).read_text(encoding="utf-8"))["kept_layers"]


def healed(model: PreTrainedModel, folder: Path = HEALED) -> PreTrainedModel:
    """The small model, with weights of its own."""
    part = keep_layers(model, kept_layers(folder), share=False)
    return PeftModel.from_pretrained(part, str(folder)).merge_and_unload().eval()
