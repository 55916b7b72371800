"""Distil a sentiment classifier, and see how it does on a kind of text that it was not trained on.

    python examples/distillation/sequence_classifier.py

A sentence is positive or negative by the mean of people's ratings. Tweets, editorials, and reviews of products and of films take turns at
being held out: teacher and students learn the other three, from which validation sentences come too. Both are ModernBERTs of one layer. The
teacher (width 128) reads the 128 main directions of SmolLM2's token embeddings, which it keeps; the students (width 16) begin with nothing.
Labels alone, KD, Sinkhorn, NKD, and a second head. About ten minutes on two cores.
"""  # the README beside this file has the table

import random
import statistics
from pathlib import Path
from typing import Any

import torch
from common import Method, Result, compare, compare_classes, fit, parser, publish, read_methods, report
from rated_sentences import rated_sentences
from smollm2 import smollm2_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)


DOMAINS = {
    "tweets": "tweets",
    "nytEditorialSnippets": "editorials",
    "amazonReviewSnippets": "products",
    "movieReviewSnippets": "films",
}
CLASSES = ("negative", "positive")
LONGEST = 32


def classifier(tokenizer: Any, words: int, width: int, seed: int) -> ModernBertForSequenceClassification:
    """One layer, and the mean over the tokens. Drawn from the seed."""
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2 * LONGEST,
        classifier_pooling="mean",
        initializer_range=0.1,  # the default is for much wider models
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=None,
        sep_token_id=None,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    return ModernBertForSequenceClassification(config)


def main_directions(embeddings: torch.Tensor, width: int) -> torch.Tensor:
    """The projections on the directions of most variance, `[tokens, width]`, scaled to a variance of 1."""
    torch.manual_seed(0)
    width = min(width, embeddings.size(1))
    centred = embeddings - embeddings.mean(0)
    found = centred @ torch.pca_lowrank(centred, q=width, center=False)[2]
    return found / found.std()


def splits(held_out: str, rows: int) -> dict[str, list[tuple[str, int]]]:
    """`rows` sentences of each kind, no nearer to 0 than half a point: of the held-out one for the test; of the others, three of four to train on."""
    found: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for kind, sentences in rated_sentences(DOMAINS).items():
        clear = [(text.lower(), int(rating > 0)) for text, rating in sentences if abs(rating) >= 0.5]
        labelled = random.Random(0).sample(clear, min(rows, len(clear)))
        if kind == held_out:
            found["test"] = labelled
        else:
            cut = len(labelled) * 3 // 4
            found["train"] += labelled[:cut]
            found["validation"] += labelled[cut:]
    return found


def run(held_out: str, options: Any, tokenizer: Any, embeddings: torch.Tensor) -> tuple[dict[str, Result], float]:
    """All methods with one kind of text held out, and the teacher's accuracy."""
    parts = splits(held_out, options.rows)
    rows, batches = [], {}
    for part, labelled in parts.items():
        read = tokenizer([text for text, _ in labelled], truncation=True, max_length=LONGEST)
        labels = [label for _, label in labelled]
        if part == "train":
            columns = zip(read["input_ids"], read["attention_mask"], labels, strict=True)
            rows = [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in columns]
        kept = {name: read[name] for name in ("input_ids", "attention_mask")}
        batches[part] = {**tokenizer.pad(kept, return_tensors="pt"), "labels": torch.tensor(labels)}
    common = {"per_device_train_batch_size": 32, "processing_class": tokenizer}

    alone = Method("teacher", Trainer, TrainingArguments, {"learning_rate": 3e-3}, [{}], "labels")
    words, width = embeddings.shape
    big = classifier(tokenizer, words, width, 0)
    big.get_input_embeddings().weight.data.copy_(embeddings)
    big.get_input_embeddings().requires_grad_(False)
    teacher = fit(alone, {}, big, rows, options.output, seed=0, max_steps=options.teacher_steps, **common)

    def train(method: Method, setting: dict, seed: int) -> ModernBertForSequenceClassification:
        student = classifier(tokenizer, words, 16, seed)
        rest = {"teacher": teacher, "seed": seed, "max_steps": options.steps, **common}
        return fit(method, setting, student, rows, options.output, **rest)

    found = compare_classes(teacher, teacher, batches["test"])["accuracy"]
    most = 100 * batches["test"]["labels"].bincount().max().item() / len(parts["test"])
    print(f"\n{DOMAINS[held_out]} held out. Teacher: {found:.1f} %, the most frequent class: {most:.1f} %", flush=True)
    results = compare(
        read_methods(options.methods),
        train,
        lambda student, part: compare_classes(student, teacher, batches[part]),
        seeds=options.seeds,
        key="accuracy",
    )
    return results, found


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, "sequence_classifier", steps=150, seeds=3)
    made.add_argument("--model", type=Path, help="the folder of a language model; SmolLM2-135M-Instruct if left out")
    made.add_argument("--teacher-steps", type=int, default=200)
    made.add_argument("--rows", type=int, default=2000, help="sentences of each kind")
    options = made.parse_args(arguments)
    folder = options.model or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embeddings = main_directions(language_model.get_input_embeddings().weight.detach(), 128)
    del language_model
    found = {title: run(kind, options, tokenizer, embeddings) for kind, title in DOMAINS.items()}
    domains = [results for results, _ in found.values()]
    averaged = {}
    for name in domains[0]:
        chosen = "; ".join(f"{title} {results[name].chosen}" for title, (results, _) in found.items())
        averaged[name] = Result(chosen)
        for seed in range(options.seeds):
            runs = {title: results[name].runs[seed] for title, (results, _) in found.items()}
            row = {
                key: statistics.fmean(one[key] for one in runs.values())
                for key in ("accuracy", "agreement", "seconds")
            }
            averaged[name].runs.append(row | {title: one["accuracy"] for title, one in runs.items()})
    columns = {"accuracy": "accuracy on held-out kinds, %", **{title: title for title in found}}
    columns |= {"agreement": "agrees with the teacher, %", "seconds": "seconds a run"}
    taught = ", ".join(f"{title} {accuracy:.1f}" for title, (_, accuracy) in found.items())
    head = f"{options.steps} steps of 32, mean over the four kinds of text held out. Teacher, %: {taught}."
    publish(report(averaged, columns, key="accuracy", head=head), "sequence_classifier", options.output)


if __name__ == "__main__":
    main()
