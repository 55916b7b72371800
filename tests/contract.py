"""What several contract suites check in the same way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from preferences import Stop, StopAt, distance, equal, logged, weights


def accumulates(make: Callable[..., Any], cuts: Sequence[tuple[int, int]], *, least: float = 1e-4) -> list[Any]:
    """Rows and steps of accumulation that make the same batch lead to the same weights. Returns the trainers, trained."""
    start, trainers = None, []
    for rows, steps in cuts:
        trainer = make(per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        start = start or weights(trainer)
        trainer.train()
        trainers.append(trainer)
    first, *others = map(weights, trainers)
    moved = distance(start, first)
    assert moved > least
    assert all(distance(first, other) < 1e-3 * moved for other in others)
    return trainers


def resumes(
    make: Callable[..., Any], folder: Path, keys: Sequence[str], *, stop_at: int = 5, max_steps: int = 6
) -> None:
    """A run that is killed and goes on from its last checkpoint, of every second step, ends where an unbroken one does.

    Args:
        make: takes a folder and settings.
        keys: of the log, that have to be the same.
    """
    settings = {"max_steps": max_steps, "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"lr_scheduler_type": "linear"}
    unbroken = make(folder / "unbroken", **settings)
    start = weights(unbroken)
    unbroken.train()
    killed = make(folder / "killed", save_strategy="steps", callbacks=[StopAt(stop_at)], **settings)
    with pytest.raises(Stop):
        killed.train()
    resumed = make(folder / "killed", save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not equal(start, weights(unbroken))
    assert equal(weights(unbroken), weights(resumed))
    for key in keys:
        assert logged(unbroken, key) == logged(resumed, key)


def goes_to_the_hub(trainer: Any, hub: Any) -> None:
    """The trainer's repository gets a model that loads as it was trained, with nothing missing or left over, and the method's card."""
    repo = trainer.args.hub_model_id
    trainer.train()
    trainer.push_to_hub()
    card = hub.repos[repo].files["README.md"].decode()
    assert f"trained with {trainer._name}" in card
    for part in (trainer._paper["title"], trainer._paper["id"], trainer._paper["citation"], *trainer._tag_names):
        assert part in card
    loaded, info = type(trainer.model).from_pretrained(repo, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]  # and so no head of the method's own
    trained = weights(trainer)
    assert all(torch.equal(value, trained[name]) for name, value in loaded.named_parameters())
    assert not hub.unknown
