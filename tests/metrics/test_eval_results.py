"""Results as files of a model's repository, here and on a Hub."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from hf_logits.metrics import OpenSet
from hf_logits.metrics.eval_results import eval_entries, push_eval_results, save_eval_results


RESULT = {
    "acc": 0.75,
    "auroc": 5 / 6,
    "count": 7,
    "nothing": math.nan,
    "bins": [],
    "notes": {"nothing": "there are no rows"},
}
TASKS = {"acc": "closed", "auroc": "open"}


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    entries = eval_entries(
        RESULT,
        TASKS,
        dataset_id="me/benchmark",
        dataset_revision="0" * 40,
        date=datetime.date(2026, 1, 2),
        notes="greedy",
        source_url="https://example.org/run",
        source_name="run",
    )
    path = save_eval_results(entries, tmp_path, "benchmark")
    assert path == tmp_path / ".eval_results" / "benchmark.yaml"
    read = yaml.safe_load(path.read_text())
    assert parse_eval_result_entries(read) == entries
    assert read[0] == {
        "dataset": {"id": "me/benchmark", "task_id": "closed", "revision": "0" * 40},
        "value": 0.75,
        "date": "2026-01-02",
        "source": {"url": "https://example.org/run", "name": "run"},
        "notes": "greedy",
    }
    assert read[1]["value"] == 5 / 6  # to the last bit
    # the least there can be, and a file that is replaced
    save_eval_results(eval_entries(RESULT, {"count": "size"}, dataset_id="me/benchmark"), tmp_path, "benchmark")
    least = [{"dataset": {"id": "me/benchmark", "task_id": "size"}, "value": 7}]
    assert yaml.safe_load(path.read_text()) == least


def test_what_a_metric_returns_goes_to_the_hub(hub: Any) -> None:
    HfApi().create_repo("tester/classifier")
    HfApi().upload_file(repo_id="tester/classifier", path_or_fileobj=b"kept", path_in_repo="README.md")
    result = OpenSet(keep_in_memory=True).compute(predictions=[0, 1], scores=[2.0, 1.0], references=[0, -1])
    entries = eval_entries(result, TASKS, dataset_id="me/benchmark")
    address = push_eval_results(entries, "tester/classifier", "benchmark")
    files = hub.repos["tester/classifier"].files
    assert address.endswith(hub.repos["tester/classifier"].refs["main"])
    assert set(files) == {".gitattributes", "README.md", ".eval_results/benchmark.yaml"}
    assert parse_eval_result_entries(yaml.safe_load(files[".eval_results/benchmark.yaml"])) == entries
    assert [entry.value for entry in entries] == [1.0, 1.0]
    assert not hub.unknown


def test_a_missing_repository_is_said(hub: Any) -> None:
    entries = eval_entries(RESULT, TASKS, dataset_id="me/benchmark")
    with pytest.raises(RepositoryNotFoundError):
        push_eval_results(entries, "tester/nowhere", "benchmark")


def test_a_benchmark_needs_an_id() -> None:
    with pytest.raises(HFValidationError):
        eval_entries(RESULT, TASKS, dataset_id="not an id")


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "tasks names no value"),
        ({"f1": "default"}, {}, "has no 'f1'; it has"),
        ({"nothing": "default"}, {}, r"'nothing' is nan \(there are no rows\)"),
        ({"bins": "default"}, {}, "finite numbers"),
        ({"acc": "same", "auroc": "same"}, {}, "a task of its own"),
        ({"acc": "default"}, {"date": "yesterday"}, "isoformat"),
        ({"acc": "default"}, {"source_name": "run"}, "source_url"),
    ],
)
def test_bad_input(tasks: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_entries(RESULT, tasks, dataset_id="me/benchmark", **options)


def test_bad_files(tmp_path: Path) -> None:
    entries = eval_entries(RESULT, TASKS, dataset_id="me/benchmark")
    for name in ("../other", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="A file's name"):
            save_eval_results(entries, tmp_path, name)
    with pytest.raises(ValueError, match="There are no entries"):
        save_eval_results([], tmp_path, "benchmark")
    assert not list(tmp_path.iterdir())
