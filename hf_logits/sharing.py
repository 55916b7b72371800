"""Recipes on the Hub: pushed with a model card, found next to a model's weights, and run by a pipeline."""

import copy
import functools
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel
from transformers.utils import cached_file

from hf_logits.recipe import load_recipe, origin_of, save_recipe
from hf_logits.recipe_format import METHOD_OF, RECIPE_FILE, TENSOR_FILE


def pipeline(task: str, model: Any = None, *, recipe: str | Path | None = None, **kwargs: Any) -> Any:
    """[`~transformers.pipeline`] that also steers, if a recipe lies next to the weights.

    Args:
        task (`str`): a task that generates text: `"text-generation"`, `"image-text-to-text"`, ...
        model: as in [`~transformers.pipeline`]. A recipe is looked for if it names a repository or folder.
        recipe (`str` or `Path`, *optional*): another repository or folder, whose recipe to use.
        kwargs: of [`~transformers.pipeline`]. A `logits_processor` among them works before the recipe's.

    Returns:
        A pipeline as transformers builds it. Without a recipe it is exactly that.
    """
    build = cast(Any, transformers).pipeline  # its overloads list every task
    named = isinstance(model, str | Path)
    model = str(model) if named else model
    hub: dict[str, Any] = {"token": kwargs.get("token")}
    hub |= {k: v for k, v in (kwargs.get("model_kwargs") or {}).items() if k in ("cache_dir", "local_files_only")}
    if recipe is None and named:
        hub["revision"] = kwargs.get("revision")
        recipe = model if has_recipe(model, **hub) else None
    if recipe is None:
        return build(task, model=model, **kwargs)
    built = build(task, model=model, **kwargs)
    main = built.model
    processors = load_recipe(recipe, main_model=main, tokenizer=built.tokenizer, **hub)
    # Some pipelines forget what they were given at construction, so the model brings the processors along. A shallow copy of
    # it, which has the same weights: a model that the caller passed stays plain.
    built.model = copy.copy(main)
    built.model.generate = functools.partial(_generate, main, processors)
    return built


def _generate(main: Any, steering: Sequence[Any], *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
    # The class's own method: the instance's may be remote code, which steers already.
    return type(main).generate(main, *args, logits_processor=[*(logits_processor or []), *steering], **kwargs)


def steering(model: Any) -> list[Any]:
    """The processors that a model has from [`pipeline`]; of every other model none."""
    generate = vars(model).get("generate")
    known = isinstance(generate, functools.partial) and generate.func is _generate
    return list(generate.args[1]) if known and generate is not None else []


def has_recipe(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """Whether a folder, or a repository on the Hub (or its copy in the cache, when offline), holds a recipe."""
    if Path(repo_or_folder).is_dir():
        return Path(repo_or_folder, RECIPE_FILE).is_file()
    found = cached_file(
        str(repo_or_folder),
        RECIPE_FILE,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


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
        main_model: see [`~hf_logits.recipe.save_recipe`].
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
    if base_model is None and main_model is not None:
        base_model = (origin_of(main_model) or {}).get("repo_id")
    with tempfile.TemporaryDirectory() as folder:
        save_recipe(processors, folder, main_model=main_model)
        try:
            existing = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
        except EntryNotFoundError:
            existing = ""
        card = model_card(processors, repo_id, existing=existing, base_model=base_model)
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

import re
from pathlib import Path

from transformers import GenerationMixin

from hf_logits import load_recipe


def generate(*args, model, logits_processor=None, custom_generate=None, trust_remote_code=None, **kwargs):
    if "_decoding_recipe" not in vars(model):
        source = model.config.name_or_path
        # transformers keeps this file in a folder that is called like the commit.
        commit = None if Path(source).is_dir() else re.search("[0-9a-f]{40}", __file__)
        revision = commit and commit[0]
        model._decoding_recipe = load_recipe(source, revision=revision, main_model=model)
    processors = [*(logits_processor or []), *model._decoding_recipe]
    # Not model.generate, which is this function.
    return GenerationMixin.generate(model, *args, logits_processor=processors, **kwargs)
'''

_BEGIN, _END = "<!-- hf_logits recipe: begin -->", "<!-- hf_logits recipe: end -->"


def model_card(
    processors: Sequence[LogitsProcessor], repo_id: str, *, existing: str = "", base_model: str | None = None
) -> str:
    """The text of a model card with a section about the recipe. Whatever else the card says is kept."""
    card = ModelCard(existing if existing.strip() else f"---\n---\n\n# {repo_id}\n", ignore_metadata_errors=True)
    data = cast(Any, card.data)
    data.tags = list(
        dict.fromkeys([*(data.tags or []), "hf_logits", *(METHOD_OF[type(p).__name__] for p in processors)])
    )
    if base_model is not None and data.base_model is None:
        data.base_model = base_model
    section = f"{_BEGIN}\n\n{_section(processors, repo_id, base_model or 'the-model-to-steer')}\n{_END}"
    text = card.content
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        return text[:begin] + section + text[end + len(_END) :]
    return f"{text.rstrip()}\n\n{section}\n"


def _section(processors: Sequence[LogitsProcessor], repo_id: str, base_model: str) -> str:
    name = type(processors[0]).__name__
    if len(processors) == 1:
        imported, loader, given = f"hf_logits.processors import {name}", f"{name}.from_pretrained", "[steering]"
    else:
        imported, loader, given = "hf_logits import load_recipe", "load_recipe", "steering"
    return f"""## Decoding recipe

`{RECIPE_FILE}` describes how to decode with `hf_logits`: it is data, and needs no remote code.

```python
from transformers import pipeline

from {imported}


pipe = pipeline("text-generation", model="{base_model}")
steering = {loader}("{repo_id}", main_model=pipe.model)
print(pipe("Once upon a time", logits_processor={given}))
```

{chr(10).join(_about(processor) for processor in processors)}"""


def _about(processor: Any) -> str:
    document = (inspect.getdoc(type(processor)) or "").split("Args:")[0].strip()
    values = repr(processor).removeprefix(f"{type(processor).__name__}(").removesuffix(")")
    return f"### {type(processor).__name__}\n\n{document}\n\n```\n{values}\n```\n"
