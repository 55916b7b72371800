"""Distil SmolLM2-135M-Instruct into twenty of its own thirty layers: labels alone, KD, NKD, Sinkhorn, and a stored teacher.

    python examples/distillation/language_model.py

The student starts as the teacher without the other layers, keeps the teacher's embeddings (which are its head) as they are, and learns tweets,
editorials and reviews. The stored teacher is run once, before; the students that learn from it never load it. Less than an hour on
two cores.
"""  # the README beside this file has the table

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from common import Method, compare, fit, parser, publish, read_methods, report
from datasets import Dataset
from rated_sentences import rated_sentences
from smollm2 import smollm2_folder
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedModel

from hf_logits.fewer_layers import keep_layers
from hf_logits.trainers import store_teacher_logits


KINDS = ("tweets", "nytEditorialSnippets", "amazonReviewSnippets", "movieReviewSnippets")
BATCH = 4


def texts(tokenizer: Any, rows: dict[str, int], longest: int) -> dict[str, Dataset]:
    """Different sentences for each part, of eight words or more."""
    sentences = sorted(
        {text for kind in rated_sentences(KINDS).values() for text, _ in kind if len(text.split()) >= 8}
    )
    random.Random(0).shuffle(sentences)
    found, start = {}, 0
    for part, count in rows.items():
        drawn = sentences[start : start + count]
        start += count
        read = tokenizer(drawn, truncation=True, max_length=longest)
        columns = {name: read[name] for name in ("input_ids", "attention_mask")}
        found[part] = Dataset.from_dict({**columns, "labels": read["input_ids"]})
    return found


@torch.no_grad()
def read_by(model: PreTrainedModel, data: Dataset, collate: Any) -> tuple[torch.Tensor, float]:
    """The best token at each place that predicts one, and the mean loss there."""
    best, losses = [], []
    for start in range(0, len(data), 8):
        batch = collate([data[index] for index in range(start, min(start + 8, len(data)))]).to(model.device)
        wanted = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1][wanted != -100]
        best.append(logits.argmax(-1).cpu())
        losses.append(cross_entropy(logits.float(), wanted[wanted != -100], reduction="none").cpu())
    return torch.cat(best), torch.cat(losses).mean().item()


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, "language_model", steps=48, seeds=3)
    made.add_argument("--model", type=Path, help="the teacher's folder; SmolLM2-135M-Instruct if left out")
    made.add_argument("--layers", type=int, default=20, help="how many the student keeps")
    made.add_argument("--k", type=int, default=64, help="tokens that are stored at each place")
    made.add_argument("--longest", type=int, default=40, help="tokens of a sentence that are read")
    made.add_argument("--test-rows", type=int, default=96)
    options = made.parse_args(arguments)

    folder = options.model or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    deep = teacher.config.num_hidden_layers
    kept = [round(index * (deep - 1) / max(options.layers - 1, 1)) for index in range(options.layers)]
    # twice what one run reads, so that seeds learn from different sentences
    rows = {"train": 2 * BATCH * options.steps, "validation": options.test_rows // 2, "test": options.test_rows}
    data = texts(tokenizer, rows, options.longest)
    collate = DataCollatorForSeq2Seq(tokenizer)
    taught = {part: read_by(teacher, data[part], collate) for part in ("validation", "test")}
    stored_in = options.output / "teacher_logits"
    shutil.rmtree(stored_in, ignore_errors=True)
    stored = store_teacher_logits(
        teacher, data["train"], stored_in, k=options.k, data_collator=collate, processing_class=tokenizer
    )

    def measure(student: PreTrainedModel, part: str) -> dict[str, float]:
        best, loss = read_by(student, data[part], collate)
        same = (best == taught[part][0]).float().mean().item()
        return {"perplexity": torch.tensor(loss).exp().item(), "agreement": 100 * same}

    def train(method: Method, setting: dict, seed: int) -> PreTrainedModel:
        student = keep_layers(teacher, kept, share=False)
        student.requires_grad_(True)
        student.get_input_embeddings().requires_grad_(False)
        return fit(
            method,
            setting,
            student,
            stored if method.learns_from == "stored teacher" else data["train"],
            options.output,
            teacher=teacher,
            seed=seed,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            processing_class=tokenizer,
            data_collator=collate,
        )

    start, own = measure(keep_layers(teacher, kept, share=False), "test"), torch.tensor(taught["test"][1]).exp().item()
    print(f"teacher: perplexity {own:.1f}; layers {kept} of it, untrained: {start['perplexity']:.1f}", flush=True)
    results = compare(read_methods(options.methods), train, measure, seeds=options.seeds, key="perplexity", lower=True)
    columns = {"perplexity": "perplexity", "agreement": "agrees with the teacher, %", "seconds": "seconds a run"}
    head = (
        f"{options.steps} steps of {BATCH} sentences; {options.layers} of {deep} layers. Perplexity on {rows['test']} test sentences: teacher "
        f"{own:.1f}, student before training {start['perplexity']:.1f}."
    )
    publish(report(results, columns, key="perplexity", lower=True, head=head), "language_model", options.output)


if __name__ == "__main__":
    main()
