"""GATEAU on samples whose answer lies far back, near the question, or nowhere in the context: SmolLM2, two minutes on two cores.

    python examples/long_context/needles.py

The model with the short window is the same SmolLM2, which is shown no more than the last tokens of a prompt. What is selected needs
what the others do without: the far context. Table and figure lie in examples/output/long_context/ afterwards.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2 import load  # noqa: E402

from hf_logits.trainers import cam_scores, hmg_scores, response_nll, select_top  # noqa: E402
from hf_logits.trainers.gateau import TEMPLATE, segment_attention, tokenized  # noqa: E402


KINDS = {"far": "the answer is far back", "near": "the answer is near", "none": "the answer is not there"}
COLORS = {"far": "#c0392b", "near": "#2471a3", "none": "#7f8c8d"}
PLACES = ("Bremen", "Oslo", "Turin", "Porto", "Ghent", "Krakow", "Malmo", "Dublin", "Lyon", "Graz", "Basel", "Delft")
THINGS = ("museum", "harbour", "library", "station", "market", "theatre", "bridge", "garden", "school", "bakery")
DOINGS = (
    "was painted again in spring",
    "opens at nine on weekdays",
    "has a new roof made of slate",
    "is closed while the floor dries",
    "was visited by two classes today",
    "sells tickets at the side door",
    "looks quiet in the early morning",
    "keeps its lights on until midnight",
)
COLOURS = ("blue", "green", "red", "white", "black", "yellow", "purple", "orange", "silver", "golden", "brown", "pink")
KNOWN = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "How many days are in a week?": "Seven",
    "What color is the sky on a clear day?": "Blue",
    "What do bees make?": "Honey",
    "What is frozen water called?": "Ice",
    "Which planet do we live on?": "Earth",
    "What is the opposite of hot?": "Cold",
    "How many legs does a spider have?": "Eight",
    "What is the first month of the year?": "January",
    "Which animal barks?": "A dog",
}


def samples(each: int, tokens: int, tokenizer: Any, seed: int = 0) -> Dataset:
    """So many of each kind, in turns, with contexts of about as many tokens."""
    rng = random.Random(seed)

    def filler() -> str:
        return f"The {rng.choice(THINGS)} in {rng.choice(PLACES)} {rng.choice(DOINGS)}."

    rows = []
    for index in range(each):
        for kind in KINDS:
            colour, code = COLOURS[index % len(COLOURS)], str(rng.randint(1000, 9999))
            sentences = [filler()]
            while len(tokenizer(" ".join(sentences))["input_ids"]) < tokens:
                sentences.append(filler())
            place = {"far": len(sentences) // 5, "near": len(sentences) - 2, "none": None}[kind]
            question, answer = f"What is the code of the {colour} box?", code
            if place is None:
                question, answer = list(KNOWN.items())[index % len(KNOWN)]
            else:
                sentences.insert(place, f"The code of the {colour} box is {code}.")
            rows.append(
                {"kind": kind, "context": " ".join(sentences), "instruction": question, "response": f"{answer}."}
            )
    return Dataset.from_list(rows)


def table(data: Dataset, columns: dict[str, list[float]], kept: dict[str, list[str]]) -> str:
    lines = [
        f"| | {' | '.join(columns)} | {' | '.join(f'kept, {name}' for name in kept)} |",
        "|---|" + "--:|" * (len(columns) + len(kept)),
    ]
    for kind, words in KINDS.items():
        rows = [index for index, other in enumerate(data["kind"]) if other == kind]
        means = [f"{statistics.mean(values[row] for row in rows):.2f}" for values in columns.values()]
        shares = [f"{chosen.count(kind)} of {len(rows)}" for chosen in kept.values()]
        lines.append(f"| {words} | {' | '.join(means + shares)} |")
    return "\n".join(lines)


def draw(data: Dataset, hmg: list[float], cam: list[float], profiles: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    for kind, words in KINDS.items():
        rows = [index for index, other in enumerate(data["kind"]) if other == kind]
        left.scatter([hmg[i] for i in rows], [cam[i] for i in rows], color=COLORS[kind], label=words, s=28)
        right.plot(range(1, len(profiles[kind]) + 1), profiles[kind], color=COLORS[kind], marker="o", markersize=3)
    left.set_xlabel("homologous models' guidance")
    left.set_ylabel("contextual awareness")
    left.legend(frameon=False, fontsize=9)
    right.set_xlabel("segment of the context")
    right.set_ylabel("mean attention of the response")
    for axis in (left, right):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output" / "long_context")
    parser.add_argument("--model", help="a Hub id or a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--each", type=int, default=8, help="samples of each kind")
    parser.add_argument("--context", type=int, default=420, help="tokens of a context")
    parser.add_argument(
        "--windows", type=int, nargs=2, default=(128, 512), help="tokens that the two models are shown"
    )
    parser.add_argument("--segment", type=int, default=32, help="tokens of a segment")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.model)
    data = samples(options.each, options.context, tokenizer)

    short, long = (
        response_nll(model, data, tokenizer, max_length=window, too_long="truncate") for window in options.windows
    )
    hmg = hmg_scores(short, long)
    # The first tokens of a text draw attention whatever they say.
    cam = cam_scores(model, data, tokenizer, segment_length=options.segment, sink_tokens=4)
    kept = {
        combine: list(select_top(data, hmg, cam, keep_fraction=1 / 3, combine=combine)["kind"])
        for combine in ("rank", "zscore", "official")
    }
    columns = {
        "perplexity, short window": short.exp().tolist(),
        "long window": long.exp().tolist(),
        "HMG": hmg.tolist(),
        "CAM": cam.tolist(),
    }
    text = table(data, columns, kept)
    print(text)
    (options.output / "needles.md").write_text(text + "\n")

    profiles: dict[str, list[Any]] = {}
    some = data.select(range(min(len(data), 4 * len(KINDS))))
    for row, sample in zip(some, tokenized(some, tokenizer, TEMPLATE), strict=True):
        starts = range(len(sample.head), len(sample.head) + options.context - options.segment, options.segment)
        spans = [(start, start + options.segment) for start in starts]
        found = segment_attention(model, sample.prompt, sample.response, spans, sink_tokens=4)
        profiles.setdefault(row["kind"], []).append(found)
    means = {kind: torch.stack(found).mean(0).tolist() for kind, found in profiles.items()}
    draw(data, hmg.tolist(), cam.tolist(), means, options.output / "needles.png")
    print(f"figure: {options.output / 'needles.png'}")


if __name__ == "__main__":
    main()
