"""Results as files of a model's repository: `.eval_results/*.yaml`, which the Hub shows on the model's page and in leaderboards.

See https://huggingface.co/docs/hub/eval-results. The Hub reads them for data sets that are registered as benchmarks.
"""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry, HfApi, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id, yaml_dump


FOLDER = ".eval_results"


def eval_entries(
    result: Mapping[str, Any],
    tasks: Mapping[str, str],
    *,
    dataset_id: str,
    dataset_revision: str | None = None,
    date: str | datetime.date | None = None,
    notes: str | None = None,
    source_url: str | None = None,
    source_name: str | None = None,
    source_user: str | None = None,
    source_org: str | None = None,
) -> list[EvalResultEntry]:
    """What a metric returned, as entries for the Hub.

    Args:
        result (`Mapping`): of a metric's `compute`.
        tasks (`Mapping[str, str]`): which of its values to take, and the benchmark's task for each: `{"acc": "default"}`.
        dataset_id (`str`): the benchmark's data set on the Hub.
        dataset_revision (`str`, *optional*): its commit.
        date (`str` or `datetime.date`, *optional*): of the measurement, as in ISO 8601. By default that of the upload.
        notes (`str`, *optional*): what a reader has to know of the setup.
        source_url, source_name, source_user, source_org (`str`, *optional*): where it comes from; none without the address.

    Raises:
        ValueError: no such value, one that is no finite number (with the metric's reason), a malformed id or date.

    Example:

    ```python
    >>> result = OpenSet().compute(**open_set_inputs(logits), references=labels)
    >>> entries = eval_entries(result, {"acc": "closed", "auroc": "open"}, dataset_id="me/benchmark")
    >>> push_eval_results(entries, "me/classifier", "benchmark")
    ```
    """
    validate_repo_id(dataset_id)
    if not tasks:
        raise ValueError(f"tasks names no value; choose from {sorted(result)}.")
    if isinstance(date, str):
        datetime.datetime.fromisoformat(date)
    entries = []
    for key, task in tasks.items():
        if key not in result:
            raise ValueError(f"The result has no {key!r}; it has {sorted(result)}.")
        value, reason = result[key], (result.get("notes") or {}).get(key)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{key!r} is {value!r}{f' ({reason})' if reason else ''}: the Hub takes finite numbers.")
        entries.append(
            EvalResultEntry(
                dataset_id=dataset_id,
                task_id=task,
                value=int(value) if isinstance(value, int) else float(value),
                dataset_revision=dataset_revision,
                date=date.isoformat() if isinstance(date, datetime.date) else date,
                notes=notes,
                source_url=source_url,
                source_name=source_name,
                source_user=source_user,
                source_org=source_org,
            )
        )
    if len(set(tasks.values())) < len(tasks):
        raise ValueError(f"Each value needs a task of its own; got {dict(tasks)}.")
    return entries


def save_eval_results(entries: Sequence[EvalResultEntry], folder: str | Path, name: str) -> Path:
    """Write entries below a folder that is, or will be, a model's repository. A file of the same name is replaced.

    Args:
        entries (`list[EvalResultEntry]`): see [`eval_entries`].
        folder (`str` or `Path`): in which `.eval_results` lies or is made.
        name (`str`): of the file, without its ending.
    """
    path = Path(folder, _file(name))
    text = _text(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def push_eval_results(
    entries: Sequence[EvalResultEntry],
    repo_id: str,
    name: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload evaluation results",
    create_pr: bool = False,
) -> str:
    """Upload entries to a model's repository, which has to be there. A file of the same name is replaced.

    Args:
        entries (`list[EvalResultEntry]`): see [`eval_entries`].
        repo_id (`str`): the model. Results of others' models go there as a pull request.
        name (`str`): of the file, without its ending.
        token, revision, commit_message, create_pr: as everywhere on the Hub.

    Returns:
        `str`: the address of the commit (or pull request).
    """
    commit = HfApi(token=token).upload_file(
        path_or_fileobj=_text(entries).encode(),
        path_in_repo=_file(name),
        repo_id=repo_id,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return str(commit.pr_url or commit.commit_url)


def _file(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"A file's name has letters, digits, '-', '_' and '.'; got {name!r}.")
    return f"{FOLDER}/{name}.yaml"


def _text(entries: Sequence[EvalResultEntry]) -> str:
    if not entries:
        raise ValueError("There are no entries; make some with eval_entries.")
    return yaml_dump(eval_result_entries_to_yaml(list(entries)))
