"""Dynamic logit fusion: move a large model as far as a small one has moved by fine-tuning, step by step."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_logits.auxiliary import BASE, Context
from hf_logits.checks import check_number, check_per_row
from hf_logits.logits import keep, kl_divergence, row_column
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor, Model


def fusion_targets(
    small: Float[Tensor, "R V"], experts: Float[Tensor, "T R V"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """How far the experts are from the small base: KL(Q_t || Q) and KL(Q || Q_t), averaged over the experts.

    The squared distances to all experts' targets sum up to the one to their mean, plus a constant.
    """
    small = small.expand_as(experts)
    return kl_divergence(experts, small).mean(0), kl_divergence(small, experts).mean(0)


def fusion_shift(
    big: Float[Tensor, "R V"], direction: Float[Tensor, "R V"], weight: float | Float[Tensor, " R"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """KL(P_a || P) and KL(P || P_a) of `P_a = softmax(big + a * direction)`, for a weight a row.

    Both follow from two numbers, the log-normaliser A(a) and the mean E_a of the direction under P_a, and grow with a >= 0.
    """
    weight = torch.as_tensor(weight, dtype=big.dtype, device=big.device)
    moved = big + weight[..., None] * direction
    normaliser = moved.logsumexp(-1) - big.logsumexp(-1)
    # f(a) = a E_a - (A(a) - A(0)); g(a) = A(a) - A(0) - a E_0
    forward = weight * (moved.softmax(-1) * direction).sum(-1) - normaliser
    backward = normaliser - weight * (big.softmax(-1) * direction).sum(-1)
    return forward, backward


def fusion_loss(
    big: Float[Tensor, "R V"],
    direction: Float[Tensor, "R V"],
    weight: float | Float[Tensor, " R"],
    targets: tuple[Float[Tensor, " R"], Float[Tensor, " R"]],
) -> Float[Tensor, " R"]:
    """The squared gaps between the large model's shift and the experts', both directions of KL together."""
    forward, backward = fusion_shift(big, direction, weight)
    return (forward - targets[0]).square() + (backward - targets[1]).square()


def exact_weight(
    big: Float[Tensor, "R V"],
    direction: Float[Tensor, "R V"],
    targets: tuple[Float[Tensor, " R"], Float[Tensor, " R"]],
    *,
    max_weight: float,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """The continuous optimum on `[0, max_weight]`, and its loss.

    Both distances grow with the weight, so it lies between the weights at which each meets its own target: found by
    bisection (a target out of reach counts as met at `max_weight`), then the bracket is searched with ever finer grids.
    """
    low = torch.zeros(2, *big.shape[:1], dtype=big.dtype, device=big.device)
    high = torch.full_like(low, max_weight)
    for _ in range(20):
        middle = (low + high) / 2
        short = torch.stack([fusion_shift(big, direction, middle[i])[i] < targets[i] for i in (0, 1)])
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    low, high = low.amin(0), high.amax(0)
    best, least = low, fusion_loss(big, direction, low, targets)
    for _ in range(8):
        for part in [i / 8 for i in range(9)]:
            weight = low + part * (high - low)
            loss = fusion_loss(big, direction, weight, targets)
            better = loss < least
            best, least = torch.where(better, weight, best), torch.where(better, loss, least)
        width = (high - low) / 8
        low, high = torch.maximum(low, best - width), torch.minimum(high, best + width)
    return best, least


def grid_weights(
    big: Float[Tensor, "R V"],
    directions: Float[Tensor, "T R V"],
    targets: tuple[Float[Tensor, " R"], Float[Tensor, " R"]],
    *,
    grid: Sequence[float],
    refinements: int = 0,
) -> tuple[Float[Tensor, "T R"], Float[Tensor, " R"]]:
    """The paper's solver, and its loss: for each row the best point of a grid, the earliest of equals.

    With T directions, of the grid's T-th power; then the point may be refined by so many halvings of the step around it.
    """
    best = directions[..., 0] * 0
    least = torch.full_like(best[0], torch.inf)

    def consider(weights: Float[Tensor, "T R"]) -> None:
        nonlocal best, least
        loss = fusion_loss(big, (weights[..., None] * directions).sum(0), 1.0, targets)
        better = loss < least
        best, least = torch.where(better, weights, best), torch.where(better, loss, least)

    for values in itertools.product(grid, repeat=len(directions)):
        consider(best.new_tensor(values)[:, None].expand_as(best))
    step = (grid[-1] - grid[0]) / max(len(grid) - 1, 1)
    for _ in range(refinements):
        step = step / 2
        for expert, sign in itertools.product(range(len(directions)), (step, -step)):
            weights = best.clone()
            weights[expert] += sign
            consider(weights.clamp(grid[0], grid[-1]))
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
        named = any(isinstance(expert, str) for expert in listed)
        terms: list[tuple[Model, Context]] = [(small_model, Context(adapter=BASE if named else None))]
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
            live = ~big.isneginf()
            small = keep(small, live).log_softmax(-1)
            experts = torch.stack([keep(expert, live).log_softmax(-1) for expert in tuned])
            directions = (experts - small).masked_fill(~live, 0.0)
            weights = self._weights(big, directions, fusion_targets(small, experts))
            chosen.append(weights)
            return big + (weights[..., None] * directions).sum(0)

        steered = self.mix(log_probs, formula, *self.auxiliary_log_probs(step, log_probs.shape[-1]))
        several = {f"weight_{i}": row for i, row in enumerate(chosen[0])} if len(chosen[0]) > 1 else {}
        self.record(step, weight=chosen[0].sum(0), **several)
        return steered

    def _weights(
        self,
        big: Float[Tensor, "R V"],
        directions: Float[Tensor, "T R V"],
        targets: tuple[Float[Tensor, " R"], Float[Tensor, " R"]],
    ) -> Float[Tensor, "T R"]:
        if self.weight is not None:
            value = row_column(self.weight, big.shape[0], big)
            return torch.ones_like(directions[..., 0]) * (value[:, 0] if isinstance(value, Tensor) else value)
        if self._combine == "joint":
            refinements = 12 if self.solver == "exact" else 0
            return grid_weights(big, directions, targets, grid=self._grid, refinements=refinements)[0]
        best = torch.zeros_like(directions[..., 0])
        least = torch.full_like(best[0], torch.inf)
        for expert, direction in enumerate(directions):
            if self.solver == "grid":
                (weight, *_), loss = grid_weights(big, direction[None], targets, grid=self._grid)
            else:
                weight, loss = exact_weight(big, direction, targets, max_weight=self.max_weight)
            alone = torch.zeros_like(best)
            alone[expert] = weight
            best, least = torch.where(loss < least, alone, best), torch.minimum(loss, least)
        return best
