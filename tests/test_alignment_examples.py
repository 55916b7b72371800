"""Each training example runs from its YAML file, on a tiny model and sentences made up here, and leaves a model and its card."""

import io
import json
import random
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import launching
import preferences
import tiny


FOLDER = Path(__file__).parents[1] / "examples" / "alignment"
PAPERS = {
    "bco": "2404.04656",
    "f_dpo": "2309.16240",
    "rpo": "2405.16436",
    "entanglement": "2410.13828",
    "armo": "2406.12845",
    "conjunction": "2402.03300",  # GRPO's
    "trice": "2312.02179",
    "score": "2409.12917",
}
DEMONSTRATIONS = {"displacement", "rationales", "self_correction"}


@pytest.fixture
def sentences(monkeypatch, tmp_path):
    """A package of rated sentences like that of vaderSentiment 0.5, in the cache."""
    rng = random.Random(0)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind in ("amazonReviewSnippets", "movieReviewSnippets"):
            lines = []
            for index in range(300):
                text = " ".join(["great" if index % 2 else "terrible", *(f"w{rng.randint(6, 63)}" for _ in range(5))])
                lines.append(f"{index}\t{2.5 if index % 2 else -2.5}\t{text}")
            data = "\n".join(lines).encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.setenv("HF_LOGITS_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as package:
        package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())


@pytest.fixture
def small(tmp_path):
    """The folder of a tiny model and its tokenizer."""
    tiny.llama().save_pretrained(tmp_path / "tiny")
    preferences.tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def arguments(name, small, out, *more):
    """A command line."""
    settings = ("--config", FOLDER / f"{name}.yaml", "--model_name_or_path", small, "--output_dir", out)
    return [FOLDER / f"{name}.py", *settings, "--max_steps", 2, "--disable_tqdm", "true", *more]


def run_in_one_process(*commands, folder, after=""):
    """As on the command line, one script after the other: what they import is imported once. `after`: a line of code behind each."""
    lines = [list(map(str, command)) for command in commands]
    program = f"""
import runpy
import sys
from pathlib import Path

sys.path.insert(0, {str(FOLDER)!r})
for sys.argv in {lines!r}:
    runpy.run_path(sys.argv[0], run_name="__main__")
    {after or "pass"}
"""
    launching.run("-c", program, folder=folder)


@pytest.mark.slow
def test_each_example_trains_saves_and_names_its_paper(sentences, small, tmp_path):
    run_in_one_process(
        *(arguments(name, small, tmp_path / name, "--use_cpu", "true") for name in PAPERS), folder=tmp_path
    )
    for name, paper in PAPERS.items():
        assert paper in (tmp_path / name / "README.md").read_text()
        weights = "model.safetensors" if name == "armo" else "adapter_model.safetensors"
        assert (tmp_path / name / weights).is_file() and (tmp_path / name / "eval_results.json").is_file()


@pytest.mark.slow
def test_a_run_of_two_stages_goes_on_from_either(small, tmp_path):
    out = tmp_path / "out"
    first = out / "stage_1" / "model.safetensors"
    saves = ("--use_cpu", "true", "--save_strategy", "steps", "--save_steps", 1, "--per_device_eval_batch_size", 64)
    checkpoints = out / "checkpoint-1", first.parent / "checkpoint-1"
    resumed = [arguments("score", small, out, *saves, "--resume_from_checkpoint", one) for one in checkpoints]
    seen = tmp_path / "seen"
    note = f"print(Path({str(first)!r}).stat().st_mtime_ns, file=open({str(seen)!r}, 'a'))"
    run_in_one_process(arguments("score", small, out, *saves), *resumed, folder=tmp_path, after=note)
    written = list(map(int, seen.read_text().split()))
    assert written[0] == written[1] < written[2]


@pytest.mark.slow
def test_the_demonstration_of_self_correction_leaves_a_table_and_a_figure(tmp_path):
    settings = ("--steps", 2, "--seeds", 2, "--start-steps", 2, "--repeats", 1)
    launching.run(FOLDER / "self_correction.py", "--output", tmp_path / "out", *settings, folder=tmp_path)
    assert (tmp_path / "out" / "self_correction.md").read_text().count("±") == 30
    assert (tmp_path / "out" / "self_correction.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_processes_and_data_of_ones_own(small, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split in ("train", "test"):
        preferences.pairs(8).to_json(data / f"{split}.jsonl")
    launching.run(*arguments("rpo", small, out, "--dataset_name", data), folder=tmp_path, launch=launching.LAUNCH)
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.slow
def test_the_demonstration_of_displacement_leaves_a_table_and_a_figure(sentences, small, tmp_path):
    settings = ("--steps", 4, "--pairs", 8, "--learning-rate", 1e-3)
    program = (FOLDER / "displacement.py", "--model", small, "--output", tmp_path / "out")
    launching.run(*program, *settings, folder=tmp_path)
    assert (tmp_path / "out" / "displacement.md").read_text().count("| RPO |") == 3
    assert (tmp_path / "out" / "displacement.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demonstration_of_rationales_leaves_tables_and_a_figure(tmp_path):
    settings = ("--imitation-steps", 20, "--steps", 4, "--every", 2, "--examples", 8, "--batch", 4, "--seeds", 1)
    launching.run(FOLDER / "rationales.py", "--output", tmp_path / "out", "--draws", 3, *settings, folder=tmp_path)
    report = (tmp_path / "out" / "rationales.md").read_text()
    assert report.count("\n| with") == 3 and report.count("| ") > 40
    assert (tmp_path / "out" / "rationales.png").stat().st_size > 10_000


def test_rationales_are_right_but_for_their_noise(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    demonstration = runpy.run_path(str(FOLDER / "rationales.py"))
    rng, answers = random.Random(0), []
    for digits in demonstration["sums"](0):
        texts = [demonstration["rationale"](digits, rng, noise) for noise in (0.0, 0.4)]
        answers.append(demonstration["verifier"](texts, [str(sum(digits))] * 2))
        assert texts[0].split()[-1] == texts[0].split()[-3]
    right, noisy = (sum(column) / len(answers) for column in zip(*answers, strict=True))
    assert right == 1.0 and 0.3 < noisy < 0.5


def test_every_script_has_its_settings():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"common"} - DEMONSTRATIONS
    assert scripts == set(PAPERS) == {path.stem for path in FOLDER.glob("*.yaml")}
    for name in scripts:
        assert yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["output_dir"] == f"examples/output/{name}"


def test_one_word_makes_the_difference(sentences, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    common = runpy.run_path(str(FOLDER / "common.py"))
    for row in common["near_duplicates"]():
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b] == [("great", "terrible")]
    assert {row["label"] for row in common["thumbs"]()} == {True, False}
    assert all("great" in row["chosen"] and "terrible" in row["rejected"] for row in common["opinions"]())
