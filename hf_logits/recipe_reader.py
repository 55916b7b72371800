"""Reads a recipe: a stranger's JSON, checked piece by piece, becomes processors."""

import copy
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from hf_logits.fewer_layers import keep_layers
from hf_logits.prompts import last_token
from hf_logits.recipe_format import (
    ADAPTERS,
    CHECKSUM,
    COMMIT,
    FOLDER,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_JSON,
    MAX_TENSORS,
    METHODS,
    RECIPE_FILE,
    RUNTIME,
    SCHEMA_VERSION,
    TASKS,
    TENSOR_FILE,
    RecipeError,
    checksum,
    is_repo_id,
)


class RecipeReader:
    """One recipe, in a folder.

    Args:
        folder (`Path`): where the recipe lies.
        within (`Path`): what no path, links followed, may leave: the folder, or the Hub's cache of the repository.
        options (`Mapping`): `token`, `cache_dir` and `local_files_only`, for models on the Hub.
        device, dtype, main_model, tokenizer: see [`~hf_logits.recipe.load_recipe`].
    """

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
        self._loading: list[int] = []
        recipe = self._read()
        self.entries, self.models = recipe["processors"], recipe["models"]
        self.files: dict[str, str] = recipe["files"]
        self.tensors = self._read_tensors() if TENSOR_FILE in self.files else {}

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
        if path.stat().st_size > MAX_JSON:
            raise self.fault("the file", f"is larger than {MAX_JSON} bytes: keep tensors in {TENSOR_FILE}.")
        try:
            recipe = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise self.fault("the file", f"is no valid JSON ({error}): download or save the recipe again.") from error
        self._check_size(recipe)
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
        if not (name == TENSOR_FILE or (FOLDER.fullmatch(first) and rest and sound)):
            raise self.fault(
                "files", f"names {name!r}: only {TENSOR_FILE} and auxiliary_<number>/<file> belong to a recipe."
            )
        if not name.endswith((".safetensors", ".json")):
            raise self.fault("files", f"names {name!r}: only .safetensors and .json files are read.")
        if not isinstance(digest, str) or not CHECKSUM.fullmatch(digest):
            raise self.fault("files", f"gives {name!r} the checksum {digest!r}, which is no SHA-256.")
        path = self.path(name)
        if not path.is_file() or (name == TENSOR_FILE and path.stat().st_size > MAX_TENSORS):
            raise self.fault("files", f"names {name!r}, which is no file, or larger than {MAX_TENSORS} bytes.")
        if checksum(path) != digest:
            raise self.fault(
                "files", f"gives {name!r} another checksum than it has: it was changed, or not saved to its end."
            )

    def _check_size(self, recipe: Any) -> None:
        level, seen = [recipe], 0
        for _ in range(MAX_DEPTH + 1):
            seen += len(level)
            items = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
            level = list(itertools.chain.from_iterable(items))
        if level or seen > MAX_ITEMS:
            raise self.fault(
                "the file",
                f"is deeper than {MAX_DEPTH} levels or holds more than {MAX_ITEMS} values: keep numbers in {TENSOR_FILE}.",
            )

    def _read_tensors(self) -> dict[str, Tensor]:
        path = self.path(TENSOR_FILE)
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors raises its own error, or none of Python's in particular
            raise self.fault("files", f"{TENSOR_FILE} cannot be read ({error}): save the recipe again.") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise self.fault("files", f"{TENSOR_FILE}: {name} holds NaN: save the recipe again without.")
        return tensors

    def _keys(self, where: str, value: Any, required: set[str], optional: set[str] | None = None) -> None:
        if not isinstance(value, dict):
            raise self.fault(where, f"must be an object, not {type(value).__name__}.")
        allowed = required | (optional or set())
        missing, unknown = required - set(value), set(value) - allowed
        if missing or unknown:
            given = ", ".join(repr(name)[:40] for name in sorted(unknown)[:5]) or "none"
            raise self.fault(
                where,
                f"lacks {sorted(missing)}; unknown keys: {given}. Its keys are {sorted(allowed)}; update hf_logits?",
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
        if not isinstance(method, str) or method not in METHODS:
            raise self.fault(
                f"{where}.method", f"is {method!r}, unknown to this version: {sorted(METHODS)}. Update hf_logits?"
            )
        cls = getattr(importlib.import_module("hf_logits.processors"), METHODS[method])
        parameters = inspect.signature(cls.__init__).parameters
        known = set(parameters) - RUNTIME
        if set(overrides) - known:
            raise TypeError(f"{cls.__name__} has no {sorted(set(overrides) - known)}; it takes {sorted(known)}.")
        self._keys(f"{where}.arguments", entry["arguments"], set(), known)
        arguments = {
            name: self.value(f"{where}.arguments.{name}", value)
            for name, value in entry["arguments"].items()
            if name not in overrides
        }
        for name, value in arguments.items():
            wanted = _SIMPLE.get(str(parameters[name].annotation))
            if wanted is not None and type(value) not in wanted:
                raise self.fault(
                    f"{where}.arguments.{name}", f"is {value!r:.60}: it must be {parameters[name].annotation}."
                )
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

    def _model(self, where: str, content: Any) -> Any:
        if type(content) is not int or not 0 <= content < len(self.models):
            raise self.fault(where, f"names the model {content!r:.60}: models has {len(self.models)} entries, from 0.")
        if content in self._loading:
            raise self.fault(where, f"names the model {content}, which is its own base.")
        if content not in self._loaded:
            self._loading.append(content)
            self._loaded[content] = self._load(f"models[{content}]", self.models[content])
            self._loading.pop()
        return self._loaded[content]

    def _load(self, where: str, reference: Any) -> Any:
        kind = reference.get("kind") if isinstance(reference, dict) else None
        if kind == "main":
            origin = {"task", "dtype", "repo_id", "revision"}
            self._keys(where, reference, {"kind"}, origin)
            if self.main_model is not None:
                return self.main_model
            if not origin <= set(reference):
                raise self.fault(where, "is the generating model: pass main_model=, or use hf_logits.pipeline().")
            return self._from_hub(where, reference)
        if kind == "hub":
            self._keys(where, reference, {"kind", "task", "dtype", "repo_id", "revision"})
            return self._from_hub(where, reference)
        if kind == "folder":
            self._keys(where, reference, {"kind", "task", "folder"})
            return self._from_folder(where, reference["task"], self._own_folder(where, reference["folder"]))
        if kind == "adapters":
            self._keys(where, reference, {"kind", "base", "folder", "adapters", "active"})
            return self._adapters(where, reference)
        if kind == "layers":
            self._keys(where, reference, {"kind", "of", "layers"})
            return self._layers(where, reference)
        raise self.fault(
            f"{where}.kind", f"is {kind!r:.60}: it must be 'main', 'hub', 'folder', 'adapters' or 'layers'."
        )

    def _layers(self, where: str, reference: Mapping[str, Any]) -> Any:
        layers = reference["layers"]
        if not isinstance(layers, list) or not all(type(index) is int for index in layers):
            raise self.fault(f"{where}.layers", f"is {layers!r:.60}: it must list numbers of layers.")
        whole = self._model(f"{where}.of", reference["of"])
        try:
            return keep_layers(detached(whole), layers)
        except (TypeError, ValueError) as error:
            raise self.fault(f"{where}.layers", f"do not fit: {error}") from error

    def _from_hub(self, where: str, reference: Mapping[str, Any]) -> Any:
        repo_id, revision = reference["repo_id"], reference["revision"]
        if not isinstance(repo_id, str) or not is_repo_id(repo_id):
            raise self.fault(f"{where}.repo_id", f"is {repo_id!r:.60}, no repository id such as 'owner/name'.")
        if not isinstance(revision, str) or not COMMIT.fullmatch(revision):
            raise self.fault(
                f"{where}.revision", f"is {revision!r:.60}: a recipe pins the full commit (40 hex digits)."
            )
        if reference["dtype"] not in _DTYPES:
            raise self.fault(f"{where}.dtype", f"is {reference['dtype']!r:.60}: it must be one of {list(_DTYPES)}.")
        try:  # what lies at the top is the model; folders hold other formats of it
            folder = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["*/*"],
                **self.options,
            )
        except LocalEntryNotFoundError as error:
            raise self.fault(
                where, f"{repo_id} at {revision} is not in the cache, and the Hub cannot be asked: go online once."
            ) from error
        except RevisionNotFoundError as error:
            raise self.fault(
                f"{where}.revision", f"{revision} is not in {repo_id} (any more): save it anew."
            ) from error
        except RepositoryNotFoundError as error:
            raise self.fault(
                f"{where}.repo_id", f"{repo_id} is not there, or private: pass token=, or save it anew."
            ) from error
        model = self._from_folder(where, reference["task"], Path(folder), reference["dtype"])
        # Where it came from, so that it is saved again as what it is.
        model.config.name_or_path, model.config._commit_hash = repo_id, revision
        return model

    def _own_folder(self, where: str, name: Any) -> Path:
        if not isinstance(name, str) or not FOLDER.fullmatch(name):
            raise self.fault(f"{where}.folder", f"is {name!r:.60}: folders of a recipe are called auxiliary_<number>.")
        folder = self.path(name)
        for path in folder.rglob("*"):
            inside = path.relative_to(self.folder).as_posix()
            if not path.is_dir() and inside not in self.files:
                raise self.fault(
                    "files", f"does not list {inside!r}, which lies there: remove it, or save the recipe again."
                )
        return folder

    def _from_folder(self, where: str, task: Any, folder: Path, dtype: str = "auto") -> Any:
        if not isinstance(task, str) or task not in TASKS:
            raise self.fault(f"{where}.task", f"is {task!r:.60}: it must be one of {sorted(TASKS)}.")
        config = self._json(where, folder / "config.json")
        if _has_kernel(config):
            raise self.fault(where, f"{folder.name}/config.json names a kernel to download: remove that key from it.")
        if (folder / "adapter_config.json").exists():
            raise self.fault(where, f"{folder.name} is an adapter, not a model: its kind must be 'adapters'.")
        try:
            model = TASKS[task].from_pretrained(
                folder,
                dtype=self.dtype or dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except Exception as error:  # whatever transformers makes of a strange config.json
            raise self.fault(where, f"{folder.name} holds no model that can be loaded: {error}") from error
        return model.to(self.device)

    def _json(self, where: str, path: Path) -> dict[str, Any]:
        try:
            if path.stat().st_size > MAX_JSON:
                raise ValueError(f"larger than {MAX_JSON} bytes")
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError("no object")
        except (OSError, ValueError, RecursionError) as error:
            raise self.fault(
                where, f"{path.parent.name}/{path.name} cannot be read ({error}): save it again."
            ) from error
        return value

    def _adapters(self, where: str, reference: Mapping[str, Any]) -> Any:
        names, active = reference["adapters"], reference["active"]
        if not isinstance(names, list) or not names or not all(_is_adapter_name(name) for name in names):
            raise self.fault(f"{where}.adapters", f"is {names!r:.60}: it must list names of adapters.")
        if active not in names:
            raise self.fault(f"{where}.active", f"is {active!r:.60}, none of {names}.")
        folder = self._own_folder(where, reference["folder"])
        places = {name: folder if name == "default" else folder / name for name in names}
        configs = {name: self._adapter_config(where, place) for name, place in places.items()}
        base = detached(self._model(f"{where}.base", reference["base"]))
        try:
            model: Any = None
            for name, place in places.items():
                if model is None:
                    model = PeftModel.from_pretrained(
                        base, str(place), adapter_name=name, config=configs[name], torch_device=str(self.device)
                    )
                else:
                    model.load_adapter(
                        str(place), adapter_name=name, peft_config=configs[name], torch_device=str(self.device)
                    )
            model.set_adapter(active)
        except Exception as error:  # whatever PEFT makes of a strange adapter_config.json
            raise self.fault(where, f"{folder.name} holds no adapter that can be loaded: {error}") from error
        return model.eval()

    def _adapter_config(self, where: str, place: Path) -> PeftConfig:
        config = self._json(where, place / "adapter_config.json")
        if not (place / "adapter_model.safetensors").is_file():
            raise self.fault(
                f"{where}.adapters", f"{place.name}/adapter_model.safetensors is not there: save it again."
            )
        if config.get("peft_type") not in ADAPTERS:
            raise self.fault(where, f"has a {config.get('peft_type')!r:.60} adapter: recipes hold {sorted(ADAPTERS)}.")
        if config.get("megatron_config") or config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            # The first imports a module by name, others change the base's weights, which may be the main model's.
            raise self.fault(
                where,
                "has an adapter with megatron_config, or an init_lora_weights that changes its base: convert it to plain LoRA.",
            )
        try:
            return PeftConfig.from_pretrained(str(place))
        except Exception as error:
            raise self.fault(where, f"{place.name}/adapter_config.json is none of PEFT's: {error}") from error


def detached(model: Any) -> PreTrainedModel:
    """A model of its own modules and the same weights, without adapters: new ones then leave `model` as it is."""
    weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, weights)
    return twin.unload() if isinstance(twin, PeftModel) else twin


_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SIMPLE: dict[str, set[type]] = {
    str(bool): {bool},
    str(float): {int, float},
    str(int): {int},
    "int | None": {int, type(None)},
    "float | None": {int, float, type(None)},
}
"""Annotations that say all about a value; the constructors check the others."""


def _has_kernel(config: Any) -> bool:
    """Whether attention is to be computed by a repository's code (`"attn_implementation": "owner/kernel"`)."""
    if isinstance(config, dict):
        named = (
            str(v) for k, v in config.items() if str(k).endswith(("attn_implementation", "experts_implementation"))
        )
        return any("/" in name for name in named) or any(_has_kernel(value) for value in config.values())
    return isinstance(config, list) and any(_has_kernel(value) for value in config)


def _is_adapter_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w-]{0,60}", name) is not None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _as_key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) and all(isinstance(i, int) for i in key) else key
