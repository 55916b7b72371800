"""The comparisons of distillation run with tiny models and data, and print a table with all their methods."""

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import preferences
import tiny


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "distillation"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a script, whose rated sentences are made up here."""
    before = set(sys.modules)
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def made_up(kinds: Any) -> dict[str, list[tuple[str, float]]]:
        rng = random.Random(0)
        words = {rating: ["bad", "so", "good"][index] for index, rating in enumerate((-2.5, 0.0, 2.5))}
        found: dict[str, list[tuple[str, float]]] = {}
        for kind in kinds:
            ratings = [rng.choice(list(words)) for _ in range(40)]
            found[kind] = [
                (" ".join([words[rating], *(f"w{rng.randint(6, 63)}" for _ in range(8))]), rating)
                for rating in ratings
            ]
        return found

    monkeypatch.setattr(importlib.import_module("rated_sentences"), "rated_sentences", made_up)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The folder of a tiny language model and its tokenizer."""
    tiny.llama(num_hidden_layers=4).save_pretrained(tmp_path / "tiny")
    preferences.tokenizer().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def untuned(name: str, folder: Path) -> list[str]:
    """The methods of a script with the first of the settings that they try."""
    methods = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for entry in methods.values():
        entry["tried"] = {key: values[:1] for key, values in entry["tried"].items()}
    (folder / "methods.yaml").write_text(yaml.safe_dump(methods, sort_keys=False))
    return ["--methods", str(folder / "methods.yaml"), "--seeds", "2", "--output", str(folder / "out")]


def check(text: str, name: str, seeds: int) -> None:
    """A row and a verdict for each method, with numbers, and an honest head."""
    for method in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
        assert "±" in row and "nan" not in row
        assert any(line.startswith(f"- {method}: ") for line in text.splitlines())
    assert f"over {seeds} seed(s)" in text


@pytest.mark.slow
def test_digits(examples, tmp_path, capsys):
    settings = ["--steps", "1", "--teacher-steps", "1", *untuned("image_classifier", tmp_path)]
    examples("image_classifier").main(settings)
    text = (tmp_path / "out" / "image_classifier.md").read_text()
    check(text, "image_classifier", 2)
    assert text in capsys.readouterr().out


@pytest.mark.slow
def test_sentiment(examples, small, tmp_path, monkeypatch):
    example = examples("sequence_classifier")
    monkeypatch.setattr(example, "DOMAINS", {"tweets": "tweets", "movieReviewSnippets": "films"})
    settings = ["--steps", "1", "--teacher-steps", "1", "--rows", "24", "--model", small]
    settings += untuned("sequence_classifier", tmp_path)
    example.main(settings)
    text = (tmp_path / "out" / "sequence_classifier.md").read_text()
    check(text, "sequence_classifier", 2)
    assert "| tweets | films |" in text


@pytest.mark.slow
def test_language_model(examples, small, tmp_path):
    settings = ["--model", small, "--steps", "2", "--layers", "2", "--k", "8", "--test-rows", "8"]
    examples("language_model").main([*settings, *untuned("language_model", tmp_path)])
    check((tmp_path / "out" / "language_model.md").read_text(), "language_model", 2)


def test_kinds_are_held_out_whole(examples):
    example = examples("sequence_classifier")
    parts = example.splits("tweets", 16)
    assert [len(rows) for rows in parts.values()] == [36, 12, 16]
    sentences = dict(example.rated_sentences(example.DOMAINS))
    assert {text for text, _ in parts["test"]} <= {text for text, _ in sentences["tweets"]}
    assert not {text for text, _ in parts["train"]} & {text for text, _ in parts["test"] + parts["validation"]}


def test_the_validation_split_chooses_and_the_test_split_is_reported(examples):
    common = examples("common")
    asked = []

    def measure(student: Any, part: str) -> dict[str, float]:
        asked.append(part)
        method, setting, seed = student
        quality = setting["learning_rate"] + (seed if part == "test" else 0) + (5 if method.name == "KD" else 0)
        return {"loss": -quality}

    tried = [{"learning_rate": 1.0}, {"learning_rate": 2.0}]
    methods = [common.Method(name, object, object, {}, tried, "labels") for name in ("CE only", "KD")]
    results = common.compare(methods, lambda *given: given, measure, seeds=3, key="loss", lower=True)
    assert asked == 2 * ["validation", "validation", "test", "test", "test"]
    assert results["CE only"].chosen == "learning_rate 2" and results["CE only"].values("loss") == [-2, -3, -4]
    text = common.report(results, {"loss": "loss"}, key="loss", lower=True)
    assert "| KD | -8.0 ± 1.0 | -5.0 ± 0.0 |" in text and "better with every seed (against CE only)" in text
    assert common.verdict([1.0, -1.0], False) == "no clear difference"
    assert common.verdict([1.0], False) == "one run says nothing"
    assert common.verdict([1.0, 2.0], True) == "worse with every seed"
