"""CHES: which preference pairs will push the chosen completion down, read off the hidden states before training."""

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Integer
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_logits.checks import check_number
from hf_logits.hidden import Fork, backbone, pack_forks, reads_forks
from hf_logits.preferences import require_columns
from hf_logits.sequences import batches_of_like_size


logger = logging.get_logger(__name__)


def ches_from_hidden(
    chosen_hidden: Float[Tensor, "B T D"],
    chosen_mask: Bool[Tensor, "B T"] | Integer[Tensor, "B T"],
    rejected_hidden: Float[Tensor, "B U D"],
    rejected_mask: Bool[Tensor, "B U"] | Integer[Tensor, "B U"],
    *,
    length_normalize: bool = False,
) -> Float[Tensor, " B"]:
    """The centered hidden embedding similarity of pairs: `<S_w, S_l> - |S_w|^2`, high where displacement threatens.

    `S` sums the hidden states that predict the tokens of a completion, those where the mask is set; with
    `length_normalize` it is their mean. NaN for a pair with an empty completion. Not symmetric in the pair.
    """
    chosen, rejected = (
        _pooled(hidden, mask.bool(), mean=length_normalize)
        for hidden, mask in ((chosen_hidden, chosen_mask), (rejected_hidden, rejected_mask))
    )
    # <S_w, S_l> - <S_w, S_w>, with the subtraction first: near duplicates cancel without rounding
    return (chosen * (rejected - chosen)).sum(-1)


def _pooled(hidden: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"], *, mean: bool) -> Float[Tensor, "B D"]:
    # In float32 at least: a sum in bfloat16 stops growing after a few hundred tokens.
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    length = mask.sum(1, keepdim=True)
    total = hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1).masked_fill(length == 0, torch.nan)
    return total / length if mean else total


def ches_scores(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    length_normalize: bool = True,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    tokens_per_batch: int = 256,
) -> Float[Tensor, " N"]:
    """CHES of every pair of a preference dataset under the model that is to be trained. Drop the highest.

    Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization"
    (https://huggingface.co/papers/2410.08847). The hidden states are those behind the last norm. One batched pass through the
    backbone, without the LM head, in which a prompt is read once for both completions if the model's attention allows that;
    padding does not enter. Completions end as in training, with the end-of-sequence token.

    Args:
        model: the causal language model before training; adapters of a PeftModel are active.
        dataset ([`~datasets.Dataset`]):
            Pairs in a form that `DPOTrainer` takes, or its own tokenized `train_dataset` (`prompt_ids`, ...).
        processing_class: the tokenizer of training, with its chat template.
        length_normalize (`bool`, *optional*, defaults to `True`): the paper's choice for filtering data.
        max_length, truncation_mode: as in `DPOConfig`. A completion that is cut away entirely gives NaN.
        tokens_per_batch (`int`, *optional*, defaults to `256`):
            How much, padding included, goes through at a time. On a CPU more costs memory and saves no time.

    Returns:
        One float32 score a row, NaN where a completion is empty.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("CHES reads the backbone, past the virtual tokens of prompt learning. Score its base model.")
    if "prompt_ids" not in dataset.column_names:
        dataset = _tokenize(dataset, processing_class)
    known = processing_class.pad_token_id
    pad = processing_class.eos_token_id if known is None else known
    forks = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]
    if max_length is not None and truncation_mode == "keep_start":
        left = [max(max_length - len(prompt), 0) for prompt, _, _ in forks]
        forks = [(p[:max_length], w[:room], r[:room]) for (p, w, r), room in zip(forks, left, strict=True)]
    scores = torch.full((len(forks),), torch.nan)
    if not forks:
        return scores
    body, training = backbone(model), model.training
    model.eval()
    try:
        longest = max(forks, key=lambda fork: sum(map(len, fork)))
        if truncation_mode == "keep_start" and reads_forks(body, longest, pad=pad):
            sizes = [sum(map(len, fork)) for fork in forks]
            score = partial(_packed_ches, body, pad)
        else:
            sizes = [2 * (len(prompt) + max(map(len, completions))) for prompt, *completions in forks]
            collate = DataCollatorForPreference(
                pad_token_id=pad, max_length=max_length, truncation_mode=truncation_mode
            )
            score = partial(_plain_ches, body, collate)
        for batch in batches_of_like_size(sizes, tokens_per_batch):
            scores[batch] = score([forks[index] for index in batch], length_normalize).cpu()
    finally:
        model.train(training)
    return scores


@torch.no_grad()
def _packed_ches(body: nn.Module, pad: int, forks: list[Fork], length_normalize: bool) -> Float[Tensor, " B"]:
    """A row a pair: the prompt is read once."""
    parameter = next(body.parameters())
    inputs, *masks = pack_forks(forks, pad=pad, dtype=parameter.dtype)
    hidden = body(
        **{key: value.to(parameter.device) for key, value in inputs.items()}, use_cache=False
    ).last_hidden_state
    chosen, rejected = (mask.to(parameter.device) for mask in masks)
    return ches_from_hidden(hidden, chosen, hidden, rejected, length_normalize=length_normalize)


@torch.no_grad()
def _plain_ches(
    body: nn.Module, collate: DataCollatorForPreference, forks: list[Fork], length_normalize: bool
) -> Float[Tensor, " B"]:
    """A row a completion, as in training."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    inputs = collate([dict(zip(names, map(list, fork), strict=True)) for fork in forks])
    inputs = {key: value.to(next(body.parameters()).device) for key, value in inputs.items()}
    mask = inputs.pop("completion_mask")
    return _ches_of_rows(body(**inputs, use_cache=False).last_hidden_state, mask, length_normalize)


def _ches_of_rows(
    hidden: Float[Tensor, "R L D"],
    completion_mask: Integer[Tensor, "R T"] | Bool[Tensor, "R T"],
    length_normalize: bool,
) -> Float[Tensor, " B"]:
    """Rows as TRL collates them: first all chosen completions, then all rejected ones."""
    mask = completion_mask[:, 1:]  # position t predicts token t + 1
    hidden = hidden[:, -completion_mask.size(1) :][:, :-1]  # virtual tokens of prompt learning stand in front
    (chosen, rejected), (chosen_mask, rejected_mask) = hidden.chunk(2), mask.chunk(2)
    return ches_from_hidden(chosen, chosen_mask, rejected, rejected_mask, length_normalize=length_normalize)


def _tokenize(dataset: Dataset, processing_class: PreTrainedTokenizerBase) -> Dataset:
    """As `DPOTrainer` does it: its own preparation, which knows prompts, templates and ends of sequence."""
    require_columns(dataset, "preference", ("chosen", "rejected"))
    settings: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)
    owner: Any = SimpleNamespace(_tokenizer=processing_class)
    return DPOTrainer._prepare_dataset(owner, dataset, processing_class, settings, "preference")


def filter_by_ches(
    dataset: Dataset, scores: Float[Tensor, " N"] | Iterable[float], *, keep_fraction: float
) -> Dataset:
    """Keep the fraction of the pairs with the lowest scores, in their order, with the scores as column `ches`.

    Pairs without a score (NaN) are dropped, with a warning that counts them. Compare scores within one dataset only: they
    grow with the width of the model and the length of the completions.
    """
    check_number("keep_fraction", keep_fraction, minimum=0.0, maximum=1.0, above=True)
    values = torch.as_tensor(scores if isinstance(scores, Tensor) else list(scores), dtype=torch.float64)
    if len(values) != len(dataset):
        raise ValueError(f"{len(values)} scores for {len(dataset)} pairs: score the dataset that is to be filtered.")
    order = [index for index in values.argsort(stable=True).tolist() if not values[index].isnan()]
    if len(order) < len(dataset):
        logger.warning(f"{len(dataset) - len(order)} of {len(dataset)} pairs have no CHES score and are dropped.")
    kept = sorted(order[: round(keep_fraction * len(order))])
    if not kept:
        raise ValueError(f"keep_fraction={keep_fraction} of {len(order)} scored pairs is none: raise it.")
    return dataset.select(kept).add_column("ches", values[kept].tolist())


class CHESCallback(TrainerCallback):
    """Logs CHES of the training batches of a DPO-like trainer, from the forward that training does anyway.

    `ches` and `ches/length_normalized` are means over the pairs since the last log. Rising values say that the pairs
    grow alike for the model, which is when the chosen log-prob (`logps/chosen`) is at risk.

    Example:

    ```python
    >>> trainer = DPOTrainer(...)
    >>> trainer.add_callback(CHESCallback(trainer))
    ```

    Args:
        trainer ([`~trl.DPOTrainer`]): the trainer, or one of its subclasses.
    """

    def __init__(self, trainer: Trainer):
        if not isinstance(trainer, DPOTrainer):
            raise TypeError(f"CHESCallback needs a DPOTrainer, whose batches are pairs; got {type(trainer).__name__}.")
        self.trainer = trainer
        self._handles: list[Any] = []
        self._labels: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        model: Any = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
            backbone(model).register_forward_hook(self._see_hidden),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see_labels(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # The reference's forward may be this model's too, with its adapters off: that one has no gradient.
        learns = model.training and torch.is_grad_enabled() and kwargs.get("fused_lm_head")
        self._labels = kwargs["labels"] if learns else None

    def _see_hidden(self, body: Any, args: Any, output: Any) -> None:
        if self._labels is None:
            return
        mask, self._labels = self._labels != -100, None
        with torch.no_grad():
            for name, normalized in (("ches", False), ("ches/length_normalized", True)):
                scores = _ches_of_rows(output.last_hidden_state, mask, normalized)
                seen = self.trainer.accelerator.gather(scores).nanmean().item()
                self.trainer._metrics["train"][name].append(seen)
