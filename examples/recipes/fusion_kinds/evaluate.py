"""Does the large model gain what the small expert learned? Accuracy of the large model alone, fused, and fine-tuned itself.

    python examples/recipes/fusion_kinds/evaluate.py                       # a quarter of an hour on two cores
    python examples/recipes/fusion_kinds/evaluate.py --part validation

Prints a table and writes `results.md` and `accuracy.png` into the recipe's folder.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))

import torch
from common import BATCH_SIZE, continue_prompts, mean, models, parser, percent, table
from matplotlib import pyplot as plt
from peft import PeftModel
from task import examples, marks

from hf_logits.processors import DynamicFusionLogitsProcessor


BASE, DIRECT, PROXY, DYNAMIC = (
    "large model",
    "large model, fine-tuned itself",
    "proxy-tuning, weight 1",
    "dynamic fusion",
)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--rows", type=int, default=800)
    made.add_argument("--tokens", type=int, default=8)
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    options = made.parse_args(arguments)

    large, tokenizer = models(options)
    rows = examples(options.part, options.rows)
    prompts = [row["question"] for row in rows]

    def fusion(**settings) -> DynamicFusionLogitsProcessor:
        return DynamicFusionLogitsProcessor.from_pretrained(options.output, main_model=large, **settings)

    small = fusion().small_model

    def alone(name: str):
        small.set_adapter(name)
        return small

    ways = {
        BASE: lambda: (large, None),
        "small model": lambda: (alone("healed"), None),
        "small expert": lambda: (alone("expert"), None),
        PROXY: lambda: (large, fusion(weight=1.0)),
        DYNAMIC: lambda: (large, fusion()),
        "dynamic fusion, exact solver": lambda: (large, fusion(solver="exact")),
        # last: the adapter is put around the large model
        DIRECT: lambda: (PeftModel.from_pretrained(large, str(options.output / "direct")).eval(), None),
    }
    scores: dict[str, list[tuple[float, float, float]]] = {}
    weights = {}
    for name, make in ways.items():
        model, processor = make()
        said, traced = [], []
        for start in range(0, len(prompts), options.batch_size):
            part = prompts[start : start + options.batch_size]
            written = continue_prompts(
                model,
                tokenizer,
                part,
                processor,
                tokens=options.tokens,
                batch_size=options.batch_size,
                do_sample=False,
            )
            said += [tokenizer.decode(ids) for ids in written]
            if processor is not None:
                traced.append(processor.stats.trace["weight"].flatten())
        if traced:
            weights[name] = float(torch.cat(traced).nanmean())
        scores[name] = [marks(row, text) for row, text in zip(rows, said, strict=True)]
        print(name, [round(100 * mean(values), 1) for values in zip(*scores[name], strict=True)], flush=True)

    start, end = (mean([one[0] for one in scores[name]]) for name in (BASE, DIRECT))
    lines = []
    for name, found in scores.items():
        both, kinds, feelings = (list(values) for values in zip(*found, strict=True))
        lines.append(
            [
                name,
                percent(both, digits=1),
                f"{100 * mean(kinds):.1f}",
                f"{100 * mean(feelings):.1f}",
                f"{100 * (mean(both) - start) / (end - start):.0f}" if end > start else "",
                f"{weights[name]:.2f}" if name in weights else "",
            ]
        )
    differences = [a[0] - b[0] for a, b in zip(scores[DYNAMIC], scores[PROXY], strict=True)]
    columns = ["", "both right, % (95 %)", "kind, %", "sentiment, %", "of the gap closed, %", "mean weight"]
    text = (
        f"{len(rows)} sentences of the {options.part} part, as many of each kind and sentiment as there are up to {options.rows // 8}; greedy. Dynamic fusion less "
        f"proxy-tuning: {percent(differences, signed=True, digits=1)} points. The gap is that between the large model and itself "
        f"fine-tuned.\n\n{table(columns, lines)}\n"
    )
    print(text)
    if options.part == "test":
        (options.output / "results.md").write_text(text, encoding="utf-8")
        draw(
            {name: mean([one[0] for one in found]) for name, found in scores.items()}, options.output / "accuracy.png"
        )


def draw(accuracies: dict[str, float], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 3))
    names = list(accuracies)[::-1]
    axis.barh(names, [100 * accuracies[name] for name in names])
    axis.set_xlabel("kind and sentiment both right, %")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
