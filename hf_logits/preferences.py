"""Preference data that cannot be learned from is refused before anything is tokenized."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, IterableDataset


def is_empty(completion: Any) -> bool:
    """Whether a completion, a text or a list of messages, says nothing."""
    if isinstance(completion, str):
        return not completion
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def require_columns(dataset: Dataset | IterableDataset, name: str, columns: Iterable[str]) -> None:
    """Raise `ValueError` if one of `columns` is missing."""
    there = list(next(iter(dataset), {}))
    if not there:
        raise ValueError(f"The {name} dataset has no rows.")
    missing = [column for column in columns if column not in there]
    if missing:
        raise ValueError(
            f"The {name} dataset has no column {', '.join(map(repr, missing))}; its columns are {there}. "
            "Rename or add what is missing (`dataset.rename_column`)."
        )


def check_datasets(given: dict[str, Any], check: Callable[[Any, str], Any]) -> None:
    """Put what `check(dataset, name)` returns in the place of each dataset among a trainer's arguments."""
    for name in ("train_dataset", "eval_dataset"):
        one = given.get(name)
        if isinstance(one, dict):
            given[name] = {key: check(dataset, key) for key, dataset in one.items()}
        elif one is not None:
            given[name] = check(one, name)


def refuse_rows(
    dataset: Dataset | IterableDataset, name: str, faults: dict[str, Callable[[Any], bool]]
) -> Dataset | IterableDataset:
    """Raise `ValueError` if a row has one of the `faults`, each a sentence and the test of a row.

    A stream is checked while it is read.
    """
    if isinstance(dataset, IterableDataset):

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            for sentence, is_faulty in faults.items():
                if is_faulty(row):
                    raise ValueError(f"Row {index} of the {name} dataset: {sentence}")
            return row

        return dataset.map(check, with_indices=True)
    found: dict[str, list[int]] = {sentence: [] for sentence in faults}
    for index, row in enumerate(dataset):
        for sentence, is_faulty in faults.items():
            if is_faulty(row):
                found[sentence].append(index)
    for sentence, rows in found.items():
        if rows:
            raise ValueError(
                f"{len(rows)} of the {len(dataset)} rows of the {name} dataset (first: {rows[:5]}): {sentence}"
            )
    return dataset


def check_pairs(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Refuse pairs without a preference: missing columns, empty completions, chosen equal to rejected."""
    require_columns(dataset, name, ("chosen", "rejected"))
    return refuse_rows(
        dataset,
        name,
        {
            "the chosen or the rejected completion is empty. Drop such rows with `dataset.filter`.": lambda row: (
                is_empty(row["chosen"]) or is_empty(row["rejected"])
            ),
            "chosen and rejected are the same, so there is nothing to prefer. Drop such rows with "
            '`dataset.filter(lambda row: row["chosen"] != row["rejected"])`.': lambda row: (
                row["chosen"] == row["rejected"]
            ),
        },
    )
