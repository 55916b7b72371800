"""Distil a vision transformer on scikit-learn's handwritten digits: labels alone, KD, NKD, USKD, and a second head.

    python examples/distillation/image_classifier.py

The teacher (4 layers, width 64) and the students (1 layer, width 16) are trained from scratch on the same 1,000 images. A few minutes on
two cores; needs `pip install scikit-learn`.
"""  # the README beside this file has the table

import torch
from common import Method, compare, compare_classes, fit, parser, publish, read_methods, report
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification


PARTS = {"train": 1000, "validation": 300, "test": 497}


def digits(parts: dict[str, int]) -> dict[str, dict[str, torch.Tensor]]:
    """Images of 8 x 8 grey pixels between -1 and 1, always cut into the same parts."""
    images, labels = (torch.from_numpy(array) for array in (load_digits().images, load_digits().target))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split([*parts.values()])
    pixels = images.float()[:, None] / 8 - 1
    return {
        name: {"pixel_values": pixels[rows], "labels": labels[rows]} for name, rows in zip(parts, order, strict=True)
    }


def classifier(width: int, layers: int, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=10,
        initializer_range=width**-0.5,  # the default is for much wider models
    )
    return ViTForImageClassification(config)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, "image_classifier", steps=300, seeds=5)
    made.add_argument("--teacher-steps", type=int, default=500)
    options = made.parse_args(arguments)
    parts = digits(PARTS)
    rows = [dict(zip(parts["train"], row, strict=True)) for row in zip(*parts["train"].values(), strict=True)]
    common = {"per_device_train_batch_size": 64}

    alone = Method("teacher", Trainer, TrainingArguments, {"learning_rate": 2e-3}, [{}], "labels")
    steps = options.teacher_steps
    teacher = fit(alone, {}, classifier(64, 4, 0), rows, options.output, seed=0, max_steps=steps, **common)
    found = compare_classes(teacher, teacher, parts["test"])["accuracy"]
    print(f"teacher: {found:.1f} % of the test split", flush=True)

    def train(method: Method, setting: dict, seed: int) -> ViTForImageClassification:
        student = classifier(16, 1, seed)
        rest = {"teacher": teacher, "seed": seed, "max_steps": options.steps, **common}
        return fit(method, setting, student, rows, options.output, **rest)

    results = compare(
        read_methods(options.methods),
        train,
        lambda student, part: compare_classes(student, teacher, parts[part]),
        seeds=options.seeds,
        key="accuracy",
    )
    columns = {"accuracy": "accuracy, %", "agreement": "agrees with the teacher, %", "seconds": "seconds a run"}
    head = f"{len(rows)} images, {options.steps} steps of 64; the teacher has {found:.1f} %, on {PARTS['test']} test images."
    publish(report(results, columns, key="accuracy", head=head), "image_classifier", options.output)


if __name__ == "__main__":
    main()
