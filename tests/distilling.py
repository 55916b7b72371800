"""Tiny students, teachers and labelled data for every task, and how the tests distil with them. Nothing drops out."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

import tiny
from preferences import arguments, tokenizer


CLASSES = 4
_BERT = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": tiny.PAD, "num_labels": CLASSES}
_BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def causal_lm(seed: int = 0, **config: Any) -> PreTrainedModel:
    return tiny.llama(seed, **config)


def softcapped(seed: int = 0, **config: Any) -> PreTrainedModel:
    """Tied embeddings, and logits that are bent by a tanh."""
    settings = {"vocab_size": tiny.VOCAB, "final_logit_softcapping": 2.0, "head_dim": 8, **tiny._SMALL, **tiny._IDS}
    return tiny.spread(Gemma2ForCausalLM(Gemma2Config(**(settings | config))), seed)


def gpt2(seed: int = 0, **config: Any) -> PreTrainedModel:
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "loss_type": "ForCausalLM"}
    return tiny.gpt2(seed, **(settings | config))


def seq2seq(seed: int = 0, **config: Any) -> PreTrainedModel:
    """T5 with tied embeddings, which scales what its head reads."""
    return tiny.t5(seed, **({"tie_word_embeddings": True, "dropout_rate": 0.0} | config))


def bart(seed: int = 0, **config: Any) -> PreTrainedModel:
    """With a bias on the logits that is no parameter."""
    settings = {
        "vocab_size": tiny.VOCAB,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
    }
    settings |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    settings |= {"max_position_embeddings": 32, "decoder_start_token_id": tiny.EOS, "dropout": 0.0, **tiny._IDS}
    made = tiny.spread(BartForConditionalGeneration(BartConfig(**(settings | config))), seed)
    made.final_logits_bias.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def masked_lm(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A transform and a bias in front of and behind the tied head."""
    made = _spread(BertForMaskedLM(BertConfig(**(_BERT | config))), seed)
    made.cls.predictions.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def token_classification(seed: int = 0, **config: Any) -> PreTrainedModel:
    return _spread(BertForTokenClassification(BertConfig(**(_BERT | config))), seed)


def sequence_classification(seed: int = 0, **config: Any) -> PreTrainedModel:
    return _spread(BertForSequenceClassification(BertConfig(**(_BERT | config))), seed)


def image_classification(seed: int = 0, **config: Any) -> PreTrainedModel:
    settings = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "num_labels": CLASSES}
    return _spread(ViTForImageClassification(ViTConfig(**(settings | config))), seed)


def _spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def texts(rows: int = 8, seed: int = 0) -> Dataset:
    """Unequal lengths; the first two tokens of each are not to be learned."""
    rng = random.Random(seed)
    found = []
    for _ in range(rows):
        ids = [rng.randint(6, tiny.VOCAB - 1) for _ in range(rng.randint(4, 9))]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, -100, *ids[2:]]})
    return Dataset.from_list(found)


def translations(rows: int = 8, seed: int = 0) -> Dataset:
    rng = random.Random(seed + 100)
    return texts(rows, seed).map(
        lambda row: {"labels": [rng.randint(6, tiny.VOCAB - 1) for _ in range(rng.randint(2, 6))]}
    )


def clozes(rows: int = 8, seed: int = 0) -> Dataset:
    """Every third token is a mask."""
    found = []
    for row in texts(rows, seed):
        ids = row["input_ids"]
        masked = [3 if i % 3 == 0 else token for i, token in enumerate(ids)]
        labels = [token if i % 3 == 0 else -100 for i, token in enumerate(ids)]
        found.append({"input_ids": masked, "attention_mask": row["attention_mask"], "labels": labels})
    return Dataset.from_list(found)


def tagged(rows: int = 8, seed: int = 0) -> Dataset:
    return texts(rows, seed).map(lambda row: {"labels": [-100, *[i % CLASSES for i in row["input_ids"][1:]]]})


def sorted_texts(rows: int = 8, seed: int = 0) -> Dataset:
    return texts(rows, seed).map(lambda row: {"labels": sum(row["input_ids"]) % CLASSES}, remove_columns=["labels"])


def images(rows: int = 8, seed: int = 0) -> Dataset:
    drawn = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"pixel_values": drawn.tolist(), "labels": [i % CLASSES for i in range(rows)]})


KINDS: dict[str, tuple[Callable[..., PreTrainedModel], Callable[..., Dataset]]] = {
    "causal_lm": (causal_lm, texts),
    "softcapped": (softcapped, texts),
    "gpt2": (gpt2, texts),
    "seq2seq": (seq2seq, translations),
    "bart": (bart, translations),
    "masked_lm": (masked_lm, clozes),
    "token_classification": (token_classification, tagged),
    "sequence_classification": (sequence_classification, sorted_texts),
    "image_classification": (image_classification, images),
}
"""By name: a model from a seed, and its data."""


def _phrase(rng: random.Random) -> str:
    return " ".join(f"w{rng.randint(6, 63)}" for _ in range(rng.randint(1, 4)))


def scorer(seed: int = 0, **config: Any) -> PreTrainedModel:
    """With one output, and with attentions that can be read."""
    return sequence_classification(seed, **({"num_labels": 1, "attn_implementation": "eager"} | config))


def ranked(rows: int = 8, seed: int = 0) -> Dataset:
    """One to three responses on each of three levels."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "context": _phrase(rng),
                "responses": [[_phrase(rng) for _ in range(rng.randint(1, 3))] for _ in range(3)],
            }
            for _ in range(rows)
        ]
    )


def rated(rows: int = 8, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"context": _phrase(rng), "response": _phrase(rng), "rating": rng.uniform(1, 5)} for _ in range(rows)]
    )


SCORES = {"ranking": (scorer, ranked), "rating": (scorer, rated)}
"""The same of the stages of multi-level ranking, which has no teacher of its own."""

LANGUAGE = ("causal_lm", "softcapped", "gpt2", "seq2seq", "bart", "masked_lm")
LORA = {
    "causal_lm": ["q_proj", "v_proj", "lm_head"],
    "softcapped": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "seq2seq": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
    "masked_lm": ["query", "value"],
    "token_classification": ["query", "value"],
    "sequence_classification": ["query", "value"],
    "image_classification": ["q_proj", "v_proj"],
    "ranking": ["query", "value"],
    "rating": ["query", "value"],
}
"""Which layers an adapter changes; of the first kind the head too."""


def adapted(model: PreTrainedModel, kind: str, seed: int = 0) -> Any:
    """With a LoRA adapter that already does something."""
    made = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=LORA[kind], fan_in_fan_out=kind == "gpt2")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return made


def words(kind: str) -> Any:
    """The tokenizer, which pads on the left for decoders alone: elsewhere absolute positions count from the left."""
    made = tokenizer()
    made.padding_side = "left" if kind in ("causal_lm", "softcapped", "gpt2") else "right"
    return made


def collator(kind: str) -> Any:
    """Of the kinds whose default will not do."""
    if kind == "image_classification":
        return default_data_collator
    if kind == "masked_lm":
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(words(kind))
    return None


class LargestOf(TorchDispatchMode):
    """How many rows of so many columns, the size of a vocabulary, the largest tensor that is made has room for."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and self.columns in value.shape:
                self.rows = max(self.rows, value.untyped_storage().nbytes() // (self.columns * value.element_size()))
        return result


def make(
    trainer: type,
    config: type,
    folder: Path | str,
    *,
    kind: str = "causal_lm",
    data: Any = None,
    evaluation: Any = None,
    lora: bool = False,
    model: Any = None,
    teacher: Any = None,
    rest: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny student with a tiny teacher, unless there is none to be had."""
    build, dataset = (KINDS | SCORES)[kind]
    student = build(0) if model is None else model
    if kind in KINDS:
        if teacher is None and trainer.needs_teacher and not settings.get("disabled_adapter_teacher"):
            teacher = build(1)
        rest = {"teacher": teacher} | (rest or {})
    else:
        settings = {"stage": kind} | settings
    return trainer(
        adapted(student, kind) if lora else student,
        args=arguments(config, folder, **settings),
        train_dataset=dataset() if data is None else data,
        eval_dataset=evaluation,
        data_collator=collator(kind),
        processing_class=None if kind == "image_classification" else words(kind),
        **(rest or {}),
    )
