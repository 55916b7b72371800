"""What a processor may remember: only what is keyed by a row's token prefix.

`generate` shows a processor nothing but token ids. Rows are permuted and duplicated by beam search, taken back by assisted
decoding, and the same object serves call after call. So nothing here counts calls; everything is found again by comparing
tokens.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def match_prefixes(new: Int[Tensor, "R L"], old: Int[Tensor, "S M"]) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
    """For every new row the old row that shares the longest prefix.

    Returns:
        `tuple[Tensor, Tensor]`: the number of shared leading ids and the index of the old row, each of shape `[R]`. Of equally
        good rows the one at the same index wins, so that nothing is moved without need.
    """
    n = min(new.shape[1], old.shape[1])
    equal = new[:, None, :n] == old[None, :, :n]
    if bool(equal.all()):  # also n == 0
        lengths = torch.full(equal.shape[:2], n, device=new.device)
    else:
        lengths = equal.to(torch.uint8).cumprod(-1, dtype=torch.uint8).sum(-1, dtype=torch.long)
    best, parent = lengths.max(1)
    own = torch.arange(min(new.shape[0], old.shape[0]), device=new.device)
    parent[own] = torch.where(lengths[own, own] == best[own], own, parent[own])
    return best, parent


class Step(NamedTuple):
    """One call of a processor, put into its place in the generation.

    Attributes:
        input_ids (`Tensor` of shape `[R, L]`): prompt and generated tokens.
        prompt_length (`int`): the columns that were there before the first generated token, padding included.
        prompt_mask (`Tensor` of shape `[R, prompt_length]`): `False` on left padding.
        is_new (`bool`): whether this is the first position of a prompt.
        parents (`Tensor` of shape `[R]`, or `None`): the row of the previous call that each row continues; `None`: its own.
        continues (`Tensor`, or `None`): the very ids of an earlier call that these extend by one column, row for row. Whoever
            has read those need not compare again.
    """

    input_ids: Tensor
    prompt_length: int
    prompt_mask: Tensor
    is_new: bool
    parents: Tensor | None
    continues: Tensor | None = None

    @property
    def position(self) -> int:
        """How many tokens have been generated before this call."""
        return self.input_ids.shape[1] - self.prompt_length


class PromptTracker:
    """Tells prompt from continuation by looking at token ids alone.

    Within one generation the processors are called at every length, so a call continues what was seen if each of its rows is
    a known row plus at most one token; everything else is a new prompt. One case cannot be told apart by content: a new
    prompt that repeats an earlier output up to some point (or one token further) looks like a continuation of it. There,
    call `reset` between the generations.

    Args:
        pad_token_id (`int`, *optional*):
            Its leading run in a prompt row is left padding.
        begins_text (`bool`, *optional*, defaults to `False`):
            Whether the padding token also begins texts (GPT-2). Then, if every row begins with it, one of them is text.
    """

    def __init__(self, pad_token_id: int | None = None, *, begins_text: bool = False):
        self.pad_token_id = pad_token_id
        self.begins_text = begins_text
        self._bound: tuple[Tensor, Tensor | None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens: the next call is a new prompt."""
        self._last: Step | None = None
        self._known: Tensor | None = None  # the ids of that step, safe from whoever writes into the caller's tensor
        self._announced: Step | None = None

    def announce(self, step: Step) -> None:
        """Say where the next call stands: a decode loop knows what a tracker would have to find out by comparing tokens."""
        if (
            step.is_new
            and self._bound is not None
            and not torch.equal(self._prompt_mask(step.input_ids), step.prompt_mask)
        ):
            raise ValueError(
                "bind() was given another attention_mask than generate(): bind the one of this generation, or bind(attention_mask=None)."
            )
        self._announced = step

    def bind(self, attention_mask: Tensor | None, input_ids: Tensor | None = None) -> None:
        """Give the attention mask of the coming prompts, of shape `[B, P]`, instead of having it inferred."""
        if attention_mask is None:
            self._bound = None
            return
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape [batch, length], got {tuple(attention_mask.shape)}.")
        if input_ids is not None and input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} differ in shape."
            )
        if bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask has a 0 after a 1: only left padding can be continued. Set tokenizer.padding_side='left'."
            )
        self._bound = (attention_mask.bool(), input_ids)
        self.reset()

    def observe(self, input_ids: Int[Tensor, "R L"]) -> Step:
        """Place the call that sees `input_ids`."""
        last, length = self._last, input_ids.shape[1]
        step, self._announced = self._announced, None
        if step is not None and step.input_ids is not input_ids:
            step = None
        announced = step is not None
        known = self._known
        if step is None and last is not None and known is not None and length > last.prompt_length:
            if input_ids.shape == (known.shape[0], known.shape[1] + 1) and torch.equal(input_ids[:, :-1], known):
                step = Step(input_ids, last.prompt_length, last.prompt_mask, False, None, last.input_ids)
            else:
                shared, parents = match_prefixes(input_ids, known)
                if int(shared.min()) >= length - 1:
                    step = Step(input_ids, last.prompt_length, last.prompt_mask[parents], False, parents)
        if step is None:
            step = Step(input_ids, length, self._prompt_mask(input_ids), True, None)
        self._last, self._known = step, input_ids if announced else input_ids.clone()
        return step

    def _prompt_mask(self, prompts: Int[Tensor, "R P"]) -> Bool[Tensor, "R P"]:
        rows, length = prompts.shape
        if self._bound is not None:
            mask, ids = self._bound
            if mask.shape[1] != length or rows % mask.shape[0]:
                raise ValueError(
                    f"bind() was given an attention_mask of shape {tuple(mask.shape)}, but the prompt has shape {(rows, length)}: "
                    "call bind() again with the inputs of this generation, or bind(attention_mask=None) to have padding inferred."
                )
            repeats = rows // mask.shape[0]
            if ids is not None and not torch.equal(ids.to(prompts.device).repeat_interleave(repeats, 0), prompts):
                raise ValueError(
                    "bind() was given other input_ids than this prompt: call bind() again with its inputs."
                )
            return mask.to(prompts.device).repeat_interleave(repeats, 0)
        if self.pad_token_id is None or length == 0:
            return torch.ones_like(prompts, dtype=torch.bool)
        pads = (prompts == self.pad_token_id).long().cumprod(-1)
        pads[:, -1] = 0  # a row has at least one token
        run = pads.sum(-1, keepdim=True)
        if self.begins_text:
            run = run - run.min().clamp(max=1)
        return torch.arange(length, device=prompts.device) >= run


class PrefixHistory:
    """One value a row and generated position, kept right under beams and rollback.

    `values` has shape `[R, T]`: column `t` belongs to the call that chose the `t`-th generated token. `append` belongs to every
    call, because rows are found by where they were at the call before.
    """

    def __init__(self) -> None:
        self.values: Float[Tensor, "R T"] | None = None

    def before(self, step: Step) -> Float[Tensor, "R t"]:
        """The values at the positions before this call's, rows in this call's order."""
        if step.is_new or self.values is None:
            # Positions that were never shown (a processor that joined late) have no value.
            return torch.full((step.input_ids.shape[0], step.position), math.nan, device=step.input_ids.device)
        values = self.values if step.parents is None else self.values[step.parents.to(self.values.device)]
        return values[:, : step.position]

    def append(self, step: Step, value: Float[Tensor, " R"]) -> None:
        """Set the value of this call's position and drop what came after it."""
        before = self.before(step).to(value.device)
        self.values = torch.cat([before.to(value.dtype), value[:, None]], dim=1)
