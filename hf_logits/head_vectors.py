"""Vectors that are added to what attention heads put out: read off a model, added to it for a while or for good, shared as data."""

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from hf_logits.attention_heads import bare_linear, head_shape, output_projections
from hf_logits.checks import check_number
from hf_logits.reading import Model, evaluating
from hf_logits.recipe import origin_of
from hf_logits.recipe_format import MAX_JSON, MAX_TENSORS, RecipeError, checksum, is_repo_id
from hf_logits.tasks import bare


logger = logging.get_logger(__name__)

VECTOR_FILE, VECTOR_TENSORS = "head_vectors.json", "head_vectors.safetensors"
VECTOR_SCHEMA = 1
_KEYS = {"schema_version", "strength", "base_model", "files"}


@dataclass(frozen=True)
class HeadVectors:
    """What to add to the outputs of attention heads, times a strength.

    Args:
        displacement (`torch.Tensor` of shape `[layers, heads, head size]`): zero for heads that are left alone. Kept in float32.
        strength (`float`, *optional*, defaults to `1.0`): what it is multiplied with unless told otherwise. 0 is the plain model.
    """

    displacement: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        object.__setattr__(self, "displacement", self.displacement.float())
        if self.displacement.dim() != 3 or not bool(self.displacement.isfinite().all()):
            raise ValueError(
                f"displacement must be finite and [layers, heads, head size]; got {tuple(self.displacement.shape)}."
            )

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Layer and number of each head that is moved."""
        return [(layer, head) for layer, head in self.displacement.any(-1).nonzero().tolist()]

    def __repr__(self) -> str:
        return (
            f"HeadVectors({len(self.heads)} of {self.displacement.shape[:2].numel()} heads, strength={self.strength})"
        )

    def with_strength(self, strength: float) -> "HeadVectors":
        """The same vectors, another default."""
        return replace(self, strength=strength)

    def _moved(self, model: Model, strength: float | None) -> list[tuple[nn.Module, Tensor]]:
        strength = check_number("strength", self.strength if strength is None else strength)
        if (shape := head_shape(model)) != tuple(self.displacement.shape):
            raise ValueError(
                f"These vectors are for {list(self.displacement.shape)} layers, heads and head size; {type(bare(model)).__name__} has "
                f"{list(shape)}: use the model that they were fitted on."
            )
        rows = strength * self.displacement.flatten(1)
        modules = [module for _, module in output_projections(model)]
        return [
            (module, row.to(cast(Any, bare_linear(module)).weight.device, model.dtype))
            for module, row in zip(modules, rows, strict=True)
            if bool(row.any())
        ]

    @contextmanager
    def applied(self, model: Model, *, strength: float | None = None) -> Iterator[None]:
        """Move the heads of `model` at every position, as long as the block lasts; weights stay as they are.

        Everything that runs the model moves with it: `generate`, pipelines, processors whose auxiliary it is, adapters. Vectors may
        be nested and add up. Caches do not know of it: `reset()` processors that have read the model outside of the block.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): of the family that the vectors come from.
            strength (`float`, *optional*): in place of the vectors' own; 0 is the plain model, bit for bit.
        """

        def mover(row: Tensor) -> Any:
            return lambda module, args: (args[0] + row.to(args[0]), *args[1:])

        handles = [module.register_forward_pre_hook(mover(row)) for module, row in self._moved(model, strength)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def bake(self, model: Model, *, strength: float | None = None) -> None:
        """Move the heads of `model` for good: what they add becomes the bias of the output projections, and costs nothing.

        A constant behind a linear map is a bias. What active adapters make of it is in it, so do not switch them off later. Where
        the model's config has an `attention_bias` that gives the output projections one, it is set, so that the bias is saved and
        loaded with the model; other models without such biases lose it then, which a warning says. So do adapters, which are saved
        without the model that they belong to: merge them first.

        Args:
            model, strength: see [`applied`].
        """
        moved = self._moved(model, strength)
        if moved and isinstance(model, PeftModel):
            logger.warning_once(
                "An adapter is saved without its base model, and what is baked into that is lost: merge_and_unload() before you save "
                "it, or share the vectors instead."
            )
        with evaluating(model):
            if any(cast(Any, bare_linear(module)).bias is None for module, _ in moved):
                _keep_biases(model)
            for module, row in moved:
                with_it, without = cast(Any, module)(torch.stack([row, torch.zeros_like(row)])[None])[0]
                linear = cast(Any, bare_linear(module))
                if linear.bias is None:
                    linear.bias = nn.Parameter(torch.zeros_like(with_it), requires_grad=False)
                linear.bias += with_it - without

    # --- sharing -----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *, base_model: Model | None = None) -> None:
        """Write `head_vectors.json` and `head_vectors.safetensors`.

        Args:
            save_directory (`str` or `Path`): a folder, made if need be.
            base_model (*optional*): the model that the vectors are for; noted by repository and commit if it comes from the Hub.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"displacement": self.displacement.detach().cpu().contiguous().clone()}
        save_file(tensors, folder / VECTOR_TENSORS, metadata={"format": "pt"})
        noted = {
            "schema_version": VECTOR_SCHEMA,
            "strength": self.strength,
            "base_model": None if base_model is None else origin_of(bare(base_model)),
            "files": {VECTOR_TENSORS: checksum(folder / VECTOR_TENSORS)},
        }
        text = json.dumps(noted, indent=2, sort_keys=True, allow_nan=False)
        (folder / VECTOR_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "HeadVectors":
        """The vectors of a folder or a repository on the Hub. They are data: no code of a repository runs.

        Args:
            source (`str` or `Path`): a folder, or a repository on the Hub.
            revision, token, cache_dir, local_files_only: as everywhere on the Hub.

        Raises:
            RecipeError: files that are missing, damaged, or not what they should be.
        """
        folder = Path(source)
        if not folder.is_dir():
            if not is_repo_id(str(source)):
                raise RecipeError(f"{str(source)!r} is neither a folder nor a repository id such as 'owner/name'.")
            options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            patterns = [VECTOR_FILE, VECTOR_TENSORS]
            folder = Path(str(snapshot_download(str(source), revision=revision, allow_patterns=patterns, **options)))
        elif revision is not None:
            raise RecipeError(f"{source} is a folder and has no revisions: leave out revision={revision!r}.")
        noted = _read_json(folder / VECTOR_FILE)
        displacement = _read_tensor(folder / VECTOR_TENSORS, noted["files"])
        return cls(displacement, strength=float(noted["strength"]))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: Model | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload head vectors",
    ) -> str:
        """Upload the vectors in one commit, with a model card where the repository has none. Returns the commit's address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, base_model=base_model)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                origin = None if base_model is None else origin_of(bare(base_model))
                about = f"base_model: {origin['repo_id']}\n" if origin else ""
                text = _CARD.format(repo_id=repo_id, about=about, vectors=self)
                ModelCard(text).save(Path(folder, "README.md"))
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)


_CARD = """---
tags:
- hf_logits
- head_vectors
{about}---

# {repo_id}

Vectors that move what attention heads put out: `{vectors}`.

```python
from hf_logits.head_vectors import HeadVectors


vectors = HeadVectors.from_pretrained("{repo_id}")
with vectors.applied(model):
    model.generate(**inputs)
```
"""


def _keep_biases(model: Model) -> None:
    """Let the config know of biases behind the heads, so that all of them are saved and loaded."""
    whole = bare(model)
    config: Any = copy.deepcopy(whole.config)
    known = "attention_bias" in config.get_text_config().to_dict()
    if known:
        config.get_text_config().attention_bias = True
        # What is loaded is what the config builds, and for some models its flag means the queries, keys and values alone.
        with torch.device("meta"):
            built: Any = type(whole)(config)
        known = all(cast(Any, module).bias is not None for _, module in output_projections(built))
    if not known:
        logger.warning_once(
            f"{type(whole).__name__} has no setting for a bias behind its heads, which is lost when it is saved and loaded: share the "
            "vectors instead."
        )
        return
    cast(Any, whole.config).get_text_config().attention_bias = True
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            linear = cast(Any, bare_linear(whole.get_submodule(name)))
            if linear.bias is None:
                zeros = torch.zeros(linear.out_features, device=linear.weight.device, dtype=model.dtype)
                linear.bias = nn.Parameter(zeros, requires_grad=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no {path.name} in {path.parent}: save vectors with save_pretrained().")
    if path.stat().st_size > MAX_JSON:
        raise RecipeError(f"{path} is larger than {MAX_JSON} bytes.")
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no valid JSON ({error}): download or save it again.") from error
    if not isinstance(noted, dict) or set(noted) != _KEYS:
        raise RecipeError(f"{path} must be an object with the keys {sorted(_KEYS)}. Update hf_logits?")
    if noted["schema_version"] != VECTOR_SCHEMA:
        raise RecipeError(
            f"{path}: schema_version is {noted['schema_version']!r}, this version reads {VECTOR_SCHEMA}: update hf_logits."
        )
    strength = noted["strength"]
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise RecipeError(f"{path}: strength is {strength!r:.60}: it must be a finite number.")
    if not isinstance(noted["files"], dict):
        raise RecipeError(f"{path}: files must map names to checksums.")
    return noted


def _read_tensor(path: Path, checksums: dict[str, Any]) -> Tensor:
    if not path.is_file() or path.stat().st_size > MAX_TENSORS:
        raise RecipeError(f"{path} is not there, or larger than {MAX_TENSORS} bytes: download or save it again.")
    if checksum(path) != checksums.get(path.name):
        raise RecipeError(
            f"{path} has another checksum than {VECTOR_FILE} says: it was changed, or not saved to its end."
        )
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own error, or none of Python's in particular
        raise RecipeError(f"{path} cannot be read ({error}): save it again.") from error
    found = tensors.get("displacement")
    if found is None or found.dtype != torch.float32 or found.dim() != 3 or not bool(found.isfinite().all()):
        raise RecipeError(f"{path} must hold a finite float32 tensor 'displacement' of three axes: save it again.")
    return found
