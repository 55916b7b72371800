"""Data that cannot be learned from is refused with what is wrong, before anything is tokenized or written."""

import pytest
from datasets import Dataset

from hf_logits.preferences import check_pairs, is_empty, require_columns
from hf_logits.trainers import FDPOConfig, FDPOTrainer, RPOConfig, RPOTrainer
from preferences import make, pairs


def turn(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("empty", ["", [], turn(""), turn(None)])
def test_what_is_empty(empty):
    assert is_empty(empty)


@pytest.mark.parametrize(
    "something", ["a", " ", turn("a"), [{"role": "assistant", "tool_calls": [{"type": "function"}]}]]
)
def test_what_is_not_empty(something):
    assert not is_empty(something)


def test_good_pairs_pass_untouched():
    for conversational in (False, True):
        data = pairs(conversational=conversational)
        assert check_pairs(data, "train") is data
        stream = check_pairs(data.to_iterable_dataset(), "train")
        assert list(stream) == list(data)


FAULTS = [
    ({"rejected": lambda row: row["chosen"]}, "the same"),
    ({"chosen": lambda row: ""}, "empty"),
    ({"rejected": lambda row: ""}, "empty"),
]


def spoil(change, rows=(2, 5)):
    data = pairs()
    return data.map(
        lambda row, index: {key: value(row) for key, value in change.items()} if index in rows else {},
        with_indices=True,
    )


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faulty_rows_are_counted_and_shown(change, message):
    with pytest.raises(ValueError, match=rf"2 of the 8 rows of the eval dataset \(first: \[2, 5\]\).*{message}"):
        check_pairs(spoil(change), "eval")


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_stream_stops_at_the_first_faulty_row(change, message):
    stream = iter(check_pairs(spoil(change).to_iterable_dataset(), "train"))
    assert next(stream) and next(stream)
    with pytest.raises(ValueError, match=f"Row 2 of the train dataset.*{message}"):
        next(stream)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"'rejected'; its columns are \['prompt', 'chosen'\]"):
        check_pairs(pairs().remove_columns("rejected"), "train")
    with pytest.raises(ValueError, match="no rows"):
        require_columns(Dataset.from_list([]), "train", ["chosen"])


@pytest.mark.parametrize(("trainer", "config"), [(FDPOTrainer, FDPOConfig), (RPOTrainer, RPOConfig)])
@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_trainers_refuse_and_write_nothing(trainer, config, part, tmp_path):
    for change, message in FAULTS:
        with pytest.raises(ValueError, match=message):
            make(trainer, config, tmp_path / "new", **{part: spoil(change)})
    with pytest.raises(ValueError, match="'chosen'"):
        make(trainer, config, tmp_path / "new", **{part: pairs().remove_columns("chosen")})
    assert not (tmp_path / "new").exists()
