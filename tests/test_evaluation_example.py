"""examples/evaluate_a_steered_model.py runs with a tiny model and made-up questions."""

import importlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from oracles import word_tokenizer


FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, which finds a package with the layout of the real one."""
    before = set(sys.modules)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.syspath_prepend(str(FOLDER))
    samples = [
        {
            "question": f"w{20 + i} w{21 + i}\n(A) w{30 + i} (B) w41 (C) w42\n(D) w43",
            "target": f"Because. The answer is ({'ABCD'[i % 4]}).",
        }
        for i in range(9)
    ]
    read = yaml.safe_dump(
        {"dataset_name": "words", "fewshot_config": {"samples": [*samples, {"question": "?", "target": "?"}]}}
    )
    with zipfile.ZipFile(tmp_path / "exam.whl", "w") as packed:
        packed.writestr("lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_words.yaml", read + "tag: !function x.y\n")
    monkeypatch.setattr(importlib.import_module("packages"), "package_file", lambda *_: tmp_path / "exam.whl")
    yield importlib.import_module("evaluate_a_steered_model")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def small(tmp_path: Path) -> str:
    words = ["A", "B", "C", "D", "A.", "B.", "C.", "D.", "Question:", "Answer:", "N/A"]
    word_tokenizer(words).save_pretrained(tmp_path / "tiny")
    tiny.llama().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_the_questions(example: Any) -> None:
    questions = example.exam()
    assert len(questions) == 9 and questions[1] == example.Question(
        "words", "w21 w22", ("w31", "w41", "w42", "w43"), 1
    )
    assert example.prompt(questions[0], questions[1], ["a", "b", "c", "d"]) == (
        "Question: w21 w22\nA. w31\nB. w41\nC. w42\nD. w43\nAnswer: B\n\n"
        "Question: w20 w21\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_the_example(example: Any, small: str, tmp_path: Path, rotated: bool, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "found"
    more = ["--rotations"] if rotated else []
    example.main(["--model", small, "--questions", "6", "--batch-size", "4", "--output", str(output), *more])
    text = (output / "results.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| 0-shot", "| 1-shot"))]
    assert len(rows) == 4 and "nan" not in text and ("same in all orders" in text) == rotated
    shares = [float(share) for row in rows for share in re.findall(r"([\d.]+)%", row)]
    assert len(shares) == 16 and sum(shares) == pytest.approx(400, abs=1)
    assert rows[0].split("|")[2:] != rows[1].split("|")[2:]
    assert (output / "results.png").is_file() and text.splitlines()[4] in capsys.readouterr().out


def test_a_scale_of_one_is_the_plain_model(example: Any, small: str, tmp_path: Path) -> None:
    example.main(["--model", small, "--questions", "4", "--scale", "1", "--output", str(tmp_path)])
    rows = [line.split("|")[2:] for line in (tmp_path / "results.md").read_text().splitlines() if "-shot" in line]
    assert rows[0] == rows[1] and rows[2] == rows[3]
