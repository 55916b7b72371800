"""GeDi's guide: a language model that is told the class first, trained to write each class and to tell the classes apart."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from hf_logits.checks import check_count, check_number
from hf_logits.class_logits import widen
from hf_logits.control_codes import ControlCodeCollator, class_of
from hf_logits.distillation import DistillationConfig
from hf_logits.extra_head import ExtraHeadMixin
from hf_logits.fused_head import fused_log_probs, inside
from hf_logits.guides import guide_record, guide_settings, read_guide, write_guide
from hf_logits.preferences import check_datasets, refuse_rows, require_columns
from hf_logits.tasks import bare, targets, valid_rows


def gedi_class_logits(
    log_probs: Float[Tensor, "B K"],
    lengths: Integer[Tensor, " B"],
    *,
    scale: float | Float[Tensor, ""],
    bias: Float[Tensor, " K"] | None = None,
    length_normalise: bool = True,
) -> Float[Tensor, "B K"]:
    """`scale log p(text | code) / n + bias`: the softmax over the codes is how probable each class is. Arguments as in [`gedi_loss`]."""
    if log_probs.shape[:1] != lengths.shape:
        raise ValueError(
            f"log_probs must be [texts, codes] and lengths [texts]; got {tuple(log_probs.shape)} and {tuple(lengths.shape)}."
        )
    logits = scale * widen(log_probs)
    if length_normalise:
        logits = logits / lengths.clamp(min=1)[:, None]
    return logits if bias is None else logits + bias


def gedi_generative_loss(
    log_probs: Float[Tensor, "B K"], lengths: Integer[Tensor, " B"], labels: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Of each text, the mean negative log-prob of its tokens behind its own code. Arguments as in [`gedi_loss`]."""
    return -gedi_class_logits(log_probs, lengths, scale=1.0).gather(1, labels[:, None])[:, 0]


def gedi_discriminative_loss(
    log_probs: Float[Tensor, "B K"],
    lengths: Integer[Tensor, " B"],
    labels: Int[Tensor, " B"],
    *,
    scale: float | Float[Tensor, ""] = 1.0,
    bias: Float[Tensor, " K"] | None = None,
    length_normalise: bool = True,
) -> Float[Tensor, " B"]:
    """Of each text, the cross-entropy of its class among the codes. Arguments as in [`gedi_loss`]."""
    logits = gedi_class_logits(log_probs, lengths, scale=scale, bias=bias, length_normalise=length_normalise)
    return cross_entropy(logits, labels, reduction="none")


def gedi_loss(
    log_probs: Float[Tensor, "B K"],
    lengths: Integer[Tensor, " B"],
    labels: Int[Tensor, " B"],
    *,
    generative_weight: float,
    scale: float | Float[Tensor, ""] = 1.0,
    bias: Float[Tensor, " K"] | None = None,
    length_normalise: bool = True,
) -> Float[Tensor, ""]:
    """`lambda L_generative + (1 - lambda) L_discriminative`, averaged over the texts.

    Args:
        log_probs: log-prob of each text behind each of K control codes, summed over its tokens.
        lengths: how many tokens that are.
        labels: which code is the text's own.
        generative_weight: lambda. At 1 this is class-conditional language modelling, at 0 classification alone.
        scale, bias: of the class logits.
        length_normalise: whether classes are compared by means per token. The generative loss always is such a mean.

    Raises:
        ValueError: shapes that do not fit, fewer than two codes, a lambda out of `[0, 1]`.
    """
    check_number("generative_weight", generative_weight, minimum=0.0, maximum=1.0)
    if log_probs.dim() != 2 or log_probs.size(1) < 2 or not log_probs.shape[:1] == lengths.shape == labels.shape:
        raise ValueError(
            f"log_probs must be [texts, codes >= 2], lengths and labels [texts]; got {tuple(log_probs.shape)}, "
            f"{tuple(lengths.shape)} and {tuple(labels.shape)}."
        )
    settings: dict[str, Any] = {"scale": scale, "bias": bias, "length_normalise": length_normalise}
    generative = gedi_generative_loss(log_probs, lengths, labels).mean()
    discriminative = gedi_discriminative_loss(log_probs, lengths, labels, **settings).mean()
    return generative_weight * generative + (1 - generative_weight) * discriminative


# --- data ----------------------------------------------------------------------------------------------------------------


def gedi_topics(
    dataset: Dataset | IterableDataset,
    *,
    topics: Sequence[str] | None = None,
    codes: tuple[str, str] = ("true", "false"),
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Rows of `text` and `topic` as GeDi learns topics from them: whether a text is about a word.

    Of each text come two rows: one with its own topic as `secondary_code`, whose `label` is the first of the codes, and one with
    another topic, drawn anew for each text, whose `label` is the second. With any word in its place, the guide then steers to topics
    that it was never taught.

    Args:
        dataset: with the columns `text` and `topic`, a word.
        topics: all of them. `None`: those of the dataset, which cannot be a stream.
        codes: for a text that is about its secondary code, and for one that is not.
        seed: of the other topics.

    Raises:
        ValueError: missing columns, fewer than two topics, rows of another one.
    """
    require_columns(dataset, "topic", ("text", "topic"))
    if topics is None:
        if isinstance(dataset, IterableDataset):
            raise ValueError("A stream does not say which topics there are: give topics=[...].")
        topics = sorted({str(topic) for topic in dataset["topic"]})
    known = list(dict.fromkeys(topics))
    if len(known) < 2:
        raise ValueError(f"A text is told from those about another topic, so two are needed; got {known}.")

    def both(rows: Mapping[str, Any], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"text": [], "secondary_code": [], "label": []}
        for text, topic, index in zip(rows["text"], rows["topic"], indices, strict=True):
            if topic not in known:
                raise ValueError(
                    f"Row {index} has the topic {topic!r}, which is not among {known}: topics are words, as the guide reads them."
                )
            other = random.Random(f"{seed}-{index}").choice([one for one in known if one != topic])
            found["text"] += [text, text]
            found["secondary_code"] += [topic, other]
            found["label"] += list(codes)
        return found

    return dataset.map(both, batched=True, with_indices=True, remove_columns=list(next(iter(dataset))))


# --- the trainer ---------------------------------------------------------------------------------------------------------


class Calibration(nn.Module):
    """Scale and bias of the class logits, those that are learned."""

    def __init__(self, codes: int, *, scale: bool, bias: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=scale)
        self.bias = nn.Parameter(torch.zeros(codes), requires_grad=bias)


@dataclass
class GeDiConfig(DistillationConfig):
    """What [`GeDiTrainer`] needs beside the settings of [`~transformers.TrainingArguments`].

    The paper trains GPT-2 medium for one epoch with `learning_rate=2e-5`, `per_device_train_batch_size=4` and no weight decay.

    Args:
        codes (`list[str]`): the control codes, one a class, in the order of the labels.
        generative_weight (`float`, *optional*, defaults to `0.8`):
            Weight of the generative loss, the paper's lambda; that of the discriminative loss is the rest. `1` is class-conditional
            language modelling, at the price of that: the other codes are not read in training then.
        learn_scale (`bool`, *optional*, defaults to `True`): whether the scale of the class logits is learned. It begins at 1.
        learn_bias (`bool`, *optional*, defaults to `False`): whether each class has a learned bias.
        scale_learning_rate (`float`, *optional*):
            Of scale and bias [ours], which short runs hardly move at that of the model. `None`: that of the model, as in the paper.
        length_normalise (`bool`, *optional*, defaults to `True`):
            Whether classes are compared by means per token (`False`: by sums, `--sum_loss` in the released code).
        max_length (`int`, *optional*, defaults to `192`): tokens of a row, codes and EOS included.
        append_eos (`bool`, *optional*, defaults to `True`): whether the end of a text is predicted and counted.
        fused_head (`bool`, *optional*):
            Whether the head runs on a chunk of the tokens at a time, so that no `[tokens, vocabulary]` tensor exists. `None`: where it
            can be done. `True`: an error where it cannot. `False`: never.
        chunk_size (`int`, *optional*, defaults to `128`): tokens in such a chunk.
        disabled_adapter_teacher (`bool`, *optional*, defaults to `False`): not for this trainer, which has no teacher.
    """

    codes: list[str] = field(default_factory=list, metadata={"help": "The control codes, in the order of the labels."})
    generative_weight: float = field(default=0.8, metadata={"help": "Weight of the generative loss."})
    learn_scale: bool = field(default=True, metadata={"help": "Whether the class logits' scale is learned."})
    learn_bias: bool = field(default=False, metadata={"help": "Whether each class has a learned bias."})
    scale_learning_rate: float | None = field(default=None, metadata={"help": "Of scale and bias."})
    length_normalise: bool = field(default=True, metadata={"help": "Whether classes compare by means per token."})
    max_length: int = field(default=192, metadata={"help": "Tokens of a row, codes and EOS included."})
    append_eos: bool = field(default=True, metadata={"help": "Whether the end of a text is predicted."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.codes)) < 2 or len(set(self.codes)) < len(self.codes):
            raise ValueError(
                f"codes must be two or more different control codes, in the order of the labels; got {self.codes}."
            )
        check_number("generative_weight", self.generative_weight, minimum=0.0, maximum=1.0)
        check_count("max_length", self.max_length, minimum=4)
        if self.scale_learning_rate is not None:
            check_number("scale_learning_rate", self.scale_learning_rate, minimum=0.0)


class GeDiTrainer(ExtraHeadMixin):
    """Trains the guide of [`~hf_logits.processors.GeDiLogitsProcessor`], from [GeDi: Generative Discriminator Guided Sequence
    Generation](https://huggingface.co/papers/2009.06367): a language model that writes each class behind its control code, and whose
    likelihoods tell the classes apart; see [`gedi_loss`].

    All codes of a text are rows of one forward, which gives both losses. The loss is a mean over the texts of the whole step,
    however that is cut into micro-batches and processes. Scale and bias are in the optimizer and in checkpoints, and are saved
    beside the weights in `gedi.json`; the weights are those of a plain causal language model or adapter.

    Beside the released code: any number of classes, EOS only behind texts that were not cut, the last position of a batch counts,
    and a secondary code is tokenized by itself, as the processor does it.

    Codes that the tokenizer does not know as one token can be added to it; with LoRA their embeddings have to be trained too.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal language model.
        args ([`GeDiConfig`]): settings; `codes` are needed.
        rest: of [`~transformers.Trainer`]. `processing_class` is the tokenizer. Datasets have the columns `text` and `label` (a code or
            its number) and may have `secondary_code`; see [`gedi_topics`].

    Logged under `gedi/`: `generative`, `discriminative`, `accuracy` (of telling the code), `scale`. Predictions are class logits.

    Example:

    ```python
    >>> args = GeDiConfig("out", codes=["negative", "positive"])
    >>> trainer = GeDiTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    >>> trainer.train()
    >>> processor = GeDiLogitsProcessor(trainer.model, **trainer.guide_settings("positive"))
    ```
    """

    args: GeDiConfig
    needs_teacher = False
    _config = GeDiConfig
    _name = "GeDi"
    _tag_names = ["hf_logits", "gedi"]
    _state_file = "gedi.safetensors"
    _meter_prefix = "gedi"
    _paper = {
        "title": "GeDi: Generative Discriminator Guided Sequence Generation",
        "id": "2009.06367",
        # docstyle-ignore
        "citation": """\
@inproceedings{krause2021gedi,
    title     = {{GeDi: Generative Discriminator Guided Sequence Generation}},
    author    = {Ben Krause and Akhilesh Deepak Gotmare and Bryan McCann and Nitish Shirish Keskar and Shafiq Joty and Richard Socher and Nazneen Fatema Rajani},
    year      = 2021,
    booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2021}
}""",
    }

    def __init__(self, model: Any, args: Any = None, **rest: Any):
        if not isinstance(args, GeDiConfig):
            raise TypeError(f"GeDiTrainer needs `args` of type GeDiConfig, got {type(args).__name__}.")
        tokenizer = rest.get("processing_class")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                "GeDiTrainer needs the tokenizer, as processing_class: it writes texts behind their codes."
            )
        collator = ControlCodeCollator(tokenizer, args.codes, max_length=args.max_length, append_eos=args.append_eos)
        self.codes = collator.codes
        if rest.get("data_collator") is None:
            rest["data_collator"] = collator
        check_datasets(rest, lambda dataset, name: check_rows(dataset, name, args.codes))
        super().__init__(model, None, args, **rest)
        whole: Any = bare(model)
        size = whole.config.get_text_config().vocab_size
        if self.task != "causal_lm":
            raise ValueError(f"A guide is a causal language model; {type(whole).__name__} is not.")
        if max(self.codes.values()) >= size:
            raise ValueError(
                f"The control codes {self.codes} are not among the model's {size} tokens: call "
                "model.resize_token_embeddings(len(tokenizer)), and train the new embeddings."
            )
        if args.learn_scale or args.learn_bias:
            self.attach(lambda: Calibration(len(self.codes), scale=args.learn_scale, bias=args.learn_bias))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def term_weights(self) -> dict[str, float]:
        return {"generative": self.args.generative_weight, "discriminative": 1 - self.args.generative_weight}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, student = dict(inputs), self._unwrapped
        classes = inputs.pop("classes")
        if student.training and self.args.generative_weight == 1:  # nobody asks what a text is behind other codes
            own = torch.arange(len(classes), device=classes.device), classes
            inputs = {name: value[own][:, None] for name, value in inputs.items()}
        shape = inputs["labels"].shape[:2]
        inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        wanted = targets(inputs.pop("labels"), self.task)
        fused = self._fused and self._heads_stand_alone(inputs)
        wanted = wanted.view(*shape, -1)
        total, values, logits = inside(model, student, self._total, inputs, wanted, classes, fused)
        loss = self._normalise(total, len(classes), num_items_in_batch)
        mode, count = ("train", len(classes)) if student.training else ("eval", self.fresh_rows(len(classes)))
        self.meters[mode].add({name: value[:count].sum() for name, value in values.items()}, count)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _total(
        self, inputs: dict[str, Any], wanted: Int[Tensor, "B K L"], classes: Int[Tensor, " B"], fused: bool
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " B"]], Float[Tensor, "B K"]]:
        """The loss summed over the texts, what is logged of each, and the class logits."""
        valid = wanted != -100
        tokens = self._token_log_probs(inputs, wanted.flatten(0, 1), fused)
        log_probs = tokens.new_zeros(valid.shape).masked_scatter(valid, tokens).sum(-1)
        lengths = valid[:, 0].sum(-1)
        calibration: Any = self._extra
        scale, bias = (1.0, None) if calibration is None else (calibration.scale, calibration.bias)
        settings: dict[str, Any] = {"scale": scale, "bias": bias, "length_normalise": self.args.length_normalise}
        if log_probs.size(1) < len(self.codes):
            terms = {"generative": gedi_generative_loss(log_probs, lengths, torch.zeros_like(classes))}
            logits = log_probs.detach()
        else:
            logits = gedi_class_logits(log_probs, lengths, **settings).detach()
            terms = {
                "generative": gedi_generative_loss(log_probs, lengths, classes),
                "discriminative": gedi_discriminative_loss(log_probs, lengths, classes, **settings),
            }
        weights = self.term_weights()
        # a weight of zero turns a term off even where it is infinite
        rows = torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum(0)
        total = rows.sum() if calibration is None else rows.sum() + self.keep_alive()
        values = {name: term.detach() for name, term in (terms | {"loss": rows}).items()}
        if logits.size(1) == len(self.codes):
            values["accuracy"] = (logits.argmax(1) == classes).float()
        if calibration is not None:
            values["scale"] = calibration.scale.detach().expand(len(classes))
        return total, values, logits

    def _token_log_probs(self, inputs: dict[str, Any], wanted: Int[Tensor, "R L"], fused: bool) -> Float[Tensor, " N"]:
        if not fused:
            logits, labels = valid_rows(self._unwrapped(**inputs).logits, wanted)
            return -cross_entropy(logits, labels, reduction="none")
        valid = wanted != -100
        with self._student_head.spared() as seen:
            self._unwrapped(**inputs)
        hidden = seen[0][:, -wanted.size(1) :][valid]
        with self.accelerator.autocast():
            return fused_log_probs(hidden, self._student_head, wanted[valid], chunk_size=self.args.chunk_size)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Texts, over all micro-batches of a step and all processes."""
        if not batch_samples:
            return None
        return self._over_processes(torch.tensor(sum(len(batch["classes"]) for batch in batch_samples), device=device))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self._extra is not None:
            own = [parameter for parameter in self._extra.parameters() if parameter.requires_grad]
            for group in optimizer.param_groups:
                group["params"] = [one for one in group["params"] if all(one is not known for known in own)]
            rate = self.args.scale_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # --- evaluation, and what is saved -------------------------------------------------------------------------------

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Predictions are class logits `[B, K]`, and their labels the classes `[B]`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs["logits"], inputs["classes"])

    def meter_names(self) -> list[str]:
        return ["generative", "discriminative", "accuracy", "scale"]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            # the length is for the sampler that groups by it
            self._signature_columns = ["text", "label", "secondary_code", str(self.args.length_column_name)]

    def guide_record(self) -> dict[str, Any]:
        """Codes, scale and bias as they are now: what `gedi.json` holds."""
        calibration: Any = self._extra
        scale = 1.0 if calibration is None else calibration.scale.item()
        biases = [0.0] * len(self.codes) if calibration is None else calibration.bias.tolist()
        bias = dict(zip(self.codes, biases, strict=True)) if self.args.learn_bias else {}
        return guide_record(self.codes, scale=scale, bias=bias, length_normalise=self.args.length_normalise)

    def guide_settings(self, desired: str) -> dict[str, Any]:
        """Arguments of [`~hf_logits.processors.GeDiLogitsProcessor`] for the model as it is now: codes, scale, bias.

        Of a saved one, [`~hf_logits.guides.guide_settings`] gives the same.
        """
        return guide_settings(self.guide_record(), desired=desired)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_guide(str(self.args.output_dir if output_dir is None else output_dir), self.guide_record())

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._extra is not None:
            record, calibration = read_guide(str(self.state.best_model_checkpoint)), self._extra
            with torch.no_grad():
                calibration.get_parameter("scale").fill_(record["scale"])
                for place, code in enumerate(self.codes):
                    calibration.get_parameter("bias")[place] = record["bias"].get(code, 0.0)


def check_rows(dataset: Any, name: str, codes: Sequence[str]) -> Any:
    """Refuse rows that cannot be learned from, and a training set of one class."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    require_columns(dataset, name, ("text", "label"))
    known = [*codes, *range(len(codes))]
    faults = {
        f"the label is not one of {list(codes)} or its number from 0 to {len(codes) - 1}.": lambda row: (
            row["label"] not in known
        ),
        "the text is empty. Drop such rows with `dataset.filter`.": lambda row: (
            not isinstance(row["text"], str) or not row["text"].strip()
        ),
    }
    dataset = refuse_rows(dataset, name, faults)
    if name == "train_dataset" and isinstance(dataset, Dataset):
        found = {class_of(label, codes) for label in dataset["label"]}
        if len(found) < 2:
            only = ", ".join(codes[one] for one in found)
            raise ValueError(f"All rows of the {name} dataset are {only}: there is nothing to tell it from.")
    return dataset
