"""Recipes: decoding methods shared as data, the way models are.

A recipe is a file, `logits_processor.json`, that names methods, their hyper-parameters and their auxiliary models, and what
little belongs to it beside it: tensors, adapters, small models, as safetensors. It lies alone in a repository or next to the
weights of the model that it steers.

A recipe is data from strangers. Methods come from the table in this file, never from a name in the recipe. Nothing is
unpickled, no code of a repository is run, paths can't leave the recipe's folder, sizes are bounded, and every fault is a
[`RecipeError`] that names the file, the key and the fix.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_logits.prompts import last_token


RECIPE_FILE = "logits_processor.json"
TENSOR_FILE = "logits_processor.safetensors"
SCHEMA_VERSION = 1

# The only names that a recipe can turn into code.
_METHODS = {
    "dynamic_fusion": "DynamicFusionLogitsProcessor",
    "entropy_adaptive": "EntropyAdaptiveLogitsProcessor",
    "gedi": "GeDiLogitsProcessor",
    "gedi_repetition_penalty": "GeDiRepetitionPenaltyLogitsProcessor",
    "lqcd": "LQCDLogitsProcessor",
    "mixture": "MixtureLogitsProcessor",
    "refusal_tokens": "RefusalTokenLogitsProcessor",
    "steer": "SteerLogitsProcessor",
}
_TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "image-text-to-text": AutoModelForImageTextToText,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
# What a caller gives when loading; never part of a recipe.
_RUNTIME = {"self", "tokenizer", "auxiliary_tokenizer", "encoder_inputs"}
_WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_MAX_BYTES, _MAX_DEPTH, _MAX_ITEMS = 2_000_000, 12, 200_000
_FOLDER = re.compile(r"auxiliary_[0-9]{1,4}")
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class RecipeError(ValueError):
    """A recipe that is not what it should be. The message names the file, the key and the fix."""


class SharedAsRecipe:
    """Save, load and push for processors; the ecosystem's three methods, on one processor."""

    def saved_arguments(self) -> dict[str, Any]:
        """The constructor's arguments as data. Methods that take text override this and give token ids."""
        own = vars(self)
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in _RUNTIME]
        return {name: own[name] if name in own else own[f"_{name}"] for name in names}

    def save_pretrained(self, save_directory: str | Path, *, main_model: Any = None) -> None:
        """Write the recipe of this processor. See [`save_recipe`]."""
        save_recipe([cast(LogitsProcessor, self)], save_directory, main_model=main_model)

    @classmethod
    def from_pretrained(cls, recipe: str | Path, **kwargs: Any) -> Self:
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
        """Upload the recipe of this processor. See [`push_recipe`]."""
        return push_recipe([cast(LogitsProcessor, self)], repo_id, **kwargs)


# --- saving ----------------------------------------------------------------------------------------------------------------


def save_recipe(
    processors: Sequence[LogitsProcessor],
    save_directory: str | Path,
    *,
    main_model: PreTrainedModel | PeftModel | None = None,
) -> None:
    """Write processors as one recipe, in their order.

    Auxiliary models that came from the Hub are stored as repository and commit, adapters and models without such an origin
    with their weights beside the recipe. The recipe itself is written last: a run that dies leaves the old one readable, or
    one whose checksums refuse it.

    Args:
        processors (`Sequence[LogitsProcessor]`): processors of this package.
        save_directory (`str` or `Path`): a folder, made if need be. It may hold a model already.
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
            path.relative_to(staging).as_posix(): _sha256(path)
            for path in sorted(Path(staging).rglob("*"))
            if path.is_file()
        }
        recipe = {"schema_version": SCHEMA_VERSION, "processors": entries, "models": encoder.models, "files": files}
        Path(staging, RECIPE_FILE).write_text(
            json.dumps(recipe, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
        for name in files:
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            os.replace(Path(staging, name), target)
        os.replace(Path(staging, RECIPE_FILE), folder / RECIPE_FILE)
    for path in folder.iterdir():  # what an older recipe had beside it
        if _FOLDER.fullmatch(path.name) and not any(name.startswith(f"{path.name}/") for name in files):
            shutil.rmtree(path)
    if TENSOR_FILE not in files:
        (folder / TENSOR_FILE).unlink(missing_ok=True)


class _Encoder:
    """Arguments as JSON; models and tensors beside it."""

    def __init__(self, folder: Path, main_model: Any):
        self.folder, self.main_model = folder, main_model
        self.tensors: dict[str, Tensor] = {}
        self.models: list[dict[str, Any]] = []
        self._known: list[Any] = []

    def processor(self, processor: LogitsProcessor) -> dict[str, Any]:
        method = {name: method for method, name in _METHODS.items()}.get(type(processor).__name__)
        if method is None or not isinstance(processor, SharedAsRecipe):
            raise RecipeError(f"{type(processor).__name__} is no method of hf_logits ({sorted(_METHODS.values())}).")
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
        if model is self.main_model:
            return {"kind": "main"} | (_origin(model) or {})
        if isinstance(model, PeftModel):
            base = self.model(model.get_base_model())
            model.save_pretrained(self.folder / name, save_embedding_layers=False)
            for path in (self.folder / name).rglob("README.md"):
                path.unlink()  # PEFT's template card, with nothing in it
            adapters = sorted(model.peft_config)
            return {
                "kind": "adapters",
                "base": base,
                "folder": name,
                "adapters": adapters,
                "active": model.active_adapter,
            }
        origin = _origin(model)
        if origin is not None:
            return {"kind": "hub", "task": _task(model), **origin}
        model.save_pretrained(self.folder / name)
        return {"kind": "folder", "task": _task(model), "folder": name}


def _origin(model: Any) -> dict[str, str] | None:
    """Repository and commit that a model was loaded from."""
    if isinstance(model, PeftModel):
        return None
    commit = getattr(model.config, "_commit_hash", None)
    name = model.config.name_or_path
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit) or not _is_repo_id(name) or Path(name).exists():
        return None
    return {"repo_id": name, "revision": commit}


def _task(model: PreTrainedModel) -> str:
    for task in ("image-text-to-text", "seq2seq-lm"):
        if type(model.config) in _TASKS[task]._model_mapping and type(model) in _values(
            _TASKS[task]._model_mapping[type(model.config)]
        ):
            return task
    return "causal-lm"


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
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    local = Path(recipe)
    if local.is_dir():
        if revision is not None:
            raise RecipeError(f"{recipe} is a folder and has no revisions: leave out revision={revision!r}.")
        root, within = local, local
    else:
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [f"{prefix}{name}" for name in (RECIPE_FILE, TENSOR_FILE, "auxiliary_*/*", "auxiliary_*/*/*")]
        root = Path(_download(str(recipe), revision, patterns, options))
        within = root.parents[1]  # snapshots of the Hub's cache are links into its blobs
    folder = root / subfolder
    if not folder.resolve().is_relative_to(within.resolve()):
        raise RecipeError(f"subfolder {subfolder!r} leaves {recipe}: name a folder inside it.")
    return _Decoder(folder, within, options, device, dtype, main_model, tokenizer).processors(overrides)


def _download(repo_id: str, revision: str | None, patterns: list[str], options: Mapping[str, Any]) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"{repo_id!r} is neither a folder nor a repository id such as 'owner/name'.") from error
    return snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **options)


class _Decoder:
    """A recipe's JSON, checked piece by piece, as processors."""

    def __init__(
        self,
        folder: Path,
        within: Path,
        options: Mapping[str, Any],
        device: Any,
        dtype: Any,
        main_model: Any,
        tokenizer: Any,
    ):
        self.folder, self.within, self.options = folder, within, options
        self.device = device if device is not None else main_model.device if main_model is not None else "cpu"
        self.dtype, self.main_model, self.tokenizer = dtype, main_model, tokenizer
        self._loaded: dict[int, Any] = {}
        recipe = self._read()
        self.entries, self.models = recipe["processors"], recipe["models"]
        self.tensors = load_file(self.path(TENSOR_FILE)) if TENSOR_FILE in recipe["files"] else {}

    def fault(self, key: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.folder / RECIPE_FILE}: {key} {problem}")

    def path(self, name: str) -> Path:
        """A file of the recipe, which must be one of its own."""
        path = self.folder / name
        if not path.exists():
            raise self.fault("files", f"names {name!r}, which is not there: download or save the recipe again.")
        if not path.resolve().is_relative_to(self.within.resolve()):
            raise self.fault(
                "files", f"names {name!r}, which links to a place outside the recipe: only its own files are read."
            )
        return path

    def _read(self) -> dict[str, Any]:
        path = self.folder / RECIPE_FILE
        if not path.is_file():
            raise RecipeError(
                f"There is no {RECIPE_FILE} in {self.folder}: it is no recipe. Save one with save_pretrained()."
            )
        self.path(RECIPE_FILE)
        if path.stat().st_size > _MAX_BYTES:
            raise self.fault("the file", f"is larger than {_MAX_BYTES} bytes: keep tensors in {TENSOR_FILE}.")
        try:
            recipe = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise self.fault("the file", f"is no valid JSON ({error}): download or save the recipe again.") from error
        self._check_size(recipe, 0, [0])
        if not isinstance(recipe, dict):
            raise self.fault("the file", "must hold a JSON object.")
        version = recipe.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise self.fault(
                "schema_version", f"is {version!r}, this version reads {SCHEMA_VERSION}: update hf_logits."
            )
        self._keys("the file", recipe, {"schema_version", "processors", "models", "files"})
        for key, kind in (("processors", list), ("models", list), ("files", dict)):
            if not isinstance(recipe[key], kind):
                raise self.fault(key, f"must be a {kind.__name__}, not {type(recipe[key]).__name__}.")
        if not recipe["processors"]:
            raise self.fault("processors", "is empty: a recipe holds at least one.")
        for name, digest in recipe["files"].items():
            self._check_file(name, digest)
        return recipe

    def _check_file(self, name: str, digest: Any) -> None:
        first, *rest = name.split("/")
        sound = all(re.fullmatch(r"\w[\w.-]{0,120}", part) for part in rest) and len(rest) <= 2 and ".." not in name
        if not (name == TENSOR_FILE or (_FOLDER.fullmatch(first) and rest and sound)):
            raise self.fault(
                "files", f"names {name!r}: only {TENSOR_FILE} and auxiliary_<number>/<file> belong to a recipe."
            )
        if not name.endswith((".safetensors", ".json")):
            raise self.fault("files", f"names {name!r}: only .safetensors and .json files are read.")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise self.fault("files", f"gives {name!r} the checksum {digest!r}, which is no SHA-256.")
        if _sha256(self.path(name)) != digest:
            raise self.fault(
                "files", f"gives {name!r} another checksum than it has: it was changed, or not saved to its end."
            )

    def _check_size(self, value: Any, depth: int, count: list[int]) -> None:
        count[0] += 1
        if depth > _MAX_DEPTH or count[0] > _MAX_ITEMS:
            raise self.fault("the file", f"is deeper than {_MAX_DEPTH} levels or holds more than {_MAX_ITEMS} values.")
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._check_size(item, depth + 1, count)

    def _keys(self, where: str, value: Any, required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        if not isinstance(value, dict):
            raise self.fault(where, f"must be an object, not {type(value).__name__}.")
        missing, unknown = required - set(value), set(value) - required - optional
        if missing or unknown:
            raise self.fault(
                where,
                f"lacks {sorted(missing)} and has unknown {sorted(unknown)}: keys are {sorted(required | optional)}.",
            )

    def processors(self, overrides: Mapping[str, Any] | None) -> LogitsProcessorList:
        if overrides and len(self.entries) != 1:
            raise RecipeError(f"{sorted(overrides)} cannot be replaced in a recipe of {len(self.entries)} processors.")
        return LogitsProcessorList(
            [self._processor(f"processors[{i}]", e, overrides or {}) for i, e in enumerate(self.entries)]
        )

    def _processor(self, where: str, entry: Any, overrides: Mapping[str, Any]) -> Any:
        self._keys(where, entry, {"method", "arguments"})
        method = entry["method"]
        if not isinstance(method, str) or method not in _METHODS:
            raise self.fault(
                f"{where}.method", f"is {method!r}, unknown to this version: {sorted(_METHODS)}. Update hf_logits?"
            )
        cls = getattr(importlib.import_module("hf_logits.processors"), _METHODS[method])
        parameters = inspect.signature(cls.__init__).parameters
        known = set(parameters) - _RUNTIME
        if set(overrides) - known:
            raise TypeError(f"{cls.__name__} has no {sorted(set(overrides) - known)}; it takes {sorted(known)}.")
        self._keys(f"{where}.arguments", entry["arguments"], set(), known)
        arguments = {
            name: self.value(f"{where}.arguments.{name}", value)
            for name, value in entry["arguments"].items()
            if name not in overrides
        }
        runtime = {"tokenizer": self.tokenizer} if "tokenizer" in parameters else {}
        try:
            processor = cls(**arguments, **overrides, **runtime)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self.fault(f"{where}.arguments", f"do not make a {cls.__name__}: {error}") from error
        return processor

    def value(self, where: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(f"{where}[{i}]", item) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if len(value) != 1 or next(iter(value)) not in ("$float", "$tensor", "$model", "$prompt", "$map", "$term"):
            raise self.fault(where, f"is an object with the keys {sorted(value)[:5]}, none that recipes use.")
        ((tag, content),) = value.items()
        return getattr(self, f"_{tag[1:]}")(where, content)

    def _float(self, where: str, content: Any) -> float:
        if content not in ("inf", "-inf"):
            raise self.fault(where, f"is {content!r}: only 'inf' and '-inf' need this form.")
        return float(content)

    def _tensor(self, where: str, content: Any) -> Tensor:
        if not isinstance(content, str) or content not in self.tensors:
            raise self.fault(where, f"names the tensor {content!r}, which {TENSOR_FILE} does not hold.")
        return self.tensors[content]

    def _prompt(self, where: str, content: Any) -> Callable[[Tensor], Tensor]:
        if content != "last_token":
            raise self.fault(where, f"names the prompt {content!r}: only 'last_token' has a name.")
        return last_token

    def _map(self, where: str, content: Any) -> dict[Any, Any]:
        if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            raise self.fault(where, "must be a list of pairs.")
        pairs = [(_as_key(self.value(where, key)), self.value(where, item)) for key, item in content]
        if not all(isinstance(key, str | int | tuple) for key, _ in pairs):
            raise self.fault(where, "has a key that is neither text nor ids.")
        return dict(pairs)

    def _term(self, where: str, content: Any) -> Any:
        term = importlib.import_module("hf_logits.processors").MixtureTerm
        self._keys(where, content, {"model", "weight"}, set(term._fields))
        return term(**{name: self.value(f"{where}.{name}", item) for name, item in content.items()})

    # --- models ------------------------------------------------------------------------------------------------------------

    def _model(self, where: str, content: Any, depth: int = 0) -> Any:
        if (
            isinstance(content, bool)
            or not isinstance(content, int)
            or not 0 <= content < len(self.models)
            or depth > 2
        ):
            raise self.fault(
                where, f"names the model {content!r}; models has {len(self.models)} entries, and adapters one base."
            )
        if content not in self._loaded:
            self._loaded[content] = self._load(f"models[{content}]", self.models[content], depth)
        return self._loaded[content]

    def _load(self, where: str, reference: Any, depth: int) -> Any:
        kind = reference.get("kind") if isinstance(reference, dict) else None
        if kind == "main":
            self._keys(where, reference, {"kind"}, {"repo_id", "revision"})
            if self.main_model is not None:
                return self.main_model
            if "repo_id" not in reference:
                raise self.fault(where, "is the generating model: pass main_model=, or use hf_logits.pipeline().")
            return self._from_hub(where, {**reference, "task": "causal-lm"})
        if kind == "hub":
            self._keys(where, reference, {"kind", "task", "repo_id", "revision"})
            return self._from_hub(where, reference)
        if kind == "folder":
            self._keys(where, reference, {"kind", "task", "folder"})
            return self._from_folder(where, reference["task"], self._own_folder(where, reference["folder"]))
        if kind == "adapters":
            self._keys(where, reference, {"kind", "base", "folder", "adapters", "active"})
            return self._adapters(where, reference, depth)
        raise self.fault(f"{where}.kind", f"is {kind!r}: it must be 'main', 'hub', 'folder' or 'adapters'.")

    def _from_hub(self, where: str, reference: Mapping[str, Any]) -> Any:
        repo_id, revision = reference["repo_id"], reference["revision"] if "revision" in reference else None
        if not isinstance(repo_id, str) or not _is_repo_id(repo_id):
            raise self.fault(f"{where}.repo_id", f"is {repo_id!r}, no repository id such as 'owner/name'.")
        if not isinstance(revision, str) or not _SHA1.fullmatch(revision):
            raise self.fault(f"{where}.revision", f"is {revision!r}: a recipe pins the full commit (40 hex digits).")
        return self._from_folder(where, reference["task"], Path(_download(repo_id, revision, _WEIGHTS, self.options)))

    def _own_folder(self, where: str, name: Any) -> Path:
        if not isinstance(name, str) or not _FOLDER.fullmatch(name):
            raise self.fault(f"{where}.folder", f"is {name!r}: folders of a recipe are called auxiliary_<number>.")
        return self.path(name)

    def _from_folder(self, where: str, task: Any, folder: Path) -> Any:
        if not isinstance(task, str) or task not in _TASKS:
            raise self.fault(f"{where}.task", f"is {task!r}: it must be one of {sorted(_TASKS)}.")
        model = _TASKS[task].from_pretrained(
            folder, dtype=self.dtype or "auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        return model.to(self.device)

    def _adapters(self, where: str, reference: Mapping[str, Any], depth: int) -> Any:
        names, active = reference["adapters"], reference["active"]
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(n, str) and re.fullmatch(r"\w[\w-]{0,60}", n) for n in names)
        ):
            raise self.fault(f"{where}.adapters", f"is {names!r}: it must list adapter names.")
        if active not in names:
            raise self.fault(f"{where}.active", f"is {active!r}, none of {names}.")
        folder = self._own_folder(where, reference["folder"])
        base = self._model(f"{where}.base", reference["base"], depth + 1)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        model: Any = None
        for name in names:
            place = folder if name == "default" else folder / name
            if not (place / "adapter_model.safetensors").is_file():
                raise self.fault(
                    f"{where}.adapters", f"names {name!r}, but {place.name}/adapter_model.safetensors is not there."
                )
            if model is None:
                model = PeftModel.from_pretrained(base, place, adapter_name=name, torch_device=str(self.device))
            else:
                model.load_adapter(place, adapter_name=name, torch_device=str(self.device))
        model.set_adapter(active)
        return model.eval()


def pipeline(task: str, model: str | Path, *, recipe: str | Path | None = None, **kwargs: Any) -> Any:
    """[`~transformers.pipeline`] that also steers, if a recipe lies next to the weights.

    Args:
        task (`str`): a task that generates text: `"text-generation"`, `"image-text-to-text"`, ...
        model (`str` or `Path`): repository or folder.
        recipe (`str` or `Path`, *optional*): the repository or folder of another recipe to use.
        kwargs: of [`~transformers.pipeline`].

    Returns:
        A pipeline as transformers builds it; a model without a recipe behaves as it always does.
    """
    import transformers

    hub = {name: kwargs[name] for name in ("revision", "token") if name in kwargs and recipe is None}
    built = transformers.pipeline(task, model=str(model), **kwargs)
    source = recipe if recipe is not None else model
    if recipe is None and not has_recipe(source, **hub):
        return built
    processors = load_recipe(source, main_model=built.model, tokenizer=built.tokenizer, **hub)
    parts = {
        name: getattr(built, name)
        for name in ("tokenizer", "feature_extractor", "image_processor", "video_processor", "processor")
        if getattr(built, name, None) is not None
    }
    rest = {
        k: v
        for k, v in kwargs.items()
        if k not in {*parts, "revision", "token", "device", "device_map", "dtype", "model_kwargs"}
    }
    return transformers.pipeline(task, model=built.model, **parts, **rest, logits_processor=processors)


def has_recipe(repo_or_folder: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a folder, or a repository on the Hub (or its copy in the cache, when offline), holds a recipe."""
    if Path(repo_or_folder).is_dir():
        return Path(repo_or_folder, RECIPE_FILE).is_file()
    from transformers.utils import cached_file

    found = cached_file(
        str(repo_or_folder),
        RECIPE_FILE,
        revision=revision,
        token=token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


# --- sharing ---------------------------------------------------------------------------------------------------------------


def push_recipe(
    processors: Sequence[LogitsProcessor],
    repo_id: str,
    *,
    main_model: PreTrainedModel | PeftModel | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a decoding recipe",
    create_pr: bool = False,
    remote_code: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload processors as one recipe, in one commit, with a section about them in the model card.

    The rest of the repository stays: weights, and what the card says elsewhere.

    Args:
        repo_id (`str`): made if need be.
        main_model: see [`save_recipe`].
        private, token, revision, commit_message, create_pr: as everywhere on the Hub.
        remote_code (`bool`, *optional*, defaults to `False`):
            Also write `custom_generate/generate.py`, with which `transformers.pipeline(model=repo_id, trust_remote_code=True)`
            steers wherever this package is installed. Needs the model's weights in the same repository.
        base_model (`str`, *optional*): the card's `base_model`. Defaults to where `main_model` came from.

    Returns:
        `str`: the address of the commit (or pull request).
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_recipe(processors, folder, main_model=main_model)
        origin = _origin(main_model) if main_model is not None else None
        card = write_card(
            processors, repo_id, _card_text(api, repo_id, revision), base_model or (origin or {}).get("repo_id")
        )
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        if remote_code:
            write_remote_code(folder)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=[TENSOR_FILE, "auxiliary_*/*"],
        )
    return str(commit.pr_url or commit.commit_url)


def write_remote_code(folder: str | Path) -> None:
    """Write `custom_generate/generate.py`, for people who accept remote code. It only loads the recipe beside it."""
    target = Path(folder, "custom_generate")
    target.mkdir(parents=True, exist_ok=True)
    (target / "generate.py").write_text(_GENERATE, encoding="utf-8")
    (target / "requirements.txt").write_text("hf_logits\n", encoding="utf-8")


_GENERATE = '''"""Steers with the recipe of this repository: loads it with hf_logits and hands it to generate()."""

from transformers import GenerationMixin

from hf_logits.recipe import load_recipe


def generate(*args, model, logits_processor=None, **kwargs):
    steering = vars(model).get("_hf_logits_recipe")
    if steering is None:
        source, commit = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
        steering = load_recipe(source, revision=commit, main_model=model)
        model._hf_logits_recipe = steering
    processors = [*(logits_processor or []), *steering]
    kwargs.pop("custom_generate", None)
    kwargs.pop("trust_remote_code", None)
    # Not model.generate: that is this function.
    return GenerationMixin.generate(model, *args, logits_processor=processors, **kwargs)
'''

_BEGIN, _END = "<!-- hf_logits recipe: begin -->", "<!-- hf_logits recipe: end -->"


def write_card(processors: Sequence[Any], repo_id: str, existing: str, base_model: str | None) -> str:
    """The model card with our section in it; everything else that it says is kept."""
    from huggingface_hub import ModelCard

    card = ModelCard(existing if existing.strip() else f"---\n---\n\n# {repo_id}\n", ignore_metadata_errors=True)
    data = card.data.to_dict()
    methods = [
        {name: method for method, name in _METHODS.items()}[type(processor).__name__] for processor in processors
    ]
    card.data.tags = list(dict.fromkeys([*(data.get("tags") or []), "hf_logits", *methods]))
    if base_model is not None and "base_model" not in data:
        card.data.base_model = base_model
    parts = []
    for processor in processors:
        document = inspect.getdoc(type(processor)) or ""
        arguments = repr(processor).removeprefix(type(processor).__name__).strip("()")
        parts.append(
            f"### {type(processor).__name__}\n\n{document.split('Args:')[0].strip()}\n\n```\n{arguments}\n```\n"
        )
    load = (
        f'processor = {type(processors[0]).__name__}.from_pretrained("{repo_id}", main_model=pipe.model)\n'
        if len(processors) == 1
        else f'processors = load_recipe("{repo_id}", main_model=pipe.model)\n'
    )
    given = "[processor]" if len(processors) == 1 else "processors"
    source = (
        "hf_logits.processors import " + type(processors[0]).__name__
        if len(processors) == 1
        else "hf_logits import load_recipe"
    )
    model = base_model or "the-model-to-steer"
    snippet = (
        f'from transformers import pipeline\n\nfrom {source}\n\n\npipe = pipeline("text-generation", model="{model}")\n{load}'
        f'print(pipe("Hello", logits_processor={given}))\n'
    )
    section = (
        f"{_BEGIN}\n\n## Decoding recipe\n\nThis repository holds `{RECIPE_FILE}`, a decoding method for `hf_logits` (no code, only "
        f"data).\n\n```python\n{snippet}```\n\n" + "\n".join(parts) + f"\n{_END}"
    )
    text = card.content
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        return text[:begin] + section + text[end + len(_END) :]
    return text.rstrip() + "\n\n" + section + "\n"


def _card_text(api: HfApi, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return ""


# --- small things ----------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_repo_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _as_list(key: Any) -> Any:
    return list(key) if isinstance(key, tuple) else key


def _as_key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) and all(isinstance(i, int) for i in key) else key


def _values(models: Any) -> tuple[type, ...]:
    return tuple(models) if isinstance(models, tuple | list) else (models,)
