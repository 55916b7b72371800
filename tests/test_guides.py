"""The record of a guide: written, read, checked, and turned into a processor's arguments."""

import json

import pytest

from hf_logits.guides import GUIDE_FILE, guide_record, guide_settings, read_guide, write_guide


RECORD = guide_record(
    {"bad": 4, "good": 5, "plain": 6}, scale=0.1 + 0.2, bias={"good": -1e-9, "bad": 2.5}, length_normalise=False
)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "at hand"])
def test_the_arguments_of_a_processor(saved, tmp_path):
    write_guide(tmp_path, RECORD)
    found = guide_settings(tmp_path if saved else RECORD, desired="good")
    assert found == {
        "desired": 5,
        "undesired": [4, 6],
        "scale": 0.1 + 0.2,
        "bias": {5: -1e-9, 4: 2.5},
        "length_normalise": False,
    }


def test_what_is_written_is_what_is_read(tmp_path):
    write_guide(tmp_path, RECORD)
    assert read_guide(str(tmp_path)) == RECORD
    assert list(read_guide(tmp_path)["codes"]) == ["bad", "good", "plain"]


def test_a_code_that_the_guide_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"'better'.*\['bad', 'good', 'plain'\]"):
        guide_settings(RECORD, desired="better")


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no {GUIDE_FILE}"):
        guide_settings(tmp_path, desired="good")


@pytest.mark.parametrize(
    "change",
    [
        {"codes": {"good": 5}},
        {"codes": {"good": 5, "bad": 5}},
        {"codes": {"good": 5, "bad": -1}},
        {"codes": {"good": 5, "bad": True}},
        {"codes": ["good", "bad"]},
        {"scale": "2"},
        {"scale": float("nan")},
        {"scale": None},
        {"bias": {"better": 1.0}},
        {"bias": {"good": float("inf")}},
        {"length_normalise": 1},
    ],
    ids=str,
)
def test_records_that_make_no_sense_are_refused(change, tmp_path):
    (tmp_path / GUIDE_FILE).write_text(json.dumps(RECORD | change))
    with pytest.raises(ValueError, match="not the record of a guide"):
        read_guide(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({"codes": {"a": 1, "b": 2}}), "\xff"])
def test_files_that_are_no_record_are_refused(text, tmp_path):
    (tmp_path / GUIDE_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="not the record of a guide"):
        read_guide(tmp_path)
