"""The examples on long contexts and personality run with a tiny model, and leave a table and a figure."""

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import preferences
import tiny
from oracles import word_tokenizer


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a script by its folder and name."""
    before = set(sys.modules)

    def load(folder: str, name: str) -> Any:
        for place in (EXAMPLES, EXAMPLES / folder):
            monkeypatch.syspath_prepend(str(place))
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The folder of a tiny model, and of a tokenizer that knows the options."""
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    made = word_tokenizer(["user", "assistant", "A", "B", "C", "D", "E"])
    made.chat_template = preferences.tokenizer().chat_template
    made.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.slow
def test_needles(examples, small, tmp_path):
    options = ["--each", "2", "--context", "60", "--windows", "40", "128", "--segment", "16"]
    examples("long_context", "needles").main([*options, "--model", small, "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "needles.md").read_text()
    assert all(f"| the answer is {where} |" in text for where in ("far back", "near", "not there"))
    assert text.count(" of 2 |") == 9 and "nan" not in text
    assert (tmp_path / "out" / "needles.png").stat().st_size > 10_000


def test_needles_lie_where_they_should(examples):
    script = examples("long_context", "needles")
    data = script.samples(3, 100, word_tokenizer())
    assert len(data) == 9
    for row in data:
        place = row["context"].find("The code of the")
        share = place / len(row["context"])
        assert {"far": 0.1 < share < 0.35, "near": share > 0.7, "none": place < 0}[row["kind"]]
        assert row["kind"] == "none" or row["response"][:-1] in row["context"][place:]


@pytest.mark.slow
def test_big_five(examples, small, tmp_path):
    options = ["--splits", "2", "--heads", "3", "--strengths", "0", "2"]
    examples("personality", "big_five").main([*options, "--model", small, "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "big_five.md").read_text()
    assert all(f"| {strength} | " in text for strength in ("-2", "+0", "+2")) and text.count("- split ") == 2
    assert "nan" not in text and (tmp_path / "out" / "big_five.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "extraverted" / "head_vectors.safetensors").is_file()


def test_no_statement_is_used_twice(examples):
    script = examples("personality", "big_five")
    parts = script.split(random.Random(0), (8, 3))
    assert [len(part) for part in parts] == [8, 3, 5]
    assert sorted(place for part in parts for place in part) == list(range(len(script.FOR)))
    assert len({*script.FOR, *script.AGAINST}) == 2 * len(script.FOR) == 32
