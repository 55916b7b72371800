"""What the three comparisons share: methods from a YAML file, one way to train a student, and the table.

Each method tries a few settings on the validation split, with one seed. The best of them then trains with every seed of the table, and
only that is measured on the test split.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from transformers import PreTrainedModel, PrinterCallback  # noqa: E402

import hf_logits.trainers  # noqa: E402


TUNING_SEED = 1000
"""Apart from those of the table."""
BASELINES = ("CE only", "KD")


@dataclass
class Method:
    """One entry of the YAML file: a trainer, its settings, and the settings that the validation split decides between."""

    name: str
    trainer: type
    config: type
    settings: dict[str, Any]
    tried: list[dict[str, Any]]
    learns_from: str
    """`"labels"`, `"teacher"` (and labels), or `"stored teacher"`."""


@dataclass
class Result:
    """What was chosen, and what was measured with each seed."""

    chosen: str
    runs: list[dict[str, float]] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs]


def read_methods(path: Path) -> list[Method]:
    """The methods in a YAML file, in its order."""
    found = []
    for name, entry in yaml.safe_load(path.read_text()).items():
        trainer = entry["trainer"]
        if trainer == "Trainer":
            classes = transformers.Trainer, transformers.TrainingArguments
        else:
            config = trainer.removesuffix("Trainer") + "Config"
            classes = getattr(hf_logits.trainers, trainer), getattr(hf_logits.trainers, config)
        tried = entry.get("tried", {})
        settings = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
        found.append(Method(name, *classes, entry.get("settings", {}), settings, entry["learns_from"]))
    return found


def parser(description: str | None, name: str, *, steps: int, seeds: int) -> argparse.ArgumentParser:
    """The arguments that all comparisons have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    made.add_argument("--methods", type=Path, default=here / f"{name}.yaml", help="what is compared")
    made.add_argument(
        "--output", type=Path, default=here.parent / "output" / "distillation", help="where the table goes"
    )
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps of each student")
    made.add_argument("--seeds", type=int, default=seeds, help="runs of each method that are averaged")
    return made


def fit(
    method: Method,
    setting: dict[str, Any],
    student: PreTrainedModel,
    data: Any,
    folder: Path,
    *,
    teacher: Any = None,
    **rest: Any,
) -> PreTrainedModel:
    """Train a student. `rest`: `seed`, `max_steps`, a batch size; and what a trainer takes beside its settings."""
    handed_on = {name: rest.pop(name) for name in ("processing_class", "data_collator") if name in rest}
    if method.learns_from == "teacher":
        handed_on["teacher"] = teacher
    args = method.config(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **rest,
        **method.settings,
        **setting,
    )
    trainer = method.trainer(student, args=args, train_dataset=data, **handed_on)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return student.eval()


def compare(
    methods: list[Method],
    train: Callable[[Method, dict[str, Any], int], PreTrainedModel],
    measure: Callable[[PreTrainedModel, str], dict[str, float]],
    *,
    seeds: int,
    key: str,
    lower: bool = False,
) -> dict[str, Result]:
    """Choose each method's setting by `key` on the validation split, then train with all seeds and measure on the test split.

    Args:
        train: from a method, a setting and a seed to a student.
        measure: from a student and `"validation"` or `"test"` to named numbers.
        lower: whether a lower `key` is a better one.
    """
    found = {}
    for method in methods:
        best, scores = method.tried[0], []
        if len(method.tried) > 1:
            for setting in method.tried:
                scores.append(measure(train(method, setting, TUNING_SEED), "validation")[key])
            best = method.tried[scores.index(min(scores) if lower else max(scores))]
        result = Result(", ".join(f"{name} {value:g}" for name, value in best.items()))
        for seed in range(seeds):
            start = time.perf_counter()
            student = train(method, best, seed)
            seconds = time.perf_counter() - start
            result.runs.append(measure(student, "test") | {"seconds": seconds})
        found[method.name] = result
        tried = " ".join(f"{score:.2f}" for score in scores)
        print(f"{method.name}: {spread(result.values(key))} [validation: {tried}]", flush=True)
    return found


def spread(values: list[float], form: str = ".1f") -> str:
    """Mean and standard deviation."""
    mean = format(statistics.fmean(values), form)
    deviation = form.replace("+", "")
    return f"{mean} ± {statistics.stdev(values):{deviation}}" if len(values) > 1 else mean


def verdict(differences: list[float], lower: bool) -> str:
    """In words, and only if all seeds say the same."""
    gains = [-value if lower else value for value in differences]
    if len(gains) < 2:
        return "one run says nothing"
    if all(gain > 0 for gain in gains):
        return "better with every seed"
    return "worse with every seed" if all(gain < 0 for gain in gains) else "no clear difference"


def report(
    results: dict[str, Result], columns: dict[str, str], *, key: str, lower: bool = False, head: str = ""
) -> str:
    """A Markdown table: mean ± standard deviation over seeds. Differences are between runs of one seed.

    Args:
        columns: titles of what was measured; that of `key` comes first.
    """
    known = [name for name in BASELINES if name in results]
    titles = [
        columns[key],
        *(f"minus {name}" for name in known),
        *(title for name, title in columns.items() if name != key),
    ]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    words = []
    for name, result in results.items():
        cells, said = [spread(result.values(key))], []
        for other in known:
            if name == other:
                cells.append("")
                continue
            pairs = zip(result.values(key), results[other].values(key), strict=True)
            differences = [mine - theirs for mine, theirs in pairs]
            cells.append(spread(differences, "+.1f"))
            said.append(f"{verdict(differences, lower)} (against {other})")
        cells += [spread(result.values(column)) for column in columns if column != key]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        words.append(f"- {name}: {'; '.join(said)}. Chosen: {result.chosen or 'nothing to choose'}.")
    seeds = len(next(iter(results.values())).runs)
    about = f"{head} Mean ± standard deviation over {seeds} seed(s); {'lower' if lower else 'higher'} is better in the first column.".strip()
    return "\n".join([about, "", *lines, "", *words])


def publish(text: str, name: str, folder: Path) -> None:
    """Print the table, and write it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    print(f"\n{text}\n\n{folder / name}.md")


@torch.no_grad()
def compare_classes(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Accuracy of a classifier, and how often it decides as its teacher, both in %."""
    inputs = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
    decided = student(**inputs).logits.argmax(-1).cpu()
    taught = teacher.to(student.device)(**inputs).logits.argmax(-1).cpu()
    return {
        "accuracy": 100 * (decided == batch["labels"]).float().mean().item(),
        "agreement": 100 * (decided == taught).float().mean().item(),
    }
