"""Train a language model to begin its answers with a token that says whether, and as what, it refuses."""

import functools
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_logits.checks import check_number
from hf_logits.new_tokens import add_token_rows, frozen_rows, lora_with_token_rows, make_head_readable
from hf_logits.preferences import refuse_rows, require_columns
from hf_logits.refusal import RESPOND, RefusalTokens


__all__ = [
    "RefusalTokenConfig",
    "RefusalTokenTrainer",
    "RefusalTokens",
    "add_refusal_tokens",
    "prepend_refusal_token",
    "refusal_lora_config",
    "weigh_tokens",
]

logger = logging.get_logger(__name__)


# --- the tokens ----------------------------------------------------------------------------------------------------------


def add_refusal_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PeftModel,
    tokens: RefusalTokens,
    *,
    like: Mapping[str, str] | None = None,
) -> list[int]:
    """Add the tokens to a tokenizer and their rows to a model, both in place. A second call changes nothing.

    New rows are the mean of all older ones, tied or untied, unless `like` says otherwise. The paper does not say how it starts.
    Words are much the faster start: on SmolLM2-135M-Instruct the loss of the tokens began at 7 nats from single words such as
    "Sorry" and "Sure", and at 19 from the mean, which takes dozens of steps more.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        model ([`~transformers.PreTrainedModel`]): without adapter.
        tokens ([`RefusalTokens`]): what to add.
        like (`Mapping[str, str]`, *optional*): words whose mean a token starts from, as `{"[refuse]": "Sorry"}`.

    Returns:
        `list[int]`: the ids, those of refusals first, `respond` last.
    """
    return add_token_rows(tokenizer, model, tokens.texts, like=like)


def refusal_lora_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tokens: RefusalTokens, **settings: Any
) -> LoraConfig:
    """A LoRA that also trains the rows of the tokens, for [`RefusalTokenTrainer`].

    To use the adapter: load the base model, call [`add_refusal_tokens`], then `PeftModel.from_pretrained`.

    Args:
        model ([`~transformers.PreTrainedModel`]): behind [`add_refusal_tokens`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        tokens ([`RefusalTokens`]): the tokens.
        settings: of [`~peft.LoraConfig`].
    """
    return lora_with_token_rows(model, tokens.ids(tokenizer), **settings)


# --- the data ------------------------------------------------------------------------------------------------------------


def prepend_refusal_token(
    row: Mapping[str, Any], *, tokens: RefusalTokens, label_column: str = "label"
) -> dict[str, Any]:
    """Put the token of a row's label in front of its answer, for `dataset.map(..., fn_kwargs={"tokens": tokens})`.

    Nothing stands between token and answer, so that without special tokens the text is as before. Messages lose the
    white space in front, which a chat template that strips would no longer see. A row that has its token stays as it is.

    In `messages`, every answer is trained, so each begins with a token: the last one with that of the label, earlier ones
    with `respond`, or each with its own if the label is a list. Messages that only call tools have none.

    Args:
        row: with `prompt` and `completion`, each text or messages, or with `messages`.
        tokens ([`RefusalTokens`]): which token a label means, see [`RefusalTokens.category`].
        label_column (`str`, *optional*, defaults to `"label"`): what the row is.

    Returns:
        `dict`: the changed column.
    """
    if label_column not in row:
        raise ValueError(f"A row has no label {label_column!r}; its columns are {sorted(row)}. Pass label_column=.")
    label = row[label_column]
    if "prompt" in row and "completion" in row:
        answer = row["completion"]
        if isinstance(answer, str):
            return {"completion": _begin(answer, label, tokens)}
        if not answer or answer[0]["role"] != "assistant":
            raise ValueError(f"A completion must begin with a message of the assistant; got {answer!r}.")
        return {"completion": [_begin_message(answer[0], label, tokens), *answer[1:]]}
    if "messages" not in row:
        raise ValueError(
            f"Rows need prompt and completion, or messages, to say where the answer begins; the columns are {sorted(row)}."
        )
    messages = list(row["messages"])
    answers = [place for place, one in enumerate(messages) if one["role"] == "assistant" and one.get("content")]
    labels = list(label) if isinstance(label, list) else [*[RESPOND] * (len(answers) - 1), label]
    if not answers or len(labels) != len(answers):
        raise ValueError(
            f"messages hold {len(answers)} answers of the assistant with text, and there are {len(labels)} labels for them: give "
            "one label for the last answer, or a list with one for each."
        )
    for place, one in zip(answers, labels, strict=True):
        messages[place] = _begin_message(messages[place], one, tokens)
    return {"messages": messages}


def _begin(answer: str, label: Any, tokens: RefusalTokens) -> str:
    token = tokens.token(label)
    there = next((text for text in tokens.texts if answer.startswith(text)), None)
    if there not in (None, token):
        raise ValueError(f"An answer begins with {there!r} already, but its label {label!r} means {token!r}.")
    return answer if there else token + answer


def _begin_message(message: Mapping[str, Any], label: Any, tokens: RefusalTokens) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _begin(content.lstrip(), label, tokens)}
    if isinstance(content, list) and content and content[0].get("type") == "text":
        first = {**content[0], "text": _begin(content[0]["text"].lstrip(), label, tokens)}
        return {**message, "content": [first, *content[1:]]}
    raise ValueError(f"An answer must begin with text, to put a token in front; got the message {dict(message)!r}.")


# --- the trainer ---------------------------------------------------------------------------------------------------------


def weigh_tokens(log_probs: Float[Tensor, "B L"], chosen: Bool[Tensor, "B L"], weight: float) -> Float[Tensor, "B L"]:
    """Log-probabilities of labels, with those of the chosen ones times `weight`: of refusal tokens, say."""
    return torch.where(chosen, weight * log_probs, log_probs)


@dataclass
class RefusalTokenConfig(SFTConfig):
    """What [`RefusalTokenTrainer`] needs beside the settings of [`~trl.SFTConfig`].

    Args:
        refuse (`str` or `dict`, *optional*, defaults to `"[refuse]"`): the token of refusals, or `{category: token}`.
        respond (`str`, *optional*, defaults to `"[respond]"`): the token of ordinary answers.
        label_column (`str`, *optional*, defaults to `"label"`): the column that says what a row is.
        refusal_token_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss of refusal tokens, one in an answer that may have hundreds. The sum is divided by the number
            of tokens as before. 1 is the paper's plain SFT; other values are our addition.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "refuse"]

    refuse: dict | str = field(
        default="[refuse]", metadata={"help": "The token of refusals, or a dict from categories to tokens."}
    )
    respond: str = field(default="[respond]", metadata={"help": "The token of ordinary answers."})
    label_column: str = field(default="label", metadata={"help": "The column that says what a row is."})
    refusal_token_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of refusal tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("refusal_token_weight", self.refusal_token_weight, minimum=0.0)
        if self.refusal_token_weight != 1 and (self.loss_type != "nll" or self.label_smoothing_factor):
            raise ValueError(
                "refusal_token_weight weighs plain likelihoods: leave loss_type at 'nll' and label_smoothing_factor at 0, or the "
                f"weight at 1; got {self.loss_type!r}, {self.label_smoothing_factor} and {self.refusal_token_weight}."
            )
        _ = self.tokens  # refuses what are no tokens

    @property
    def tokens(self) -> RefusalTokens:
        return RefusalTokens(self.refuse, self.respond)


class RefusalTokenTrainer(SFTTrainer):
    """Supervised fine-tuning on answers that begin with a refusal token.

    Jain et al. 2024, "Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models"
    (https://huggingface.co/papers/2412.06748). The authors published how they evaluate, not how they train: the loss is that of
    [`~trl.SFTTrainer`], and what stands between token and answer (here nothing) is our choice. Benign prompts that look like
    those to refuse belong into the data; calibration on prompts that were not trained on comes after.

    Takes `prompt` and `completion`, or `messages`, with a column of labels, and puts the tokens in front
    ([`prepend_refusal_token`]); without that column the tokens must be there. With `messages`, set `assistant_only_loss=True`
    to train answers alone. The model and its tokenizer must know the tokens ([`add_refusal_tokens`]).

    With [`refusal_lora_config`] the tokens' rows are trained beside the adapter, also on tied embeddings, where TRL's own
    trainer fails. Adapters are saved without whole embeddings. `refusal/token_accuracy` and `refusal/token_loss` log how well
    the tokens are told, among the whole vocabulary.

    Example:

    ```python
    >>> tokens = RefusalTokens({"safety": "[Requests with safety concerns]", "unsupported": "[Unsupported requests]"})
    >>> add_refusal_tokens(tokenizer, model, tokens)
    >>> trainer = RefusalTokenTrainer(
    ...     model,
    ...     RefusalTokenConfig("out", refuse=dict(tokens.refuse), label_column="category"),
    ...     train_dataset=dataset,
    ...     processing_class=tokenizer,
    ...     peft_config=refusal_lora_config(model, tokenizer, tokens, r=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    args: RefusalTokenConfig
    _tag_names = ["trl", "sft", "hf_logits", "refusal-tokens"]
    _name = "Refusal tokens"
    _paper = {
        "title": "Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models",
        "id": "2412.06748",
        "citation": textwrap.dedent("""\
            @article{jain2024refusal,
                title   = {{Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models}},
                author  = {Neel Jain and Aditya Shrivastava and Chenyang Zhu and Daben Liu and Alfy Samuel and Ashwinee Panda and Anoop Kumar and Micah Goldblum and Tom Goldstein},
                year    = 2024,
                journal = {arXiv preprint arXiv:2412.06748},
            }"""),
    }

    def __init__(self, model: Any, args: Any = None, *rest: Any, **kwargs: Any):
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = RefusalTokenConfig(f"{path.split('/')[-1]}-refusal-tokens")
        elif not isinstance(args, RefusalTokenConfig):
            raise TypeError(f"RefusalTokenTrainer needs `args` of type RefusalTokenConfig, got {type(args).__name__}.")
        super().__init__(model, args, *rest, **kwargs)
        whole: Any = self.model
        ids, rows = args.tokens.ids(self._tokenizer), whole.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise ValueError(
                f"The refusal tokens have the ids {ids}, the model only {rows} rows: call add_refusal_tokens(tokenizer, model, "
                "tokens) on it first."
            )
        make_head_readable(whole)
        if frozen := frozen_rows(whole, ids):
            logger.warning_once(
                f"The rows of the refusal tokens in the {' and '.join(frozen)} embedding are not trained. If they are new, take "
                "refusal_lora_config(model, tokenizer, tokens) for peft_config."
            )
        self._token_ids = torch.tensor(ids)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        ids = set(args.tokens.ids(self._tokenizer))
        columns = list(next(iter(dataset), {}))
        if args.label_column in columns and "input_ids" not in columns and formatting_func is None:
            dataset = dataset.map(
                prepend_refusal_token, fn_kwargs={"tokens": args.tokens, "label_column": args.label_column}
            )
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # Packed rows do not begin where answers do; whole conversations are trained from their first word on.
        if packing or not (self.completion_only_loss or args.assistant_only_loss):
            return prepared
        return _check_first_tokens(prepared, dataset_name, ids, args.tokens)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock loss, of log-probabilities that are weighed where the labels are refusal tokens."""

        def weighed(**given: Any) -> Any:
            outputs = model(**given)
            if not given.get("fused_lm_head"):
                return outputs
            chosen = self._chosen(given, outputs.log_probs)
            self._record(outputs, chosen)
            weight = self.args.refusal_token_weight
            if weight == 1:
                return outputs
            return replace(outputs, log_probs=weigh_tokens(outputs.log_probs, chosen, weight))

        return super().compute_loss(weighed, inputs, return_outputs, num_items_in_batch)

    def _chosen(self, given: Mapping[str, Any], log_probs: Float[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Where the label is a refusal token, in the places of the log-probabilities."""
        shifted: Int[Tensor, "B N"] | None = given.get("shift_labels")
        labels = given["labels"][:, 1:] if shifted is None else shifted
        chosen = torch.isin(labels, self._token_ids.to(labels.device)).to(log_probs.device)
        return nn.functional.pad(chosen, (log_probs.shape[1] - chosen.shape[1], 0))  # behind virtual tokens

    def _record(self, outputs: Any, chosen: Bool[Tensor, "B L"]) -> None:
        known = outputs.is_top1.detach().bool() & chosen
        loss = -outputs.log_probs.detach().masked_fill(~chosen, 0.0).sum()
        sums = torch.stack([chosen.sum().float(), known.sum().float(), loss.float()])[None]
        count, right, total = self.accelerator.gather_for_metrics(sums).sum(0).tolist()
        if count:
            assert self.model is not None
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["refusal/token_accuracy"].append(right / count)
            metrics["refusal/token_loss"].append(total / count)

    def _save(self, output_dir: Any = None, state_dict: dict | None = None) -> None:
        with _without_embeddings(self.model):
            super()._save(output_dir, state_dict)


def _check_first_tokens(
    dataset: Dataset | IterableDataset, name: str, ids: set[int], tokens: RefusalTokens
) -> Dataset | IterableDataset:
    """Refuse rows whose first trained token is another one: generation would look for it there in vain."""
    require_columns(dataset, name, ("labels",))

    def begins_otherwise(row: Mapping[str, Any]) -> bool:
        return next((label for label in row["labels"] if label != -100), None) not in ids

    sentence = (
        f"the first token that is trained is none of {tokens.texts}. Give the data a column of labels, or the tokens "
        "(prepend_refusal_token). If they have them, the chat template writes something before the answer, an empty thought "
        "perhaps: a column chat_template_kwargs ({'enable_thinking': False}, say) can put that into the prompt. With "
        "truncation_mode='keep_end' it may have been cut off."
    )
    return refuse_rows(dataset, name, {sentence: begins_otherwise})


@contextmanager
def _without_embeddings(model: Any) -> Iterator[None]:
    """Save adapters whose token rows are their own without the embeddings, which PEFT adds once a vocabulary has grown."""
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig) or config.trainable_token_indices is None:
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained
