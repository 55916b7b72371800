"""The prompt that an auxiliary context reads in place of the main one, and the tokenizers that must agree for it.

Whatever the caller gives becomes one function `rewrite(prompt, row, rows) -> ids` of an unpadded prompt: everything that
follows can then forget where the ids came from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

Rewrite = Callable[[list[int], int, int], list[int]]
"""`(unpadded main prompt, row, number of rows) -> ids of the context's prompt`."""


def tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase | None, *, what: str, special_tokens: bool = True
) -> list[int]:
    """Ids of `text`; the error for a missing tokenizer names the argument `what`."""
    if tokenizer is None:
        raise ValueError(f"{what} was given as text ({text[:40]!r}): pass tokenizer= too, or pass token ids.")
    return tokenizer(text, add_special_tokens=special_tokens)["input_ids"]


def single_token(value: int | str, tokenizer: PreTrainedTokenizerBase | None, *, what: str) -> int:
    """The id of a token given as id or as text; text that is not exactly one token is refused."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{what} must be a token id or a token's text, got {value!r}.")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{what} must be a token id >= 0, got {value}.")
        return value
    ids = tokenize(value, tokenizer, what=what, special_tokens=False)
    if len(ids) == 1:
        check_known(value, ids, tokenizer, what=what)
    if len(ids) != 1:
        raise ValueError(
            f"{what}={value!r} is {len(ids)} tokens ({ids}), not one: add it with tokenizer.add_tokens([...]) before training, or "
            "pass the id of the token that is meant."
        )
    return ids[0]


def control_code(code: int | str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id of a control code given as id, or the first one of its text; a text of several is worth a warning."""
    if isinstance(code, int) and not isinstance(code, bool) and code >= 0:
        return code
    if not isinstance(code, str):
        raise TypeError(f"A control code must be a token id or a text, got {code!r}.")
    ids = tokenize(code, tokenizer, what="A control code", special_tokens=False)
    if not ids:
        raise ValueError(f"The control code {code!r} has no tokens.")
    check_known(code, ids, tokenizer, what="A control code")
    if len(ids) > 1:
        logger.warning_once(f"The control code {code!r} is {len(ids)} tokens; GeDi uses the first, {ids[0]}.")
    return ids[0]


def check_known(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase | None, *, what: str) -> None:
    """Refuse text for which the tokenizer has only its unknown token."""
    unknown = tokenizer.unk_token_id if tokenizer is not None else None
    if unknown is not None and unknown in ids and tokenizer is not None and text != tokenizer.unk_token:
        raise ValueError(
            f"{what}={text!r} is unknown to the tokenizer: add it with tokenizer.add_tokens([...]), or pass an id."
        )


def as_rewrite(
    prompt: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, what: str = "prompt"
) -> Rewrite | None:
    """Turn any form of prompt into a [`Rewrite`]; `None` (the main prompt itself) stays `None`.

    Args:
        prompt: one of
            - `str`, a 1-D tensor or a list of ids: the same prompt for every row;
            - a list of these, a 2-D tensor, or a mapping with `input_ids` (and `attention_mask`) as tokenizers return it: one
              prompt for each item of the batch, in order;
            - any other mapping, from main prompt (text, or tuple of ids) to prompt: for pipelines, whose batches the caller
              does not see;
            - a callable from the main prompt's ids (1-D tensor, unpadded) to ids.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): needed where text is given.
        what (`str`): the argument's name, for error messages.
    """
    if prompt is None:
        return None
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        return _by_item(_unpad(prompt["input_ids"], prompt.get("attention_mask")), what)
    if isinstance(prompt, Mapping):
        return _by_content(prompt, tokenizer, what)
    if callable(prompt):
        return lambda main, row, rows: _ids(prompt(torch.tensor(main, dtype=torch.long)), tokenizer, what)
    if isinstance(prompt, Tensor) and prompt.dim() == 2:
        return _by_item(prompt.tolist(), what)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and not all(isinstance(i, int) for i in prompt):
        return _by_item([_ids(item, tokenizer, what) for item in prompt], what)
    shared = _ids(prompt, tokenizer, what)
    return lambda main, row, rows: shared


def _ids(value: Any, tokenizer: PreTrainedTokenizerBase | None, what: str) -> list[int]:
    if isinstance(value, str):
        return tokenize(value, tokenizer, what=what)
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = list(value) if isinstance(value, Sequence) else None
    if ids is None or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise TypeError(f"{what} must be text or a flat list of token ids, got {value!r}.")
    if not ids:
        raise ValueError(f"{what} is empty: give at least one token (a BOS token, say).")
    return ids


def _unpad(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    rows = torch.as_tensor(input_ids) if not isinstance(input_ids, list) else input_ids
    rows = rows.tolist() if isinstance(rows, Tensor) else rows
    rows = [rows] if rows and isinstance(rows[0], int) else rows
    if attention_mask is None:
        return rows
    masks = attention_mask.tolist() if isinstance(attention_mask, Tensor) else attention_mask
    masks = [masks] if isinstance(masks[0], int) else masks
    return [[i for i, kept in zip(row, mask, strict=True) if kept] for row, mask in zip(rows, masks, strict=True)]


def _by_item(items: list[list[int]], what: str) -> Rewrite:
    if not items or not all(items):
        raise ValueError(
            f"{what} holds no prompt or an empty one: give at least one token for each item of the batch."
        )

    def rewrite(main: list[int], row: int, rows: int) -> list[int]:
        if rows % len(items):
            raise ValueError(
                f"{what} holds {len(items)} prompts, but generation runs {rows} rows: give one prompt for all, one for each item of "
                "the batch, or a mapping from main prompt to prompt (pipelines split their inputs into batches)."
            )
        return items[row // (rows // len(items))]

    return rewrite


def _by_content(prompts: Mapping[Any, Any], tokenizer: PreTrainedTokenizerBase | None, what: str) -> Rewrite:
    table = {tuple(_ids(k, tokenizer, what)): _ids(v, tokenizer, what) for k, v in prompts.items()}

    def rewrite(main: list[int], row: int, rows: int) -> list[int]:
        if tuple(main) not in table:
            raise ValueError(
                f"{what} has no entry for the prompt with ids {main[:8]}{'...' if len(main) > 8 else ''} (of {len(table)} entries): its "
                "keys must tokenize exactly as the prompts do, chat template and special tokens included."
            )
        return table[tuple(main)]

    return rewrite


def last_token(prompt: Tensor) -> Tensor:
    """The prompt that is the main one's last token: an unconditional branch, for want of a better beginning."""
    return prompt[-1:]


def as_data(prompt: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, what: str = "prompt") -> Any:
    """The same prompt without text: ids, lists of ids, or a mapping from ids to ids. Functions stay what they are."""
    if prompt is None or callable(prompt) or (isinstance(prompt, Mapping) and "input_ids" in prompt):
        return dict(prompt) if isinstance(prompt, Mapping) else prompt
    if isinstance(prompt, Mapping):
        return {tuple(_ids(k, tokenizer, what)): _ids(v, tokenizer, what) for k, v in prompt.items()}
    if isinstance(prompt, Tensor):
        return prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and not all(isinstance(i, int) for i in prompt):
        return [_ids(item, tokenizer, what) for item in prompt]
    return _ids(prompt, tokenizer, what)


def check_same_tokenizer(main: PreTrainedTokenizerBase, auxiliary: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` that names the first differing token unless both tokenizers map the same tokens to the same ids.

    Ids that only one of the two knows are allowed behind the last id of the other (added tokens, padded vocabularies).
    """
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (main, auxiliary))
    for i in range(min(max(ours), max(theirs)) + 1):
        if ours.get(i) != theirs.get(i):
            raise ValueError(
                f"The tokenizers disagree: id {i} is {ours.get(i)!r} for the main model and {theirs.get(i)!r} for the auxiliary one. "
                "Logits can only be mixed over one vocabulary: use an auxiliary model of the same family."
            )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch up: that of the pad token, or of the end."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError("The tokenizer has neither a pad nor an eos token; set tokenizer.pad_token.")
    return token


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as `[B, L]` ids, filled up in front, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
