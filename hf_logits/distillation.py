"""Distillation on [`~transformers.Trainer`]: what every method needs, and no method."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from hf_logits.checks import check_count
from hf_logits.fused_head import Head, fused_loss, inside
from hf_logits.meters import MeteredMixin, compare
from hf_logits.method_card import MethodCardMixin
from hf_logits.resumable import RenamedWeightsMixin, ResumableMixin
from hf_logits.stored_teacher import IDS, LOG_PROBS, TeacherLogitsCollator, check_stored, stored_fingerprint, stored_of
from hf_logits.tasks import (
    LANGUAGE,
    bare,
    check_one_class,
    collator_for,
    decoder_inputs,
    shared_classes,
    targets,
    task_of,
    valid_rows,
)
from hf_logits.teachers import arguments_of, check_apart, fingerprint, freeze, in_dtype, place, teaching, without_cache


logger = logging.get_logger(__name__)

METERS = ("cross_entropy", "student_entropy", "teacher_cross_entropy", "agreement")


@dataclass
class DistillationConfig(TrainingArguments):
    """What all distillation trainers need beside the settings of [`~transformers.TrainingArguments`].

    Args:
        fused_head (`bool`, *optional*):
            Whether language models' heads run on a chunk of the tokens at a time, so that no `[tokens, vocabulary]` tensor
            exists. `None`: where it can be done. `True`: an error where it cannot. `False`: never.
        chunk_size (`int`, *optional*, defaults to `128`):
            Tokens in a chunk of the fused head. Memory grows with it.
        disabled_adapter_teacher (`bool`, *optional*, defaults to `False`):
            Whether a PEFT student with its adapter disabled is the teacher. Costs no memory.
    """

    fused_head: bool | None = field(
        default=None,
        metadata={"help": "Whether language models' heads run chunk by chunk. None: where it can be done."},
    )
    chunk_size: int = field(default=128, metadata={"help": "Tokens in a chunk of the fused head."})
    disabled_adapter_teacher: bool = field(
        default=False,
        metadata={"help": "Whether a PEFT student with its adapter disabled is the teacher."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk_size", self.chunk_size, minimum=1)
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the teacher's distribution is the soft label. "
                "Leave it at 0."
            )


class DistillationTrainer(MeteredMixin, MethodCardMixin, ResumableMixin, RenamedWeightsMixin, Trainer):
    """Trains a student on its own logits and a teacher's. A subclass says what is done with them: [`terms`], [`term_weights`].

    The loss is summed over all rows that predict something (tokens, or examples) and divided by their number in the whole
    step: however the step is cut into micro-batches and processes, it is the same one. The routers of a mixture of experts keep their
    own loss beside it if the student's config says `output_router_logits`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student: causal, encoder-decoder or masked language model, token, sequence or image classifier.
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            For the same task. It keeps its dtype, is frozen, and is not moved if it was quantised or loaded with a device map.
        args ([`DistillationConfig`], *optional*):
            Settings.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer, to be compared with the student's `processing_class`.
        rest:
            Of [`~transformers.Trainer`].
    """

    args: DistillationConfig
    _signature_columns: Any
    between: tuple[str, ...] = ()
    """Terms that compare rows with each other, in [`terms_between`]."""
    needs_teacher: bool = True
    loss_is_scaled_for_ga = True
    _config: type[DistillationConfig] = DistillationConfig
    _name: str = "Distillation"
    _tag_names: list[str] = ["hf_logits", "distillation"]
    _paper: dict[str, str] = {}
    _state_file = "teacher.safetensors"
    _meter_prefix = "distillation"
    _fused: bool
    _heads_tried: bool
    _student_head: Head
    _teacher_head: Head | None
    _head_adapted: bool

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        teacher: PreTrainedModel | PeftModel | None = None,
        args: Any = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **rest: Any,
    ):
        name = type(self).__name__
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(f"The student must be a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
        if args is None:
            args = self._config(f"{str(model.config.name_or_path or 'student').split('/')[-1]}-{self._name}")
        elif not isinstance(args, self._config):
            raise TypeError(f"{name} needs `args` of type {self._config.__name__}, got {type(args).__name__}.")
        for argument in ("compute_loss_func", "model_init"):
            if rest.get(argument) is not None:
                raise ValueError(
                    f"{name} does not take {argument}: the loss and the student are fixed when it is built."
                )
        # A teacher at hand knows more than what is stored of it.
        stored = (
            None if teacher is not None or args.disabled_adapter_teacher or not self.needs_teacher else stored_of(rest)
        )
        task = task_of(model)
        if task is None:
            raise ValueError(
                f"{name} cannot tell what {type(bare(model)).__name__} predicts. Give a causal, encoder-decoder or masked language "
                "model, or a token, sequence or image classifier."
            )
        self.task: str = task
        check_one_class(model)
        self.stored: dict[str, Any] | None = stored
        self._check_teacher(model, teacher, args)
        tokenizer = rest.get("processing_class")
        self.classes: int | None = None
        if stored is not None:
            self._check_stored(args, stored)
            self.classes = check_stored(stored, model, task, tokenizer)
        if teacher is not None:
            self.classes = shared_classes(
                model, teacher, tokenizer=tokenizer, teacher_tokenizer=teacher_processing_class
            )
            freeze(teacher)
        if rest.get("data_collator") is None:
            rest["data_collator"] = collator_for(task, model, tokenizer, rest.get("train_dataset"))
        super().__init__(model, args, **rest)
        if stored is not None:
            self.data_collator = TeacherLogitsCollator(self.data_collator, k=stored["k"], task=task)
        if args.n_gpu > 1:
            raise ValueError(
                f"{name} does not run under DataParallel: start it with `accelerate launch` or `torchrun`."
            )
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(f"{name} needs whole sequences: turn context and sequence parallelism off.")
        read = teacher if teacher is not None else model if args.disabled_adapter_teacher else None
        self._fingerprint = None if read is None else fingerprint(read)
        if stored is not None:
            self._fingerprint = stored_fingerprint(stored)
        self._teacher_settings: dict[str, Any] = {} if read is None else without_cache(read)
        self._teacher_dtype = None if teacher is None else bare(teacher).dtype
        self._teacher_alone = set() if teacher is None else arguments_of(teacher) - arguments_of(model)
        self.teacher: Any = None if teacher is None else place(teacher, self.accelerator)
        settings = bare(model).config.get_text_config().to_dict()
        self._balance: float = (
            settings.get("router_aux_loss_coef", 0.0) if settings.get("output_router_logits") else 0.0
        )
        self._prepare_heads(model, teacher)

    # --- what a method defines ---------------------------------------------------------------------------------------

    def terms(
        self, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"] | None, labels: Int[Tensor, " N"]
    ) -> dict[str, Float[Tensor, " N"]]:
        """The parts of the loss before their weights, one value a row, which depends on that row alone.

        Args:
            student, teacher: logits of the rows that predict something, in float32 or better.
            labels: what they are to predict.
        """
        raise NotImplementedError

    def stored_terms(
        self,
        student: Float[Tensor, "N C"],
        labels: Int[Tensor, " N"],
        ids: Int[Tensor, "N k"],
        log_probs: Float[Tensor, "N k"],
    ) -> dict[str, Float[Tensor, " N"]]:
        """The same parts, where all that is known of the teacher are its best tokens; see [`_check_stored`]."""
        raise NotImplementedError

    def terms_between(
        self, student: Float[Tensor, "M C"], teacher: Float[Tensor, "M C"] | None, labels: Int[Tensor, " M"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The parts that compare the rows which [`compared`] chooses with each other, one value for all of them."""
        raise NotImplementedError

    def compared(self, rows: int) -> Int[Tensor, " M"] | None:
        """Which of a batch's rows [`terms_between`] gets: all their logits are in memory at once. `None`: there are no such parts."""
        return None

    def fused_rows(
        self, hidden: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "N ... D"], Callable[[Tensor], Tensor]]:
        """What the fused head reads of a batch's rows, and how it gives their logits. A method that reads more overrides this."""
        return hidden, self._student_head

    def term_weights(self) -> dict[str, float]:
        """What each term is multiplied by. May depend on `self.state.global_step`, so that a resumed run goes on alike."""
        raise NotImplementedError

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, wanted, stored = self._split(inputs)
        if self._fused and not return_outputs and self._heads_stand_alone(inputs):
            run = self._fused_total
            total, sums, rows = inside(model, self.accelerator.unwrap_model(model), run, inputs, wanted, stored)
            outputs = None
        else:
            taught = None
            with self._teaching() as teacher:
                if teacher is not None:
                    taught, _ = valid_rows(
                        teacher(**self._for_teacher(inputs), **self._teacher_settings).logits, wanted
                    )
            outputs = model(**self._for_student(inputs))
            student, labels = valid_rows(outputs.logits, wanted)
            rows = len(labels)
            total, sums = self.weigh(student, taught, labels, *stored)
            if rows and (chosen := self.compared(rows)) is not None:
                chosen = chosen.to(student.device)
                some = None if taught is None else taught[chosen]
                more, found = self.weigh_between(rows, student[chosen], some, labels[chosen])
                total, sums = total + more, sums | found
            total, sums = self._keep_balance(outputs, rows, total, sums)
        loss = self._normalise(total, rows, num_items_in_batch)
        self.meters["train" if self._unwrapped.training else "eval"].add(sums | {"loss": total.detach()}, rows)
        return (loss, outputs) if return_outputs else loss

    def _fused_total(
        self, inputs: dict[str, Any], wanted: Int[Tensor, "B L"], stored: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]], int]:
        """The loss summed over the rows, through heads that see a chunk of them at a time."""
        valid, teacher_hidden = wanted != -100, None
        with self._teaching() as teacher:
            if teacher is not None:
                with (self._teacher_head or self._student_head).spared() as seen:
                    teacher(**self._for_teacher(inputs), **self._teacher_settings)
                teacher_hidden = seen[0][:, -wanted.size(1) :][valid]
        with self._student_head.spared() as seen:
            outputs = self._unwrapped(**self._for_student(inputs))
        hidden = seen[0][:, -wanted.size(1) :][valid]

        def teach(rows: Tensor) -> Tensor:
            if self._teacher_head is not None:
                with self._plain():
                    return self._teacher_head(rows)
            with self._teaching() if self._head_adapted else contextlib.nullcontext():
                return self._student_head(rows)

        def plainly(*given: Any, weigh: Any = self.weigh) -> Any:
            with self._plain():
                return weigh(*given)

        labels = wanted[valid]
        rows = len(labels)
        chosen = self.compared(rows) if rows else None
        between = partial(plainly, weigh=partial(self.weigh_between, rows))
        with self.accelerator.autocast():
            read, head = self.fused_rows(hidden, labels)
            total, sums = fused_loss(
                read,
                head,
                labels,
                plainly,
                chunk_size=self.args.chunk_size,
                teacher_hidden=teacher_hidden,
                teacher_head=teach,
                stored=stored,
                between=None if chosen is None else (chosen.to(labels.device), between),
            )
        return *self._keep_balance(outputs, rows, total, sums), rows

    def _keep_balance(
        self, outputs: Any, rows: int, total: Float[Tensor, ""], sums: dict[str, Float[Tensor, ""]]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """With the loss of a mixture of experts' routers, if the student's config has `output_router_logits`, as if each row had it."""
        if not self._balance or outputs.get("aux_loss") is None:
            return total, sums
        balance = rows * outputs.aux_loss
        return total + self._balance * balance, sums | {"aux_loss": balance.detach()}

    def _plain(self) -> Any:
        """No autocast: not in the loss, nor for a teacher, which has a dtype of its own."""
        return torch.autocast(self.args.device.type, enabled=False)

    def _heads_stand_alone(self, inputs: dict[str, Any]) -> bool:
        """Whether the heads give the models' logits from hidden states alone: tried out once, on the first batch."""
        if self._heads_tried:
            return True
        reason = self._student_head.fails(self._unwrapped, self._for_student(inputs))
        if reason is None and self._teacher_head is not None:
            reason = self._teacher_head.fails(self.teacher, self._for_teacher(inputs))
        if reason is not None:
            self._not_fused(reason)
        self._heads_tried = reason is None
        return self._heads_tried

    def _not_fused(self, reason: str) -> None:
        if self.args.fused_head:
            raise ValueError(f"fused_head=True is not possible: {reason}. Leave fused_head out.")
        self._fused = False
        if self.task in LANGUAGE and self.args.fused_head is None:
            logger.warning_once(f"All logits of a batch are in memory at once: {reason}. fused_head=False is silent.")

    def _prepare_heads(self, model: Any, teacher: Any) -> None:
        self._heads_tried, self._fused = False, self.args.fused_head is not False
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.task not in LANGUAGE:
            self._not_fused(f"{self.task} has few classes")
        elif self.args.torch_compile:
            self._not_fused("torch_compile compiles the whole forward")
        elif self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            self._not_fused("the heads are sharded")
        if not self._fused:
            return
        try:
            self._student_head, self._teacher_head = Head(model), None if teacher is None else Head(teacher)
        except ValueError as error:
            self._not_fused(str(error))
            return
        self._head_adapted = isinstance(model, PeftModel) and self._student_head.has_adapter()

    def weigh(
        self,
        student: Float[Tensor, "N C"],
        teacher: Float[Tensor, "N T"] | None,
        labels: Int[Tensor, " N"],
        *stored: Shaped[Tensor, "N k"],
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The weighted terms summed over the rows, and the sums that are logged."""
        if not len(labels):  # a graph without rows still reaches every weight, for processes that wait for gradients
            return student.sum(), {}
        student, teacher = self._cut(student, teacher)
        terms = self.stored_terms(student, labels, *stored) if stored else self.terms(student, teacher, labels)
        total, sums = self._add_up({name: term.sum() for name, term in terms.items()}, between=False)
        logged = compare(student.detach(), teacher, labels) | sums
        if stored:
            logged["agreement"] = (student.argmax(-1) == stored[0][:, 0]).sum().to(total.dtype)
        return total, logged

    def weigh_between(
        self,
        rows: int,
        student: Float[Tensor, "M C"],
        teacher: Float[Tensor, "M T"] | None,
        labels: Int[Tensor, " M"],
        *stored: Shaped[Tensor, "M k"],
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The weighted terms between some of a batch's rows, as if each of the `rows` in it had them."""
        terms = self.terms_between(*self._cut(student, teacher), labels)
        return self._add_up({name: rows * value for name, value in terms.items()}, between=True)

    def _cut(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both to the classes that they share, before the softmax: padding of a vocabulary is no token."""
        return student[:, : self.classes], None if teacher is None else teacher[:, : self.classes]

    def _add_up(
        self, sums: dict[str, Float[Tensor, ""]], *, between: bool
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        weights = {name: value for name, value in self.term_weights().items() if (name in self.between) == between}
        if sums.keys() != weights.keys():
            raise ValueError(f"{type(self).__name__} has terms {sorted(sums)} and weights of {sorted(weights)}.")
        # a weight of zero turns a term off even where it is infinite
        parts = [weights[name] * one if weights[name] else one.view(1)[:0].sum() for name, one in sums.items()]
        return torch.stack(parts).sum(), {name: value.detach() for name, value in sums.items()}

    def _normalise(self, total: Float[Tensor, ""], rows: int, items: Any) -> Float[Tensor, ""]:
        if items is None:
            return total / max(1, rows)
        # Gradients are averaged over the processes, but `items` are all of theirs.
        shares = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return total * shares / torch.as_tensor(items, device=total.device).clamp(min=1)

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Shaped[Tensor, "B ..."], tuple[Tensor, ...]]:
        """What both models read, what they are to predict, and what is stored of the teacher, for rows that predict something."""
        inputs = dict(inputs)
        stored = tuple(inputs.pop(name) for name in (IDS, LOG_PROBS) if name in inputs)
        labels = inputs.pop("labels", None)
        shifted = inputs.pop("shift_labels", None)
        if labels is None and shifted is None:
            raise ValueError(
                "A batch has no labels: they say which positions count (-100: not), even where only the teacher's logits are learned "
                "from. Give the dataset labels, or a data_collator that makes them."
            )
        if self.task == "seq2seq" and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = decoder_inputs(self._unwrapped, labels)
        wanted = targets(labels, self.task) if shifted is None else shifted
        expected = 1 if self.task in ("sequence_classification", "image_classification") else 2
        if wanted.is_floating_point() or wanted.dim() != expected:
            raise ValueError(
                f"{self.task} needs labels that are class ids of {expected} dimension(s); got {wanted.dtype} of shape "
                f"{tuple(wanted.shape)}."
            )
        return inputs, wanted, tuple(one[wanted != -100] for one in stored)

    def _for_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Without what only the teacher reads: segments of a text, say."""
        return {name: value for name, value in inputs.items() if name not in self._teacher_alone}

    def _for_teacher(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """In a teacher's own dtype, to which not every model brings images. An adapter's base reads what the student does."""
        if self._teacher_dtype is None:
            return self._for_student(inputs)
        return in_dtype(inputs, self._teacher_dtype)

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _teaching(self) -> Any:
        return teaching(self.teacher, self._unwrapped if self.args.disabled_adapter_teacher else None)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Rows that predict something, over all micro-batches of a step and all processes."""
        if not batch_samples or all(batch_samples[0].get(name) is None for name in ("labels", "shift_labels")):
            return None
        found = []
        for batch in batch_samples:
            wanted = batch["shift_labels"] if "shift_labels" in batch else targets(batch["labels"], self.task)
            if self.classes is not None and bool((wanted >= self.classes).any()):
                raise ValueError(
                    f"A label is {int(wanted.max())}, but student and teacher share only the ids below {self.classes}: one of the two "
                    "has tokens that the other lacks. Set such labels to -100."
                )
            found.append((wanted != -100).sum())
        return self._over_processes(torch.stack(found).sum().to(device))

    def _over_processes(self, items: Tensor) -> Tensor:
        """The sum of all processes' items, as far as gradients are averaged by it."""
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum() / self.get_tp_size()
        return items

    # --- evaluation, logging, checkpoints, card ----------------------------------------------------------------------

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        inputs = self._without_repeats(inputs)
        if inputs.get("labels") is None:
            return super().prediction_step(model, self._for_student(inputs), prediction_loss_only, ignore_keys)
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=items).detach(), None, None

    def _without_repeats(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Rows that fill up the last batch of an evaluation, and were in it before, predict nothing."""
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if inputs.get(name) is not None}
        masked = {name: value.clone() for name, value in labels.items()}
        for value in masked.values():
            value[self.fresh_rows(len(value)) :] = -100
        return {**inputs, **masked}

    def meter_names(self) -> list[str]:
        return [*self.term_weights(), *METERS, *(["aux_loss"] if self._balance else [])]

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self._fingerprint is None else {"fingerprint": self._fingerprint}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self._fingerprint is not None and not torch.equal(state["fingerprint"], self._fingerprint):
            raise ValueError(
                "This checkpoint was trained with another teacher (its weights or their dtype differ). Give the same teacher, or start "
                "from the checkpoint's weights instead of resuming."
            )

    def taught_by(self) -> str:
        if self.stored is not None:
            return str(self.stored["teacher"]["name"])
        return str(self.teacher.config.name_or_path) if self.teacher is not None else ""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        more = [*sorted(self._teacher_alone), *([] if self.stored is None else [IDS, LOG_PROBS])]
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *more]))

    # --- what is refused, and defaults -------------------------------------------------------------------------------

    def _check_teacher(self, model: Any, teacher: Any, args: DistillationConfig) -> None:
        name = type(self).__name__
        if teacher is not None and not isinstance(teacher, PreTrainedModel | PeftModel):
            raise TypeError(f"The teacher must be a PreTrainedModel or a PeftModel, got {type(teacher).__name__}.")
        if args.disabled_adapter_teacher and not isinstance(model, PeftModel):
            raise ValueError(
                f"disabled_adapter_teacher=True needs a PeftModel as the student, got {type(model).__name__}: give a teacher instead."
            )
        if args.disabled_adapter_teacher and teacher is not None:
            raise ValueError("Give a teacher or set disabled_adapter_teacher=True, not both.")
        given = teacher is not None or args.disabled_adapter_teacher
        if self.needs_teacher and not given and self.stored is None:
            raise ValueError(
                f"{name} needs a teacher: give a model, or the dataset of load_teacher_logits, or set disabled_adapter_teacher=True if the student is a PeftModel whose base "
                "model is to teach."
            )
        if given and not self.needs_teacher:
            raise ValueError(f"{name} learns without a teacher: leave it out.")
        if teacher is not None:
            check_apart(model, teacher)

    def _check_stored(self, args: Any, stored: dict[str, Any]) -> None:
        """Refuse what cannot be learned from a teacher's best tokens alone. A method that has [`stored_terms`] overrides this."""
        raise ValueError(
            f"{type(self).__name__} needs all of a teacher's logits, and this dataset has its {stored['k']} best: give the teacher itself."
        )
