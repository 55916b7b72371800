"""Multi-level ranking: scores that are graded, from levels of responses; then human ratings without forgetting (QuantiDCE)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import relu
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.class_logits import widen
from hf_logits.meters import MeteredMixin
from hf_logits.method_card import MethodCardMixin
from hf_logits.preferences import check_datasets, refuse_rows, require_columns
from hf_logits.resumable import RenamedWeightsMixin, ResumableMixin
from hf_logits.tasks import bare
from hf_logits.teachers import fingerprint, freeze, place, teaching


STAGES = {"ranking": ("context", "responses"), "rating": ("context", "response", "rating")}
"""The columns that each stage learns from."""


def masked_mean(values: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Over the last axis, of what is not masked away; 0 of nothing."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def mlr_terms(
    scores: Float[Tensor, "B L K"], mask: Bool[Tensor, "B L K"], *, margin: float, upper: float, weighted: bool
) -> dict[str, Float[Tensor, " B"]]:
    """The three parts of [`mlr_loss`] of each context: `separation`, `compactness`, `ordering`."""
    present = mask.any(-1)
    centers = masked_mean(scores, mask)  # [B, L]
    better, worse = torch.triu_indices(scores.size(1), scores.size(1), 1, device=scores.device)
    both = present[:, better] & present[:, worse]
    gap = centers[:, better] - centers[:, worse]
    bound = margin * (worse - better) if weighted else margin
    spread = masked_mean((scores - centers[..., None]).abs(), mask)
    return {
        "separation": torch.where(both, relu(bound - gap.abs()), 0.0).sum(-1),
        "compactness": relu(spread - upper).sum(-1),
        "ordering": torch.where(both, relu(-gap), 0.0).sum(-1),
    }


def mlr_loss(
    scores: Float[Tensor, "B L K"],
    *,
    margin: float,
    upper: float,
    weighted: bool = True,
    mask: Bool[Tensor, "B L K"] | None = None,
) -> Float[Tensor, ""]:
    """Separation + compactness + ordering of scores on L levels, best first, averaged over the contexts.

    With `c_l` the mean score of level l: `sum_{i<j} relu(margin (j - i) - |c_i - c_j|) + sum_l relu(mean_k |s_lk - c_l| - upper) +
    sum_{i<j} relu(c_j - c_i)`. The released code orders by `|c|`, which is the same for its positive scores, and adds up in place,
    so that it cannot be differentiated with three levels.

    Args:
        scores: K responses on each of L levels for B contexts.
        margin: how far neighbouring levels are to be apart.
        upper: how far a level's scores may be from their mean, on average.
        weighted: whether the margin grows with the number of levels in between.
        mask: which responses are there, if levels differ in their number. A level without any takes no part.

    Raises:
        ValueError: scores that are not `[B, L, K]` with two levels, negative margins.
    """
    check_number("margin", margin, minimum=0.0)
    check_number("upper", upper, minimum=0.0)
    if scores.dim() != 3 or scores.size(1) < 2 or not scores.numel():
        raise ValueError(f"scores must be of shape [contexts, levels >= 2, responses]; got {tuple(scores.shape)}.")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    terms = mlr_terms(widen(scores), mask, margin=margin, upper=upper, weighted=weighted)
    return torch.stack(list(terms.values())).sum(0).mean()


def self_distillation(student: Any, teacher: Any, mask: Bool[Tensor, "R T"]) -> dict[str, Float[Tensor, " R"]]:
    """Squared differences of two outputs of one model, averaged over a row's places and summed over the layers.

    Args:
        student, teacher: outputs with hidden states and attentions, each of which is left out where it is `None`.
        mask: the places that count; of attentions, those from and to them.
    """
    terms = {}
    for name, places in (("hidden_states", mask), ("attentions", mask[:, :, None] & mask[:, None])):
        if student[name] is None:
            continue
        total = torch.zeros(len(mask), device=mask.device)
        for ours, theirs in zip(student[name], teacher[name], strict=True):
            square = (widen(ours) - widen(theirs).detach()).square()
            # [R, T, D] over D, [R, heads, T, T] over the heads
            square = square.mean(-1 if name == "hidden_states" else 1)
            total = total + masked_mean(square.flatten(1), places.flatten(1))
        terms[name] = total
    return terms


class MultiLevelRankingCollator:
    """Tokenizes all responses of a batch together: one forward, however many levels there are.

    Rows are `context` and `responses` (a list for each level, best first), or `context`, `response` and `rating`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): with a padding token.
        max_length (`int`): tokens of a context with its response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        if "responses" in rows[0]:
            levels = max(len(row["responses"]) for row in rows)
            width = max(len(level) for row in rows for level in row["responses"])
            mask = torch.zeros(len(rows), levels, width, dtype=torch.bool)
            pairs = []
            for i, row in enumerate(rows):
                for j, level in enumerate(row["responses"]):
                    mask[i, j, : len(level)] = True
                    pairs += [(row["context"], response) for response in level]
            batch["response_mask"] = mask
        else:
            pairs = [(row["context"], row["response"]) for row in rows]
            batch["ratings"] = torch.tensor([float(row["rating"]) for row in rows])
        contexts, responses = (list(side) for side in zip(*pairs, strict=True))
        return batch | dict(
            self.tokenizer(
                contexts,
                responses,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                return_attention_mask=True,
            )
        )


@dataclass
class MultiLevelRankingConfig(TrainingArguments):
    """What [`MultiLevelRankingTrainer`] needs beside the settings of [`~transformers.TrainingArguments`].

    Args:
        stage (`str`, *optional*, defaults to `"ranking"`):
            `"ranking"`: levels of responses. `"rating"`: ratings by humans, with self-distillation.
        margin (`float`, *optional*, defaults to `0.3`): how far neighbouring levels are to be apart, the paper's lower bound.
        upper (`float`, *optional*, defaults to `0.1`): how far the scores of a level may be from their mean.
        weighted (`bool`, *optional*, defaults to `True`): whether the margin grows with the levels in between.
        sigmoid (`bool`, *optional*, defaults to `True`):
            Whether a score is the sigmoid of the model's output, as in the paper, or the output itself.
        rating_range (`tuple[float, float]`, *optional*, defaults to `(1.0, 5.0)`):
            The ratings that scores of 0 and 1 stand for.
        distillation_weight (`float`, *optional*, defaults to `5.0`):
            Of the squared differences to the model before the rating stage. `0` is a plain squared error.
        distil_attentions (`bool`, *optional*, defaults to `True`):
            Whether attentions are among them, for which the model has to be loaded with `attn_implementation="eager"`.
        mask_padding (`bool`, *optional*, defaults to `True`):
            Whether padding is left out of them. `False` is the released code.
        max_length (`int`, *optional*, defaults to `128`): tokens of a context with its response.
    """

    stage: str = field(default="ranking", metadata={"help": "What is learned from.", "choices": list(STAGES)})
    margin: float = field(default=0.3, metadata={"help": "How far neighbouring levels are to be apart."})
    upper: float = field(default=0.1, metadata={"help": "How far a level's scores may be from their mean."})
    weighted: bool = field(default=True, metadata={"help": "Whether the margin grows with the levels in between."})
    sigmoid: bool = field(default=True, metadata={"help": "Whether a score is the sigmoid of the model's output."})
    rating_range: tuple[float, float] = field(
        default=(1.0, 5.0), metadata={"help": "The ratings that scores of 0 and 1 stand for."}
    )
    distillation_weight: float = field(default=5.0, metadata={"help": "Of the differences to the model before."})
    distil_attentions: bool = field(default=True, metadata={"help": "Whether attentions are among them."})
    mask_padding: bool = field(default=True, metadata={"help": "Whether padding is left out of them."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a context with its response."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stage", self.stage, *STAGES)
        check_number("margin", self.margin, minimum=0.0)
        check_number("upper", self.upper, minimum=0.0)
        check_number("distillation_weight", self.distillation_weight, minimum=0.0)
        check_count("max_length", self.max_length, minimum=1)
        loading: Any = self.accelerator_config
        if loading.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True cuts all tensors of a batch after as many rows as there are contexts, and responses are more: leave "
                "it out."
            )
        loading.dispatch_batches = False  # of streams it is the default
        low, high = self.rating_range
        if not low < high:
            raise ValueError(f"rating_range must be the lowest and the highest rating; got {self.rating_range}.")


class MultiLevelRankingTrainer(MeteredMixin, MethodCardMixin, ResumableMixin, RenamedWeightsMixin, Trainer):
    """Trains a model with one output to give graded scores, from [Towards Quantifiable Dialogue Coherence
    Evaluation](https://huggingface.co/papers/2106.00507) (QuantiDCE).

    Stage `"ranking"` learns levels of responses by [`mlr_loss`]. Stage `"rating"` fits ratings by their squared error, while
    hidden states, attentions and scores stay near those of the model that it began with: a frozen copy, or, for a PEFT student,
    the model with its adapter disabled, at no memory. On resuming, give the model that the stage began with.

    Beside the released code: all responses of a batch are one forward, the teacher has no graph, padding is left out of the
    differences (`mask_padding=False` puts it in; they are then averaged row by row). Its loss on features and its binary
    cross-entropy, which the published script gives no weight, are not here.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a sequence classifier with `num_labels=1`.
        args ([`MultiLevelRankingConfig`], *optional*): settings.
        rest: of [`~transformers.Trainer`]. `processing_class` is the tokenizer.
    """

    args: MultiLevelRankingConfig
    _name = "Multi-level ranking"
    _tag_names = ["hf_logits", "multi-level-ranking"]
    _paper = {
        "title": "Towards Quantifiable Dialogue Coherence Evaluation",
        "id": "2106.00507",
        # docstyle-ignore
        "citation": """\
@inproceedings{ye2021towards,
    title     = {{Towards Quantifiable Dialogue Coherence Evaluation}},
    author    = {Zheng Ye and Liucun Lu and Lishan Huang and Liang Lin and Xiaodan Liang},
    year      = 2021,
    booktitle = {Proceedings of the 59th Annual Meeting of the Association for Computational Linguistics}
}""",
    }
    loss_is_scaled_for_ga = True
    _signature_columns: Any
    _state_file = "teacher.safetensors"
    _meter_prefix = "mlr"

    def __init__(self, model: Any, args: Any = None, **rest: Any):
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(f"The model must be a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
        config: Any = bare(model).config
        if args is None:
            args = MultiLevelRankingConfig(f"{str(config.name_or_path or 'model').split('/')[-1]}-MLR")
        elif not isinstance(args, MultiLevelRankingConfig):
            raise TypeError(f"Needs `args` of type MultiLevelRankingConfig, got {type(args).__name__}.")
        if config.num_labels != 1:
            raise ValueError(f"A score is one output, got num_labels={config.num_labels}: load it with num_labels=1.")
        tokenizer = rest.get("processing_class")
        if rest.get("data_collator") is None:
            if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.pad_token_id is None:
                raise ValueError(
                    "Give the tokenizer, with a padding token, as processing_class: responses are padded together."
                )
            rest["data_collator"] = MultiLevelRankingCollator(tokenizer, args.max_length)
        check_datasets(rest, lambda dataset, name: check_rows(dataset, name, args.stage))
        distils = args.stage == "rating" and args.distillation_weight > 0
        if distils and config.is_encoder_decoder:
            raise ValueError("Self-distillation needs a model of one stack: set distillation_weight=0.")
        if distils and args.distil_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} gives no attentions: load the model with "
                'attn_implementation="eager", or set distil_attentions=False.'
            )
        if isinstance(model, PeftModel) and distils and model.active_peft_config.is_prompt_learning:
            raise ValueError("Virtual tokens have no counterpart in the teacher: set distillation_weight=0.")
        teacher = copy.deepcopy(model) if distils and not isinstance(model, PeftModel) else None
        if teacher is not None:
            freeze(teacher)
        super().__init__(model, args, **rest)
        if args.n_gpu > 1:
            raise ValueError(
                "DataParallel would cut contexts apart: start this with `accelerate launch` or `torchrun`."
            )
        self._distils = distils
        self._fingerprint = fingerprint(model if teacher is None else teacher) if distils else None
        self.teacher: Any = None if teacher is None else place(teacher, self.accelerator)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        mask, ratings = inputs.pop("response_mask", None), inputs.pop("ratings", None)
        asked = {"output_hidden_states": True, "output_attentions": self.args.distil_attentions}
        outputs = model(**inputs, **(asked if self._distils else {}))
        scores = self.scores(outputs)
        if mask is not None:
            grid = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
            terms = mlr_terms(grid, mask, margin=self.args.margin, upper=self.args.upper, weighted=self.args.weighted)
            rows = torch.stack(list(terms.values())).sum(0)
            predictions = masked_mean(grid.detach(), mask)
        else:
            predictions = self.as_rating(scores)
            rows = (predictions - ratings).square()
            terms = {"rating": rows}
            if self._distils:
                with self._teaching() as teacher:
                    before = teacher(**inputs, **asked)
                places = inputs["attention_mask"].bool()
                terms |= self_distillation(outputs, before, places if self.args.mask_padding else places | True)
                terms["scores"] = (scores - self.scores(before)).square()
                distances = torch.stack([term for name, term in terms.items() if name != "rating"]).sum(0)
                rows = rows + self.args.distillation_weight * distances
        mode, count = ("train", len(rows)) if self._unwrapped.training else ("eval", self.fresh_rows(len(rows)))
        sums = {name: term[:count].sum() for name, term in (terms | {"loss": rows}).items()}
        self.meters[mode].add(sums, count)
        items = len(rows) if num_items_in_batch is None else num_items_in_batch
        shares = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = rows.sum() * shares / items
        return (loss, {"scores": predictions.detach()}) if return_outputs else loss

    def scores(self, outputs: Any) -> Float[Tensor, " R"]:
        """One score a response, in float32 at least."""
        logits = widen(outputs.logits).flatten()
        return logits.sigmoid() if self.args.sigmoid else logits

    def as_rating(self, scores: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        """On the scale of the humans: `4 s + 1` for ratings from 1 to 5."""
        low, high = self.args.rating_range
        return low + (high - low) * scores

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _teaching(self) -> Any:
        return teaching(self.teacher, self._unwrapped if self.teacher is None else None)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Contexts, or ratings, over all micro-batches of a step and all processes."""
        if not batch_samples:
            return None
        found = [
            len(batch["response_mask"] if "response_mask" in batch else batch["ratings"]) for batch in batch_samples
        ]
        items = torch.tensor(sum(found), device=device)
        return self.accelerator.gather(items).sum() if self.args.world_size > 1 else items

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Predictions are the means of levels `[B, L]`, or ratings `[B]`; their labels are the levels' ranks, or the ratings."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        labels = inputs.get("ratings")
        if labels is None:
            levels = torch.arange(outputs["scores"].size(1), 0, -1, device=loss.device)
            labels = levels.expand_as(outputs["scores"]).contiguous()
        return loss.detach(), outputs["scores"], labels

    def meter_names(self) -> list[str]:
        return ["separation", "compactness", "ordering", "rating", "hidden_states", "attentions", "scores"]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(STAGES[self.args.stage])

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self._fingerprint is None else {"fingerprint": self._fingerprint}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self._fingerprint is not None and not torch.equal(state["fingerprint"], self._fingerprint):
            raise ValueError(
                "This checkpoint's stage began with another model, which is the teacher: build the trainer with that one to resume."
            )


def check_rows(dataset: Any, name: str, stage: str) -> Any:
    """Refuse rows that cannot be learned from."""
    if not hasattr(dataset, "column_names"):
        return dataset
    require_columns(dataset, name, STAGES[stage])
    if stage == "rating":
        return refuse_rows(dataset, name, {"rating is missing.": lambda row: row["rating"] is None})
    return refuse_rows(
        dataset,
        name,
        {
            "responses need two levels or more, best first.": lambda row: len(row["responses"]) < 2,
            "a level has no responses.": lambda row: any(not level for level in row["responses"]),
        },
    )
