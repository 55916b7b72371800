"""Losses on a language model's logits that never exist all at once: its head runs on a few tokens at a time.

The gradient of a chunk is formed together with its loss, so nothing of a chunk outlives it. The head is whatever the model
does behind its backbone: adapters, quantised weights, biases, scales, caps and transforms are in it.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from hf_logits.class_logits import widen
from hf_logits.hidden import backbone
from hf_logits.tasks import bare


Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""`(student's logits, teacher's logits, labels, *what is stored) -> (sum over the rows, sums to log)`."""


class Head:
    """A language model from the last hidden states on, as a function of any of its rows.

    The model's own forward runs, with the rows in place of what its backbone would give.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): with a backbone, and logits that depend on the last
            hidden state of their own position alone.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self._whole: Any = bare(model)
        self._body: Any = backbone(model)
        self._output: Any = BaseModelOutput
        accepted = inspect.signature(type(self._whole).forward).parameters
        self._without_cache = {"use_cache": False} if "use_cache" in accepted else {}
        self._reads_encoder = self._whole.config.is_encoder_decoder and self._body is not self._whole.base_model

    @contextlib.contextmanager
    def spared(self) -> Iterator[list[Float[Tensor, "B L D"]]]:
        """Collect the hidden states of the forward in the block, whose head sees no more than the first position."""
        seen: list[Tensor] = []

        def keep(body: Any, args: Any, output: Any) -> Any:
            named: Any = isinstance(output, ModelOutput) and "last_hidden_state" in output
            if not named:
                raise ValueError(
                    f"{type(body).__name__} does not return its last_hidden_state by name: set fused_head=False."
                )
            seen.append(output.last_hidden_state)
            self._output = type(output)
            return replace(output, last_hidden_state=output.last_hidden_state[:, :1])

        handle = self._body.register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from the forward in the block what its backbone returns, and change nothing."""
        handle = self._body.register_forward_hook(lambda body, args, output: setattr(self, "_output", type(output)))
        try:
            yield
        finally:
            handle.remove()

    def has_adapter(self) -> bool:
        """Whether PEFT has a layer of its own behind the backbone."""
        behind = set(self._whole.modules()) - set(self._body.modules())
        if self._reads_encoder:
            behind -= set(self._whole.get_encoder().modules())
        return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in behind)

    @torch.no_grad()
    def fails(self, model: Any, inputs: dict[str, Any]) -> str | None:
        """Why it does not give a model's logits from hidden states alone, tried out on these inputs. `None`: it does."""
        try:
            # The mode stays: 4-bit layers that are read in evaluation mode on a CPU lose their gradient for good.
            with torch.random.fork_rng(), self.spared() as seen:
                whole = model(**inputs).logits[:, 0].float()
            if not seen:
                return f"{type(self._whole).__name__} does not call its {type(self._body).__name__} as a whole"
            difference = whole - self(seen[0][:, 0]).float()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"the head of {type(self._whole).__name__} does not run by itself ({error})"
        if bool(difference.abs().max() <= 0.02 * whole.abs().max()):
            return None
        return f"the head of {type(self._whole).__name__} needs more than the hidden state of a token"

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        given: dict[str, Any] = {}
        if self._reads_encoder:
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden[None])
        output = self._output(last_hidden_state=hidden[None])
        with _replaced_forward(self._body, lambda *args, **kwargs: output):
            logits: Tensor = self._whole.forward(**given, **self._without_cache).logits
        return logits[0]


@contextlib.contextmanager
def _replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def inside(wrapper: Any, module: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as if it were the forward of `module`, through whatever is wrapped around that.

    So the wrapper (DDP, FSDP) sees the loss as the output of its forward, and has gathered what it shards.
    """

    def redirected(*given: Any) -> Any:
        with _replaced_forward(module, original) if own else _class_forward(module):
            return function(*given)

    own = "forward" in module.__dict__
    original = module.forward
    with _replaced_forward(module, redirected):
        return wrapper(*args)


@contextlib.contextmanager
def _class_forward(module: Any) -> Iterator[None]:
    now = module.__dict__.pop("forward")
    try:
        yield
    finally:
        module.forward = now


def fused_loss(
    hidden: Float[Tensor, "N ... D"],
    head: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " N"],
    loss: Loss,
    *,
    chunk_size: int,
    teacher_hidden: Float[Tensor, "N E"] | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    stored: Sequence[Shaped[Tensor, "N ..."]] = (),
    between: tuple[Int[Tensor, " M"], Loss] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """A loss that is summed over rows, of logits that exist for `chunk_size` rows at a time.

    It can be differentiated once, with respect to `hidden` and all leaves behind it that want a gradient.

    Args:
        hidden, teacher_hidden: one row for each label.
        head, teacher_head: from some of these rows to their logits.
        loss: see [`Loss`]. Rows must not depend on each other.
        stored: what else belongs to each row, handed to the loss.
        between: a few rows, and one more loss that gets all of them at once because it compares them.
    """
    trained = torch.is_grad_enabled()
    total, sums = torch.zeros((), device=hidden.device), dict[str, Tensor]()
    leaves: list[Tensor] | None = None
    gradients: list[Tensor | None] = []
    of_hidden = torch.zeros_like(hidden) if trained and hidden.requires_grad else None
    starts = range(0, max(1, len(labels)), chunk_size)
    parts: list[tuple[Any, Loss]] = [(slice(start, start + chunk_size), loss) for start in starts]
    for part, of_part in parts if between is None else [*parts, between]:
        taught = None
        if teacher_head is not None and teacher_hidden is not None and len(labels):
            with torch.no_grad():
                taught = widen(teacher_head(teacher_hidden[part]))
        rows = hidden[part].detach().requires_grad_(of_hidden is not None)
        value, found = of_part(widen(head(rows)), taught, labels[part], *(one[part] for one in stored))
        del taught
        if trained and value.requires_grad:
            if leaves is None:
                leaves = [leaf for leaf in _leaves(value) if leaf is not rows]
                gradients = [None] * len(leaves)
            wanted = [*([rows] if of_hidden is not None else []), *leaves]
            fresh = list(torch.autograd.grad(value, wanted, allow_unused=True))
            if of_hidden is not None and (first := fresh.pop(0)) is not None:
                of_hidden[part] += first
            gradients = [_add(before, new) for before, new in zip(gradients, fresh, strict=True)]
            del fresh
        total = total + value.detach()
        sums |= {name: sums[name] + one if name in sums else one for name, one in found.items()}
    if not trained:
        return total, sums
    leaves = leaves or []
    if of_hidden is not None:
        leaves, gradients = [hidden, *leaves], [of_hidden, *gradients]
    return _Formed.apply(total, gradients, *leaves), sums


def fused_log_probs(
    hidden: Float[Tensor, "N D"], head: Callable[[Tensor], Tensor], labels: Int[Tensor, " N"], *, chunk_size: int
) -> Float[Tensor, " N"]:
    """Log-probs of the labels, of logits that exist for `chunk_size` rows at a time.

    For losses that see several rows at once, so that no gradient is known yet: the backward pass forms the logits again.
    """

    def chunk(rows: Tensor, wanted: Tensor) -> Tensor:
        return -cross_entropy(widen(head(rows)), wanted, reduction="none")

    parts = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def _add(before: Tensor | None, new: Tensor | None) -> Tensor | None:
    if new is None:
        return before
    if before is None:  # a copy: autograd may give two leaves one tensor, or a tensor that repeats one number
        return new.to(torch.promote_types(new.dtype, torch.float32), copy=True)
    return before.add_(new)


def _leaves(value: Tensor) -> list[Tensor]:
    """What a graph ends in."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


class _Formed(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [one.dtype for one in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of a fused loss was taken a second time: it is formed once and then gone."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if one is None else one.mul_(outer).to(dtype)
            for one, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled
