"""What trainers that learn from their own samples check before they start, where their host would fail late or train on nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl import GRPOConfig

from hf_logits.preferences import require_columns


WARPERS = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_new_tokens": 0,
    "min_length": 0,
}
"""Settings of generation, beside those that GRPO has itself, that draw from another distribution than the model's, and what leaves it alone."""


def check_prompts(args: GRPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data that the host's samplers would leave out, and batches that it could not cut into groups.

    Raises:
        ValueError: fewer prompts than a generation batch has; evaluation batches that split a group; data without prompts.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    if train_dataset is not None:
        require_columns(train_dataset, "train", ("prompt",))
        groups = args.generation_batch_size // args.num_generations
        if hasattr(train_dataset, "__len__") and len(train_dataset) < groups:
            raise ValueError(
                f"The train dataset has {len(train_dataset)} prompts, but a generation batch takes {groups} different ones, and what does "
                "not fill it is left out: nothing would be trained. Give more prompts, or make per_device_train_batch_size smaller."
            )
    if eval_dataset is None:
        return
    for name, one in (eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation": eval_dataset}).items():
        require_columns(one, str(name), ("prompt",))
    rows = args.per_device_eval_batch_size * args.world_size
    generations = args.num_generations_eval or args.num_generations
    if rows % generations:
        raise ValueError(
            f"An evaluation batch has {rows} rows on all processes (per_device_eval_batch_size times their number), which is no multiple "
            f"of the {generations} answers to a prompt (num_generations_eval): change one of the two."
        )


def check_window(model: Any, prompt_ids: Sequence[Sequence[int]], new_tokens: int | None) -> None:
    """Refuse prompts behind which the model has no place for an answer.

    Raises:
        ValueError: the longest prompt with `new_tokens` exceeds the model's `max_position_embeddings`.
    """
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, prompt_ids), default=0)
    if window is not None and 0 < window < longest + (new_tokens or 0):
        raise ValueError(
            f"A prompt has {longest} tokens, and an answer to it can have {new_tokens} (max_completion_length), but the model holds {window} "
            "(max_position_embeddings): leave such prompts out, or make max_completion_length smaller."
        )


def check_draws_freely(model: Any) -> None:
    """Refuse a model whose own generation config would change the distribution that it is sampled from.

    Raises:
        ValueError: one of its settings, such as `no_repeat_ngram_size`, is not neutral.
    """
    config = model.generation_config
    found = {name: getattr(config, name, None) for name in WARPERS}
    changed = {name: value for name, value in found.items() if value is not None and value != WARPERS[name]}
    if changed:
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"The model's generation_config has {given}, and samples would not be the model's own: set it to None "
            "(`model.generation_config.<name> = None`)."
        )
