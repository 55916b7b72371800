"""Dynamic logit fusion: move a large model as far as a small one has moved by fine-tuning, step by step."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.auxiliary import BASE, Context
from hf_logits.checks import check_number, check_per_row
from hf_logits.logits import difference, row_column
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor, Model
from hf_logits.tilting import condense, tilt, tilt_divergences


Vocab = Float[Tensor, "R V"]
Row = Float[Tensor, " R"]
Vocabs = Float[Tensor, "*T R V"]  # of one direction, or of several
Rows = Float[Tensor, "*T R"]


def fusion_targets(small: Vocab, experts: Float[Tensor, "T R V"]) -> tuple[Row, Row]:
    """How far the experts are from the small base: KL(Q_t || Q) and KL(Q || Q_t), averaged over the experts.

    The squared distances to all experts' targets sum up to the one to their mean, plus a constant.
    """
    forward, backward = fusion_shift(small, torch.stack([difference(expert, small) for expert in experts]), 1.0)
    return forward.mean(0), backward.mean(0)


def fusion_shift(big: Vocab, direction: Vocabs, weight: float | Rows) -> tuple[Rows, Rows]:
    """KL(P_a || P) and KL(P || P_a) of `P_a = softmax(big + a * direction)`, for a weight a row; both grow with a >= 0."""
    zero = torch.zeros_like(direction[..., 0])
    return tilt_divergences(zero + weight, tilt(big, direction, zero + weight), tilt(big, direction, zero))


def fusion_loss(big: Vocab, direction: Vocabs, weight: float | Rows, targets: tuple[Row, Row]) -> Rows:
    """The squared gaps between the large model's shift and the experts', both directions of KL together."""
    return _loss(fusion_shift(big, direction, weight), targets)


def exact_weight(big: Vocab, direction: Vocabs, targets: tuple[Row, Row], *, max_weight: float) -> tuple[Rows, Rows]:
    """The continuous optimum on `[0, max_weight]`, and its loss, of each direction by itself.

    There may be several minima: ever finer grids search all of an estimate of the loss, a Newton step on the loss itself ends it.
    """
    zero, width = torch.zeros_like(direction[..., 0]), max_weight
    start = tilt(big, direction, zero, moments=2)
    few = condense(big, direction, start, max_weight)
    low, steps = zero, torch.linspace(0, 1, 33, dtype=zero.dtype, device=zero.device).view(-1, *[1] * zero.dim())
    for _ in range(3):
        points = low + width * steps
        losses = _loss(tilt_divergences(points, tilt(*few, points), start), targets)
        weight, width = points.gather(0, losses.argmin(0, keepdim=True))[0], width / 16
        low = (weight - width / 2).clamp(0, max_weight - width)
    here = _, mean, square, cube = tilt(big, direction, weight, moments=3)
    shift = tilt_divergences(weight, here, start)
    forward, backward = shift[0] - targets[0], shift[1] - targets[1]
    # f' = a Var, g' = E_a - E_0, Var' is the third cumulant; without f'' and g'' (Gauss-Newton) where they bend the loss down
    variance, rise = square - mean.square(), mean - start[1]
    third = cube - 3 * mean * square + 2 * mean**3
    plain = (weight * variance).square() + rise.square()
    bent = plain + forward * (variance + weight * third) + backward * variance
    step = (forward * weight * variance + backward * rise) / torch.where(bent > plain / 8, bent, plain)
    refined = (weight - step.nan_to_num(0.0)).clamp(0, max_weight)
    there = tilt_divergences(refined, tilt(big, direction, refined), start)
    return _least((w, _loss(s, targets)) for w, s in ((zero, (zero, zero)), (weight, shift), (refined, there)))


def grid_weight(
    big: Vocab, direction: Vocabs, targets: tuple[Row, Row], *, grid: Sequence[float]
) -> tuple[Rows, Rows]:
    """The paper's solver: for each row the best point of a grid, the earliest of equals, and its loss, of each direction by itself.

    Estimates say which three points it can be, the loss itself decides.
    """
    zero = torch.zeros_like(direction[..., 0])
    start = tilt(big, direction, zero, moments=2)
    few = condense(big, direction, start, max(grid))
    points = torch.stack([zero + value for value in grid])
    losses = [_loss(tilt_divergences(part, tilt(*few, part), start), targets) for part in points.split(32)]
    likely = torch.cat(losses).sort(dim=0, stable=True).indices[:3].sort(0).values
    tried = points.gather(0, likely)
    return _least((w, _loss(tilt_divergences(w, tilt(big, direction, w), start), targets)) for w in tried)


def grid_weights(
    big: Vocab, directions: Vocabs, targets: tuple[Row, Row], *, grid: Sequence[float], refinements: int = 0
) -> tuple[Rows, Row]:
    """The best point of the grid's T-th power for T directions together, the earliest of equals, and its loss.

    The point may be refined by so many halvings of the step around it.
    """
    one = torch.ones_like(big[:, 0])
    normaliser, means = tilt(big, directions, torch.zeros_like(directions[..., 0]))

    def tried(weights: Rows) -> tuple[Rows, Row]:
        move = weights[0, :, None] * directions[0]
        for weight, direction in zip(weights[1:], directions[1:], strict=True):
            move.addcmul_(weight[:, None], direction)
        start = normaliser[0], (weights * means).sum(0)
        return weights, _loss(tilt_divergences(one, tilt(big, move, one), start), targets)

    points = itertools.product(grid, repeat=len(directions))
    best = _least(tried(torch.stack([value * one for value in point])) for point in points)
    step = (grid[-1] - grid[0]) / max(len(grid) - 1, 1)
    for _ in range(refinements):
        step /= 2
        for expert, sign in itertools.product(range(len(directions)), (step, -step)):
            weights = best[0].clone()
            weights[expert] += sign
            best = _least([best, tried(weights.clamp(grid[0], grid[-1]))])
    return best


def _loss(shift: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return (shift[0] - targets[0]).square() + (shift[1] - targets[1]).square()


def _least(tried: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of weights with their losses the best, row by row; of equals the first."""
    points = iter(tried)
    best, least = next(points)
    for weight, loss in points:
        best, least = torch.where(loss < least, weight, best), torch.where(loss < least, loss, least)
    return best, least


class DynamicFusionLogitsProcessor(AuxiliaryLogitsProcessor):
    """Dynamic Logit Fusion: fine-tune a large model at decoding time, with small experts.

    Fan et al. 2024, "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion"
    (https://huggingface.co/papers/2406.15480); no code was published. At each step and row the weight of the expert's change
    is set so that the large model moves as far as the small one did, in both directions of KL. With a fixed `weight` this is
    proxy-tuning (Liu et al. 2024, https://huggingface.co/papers/2401.08565). The exact solver is ours: the paper's grid often
    ends on its bound, and the optimum need not be unique.

    Args:
        small_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the experts' base before fine-tuning.
        experts (model, `str`, or a list of them): fine-tuned small models, or names of adapters of `small_model`; adapters and
            base are then read in one forward.
        small_adapter (`str`, *optional*):
            The adapter of `small_model` that named experts were trained from, where it is not the bare base.
        solver (`str`, *optional*, defaults to `"grid"`): `"grid"` (the paper's) or `"exact"`.
        combine (`str`, *optional*, defaults to `"single"`): of several experts, use the best one alone at each step (`"single"`,
            the paper's) or all together (`"joint"`, up to three; the cost grows as the grid to that power).
        weight (`float` or `[B]` tensor, *optional*): a fixed weight for all experts instead of a solver.
        max_weight (`float`, *optional*, defaults to `2.0`): the largest weight.
        step (`float`, *optional*, defaults to `0.1`): of the grid.
        tokenizer, auxiliary_tokenizer, pad_token_id, encoder_inputs:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`].

    The trace has `weight`, and with several experts `weight_0`, `weight_1`, ...
    """

    def __init__(
        self,
        small_model: Model,
        experts: Model | str | Sequence[Model | str],
        *,
        small_adapter: str | None = None,
        solver: Literal["grid", "exact"] = "grid",
        combine: Literal["single", "joint"] = "single",
        weight: float | Tensor | None = None,
        max_weight: float = 2.0,
        step: float = 0.1,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        encoder_inputs: dict[str, Tensor] | None = None,
    ):
        listed = list(experts) if isinstance(experts, Sequence) and not isinstance(experts, str) else [experts]
        if not listed:
            raise ValueError("experts is empty: give at least one fine-tuned small model, or the name of an adapter.")
        if solver not in ("grid", "exact") or combine not in ("single", "joint"):
            raise ValueError(f"solver is 'grid' or 'exact', combine 'single' or 'joint'; got {solver!r}, {combine!r}.")
        if combine == "joint" and len(listed) > 3:
            raise ValueError(f"combine='joint' searches a grid to the power of {len(listed)}: use 'single' above 3.")
        check_number("max_weight", max_weight, minimum=0.0, above=True)
        check_number("step", step, minimum=0.0, maximum=max_weight, above=True)
        check_number("max_weight / step", max_weight / step, maximum=10_000.0)
        self.small_model, self.experts, self.solver, self._combine = small_model, experts, solver, combine
        self.weight = None if weight is None else check_per_row("weight", weight, minimum=0.0)
        self.max_weight, self.step = max_weight, step
        self._grid = [i * step for i in range(round(max_weight / step) + 1) if i * step <= max_weight + 1e-9]
        self.small_adapter = small_adapter
        named = any(isinstance(expert, str) for expert in listed)
        before = small_adapter if small_adapter is not None else BASE if named else None
        terms: list[tuple[Model, Context]] = [(small_model, Context(adapter=before))]
        for expert in listed:
            terms.append((small_model, Context(adapter=expert)) if isinstance(expert, str) else (expert, Context()))
        plain = not isinstance(self.weight, Tensor) and self.weight == 0
        super().__init__(
            [] if plain else terms,
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
            encoder_inputs=encoder_inputs,
        )

    def steer(self, step: Step, log_probs: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        if not self.engines:
            return log_probs
        chosen: list[Tensor] = []

        def formula(big: Float[Tensor, "R V"], small: Float[Tensor, "R V"], *tuned: Float[Tensor, "R V"]) -> Tensor:
            # Banned tokens are no part of any of the distributions.
            banned = big.isneginf()
            small, *experts = (values.masked_fill(banned, -torch.inf).log_softmax(-1) for values in (small, *tuned))
            directions = torch.stack(experts).sub_(small).masked_fill_(banned, 0.0)
            weights = self._weights(big, small, directions)
            chosen.append(weights)
            for weight, direction in zip(weights, directions, strict=True):
                big = torch.addcmul(big, weight[:, None], direction)
            return big

        steered = self.mix(log_probs, formula, *self.auxiliary_log_probs(step, log_probs.shape[-1]))
        several = {f"weight_{i}": row for i, row in enumerate(chosen[0])} if len(chosen[0]) > 1 else {}
        self.record(step, weight=chosen[0].sum(0), **several)
        return steered

    def _weights(self, big: Vocab, small: Vocab, directions: Vocabs) -> Rows:
        if self.weight is not None:
            value = row_column(self.weight, big.shape[0], big)
            return torch.ones_like(directions[..., 0]) * (value[:, 0] if isinstance(value, Tensor) else value)
        # The targets are the small model's own shift at weight 1.
        forward, backward = fusion_shift(small, directions, 1.0)
        targets = forward.mean(0), backward.mean(0)
        if self._combine == "joint" and len(directions) > 1:
            refinements = 12 if self.solver == "exact" else 0
            return grid_weights(big, directions, targets, grid=self._grid, refinements=refinements)[0]
        if self.solver == "grid":
            weights, losses = grid_weight(big, directions, targets, grid=self._grid)
        else:
            weights, losses = exact_weight(big, directions, targets, max_weight=self.max_weight)
        best = losses.argmin(0, keepdim=True)
        return torch.zeros_like(weights).scatter(0, best, weights.gather(0, best))
