"""All tables as one Markdown report: `python examples/benchmarks/run.py [--quick] [--only overhead ...] [--output FILE]`.

Times are medians of five turns in which all candidates of a table run one after the other, in one process; the spread is that of
the turns. `--quick` runs a part of each table once, to see that everything works: don't quote its numbers.
"""

import argparse
import importlib
import os
import platform
import time
from pathlib import Path

import peft
import torch
import transformers


TABLES = {
    "overhead": "Processors against the plain models",
    "shared_batch": "Contexts in the generating model's batch",
    "adapters": "LoRA experts in one forward",
    "entropy_adaptive": "Entropy-adaptive decoding",
    "fusion_solver": "Solvers of dynamic logit fusion",
    "filters": "Filters of the vocabulary",
    "sinkhorn": "Sinkhorn distances with their gradient",
    "engine": "The engine",
    "trainers": "Training steps against the stock trainers",
    "own_samples": "Steps on own samples against GRPO",
    "two_attempts": "Steps with two attempts against GRPO",
    "distillation": "Distillation without a tensor of tokens times vocabulary",
    "ches": "Scoring preference pairs",
    "choices": "Scoring choices",
    "gateau": "Attention of a response on a long context",
}


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    return f"{names[0] if names else platform.processor()}, {device}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of each table, once, in under three minutes")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="these tables")
    parser.add_argument("--output", type=Path, help="the report's file; printed anyway")
    arguments = parser.parse_args()

    report = [
        "# Benchmarks" + (" (quick: not for quoting)" if arguments.quick else ""),
        "",
        f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}. SmolLM2-135M in float32, prompts of 128 tokens, 64 new tokens, greedy.",
        "",
    ]
    print("\n".join(report), flush=True)
    for name in arguments.only:
        start = time.perf_counter()
        part = [f"## {TABLES[name]}", "", importlib.import_module(name).run(quick=arguments.quick)]
        part.append(f"`python examples/benchmarks/{name}.py`, {time.perf_counter() - start:.0f} s\n")
        print("\n".join(part), flush=True)
        report += part
        if arguments.output is not None:  # what is done is kept, whatever happens to the rest
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text("\n".join(report))


if __name__ == "__main__":
    main()
