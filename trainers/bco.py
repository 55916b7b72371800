"""BCO: learn from thumbs up and thumbs down, as a binary classifier whose logit is DPO's implicit reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import KTOConfig, KTOTrainer

from hf_logits.checks import check_number
from hf_logits.density_ratio import LogDensityRatio, fit_density_ratio
from hf_logits.preferences import check_pairs, is_empty, refuse_rows, require_columns
from hf_logits.replay import ReplayMixin
from hf_logits.resumable import ResumableMixin
from hf_logits.sequences import sequence_log_probs


UDM_WEIGHT = "udm_weight"
"""The column with the weights of underlying distribution matching."""


def bco_loss(
    desirable_logratios: Float[Tensor, " P"],
    undesirable_logratios: Float[Tensor, " N"],
    *,
    beta: float,
    shift: float | Float[Tensor, ""],
    undesirable_weights: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """`-log s(r - shift)` of desirable and `-w log s(shift - r)` of undesirable rows, averaged over all of them.

    `r` is `beta` times the log-ratio `log p(y | x) - log p_ref(y | x)`; `s` the logistic function. The shift is a
    constant: it has no gradient. One of the two may be empty.
    """
    desirable = -logsigmoid(beta * desirable_logratios - shift)
    undesirable = -logsigmoid(shift - beta * undesirable_logratios)
    if undesirable_weights is not None:
        undesirable = undesirable_weights * undesirable
    return torch.cat([desirable, undesirable]).mean()


@dataclass
class RewardShift:
    """What the classifier subtracts from every reward (rewards include `beta`), and what it remembers for that.

    `"ema"`: the midpoint of two exponential moving averages, of desirable and of undesirable rewards. A class that a step
    lacks keeps its average; one never seen (NaN) counts as 0, the reward of the reference. `"running_mean"`: the mean of
    all rewards so far, whatever their class. `"none"`: 0.
    """

    desirable: float = math.nan
    undesirable: float = math.nan
    mean: float = 0.0
    count: float = 0.0

    def value(self, mode: str) -> float:
        if mode == "running_mean":
            return self.mean
        midpoint = sum(0.0 if math.isnan(one) else 0.5 * one for one in (self.desirable, self.undesirable))
        return midpoint if mode == "ema" else 0.0

    def average(self, sums: Sequence[float], counts: Sequence[float], *, decay: float) -> None:
        """Move both averages towards the means of a step: sums and numbers of desirable and of undesirable rewards."""
        self.desirable, self.undesirable = (
            old if not rows else total / rows if math.isnan(old) else decay * old + (1 - decay) * total / rows
            for old, total, rows in zip((self.desirable, self.undesirable), sums, counts, strict=True)
        )

    def accumulate(self, sums: Sequence[float], counts: Sequence[float]) -> None:
        """Take the rewards into the mean of all."""
        self.count += sum(counts)
        self.mean += (sum(sums) - sum(counts) * self.mean) / self.count


@dataclass
class BCOConfig(KTOConfig):
    """Configuration of [`BCOTrainer`]: that of [`~trl.KTOConfig`], of which BCO needs no KL pairs, and so may shuffle.

    Args:
        reward_shift (`str`, *optional*, defaults to `"ema"`):
            See [`RewardShift`]. `"ema"` moves once an optimizer step, after it was used, so that it does not matter how a
            batch is cut into micro-batches. `"running_mean"` is what TRL had until 2026: every micro-batch moves it
            before it is used.
        shift_decay (`float`, *optional*, defaults to `0.9`): how much of the moving averages stays at a step.
        udm_sample_size (`int`, *optional*, defaults to `1024`): prompts of each class to fit the density ratio on.
        udm_penalty (`float`, *optional*, defaults to `1.0`): of the squared weights of that fit.
        udm_min_weight, udm_max_weight (`float`, *optional*, defaults to `0.5` and `10.0`): what the weights are clipped to.
    """

    loss_type: str = field(
        default="apo_zero_unpaired", metadata={"help": "Not used.", "choices": ["apo_zero_unpaired"]}
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={"help": "Order of the training data.", "choices": ["random", "sequential", "group_by_length"]},
    )
    reward_shift: str = field(
        default="ema",
        metadata={
            "help": "Subtracted from rewards: midpoint of both classes' moving averages, mean of all so far, or nothing.",
            "choices": ["ema", "running_mean", "none"],
        },
    )
    shift_decay: float = field(default=0.9, metadata={"help": "How much of the moving averages stays at a step."})
    udm_sample_size: int = field(default=1024, metadata={"help": "Prompts of each class to fit the density ratio on."})
    udm_penalty: float = field(default=1.0, metadata={"help": "Penalty of the squared weights of the density ratio."})
    udm_min_weight: float = field(default=0.5, metadata={"help": "Lowest weight of an undesirable row."})
    udm_max_weight: float = field(default=10.0, metadata={"help": "Highest weight of an undesirable row."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_shift not in ("ema", "running_mean", "none"):
            raise ValueError(f'reward_shift must be "ema", "running_mean" or "none", got {self.reward_shift!r}.')
        if self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f'BCO has a loss of its own: leave loss_type at "apo_zero_unpaired", got {self.loss_type!r}.'
            )
        if (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                "BCO does not weigh classes with desirable_weight and undesirable_weight. Leave them at 1.0; to match the "
                f"prompts of both classes, give BCOTrainer a prompt_embedder or the data a column {UDM_WEIGHT!r}."
            )
        check_number("shift_decay", self.shift_decay, minimum=0.0, maximum=1.0)
        if self.udm_sample_size < 1:
            raise ValueError(f"udm_sample_size must be at least 1, got {self.udm_sample_size}.")
        check_number("udm_penalty", self.udm_penalty, minimum=0.0, above=True)
        check_number("udm_min_weight", self.udm_min_weight, minimum=0.0)
        check_number("udm_max_weight", self.udm_max_weight, minimum=self.udm_min_weight)


class _WithWeights:
    """A collator that does not lose the weights."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        if UDM_WEIGHT in rows[0]:
            batch[UDM_WEIGHT] = torch.tensor([row[UDM_WEIGHT] for row in rows], dtype=torch.float32)
        return batch


class BCOTrainer(ResumableMixin, ReplayMixin, KTOTrainer):
    """Binary Classifier Optimization, for desirable and undesirable completions that need not share prompts.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment"
    (https://huggingface.co/papers/2404.04656). The binary cross-entropy of shifted rewards bounds DPO's loss from above, most
    closely with the shift at the midpoint of both rewards. The paper's decay of the moving average is not known to us: 0.9
    is our choice, and so are that the shift moves after a step and that each class has an average of its own.

    *Underlying distribution matching* weighs every undesirable row by how much more often its prompt occurs among the desirable
    ones: an estimate of a classifier of prompt embeddings, fitted before training and clipped. It is on where the data
    has a column `udm_weight` or a `prompt_embedder` is given.

    Takes unpaired data (`prompt`, `completion`, `label`), and paired data (`prompt`, `chosen`, `rejected`), which it unpairs.
    `"running_mean"` depends on how a batch is cut into micro-batches, as it did in TRL. Evaluation never moves the shift.

    Args:
        prompt_embedder (`Callable[[list[str]], Tensor]`, *optional*):
            Prompts to vectors `[N, D]`, such as `SentenceTransformer(...).encode` with `convert_to_tensor=True`, or
            [`~hf_logits.hidden.embed_texts`] with a model and its tokenizer.
        args ([`BCOConfig`], *optional*): settings.

    All other arguments are those of [`~trl.KTOTrainer`].
    """

    _tag_names = ["hf_logits", "bco"]
    _name = "BCO"
    _paper = {
        "title": "Binary Classifier Optimization for Large Language Model Alignment",
        "id": "2404.04656",
        "citation": (
            "@inproceedings{jung2025binary,\n"
            "    title = {{Binary Classifier Optimization for Large Language Model Alignment}},\n"
            "    author = {Seungjae Jung and Gunsoo Han and Daniel Wontae Nam and Kyoung-Woon On},\n"
            "    booktitle = {Annual Meeting of the Association for Computational Linguistics},\n"
            "    year = 2025,\n"
            "    eprint = {arXiv:2404.04656},\n"
            "}"
        ),
    }
    args: BCOConfig
    model: Any
    _signature_columns: Any
    _config = BCOConfig
    _state_file = "reward_shift.safetensors"
    reference_columns = ("ref_logps", "ref_KL_logps")

    def __init__(self, *args: Any, prompt_embedder: Callable[[list[str]], Tensor] | None = None, **kwargs: Any):
        self.prompt_embedder = prompt_embedder
        self.shift = RewardShift()
        self._seen: list[tuple[Tensor, Tensor]] = []  # rewards and labels of this optimizer step
        self._ratio: LogDensityRatio | None = None
        super().__init__(*args, **kwargs)
        if self._is_vision_dataset:
            raise ValueError(
                "BCOTrainer is for text: KTO's reference log-probs, which it stands on, leave images out."
            )
        self.data_collator = _WithWeights(self.data_collator)

    # --- data ------------------------------------------------------------------------------------------------------------

    def check_dataset(self, dataset: Any, name: str) -> Any:
        first: dict[str, Any] = next(iter(dataset), {})
        if "chosen" in first and "rejected" in first:
            return check_pairs(dataset, name)
        require_columns(dataset, name, ("prompt", "completion", "label"))
        faults = {
            "the completion is empty. Drop such rows with `dataset.filter`.": lambda row: is_empty(row["completion"]),
            "the label is neither true nor false.": lambda row: row["label"] not in (True, False),
        }
        if UDM_WEIGHT in first:
            faults[f"{UDM_WEIGHT} is not a finite number of at least 0."] = lambda row: (
                not 0 <= row[UDM_WEIGHT] < math.inf
            )
        return refuse_rows(dataset, name, faults)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        # Under another name than "train", KTO does not advise on class weights, which BCO has not.
        prepared = super()._prepare_dataset(dataset, processing_class, args, f"BCO {dataset_name}")
        if isinstance(prepared, Dataset) and dataset_name == "train" and len(set(prepared["label"])) == 1:
            raise ValueError(
                f"All {len(prepared)} labels of the train dataset are {prepared[0]['label']}. BCO is a classifier: it needs "
                "desirable (true) and undesirable (false) completions. For desirable ones alone, take SFTTrainer."
            )
        if self.prompt_embedder is None or UDM_WEIGHT in next(iter(prepared)):
            return prepared
        if not isinstance(prepared, Dataset):
            raise ValueError(f"prompt_embedder needs a map-style dataset; or give the stream a column {UDM_WEIGHT!r}.")
        weights = [self._udm_weights(prepared, args, self.prompt_embedder) if args.process_index == 0 else None]
        return prepared.add_column(UDM_WEIGHT, broadcast_object_list(weights)[0])

    def _udm_weights(self, dataset: Dataset, args: BCOConfig, embed: Callable[[list[str]], Tensor]) -> list[float]:
        """Clipped density ratios of the prompts; 1 for desirable rows. The first dataset, the train one, is fitted."""
        prompts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in dataset["prompt_ids"]]
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        points = torch.as_tensor(embed(list(distinct)))[[distinct[prompt] for prompt in prompts]]
        label = torch.tensor(dataset["label"], dtype=torch.bool)
        if self._ratio is None:
            shuffled = torch.randperm(len(label), generator=torch.Generator().manual_seed(args.seed))
            above, below = (
                points[[index for index in shuffled.tolist() if label[index] == kind][: args.udm_sample_size]]
                for kind in (True, False)
            )
            self._ratio = fit_density_ratio(above, below, penalty=args.udm_penalty)
        ratio = self._ratio(points).exp().clamp(args.udm_min_weight, args.udm_max_weight)
        return ratio.masked_fill(label, 1.0).tolist()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if UDM_WEIGHT not in self._signature_columns:
            self._signature_columns.append(UDM_WEIGHT)

    # --- loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        weights, label = inputs.pop(UDM_WEIGHT, None), inputs["label"].bool()
        outputs, reference = self.run_once(model, inputs), self.reference(inputs)
        stock = self.replay(model, inputs, outputs, reference=reference, return_outputs=return_outputs)
        log_probs = sequence_log_probs(outputs.log_probs, inputs["completion_mask"], tail_weight=None)
        logratios = log_probs - reference["ref_logps"]
        training, mode = self.model.training, self.args.reward_shift
        rewards = self.beta * logratios.detach()
        if training and mode == "running_mean":
            self.shift.accumulate(*self._totals(rewards, label))
        shift = self.shift.value(mode)
        self._metrics["train" if training else "eval"]["rewards/shift"].append(shift)
        loss = bco_loss(
            logratios[label],
            logratios[~label],
            beta=self.beta,
            shift=shift,
            undesirable_weights=None if weights is None else weights[~label],
        )
        if training and mode == "ema":
            self._seen.append((rewards, label))
            if self.accelerator.sync_gradients:  # the last micro-batch of an optimizer step
                rewards, label = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
                self.shift.average(*self._totals(rewards, label), decay=self.args.shift_decay)
                self._seen = []
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return (loss, stock[1]) if return_outputs else loss

    def _totals(self, rewards: Float[Tensor, " R"], label: Bool[Tensor, " R"]) -> list[list[float]]:
        """Sums and numbers of desirable and undesirable rewards, over all processes."""
        kinds = torch.stack([label, ~label]).to(rewards)
        return self.accelerator.reduce(torch.stack([kinds @ rewards, kinds.sum(1)]), "sum").tolist()

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in asdict(self.shift).items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.shift = RewardShift(**{name: value.item() for name, value in state.items()})
