"""What a model predicts, where, and among which classes: what losses on logits must know before they compare two models."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft import PeftModel
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_logits.class_logits import widen
from hf_logits.prompts import check_same_tokenizer


logger = logging.get_logger(__name__)

LANGUAGE = ("causal_lm", "seq2seq", "masked_lm")
"""Tasks whose classes are the tokens of a vocabulary."""

_ENDINGS = {
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "image_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "causal_lm",
    "MTModel": "causal_lm",
}


def bare(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself; adapters stay in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def task_of(model: PreTrainedModel | PeftModel) -> str | None:
    """One of `causal_lm`, `seq2seq`, `masked_lm`, `token_classification`, `sequence_classification`,
    `image_classification`, by the names of a model's class and of those above it; `None` for all others."""
    whole = bare(model)
    for base in type(whole).__mro__:
        for ending, task in _ENDINGS.items():
            if base.__name__.endswith(ending):
                return "seq2seq" if task == "causal_lm" and whole.config.is_encoder_decoder else task
    return None


def collator_for(task: str, model: PreTrainedModel | PeftModel, tokenizer: Any, dataset: Any = None) -> Any:
    """What makes batches of labelled rows, where [`~transformers.Trainer`]'s default would not pad or make their labels, else `None`.

    Tokens are masked at random only in a dataset without labels: others say what is masked.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if task in ("causal_lm", "seq2seq"):
        return DataCollatorForSeq2Seq(tokenizer, bare(model))
    labelled = "labels" in (getattr(dataset, "column_names", None) or ())
    if task == "token_classification" or (task == "masked_lm" and labelled):
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorForLanguageModeling(tokenizer) if task == "masked_lm" else None


def decoder_inputs(model: PreTrainedModel | PeftModel, labels: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """What an encoder-decoder's decoder reads: the labels, one place later."""
    whole: Any = bare(model)
    prepare = getattr(whole, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        found: Tensor = prepare(labels=labels)
        return found
    # M2M100 and Blenderbot shift inside of their forward, where they are given the labels
    later = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=whole.config.decoder_start_token_id)
    return later.masked_fill(later == -100, whole.config.pad_token_id)


def targets(labels: Shaped[Tensor, "B ..."], task: str) -> Shaped[Tensor, "B ..."]:
    """What the logits at each position are to predict, `-100` where nothing: causal language models predict the next label."""
    if task != "causal_lm":
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def valid_rows(
    logits: Float[Tensor, "B ... C"], wanted: Int[Tensor, "B ..."]
) -> tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]:
    """The logits that predict something, one row each, in float32 or better, and their targets.

    Virtual tokens of prompt learning may stand in front of the positions.
    """
    if wanted.dim() == 2:
        logits = logits[:, logits.size(1) - wanted.size(1) :]
    valid = wanted != -100
    return widen(logits[valid]), wanted[valid]


def shared_classes(
    student: PreTrainedModel | PeftModel,
    teacher: PreTrainedModel | PeftModel,
    *,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> int | None:
    """How many classes two models have in common, `None` if the same ones; those of an id must mean the same.

    Vocabularies may be padded: both are then cut, to the smallest of the two and the tokenizer's.

    Raises:
        ValueError: the tasks, the tokenizers, or the names or order of the classes differ.
    """
    tasks = task_of(student), task_of(teacher)
    if tasks[0] != tasks[1]:
        what = f"does {tasks[1]}" if tasks[1] else "has no logits that a loss could be made of"
        raise ValueError(
            f"The student {type(bare(student)).__name__} does {tasks[0]}, but the teacher {type(bare(teacher)).__name__} {what}: "
            f"load the teacher with the Auto class of the student's task."
        )
    configs = bare(student).config, bare(teacher).config
    compared = all(isinstance(one, PreTrainedTokenizerBase) for one in (tokenizer, teacher_tokenizer))
    if compared:  # both models read the same ids, whatever they predict
        check_same_tokenizer(tokenizer, teacher_tokenizer)
    if tasks[0] not in LANGUAGE:
        check_class_names(*configs)
        return None
    sizes = [config.get_text_config().vocab_size for config in configs]
    known = len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else min(sizes)
    shared = min(*sizes, known)
    if sizes[0] != sizes[1] and not compared:
        logger.warning_once(
            f"The student has {sizes[0]} tokens and the teacher {sizes[1]}: both are cut to {shared}, as if only padding differed. Give "
            "processing_class and teacher_processing_class, so that their tokens are compared."
        )
    return None if sizes == [shared, shared] else shared


def check_class_names(student: Any, teacher: Any) -> None:
    """Refuse configs whose classes have other names, or the same ones in another order."""
    if student.num_labels != teacher.num_labels:
        raise ValueError(
            f"The student has {student.num_labels} classes and the teacher {teacher.num_labels}: load the student with "
            f"num_labels={teacher.num_labels}."
        )
    ours, theirs = student.id2label, teacher.id2label
    # names that nobody has given say nothing
    if any(all(name == f"LABEL_{i}" for i, name in names.items()) for names in (ours, theirs)):
        return
    for i in range(student.num_labels):
        if ours[i] != theirs[i]:
            raise ValueError(
                f"Class {i} is {ours[i]!r} for the student and {theirs[i]!r} for the teacher: give both the same id2label, in the "
                "order of the dataset's labels."
            )


def check_one_class(model: PreTrainedModel | PeftModel) -> None:
    """Refuse heads whose outputs are not the logits of one softmax."""
    whole = bare(model)
    task, kind = task_of(model), whole.config.problem_type
    if task in (None, *LANGUAGE):
        return
    if kind in ("regression", "multi_label_classification") or whole.config.num_labels == 1:
        raise ValueError(
            f"{type(whole).__name__} with problem_type={kind!r} and {whole.config.num_labels} label(s) does not choose one class of "
            'several, and its logits have no softmax: only problem_type="single_label_classification" can be distilled here.'
        )
