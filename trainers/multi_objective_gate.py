"""Stage 2 of the multi-objective reward model: its gate learns from preferences, on embeddings that are worked out once."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from hf_logits.completions import conversation_text
from hf_logits.preferences import check_pairs, require_columns


EMBEDDINGS = ("prompt_embedding", "chosen_embedding", "rejected_embedding")


@torch.no_grad()
def _embed(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    last, prompt = model.eval().embed(**inputs.to(model.device))
    return last.float().cpu(), prompt.float().cpu()


def embed_ratings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, batch_size: int = 8
) -> Iterator[tuple[Float[Tensor, "B D"], Float[Tensor, "B K"]]]:
    """The batches that [`~hf_logits.ridge.fit_ridge`] wants (stage 1): embeddings of rated completions, and the ratings.

    Args:
        model ([`MultiObjectiveRewardModel`]): whose objectives are columns of the dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model, with a padding token.
        dataset ([`~datasets.Dataset`]):
            With `prompt`, `completion` and a number for each objective, best in [0, 1]. `None` and NaN: not rated.
        batch_size (`int`, *optional*, defaults to `8`): texts in one forward.
    """
    names = list(model.config.objectives)
    require_columns(dataset, "ratings", ("prompt", "completion", *names))
    for start in range(0, len(dataset), batch_size):
        batch = dataset[start : start + batch_size]
        pairs = zip(batch["prompt"], batch["completion"], strict=True)
        texts = [conversation_text(prompt, completion, tokenizer) for prompt, completion in pairs]
        ratings = [[np.nan if value is None else value for value in batch[name]] for name in names]
        yield _embed(model, tokenizer, texts)[0], torch.tensor(ratings, dtype=torch.float64).T


def cache_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, batch_size: int = 8
) -> Dataset:
    """What [`MultiObjectiveGateTrainer`] trains on: the states of prompts, chosen and rejected texts, two forwards a pair.

    Args:
        model ([`MultiObjectiveRewardModel`]): whose backbone runs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model, with a padding token.
        dataset ([`~datasets.Dataset`]): preferences, with `prompt`, `chosen`, `rejected` and perhaps a `margin`.
        batch_size (`int`, *optional*, defaults to `8`): pairs in one forward.
    """
    require_columns(dataset, "preference", ("prompt",))
    check_pairs(dataset, "preference")

    def embed(batch: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for side in ("rejected", "chosen"):
            pairs = zip(batch["prompt"], batch[side], strict=True)
            last, prompt = _embed(model, tokenizer, [conversation_text(p, c, tokenizer) for p, c in pairs])
            # The prompt's state is the same on both sides: later tokens cannot change it.
            found |= {f"{side}_embedding": last.numpy(), "prompt_embedding": prompt.numpy()}
        return found

    # A name of our own: to make one up, `map` would pickle the model.
    fingerprint = uuid.uuid4().hex[:16]
    dropped = [column for column in dataset.column_names if column != "margin"]
    return dataset.map(embed, batched=True, batch_size=batch_size, remove_columns=dropped, new_fingerprint=fingerprint)


def collate_embeddings(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Chosen rows, then rejected ones, as the reward trainer wants them. The gate runs once for both."""
    columns = {
        name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows])).float() for name in EMBEDDINGS
    }
    batch = {
        "embeddings": torch.cat([columns["chosen_embedding"], columns["rejected_embedding"]]),
        "prompt_embeddings": columns["prompt_embedding"],
        # Stock counts its tokens: one an embedding.
        "attention_mask": torch.ones(2 * len(rows), 1, dtype=torch.long),
    }
    if "margin" in rows[0]:
        batch["margin"] = torch.tensor([float(row["margin"]) for row in rows])
    return batch


@dataclass
class MultiObjectiveGateConfig(RewardConfig):
    """Of [`MultiObjectiveGateTrainer`]: [`~trl.RewardConfig`] with the defaults of the released stage-2 script."""

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    max_steps: int = field(default=2000, metadata={"help": "Total number of training steps."})
    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Pairs on each device and step."})
    per_device_eval_batch_size: int = field(default=1024, metadata={"help": "Pairs on each device in evaluation."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Of no use: the backbone does not run."})
    disable_dropout: bool = field(default=False, metadata={"help": "Whether the gate's dropout is turned off."})


class MultiObjectiveGateTrainer(RewardTrainer):
    """Trains the gate of a [`MultiObjectiveRewardModel`] on cached embeddings; backbone and heads are frozen.

    From [Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts](https://huggingface.co/papers/2406.12845)
    (ArmoRM). The loss is `-log sigmoid(score(chosen) - score(rejected))`, over the debiased ratings.

    Args:
        model ([`MultiObjectiveRewardModel`]): with heads that are fitted and, if wanted, debiased.
        args ([`MultiObjectiveGateConfig`], *optional*): settings.
        train_dataset ([`~datasets.Dataset`]): from [`cache_embeddings`].
        rest: of [`~trl.RewardTrainer`].
    """

    _signature_columns: Any
    _tag_names = ["trl", "hf_logits", "armorm", "multi-objective-gate"]
    _name = "ArmoRM gate"
    _paper = {
        "title": "Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts",
        "id": "2406.12845",
        # docstyle-ignore
        "citation": """\
@inproceedings{wang2024interpretable,
    title        = {{Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts}},
    author       = {Haoxiang Wang and Wei Xiong and Tengyang Xie and Han Zhao and Tong Zhang},
    year         = 2024,
    booktitle    = {Findings of the Association for Computational Linguistics: EMNLP 2024}
}""",
    }

    def __init__(self, model: Any, args: Any = None, data_collator: Any = None, **rest: Any):
        if not isinstance(model, PreTrainedModel) or model.config.model_type != "multi_objective_reward":
            raise TypeError(f"The gate trainer needs a MultiObjectiveRewardModel, got {type(model).__name__}.")
        if rest.get("peft_config") is not None:
            raise ValueError("Only the gate is trained here, and as a whole: peft_config has nothing to adapt.")
        if args is None:
            args = MultiObjectiveGateConfig(f"{str(model.config.name_or_path or 'ArmoRM').split('/')[-1]}-gate")
        model.requires_grad_(False).gating.requires_grad_(True)
        super().__init__(model, args, data_collator or collate_embeddings, **rest)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        require_columns(dataset, dataset_name, EMBEDDINGS)
        return dataset.with_format("numpy")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*EMBEDDINGS, "margin"]
