"""Recipes: decoding methods shared as data, the way models are.

A recipe is a file, `logits_processor.json`, that names methods, their hyper-parameters and their auxiliary models, and what
little belongs to it beside it: tensors, adapters, small models, as safetensors. It lies alone in a repository or next to the
weights of the model that it steers.

A recipe is data from strangers. Methods come from a closed table, never from a name in the recipe. Nothing is
unpickled, no code of a repository is run, paths can't leave the recipe's folder, sizes are bounded, and every fault is a
[`RecipeError`] that names the file, the key and the fix.
"""

import importlib
import inspect
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from hf_logits.fewer_layers import keep_layers
from hf_logits.prompts import last_token
from hf_logits.recipe_format import (
    ADAPTERS,
    COMMIT,
    FOLDER,
    METHOD_OF,
    METHODS,
    RECIPE_FILE,
    RUNTIME,
    SCHEMA_VERSION,
    TENSOR_FILE,
    RecipeError,
    checksum,
    is_repo_id,
)
from hf_logits.recipe_reader import RecipeReader


__all__ = ["RecipeError", "SharedAsRecipe", "load_recipe", "origin_of", "save_recipe"]

logger = logging.get_logger(__name__)
Processor = TypeVar("Processor")


class SharedAsRecipe:
    """Save, load and push for processors; the ecosystem's three methods, on one processor."""

    def saved_arguments(self) -> dict[str, Any]:
        """The constructor's arguments as data. Methods that take text override this and give token ids."""
        own = vars(self)
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in RUNTIME]
        return {name: own[name] if name in own else own[f"_{name}"] for name in names}

    def save_pretrained(self, save_directory: str | Path, *, main_model: Any = None) -> None:
        """Write the recipe of this processor. See [`save_recipe`]."""
        save_recipe([cast(LogitsProcessor, self)], save_directory, main_model=main_model)

    @classmethod
    def from_pretrained(cls: type[Processor], recipe: str | Path, **kwargs: Any) -> Processor:
        """The processor of a recipe. See [`load_recipe`]; further keyword arguments replace those of the recipe."""
        names = {*inspect.signature(load_recipe).parameters} - {"overrides"}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        processors = load_recipe(recipe, overrides=kwargs, **options)
        if len(processors) != 1 or not isinstance(processors[0], cls):
            found = ", ".join(type(processor).__name__ for processor in processors)
            raise RecipeError(
                f"{recipe} holds {found}, not one {cls.__name__}: use load_recipe(), or the class that it holds."
            )
        return processors[0]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the recipe of this processor. See [`~hf_logits.sharing.push_recipe`]."""
        sharing = importlib.import_module("hf_logits.sharing")  # which needs this module
        return sharing.push_recipe([cast(LogitsProcessor, self)], repo_id, **kwargs)


# --- saving ----------------------------------------------------------------------------------------------------------------


def save_recipe(
    processors: Sequence[LogitsProcessor],
    save_directory: str | Path,
    *,
    main_model: PreTrainedModel | PeftModel | None = None,
) -> None:
    """Write processors as one recipe, in their order.

    Auxiliary models that came from the Hub are stored as repository and commit, adapters and models without such an origin
    with their weights beside the recipe; of a part of the main model's layers ([`~hf_logits.fewer_layers.keep_layers`]) the list is enough. That includes models that were trained since they came: their weights are compared
    with those in the Hub's cache. The recipe itself is written last: a run that dies leaves the old one, which its checksums
    may refuse.

    Args:
        processors (`Sequence[LogitsProcessor]`): processors of this package.
        save_directory (`str` or `Path`):
            A folder, made if need be. It may hold a model already; `auxiliary_<number>` in it belongs to the recipe.
        main_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The generating model. Auxiliaries that are this very object are stored as such, and share its weights on load.

    Raises:
        RecipeError: a processor of another package, or an argument (a function, say) that is no data.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".recipe-") as staging:
        encoder = _Encoder(Path(staging), main_model)
        entries = [encoder.processor(processor) for processor in processors]
        if not entries:
            raise RecipeError("There is nothing to save: give at least one processor.")
        if encoder.tensors:
            save_file(encoder.tensors, Path(staging, TENSOR_FILE), metadata={"format": "pt"})
        files = {
            path.relative_to(staging).as_posix(): checksum(path)
            for path in sorted(Path(staging).rglob("*"))
            if path.is_file()
        }
        recipe = {"schema_version": SCHEMA_VERSION, "processors": entries, "models": encoder.models, "files": files}
        Path(staging, RECIPE_FILE).write_text(
            json.dumps(recipe, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
        for path in folder.iterdir():  # what an older recipe had beside it
            if FOLDER.fullmatch(path.name):
                shutil.rmtree(path)
        (folder / TENSOR_FILE).unlink(missing_ok=True)
        for name in files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(staging, name), target)
        os.replace(Path(staging, RECIPE_FILE), folder / RECIPE_FILE)


class _Encoder:
    """Arguments as JSON; models and tensors beside it."""

    def __init__(self, folder: Path, main_model: Any):
        self.folder, self.main_model = folder, main_model
        self.tensors: dict[str, Tensor] = {}
        self.models: list[dict[str, Any]] = []
        self._known: list[Any] = []

    def processor(self, processor: LogitsProcessor) -> dict[str, Any]:
        method = METHOD_OF.get(type(processor).__name__)
        if method is None or not isinstance(processor, SharedAsRecipe):
            raise RecipeError(f"{type(processor).__name__} is no method of hf_logits ({sorted(METHODS.values())}).")
        arguments = {name: self.value(name, value) for name, value in processor.saved_arguments().items()}
        return {"method": method, "arguments": arguments}

    def value(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            key = f"tensor_{len(self.tensors)}"
            self.tensors[key] = value.detach().cpu().contiguous().clone()
            return {"$tensor": key}
        if isinstance(value, PreTrainedModel | PeftModel):
            return {"$model": self.model(value)}
        if value is last_token:
            return {"$prompt": "last_token"}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"$term": {field: self.value(name, item) for field, item in zip(value._fields, value, strict=True)}}
        if isinstance(value, Mapping):
            return {"$map": [[self.value(name, _as_list(key)), self.value(name, item)] for key, item in value.items()]}
        if isinstance(value, Sequence):
            return [self.value(name, item) for item in value]
        raise RecipeError(
            f"{name} is a {type(value).__name__}, which cannot be saved as data: use text, token ids, tensors, or a mapping from "
            "prompt to prompt in place of a function."
        )

    def model(self, model: Any) -> int:
        for index, known in enumerate(self._known):
            if known is model:
                return index
        index = len(self._known)
        self._known.append(model)
        self.models.append({})
        self.models[index] = self._reference(model, f"auxiliary_{index}")
        return index

    def _reference(self, model: Any, name: str) -> dict[str, Any]:
        whole: Any = self.main_model.get_base_model() if isinstance(self.main_model, PeftModel) else self.main_model
        adapted = isinstance(model, PeftModel)
        if whole is not None and model is not self.main_model and not adapted and _is_part(model, whole):
            return {"kind": "layers", "of": self.model(self.main_model), "layers": list(model.config.kept_layers)}
        origin = origin_of(model)
        if origin is not None:
            origin |= {"task": _task(model), "dtype": str(model.dtype).removeprefix("torch.")}
        if model is self.main_model:
            return {"kind": "main"} | (origin or {})
        if isinstance(model, PeftModel):
            return self._adapters(model, name)
        if origin is not None:
            return {"kind": "hub", **origin}
        model.save_pretrained(self.folder / name, state_dict=_without_adapters(model))
        return {"kind": "folder", "task": _task(model), "folder": name}

    def _adapters(self, model: PeftModel, name: str) -> dict[str, Any]:
        kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
        if not kinds <= ADAPTERS:
            raise RecipeError(f"Recipes hold adapters of the kinds {sorted(ADAPTERS)}, not {sorted(kinds)}.")
        main = self.main_model
        bare = main.get_base_model() if isinstance(main, PeftModel) else main
        base = self.model(main if bare is model.get_base_model() else model.get_base_model())
        model.save_pretrained(str(self.folder / name), save_embedding_layers=False)
        for path in (self.folder / name).rglob("README.md"):
            path.unlink()  # PEFT's template card, with nothing in it
        for path in (self.folder / name).rglob("adapter_config.json"):
            # The recipe names the base; what PEFT notes is a path of this machine.
            config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        adapters = sorted(model.peft_config)
        return {
            "kind": "adapters",
            "base": base,
            "folder": name,
            "adapters": adapters,
            "active": model.active_adapter,
        }


def _without_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a model had before PEFT put its layers around some of them."""
    weights = {}
    tuned = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    adapters = {part for layer in tuned for part in layer.adapter_layer_names}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        if not adapters.intersection(parts) and "modules_to_save" not in parts:
            weights[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    return weights


def origin_of(model: Any) -> dict[str, str] | None:
    """Repository and commit that hold the weights of `model`, if the Hub's cache shows them to be the same."""
    name: Any = None if isinstance(model, PeftModel) else model.config.name_or_path
    if not is_repo_id(name) or Path(name).exists():
        return None
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    main = cache / "refs" / "main"
    likely: list[Any] = [getattr(model.config, "_commit_hash", None), main.read_text() if main.is_file() else None]
    for commit in dict.fromkeys([*likely, *sorted(path.name for path in cache.glob("snapshots/*"))]):
        if commit is not None and COMMIT.fullmatch(commit) and _holds(cache / "snapshots" / commit, model):
            return {"repo_id": str(name), "revision": str(commit)}
    logger.warning_once(
        f"{name} in the cache has not the weights of the given model, which is therefore stored itself."
    )
    return None


def _holds(snapshot: Path, model: PreTrainedModel) -> bool:
    weights, stored = _without_adapters(model), set[str]()
    for path in snapshot.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                ours = weights.get(name)
                if ours is None or not torch.equal(ours, file.get_tensor(name).to(ours)):
                    return False
                stored.add(name)
    places = {weights[name].data_ptr() for name in stored}
    return bool(stored) and all(weight.data_ptr() in places for weight in weights.values())


def _is_part(model: PreTrainedModel, whole: PreTrainedModel) -> bool:
    """Whether a model is what `keep_layers` makes of another, with the same weights still."""
    kept = getattr(model.config, "kept_layers", None)
    if not kept or getattr(whole.config, "kept_layers", None) is not None or type(model) is not type(whole):
        return False
    try:
        part = keep_layers(whole, kept)
    except (TypeError, ValueError):  # the layers of another model
        return False
    ours, theirs = _without_adapters(model), _without_adapters(part)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name].to(ours[name].device))
        for name in ours
    )


def _task(model: PreTrainedModel) -> str:
    if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model.config.model_type) == type(model).__name__:
        return "image-text-to-text"
    return "seq2seq-lm" if model.config.is_encoder_decoder else "causal-lm"


# --- loading ---------------------------------------------------------------------------------------------------------------


def load_recipe(
    recipe: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    main_model: PreTrainedModel | PeftModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LogitsProcessorList:
    """The processors of a recipe, in order, ready for `generate(logits_processor=...)`.

    Args:
        recipe (`str` or `Path`): a repository on the Hub, or a folder.
        revision, token, cache_dir, local_files_only: as everywhere on the Hub.
        subfolder (`str`, *optional*): where in the repository or folder the recipe lies.
        device, dtype (*optional*): of the auxiliary models; default: the main model's device, and the dtype that was saved.
        main_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The generating model. Auxiliaries that are the main model share its weights; without it they are loaded from where
            it came from, if the recipe knows that.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): of the main model; pads prompts as it does.
        overrides (`Mapping[str, Any]`, *optional*): hyper-parameters to replace, if the recipe holds one processor.

    Raises:
        RecipeError: a recipe that is damaged, unknown to this version, or asks for something it may not.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise RecipeError(f"subfolder {subfolder!r} leaves {recipe}: name a folder inside it.")
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    local = Path(recipe)
    if local.is_dir():
        if revision is not None:
            raise RecipeError(f"{recipe} is a folder and has no revisions: leave out revision={revision!r}.")
        root, within = local, local
    elif is_repo_id(str(recipe)):
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        auxiliary = [f"auxiliary_*/{name}" for name in ("*.json", "*.safetensors")]
        patterns = [f"{prefix}{name}" for name in (RECIPE_FILE, TENSOR_FILE, *auxiliary)]
        root = Path(str(snapshot_download(str(recipe), revision=revision, allow_patterns=patterns, **options)))
        within = root.parents[1]  # snapshots of the Hub's cache are links into its blobs
    else:
        raise RecipeError(f"{str(recipe)!r} is neither a folder nor a repository id such as 'owner/name'.")
    return RecipeReader(root / subfolder, within, options, device, dtype, main_model, tokenizer).processors(overrides)


def _as_list(key: Any) -> Any:
    return list(key) if isinstance(key, tuple) else key
