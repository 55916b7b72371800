"""Texts behind control codes: what class-conditional language models read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.prompts import check_known, control_code, tokenize


class ControlCodeCollator:
    """Writes every text behind every control code: one forward reads them all.

    Rows are `text`, `label` and, if there are secondary codes, `secondary_code`. A row becomes `[BOS] code [secondary code] text
    EOS`, with a BOS if the tokenizer puts one. What stands behind the code is predicted and counted, as the processor counts it;
    code and BOS are not. Padding is on the right whatever the tokenizer says, because absolute positions count from the left.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the guide.
        codes (`Sequence[str]`): the control codes, of which the first token is used.
        max_length (`int`, *optional*, defaults to `192`): tokens of a row; a text that is cut has no EOS.
        append_eos (`bool`, *optional*, defaults to `True`): whether the end of a text is predicted and counted too.

    Returns:
        `dict[str, Tensor]`: `input_ids`, `attention_mask` and `labels` of shape `[B, K, L]`, and `classes` of shape `[B]`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        codes: Sequence[str],
        *,
        max_length: int = 192,
        append_eos: bool = True,
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.codes = {code: control_code(code, tokenizer) for code in codes}
        if len(set(self.codes.values())) < len(codes) or len(codes) < 2:
            raise ValueError(f"The control codes must be two or more of different first tokens; got {self.codes}.")
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token: give it one, or set append_eos=False.")
        self._end = [tokenizer.eos_token_id] if append_eos else []
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and tokenizer(codes[0])["input_ids"][:1] == [bos] else []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        bodies = [self._body(row) for row in rows]
        begin, codes = len(self._start) + 1, list(self.codes.values())
        shape = len(rows), len(codes), begin + max(map(len, bodies))
        pad = self.tokenizer.pad_token_id
        ids = torch.full(shape, 0 if pad is None else pad)
        mask, labels = torch.zeros_like(ids), torch.full(shape, -100)
        for index, body in enumerate(bodies):
            end = begin + len(body)
            ids[index, :, : begin - 1] = torch.tensor(self._start, dtype=torch.long)
            ids[index, :, begin - 1] = torch.tensor(codes)
            ids[index, :, begin:end] = labels[index, :, begin:end] = torch.tensor(body)
            mask[index, :, :end] = 1
        classes = torch.tensor([class_of(row["label"], list(self.codes)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "classes": classes}

    def _body(self, row: Mapping[str, Any]) -> list[int]:
        room = self.max_length - len(self._start) - 1
        word = row["secondary_code"] if "secondary_code" in row else None
        secondary = tokenize(word, self.tokenizer, what="secondary_code", special_tokens=False) if word else []
        if word:
            check_known(word, secondary, self.tokenizer, what="secondary_code")
        settings = {"add_special_tokens": False, "truncation": True, "max_length": self.max_length}
        text = self.tokenizer(row["text"], **settings)["input_ids"]
        if not text or (word and not secondary):
            raise ValueError(
                f"A text or a secondary code has no tokens: {row!r}. Drop such rows with `dataset.filter`."
            )
        if len(secondary) >= room:
            raise ValueError(f"max_length={self.max_length} leaves no room for a text behind {word!r}.")
        return [*secondary, *text, *self._end][:room]


def class_of(label: Any, codes: Sequence[str]) -> int:
    """Which class a label is, given as one of the codes or as its number."""
    if isinstance(label, str) and label in codes:
        return codes.index(label)
    if isinstance(label, int) and 0 <= label < len(codes):
        return int(label)
    raise ValueError(f"A label must be one of {list(codes)} or its number from 0 to {len(codes) - 1}; got {label!r}.")
