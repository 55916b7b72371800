"""The benchmarks run and print their tables; with tiny models here, and nobody looks at the clock."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    common = importlib.import_module("common")

    def model() -> Any:
        # As many ids as SmolLM2, because the prompts are drawn from them.
        lm = tiny.llama(vocab_size=49152, num_hidden_layers=12, max_position_embeddings=2048)
        lm.generation_config.pad_token_id = 2
        return lm

    monkeypatch.setattr(common, "model", model)
    yield importlib.import_module("run")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def names() -> list[str]:
    return re.findall(r'^    "(\w+)": "', (FOLDER / "run.py").read_text(), flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", names())
def test_every_table_is_written(benchmarks, monkeypatch, tmp_path, name):
    report = tmp_path / "folder" / "report.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--only", name, "--output", str(report)])
    benchmarks.main()
    text = report.read_text()
    assert f"examples/benchmarks/{name}.py" in text and "not for quoting" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) >= 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert all(re.search(r"\d\.\d", line) for line in lines[2:])


def test_every_script_has_its_table():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"common", "run"} == set(names())
