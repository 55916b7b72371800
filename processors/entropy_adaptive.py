"""Entropy-adaptive decoding: a large model takes over where the small one is uncertain."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_logits.auxiliary import AuxiliaryLM, Context, EngineStats
from hf_logits.checks import check_choice, check_count, check_per_row
from hf_logits.costs import relative_cost
from hf_logits.logits import entropy, row_column
from hf_logits.prefix import Step
from hf_logits.processing import AuxiliaryLogitsProcessor, Model


logger = logging.get_logger(__name__)


def switch(
    large: Bool[Tensor, " R"],
    stay: Float[Tensor, " R"],
    mean_entropy: Float[Tensor, " R"],
    *,
    threshold: float | Tensor,
    min_stay: int,
) -> tuple[Bool[Tensor, " R"], Float[Tensor, " R"]]:
    """One decision: the large model above the threshold, the small one at or below, neither before `min_stay` tokens.

    Args:
        large: whether the large model is at work.
        stay: c, the tokens that it or the small one has generated since the last switch.
        mean_entropy: in bits, over the window.

    Returns:
        The model to work from here on, and `stay`, 0 where it has changed.
    """
    changed = ((mean_entropy > threshold) != large) & (stay >= min_stay)
    return large ^ changed, stay.masked_fill(changed, 0.0)


@dataclass
class SwitchingCost:
    """Three meters, because they differ: what the paper counts, what is sequential, what is computed.

    Attributes:
        share (`float`): of the tokens, those that the large model chose (f).
        relative_cost (`float`): the paper's, if only the active model ran for each token.
        relative_cost_here (`float`): as it was run. Beside `generate` the small model reads every token; in
            [`hf_logits.generate`] a model reads when it is at work, and both read the token at which they change.
        large_forwards (`int`): sequential forwards of the large model.
        flops (`float`): 2 a parameter and token read, prompts and the large model's catch-up included.
        relative_flops (`float`): against the large model alone on the same rows.
    """

    share: float
    relative_cost: float
    relative_cost_here: float
    large_forwards: int
    flops: float
    relative_flops: float


class EntropyAdaptiveLogitsProcessor(AuxiliaryLogitsProcessor):
    """Entropy-adaptive decoding for a small model: use the large one while the entropy is high.

    Simonds 2025, "Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference"
    (https://huggingface.co/papers/2502.06833). There is no published code, and this was built from summaries that quote the
    formulas: the paper's threshold and minimum stay are not known to us, nor whether a switch acts on the same token
    (`timing`), nor whose entropy counts (`entropy_of`). The large model is read only when some row needs it, and then
    catches up in one forward. The small model always runs, as it is the one that generates.

    Penalties and bans act on the small model's scores; the large model's are taken raw, and banned tokens stay banned. Under
    beam search scores of both models meet in one sum, which is allowed but has no clear meaning. Under assisted decoding the
    draft is switched too, which costs forwards and changes no token.

    With `custom_generate=hf_logits.generate` only the model at work runs. It catches up in one forward; a batch reads the large
    model for all rows as soon as one needs it. There the entropy is that of the raw logits, penalties and bans are
    applied to whichever model chose, ids that the large model does not have cannot be chosen by it, and the trace has no `kl`.

    Args:
        large_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): shares the small model's tokenizer.
        threshold (`float` or `[B]` tensor, *optional*, defaults to `1.0`): tau, in bits. Infinite: the small model alone.
        window (`int`, *optional*, defaults to `5`): w, the entropies that are averaged; fewer at the beginning.
        min_stay (`int`, *optional*, defaults to `5`): d_min, tokens before a model may be left.
        timing (`str`, *optional*, defaults to `"now"`): `"now"`: a switch acts on the token whose entropy caused it; `"next"`: on
            the one after.
        entropy_of (`str`, *optional*, defaults to `"current"`): the model at work, or always the `"small"` one.
        start (`str`, *optional*, defaults to `"small"`): the model to begin with, or `"large"`.
        eos_token_id (`int` or list, *optional*): ends rows, which then never ask for the large model. Defaults to its own.
        tokenizer, auxiliary_tokenizer, pad_token_id, encoder_inputs:
            See [`~hf_logits.processing.AuxiliaryLogitsProcessor`].

    The trace has `entropy` (bits, of the model at work), `large` (1 where it chose, NaN behind the end of a row), `next_large` and `stay`.
    """

    picks_model = True

    def __init__(
        self,
        large_model: Model,
        *,
        threshold: float | Tensor = 1.0,
        window: int = 5,
        min_stay: int = 5,
        timing: Literal["now", "next"] = "now",
        entropy_of: Literal["current", "small"] = "current",
        start: Literal["small", "large"] = "small",
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        auxiliary_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        encoder_inputs: dict[str, Tensor] | None = None,
    ):
        self.large_model, self.eos_token_id = large_model, eos_token_id
        self.threshold = check_per_row("threshold", threshold, infinite=True)
        check_count("window", window, minimum=1)
        check_count("min_stay", min_stay, minimum=0)
        check_choice("timing", timing, "now", "next")
        check_choice("entropy_of", entropy_of, "current", "small")
        check_choice("start", start, "small", "large")
        self.window, self.min_stay = window, min_stay
        self.timing, self.entropy_of, self.start = timing, entropy_of, start
        eos = eos_token_id if eos_token_id is not None else large_model.generation_config.eos_token_id
        self._eos = torch.tensor([eos] if isinstance(eos, int) else list(eos or []), dtype=torch.long)
        self._main: EngineStats | None = None
        super().__init__(
            [(large_model, Context())],
            tokenizer=tokenizer,
            auxiliary_tokenizer=auxiliary_tokenizer,
            pad_token_id=pad_token_id,
            encoder_inputs=encoder_inputs,
        )

    def steer(self, step: Step, log_probs: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        def large() -> Float[Tensor, "R V"]:
            # With the bans of the small model's scores.
            return self.mix(log_probs, lambda main, large: large, *self.auxiliary_log_probs(step, log_probs.shape[-1]))

        self._main = None
        return self._decide(step, lambda: log_probs, large)

    def pick(self, step: Step, main: AuxiliaryLM) -> Float[Tensor, "R V"]:
        device, engine = step.input_ids.device, self.engines[0]

        def large() -> Float[Tensor, "R V"]:
            logits = engine.read(step, check_ids=main.vocab_size > engine.vocab_size)[0].to(device)
            engine.check_numbers(logits.logsumexp(-1, keepdim=True)[None], at_once=step.is_new)
            missing = max(main.vocab_size - engine.vocab_size, 0)
            return nn.functional.pad(logits[:, : main.vocab_size], (0, missing), value=-math.inf)

        self._main, self._calls = main.stats, self._calls + 1
        # What an earlier generation noted: here nobody knows what the other model would have said.
        self._histories.pop("kl", None)
        return self._decide(step, lambda: main.read(step, check_ids=False)[0].to(device), large)

    def _decide(
        self,
        step: Step,
        small: Callable[[], Float[Tensor, "R V"]],
        large: Callable[[], Float[Tensor, "R V"]],
    ) -> Float[Tensor, "R V"]:
        """Scores of the model that chooses this token, row by row. A model that no row needs is not read."""
        rows, device = step.input_ids.shape[0], step.input_ids.device
        if step.is_new:
            self._begun = replace(self.engines[0].stats), int(step.prompt_mask.sum())
        if step.parents is not None and rows > 1:
            logger.warning_once("Entropy-adaptive decoding under beam search adds up scores of two models.")
        at_work = self._before(step, "next_large", float(self.start == "large"))[:, -1].to(device) > 0
        stay = self._before(step, "stay", 0.0)[:, -1].to(device)
        finished = self._finished(step)
        answers: dict[bool, Tensor] = {}

        def read(wanted: Bool[Tensor, " R"]) -> None:
            """Read the models that some unfinished row wants."""
            of_large, of_small = torch.stack([(wanted & ~finished).any(), (~wanted & ~finished).any()]).tolist()
            if of_large and True not in answers:
                answers[True] = large()
            if (of_small or not answers) and False not in answers:
                answers[False] = small()

        read(at_work if self.entropy_of == "current" else torch.zeros_like(at_work))
        bits = {which: entropy(values.float().log_softmax(-1)) for which, values in answers.items()}
        measured = torch.where(at_work, bits[True], bits[False]) if len(bits) == 2 else next(iter(bits.values()))
        before = self._before(step, "entropy", None).to(measured)
        mean = torch.cat([before, measured[:, None]], dim=1)[:, -self.window :].mean(-1)

        threshold = row_column(self.threshold, rows, mean)
        threshold = threshold[:, 0] if isinstance(threshold, Tensor) else threshold  # one value a row, not a column
        if self.timing == "now":
            chooses, stay = switch(at_work, stay, mean, threshold=threshold, min_stay=self.min_stay)
            after, stay = chooses, stay + 1
        else:
            chooses = at_work
            after, stay = switch(at_work, stay + 1, mean, threshold=threshold, min_stay=self.min_stay)
        chooses, after = chooses & ~finished, torch.where(finished, at_work, after)
        self.record(
            step,
            entropy=measured,
            large=chooses.float().masked_fill(finished, math.nan),
            stay=stay,
            next_large=after.float(),
        )
        read(chooses)
        if len(answers) == 1:
            return next(iter(answers.values()))
        return torch.where(chooses[:, None], answers[True], answers[False])

    def _before(self, step: Step, name: str, first: float | None) -> Float[Tensor, "R t"]:
        """The trace before this step, behind a first column where the recursion needs one to begin with."""
        rows, device = step.input_ids.shape[0], step.input_ids.device
        history = self._histories.get(name)
        before = history.before(step).to(device) if history is not None else torch.empty(rows, 0, device=device)
        return before if first is None else torch.cat([torch.full((rows, 1), first, device=device), before], dim=1)

    def _finished(self, step: Step) -> Bool[Tensor, " R"]:
        """Rows that have ended and are only filled up with padding."""
        generated = step.input_ids[:, step.prompt_length :]
        if generated.shape[1] < 2 or not len(self._eos):
            return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)
        ended = torch.isin(generated[:, :-1], self._eos.to(generated.device)).any(-1)
        return ended & (generated[:, -1] == self.tracker.pad_token_id)

    def cost(self, small_model: PreTrainedModel | int) -> SwitchingCost:
        """Costs of the last generation.

        Args:
            small_model ([`~transformers.PreTrainedModel`] or `int`): the generating model, or its number of parameters.
        """
        chosen = self.stats.trace.get("large")
        if chosen is None:
            raise RuntimeError("There is no cost yet: generate with the processor first.")
        small = small_model if isinstance(small_model, int) else small_model.num_parameters()
        large = self.engines[0].model.num_parameters()
        share, spent, (before, prompt) = float(chosen.nanmean()), self.engines[0].stats, self._begun
        # Either model alone reads the prompts and every chosen token but the last.
        tokens = prompt + chosen.shape[0] * (chosen.shape[1] - 1)
        large_forwards = spent.forwards - before.forwards
        small_tokens, here = tokens, small / large + share
        if self._main is not None:
            small_tokens = self._main.tokens
            here = (small / large * self._main.forwards + large_forwards) / chosen.shape[1]
        flops = 2.0 * (small * small_tokens + large * (spent.tokens - before.tokens))
        return SwitchingCost(
            share=share,
            relative_cost=relative_cost(share, small=float(small), large=float(large)),
            relative_cost_here=here,
            large_forwards=large_forwards,
            flops=flops,
            relative_flops=flops / (2.0 * large * tokens),
        )
