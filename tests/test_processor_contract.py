"""Every processor, with every kind of auxiliary model, in every decoding mode, against the slow obvious path.

One table: a row builds a processor and the reference that judges it. The reference knows nothing but the tokens of a row
and the scores that the processor was given; it reads every context of every row from scratch, alone, without cache,
padding or batch, and applies the method's own arithmetic. [`Judge`] stands around the processor inside `generate` and
compares them at every call, so that an error cannot hide behind tokens that happen to agree.

Here are the decoding modes and what every call must keep; test_processor_modes.py has what surrounds a generation.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

import tiny
from hf_logits.logits import entropy, keep, plausible, top_p
from hf_logits.processors.dynamic_fusion import (
    DynamicFusionLogitsProcessor,
    exact_weight,
    fusion_targets,
    grid_weights,
)
from hf_logits.processors.entropy_adaptive import EntropyAdaptiveLogitsProcessor
from hf_logits.processors.gedi import GeDiLogitsProcessor, class_log_posterior, gedi_filter
from hf_logits.processors.lqcd import LQCDLogitsProcessor, leading_query_contrast
from hf_logits.processors.mixture import MixtureLogitsProcessor, mixture
from hf_logits.processors.refusal_tokens import (
    RefusalTokenLogitsProcessor,
    choose_category,
    choose_single,
    choose_sum,
)
from hf_logits.processors.steer import SteerLogitsProcessor, steer


NEW_TOKENS = 8
Ids = list[int]
Prompt = Callable[[Ids], Ids]


# --- the slow path ---------------------------------------------------------------------------------------------------


@functools.cache
@torch.no_grad()
def read_alone(model: PreTrainedModel, ids: tuple[int, ...], encoder: tuple[int, ...] | None) -> Tensor:
    """Logits at every position of one row, from scratch. Remembered by its ids: beams ask for the same row often."""
    inputs = {"input_ids": torch.tensor([ids])}
    if encoder is not None:
        inputs = {"input_ids": torch.tensor([encoder]), "decoder_input_ids": inputs["input_ids"]}
    return model(**inputs).logits[0].float()


@dataclass
class View:
    """What the reference may know of one call: for every row the batch item, the unpadded prompt and the new tokens."""

    rows: list[tuple[int, Ids, Ids]]
    vocab: int
    shown: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor]
    """Main log-probabilities by (prompt, new tokens), of all calls so far: what a method with a history may look at."""

    def logits(self, model: PreTrainedModel, prompt: Prompt = list, encoder: Sequence[Ids] | None = None):
        """For every row: the ids that a context has read, and the logits over the shared vocabulary at each of them."""
        for item, main, new in self.rows:
            ids = (*prompt(main), *new)
            own = None if encoder is None else tuple(encoder[item])
            yield ids, read_alone(model, ids, own)[:, : self.vocab]

    def read(self, model: PreTrainedModel, prompt: Prompt = list, encoder: Sequence[Ids] | None = None) -> Tensor:
        """Next-token log-probabilities of a context, `[R, shared vocabulary]`."""
        return torch.stack([logits[-1] for _, logits in self.logits(model, prompt, encoder)]).log_softmax(-1)


def redistribute(plain: Tensor, formula: Callable[..., Tensor], *others: Tensor) -> Tensor:
    """The formula on the ids that all models know; bans stay, all other ids keep their plain probability."""
    shared = min(values.shape[-1] for values in (plain, *others))
    head = plain[:, :shared]
    scores = formula(head.log_softmax(-1), *(values[:, :shared].log_softmax(-1) for values in others))
    scores = torch.where(head.isneginf(), head, scores).log_softmax(-1)
    if shared < plain.shape[-1]:
        scores = scores + head.logsumexp(-1, keepdim=True)
    return torch.cat([scores, plain[:, shared:]], dim=-1)


Reference = Callable[[View, Tensor], Tensor]


@dataclass
class Judge:
    """Stands before and behind a processor in the list, and compares its output with the reference at every call."""

    reference: Reference
    ids: Tensor
    mask: Tensor
    tolerance: float = 1e-5
    normalised: bool = True
    lengths: list[int] = field(default_factory=list)
    worst: float = 0.0

    def __post_init__(self) -> None:
        self.shown: dict = {}

    def prompt(self, ids: Tensor, mask: Tensor) -> None:
        """The prompts of the next generation."""
        self.ids, self.mask, self.shown = ids, mask, {}

    def around(self, processor: LogitsProcessor) -> list[LogitsProcessor]:
        return [_Before(self), processor, _Behind(self)]

    def plain(self, scores: Tensor) -> Tensor:
        return torch.where(scores <= torch.finfo(scores.dtype).min, -math.inf, scores).log_softmax(-1)

    def view(self, input_ids: Tensor, vocab: int) -> View:
        items, width = self.ids.shape
        repeats = input_ids.shape[0] // items
        rows = []
        for row, ids in enumerate(input_ids.tolist()):
            real = self.mask[row // repeats].tolist()
            assert ids[:width] == self.ids[row // repeats].tolist(), "the judge was given other prompts"
            rows.append((row // repeats, [i for i, r in zip(ids, real, strict=False) if r], ids[width:]))
        return View(rows, vocab, self.shown)

    def expected(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        view, plain = self.view(input_ids, scores.shape[-1]), self.plain(scores)
        for (_, prompt, new), row in zip(view.rows, plain, strict=True):
            self.shown[tuple(prompt), tuple(new)] = row
        return self.reference(view, plain)

    def compare(self, input_ids: Tensor, scores: Tensor, output: Tensor) -> None:
        assert output.dtype == torch.float32 and output.shape == scores.shape
        assert not output.isnan().any() and not output.isposinf().any()
        banned = scores <= torch.finfo(scores.dtype).min
        assert output[banned].isneginf().all(), "a banned token came back"
        if self.normalised:
            assert output.logsumexp(-1).abs().max() < 1e-5, "not normalised"
        expected = self.expected(input_ids, scores)
        # Differences of log-probabilities, times a weight, differ in the sixth digit: other batches round otherwise.
        torch.testing.assert_close(output, expected, rtol=2e-6, atol=self.tolerance)
        finite = expected.isfinite()
        self.worst = max(self.worst, float((output - expected)[finite].abs().max()))
        self.lengths.append(input_ids.shape[1])

    @property
    def went_back(self) -> bool:
        """Whether tokens were taken back between two calls, as assisted decoding does."""
        return any(later <= earlier for earlier, later in itertools.pairwise(self.lengths))


class _Before(LogitsProcessor):
    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.judge.given = (scores, scores.clone(), input_ids.clone())
        return scores


class _Behind(LogitsProcessor):
    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given, copy, ids = self.judge.given
        assert torch.equal(given, copy) and torch.equal(ids, input_ids), "the caller's tensors were edited"
        self.judge.compare(input_ids, copy, scores)
        return scores


# --- the table -------------------------------------------------------------------------------------------------------
# Each row: (generating model, seed -> auxiliary model) -> (processor, reference). Prompts of contexts are made from the
# main prompt's content, so that a row serves any batch.

Auxiliary = Callable[[int], PreTrainedModel]
Case = tuple[LogitsProcessor, Reference]


def leading(prompt: Any) -> Ids:
    """Another prompt that is longer than the main one."""
    return [8, 9, 10, *[int(i) for i in prompt], 11]


def without_context(prompt: Any) -> Ids:
    """Another prompt that is shorter than the main one."""
    return [int(i) for i in prompt][3:]


def last_token(prompt: Ids) -> Ids:
    return prompt[-1:]


def steer_case(main: PreTrainedModel, aux: Auxiliary, *, normalise: bool = False) -> Case:
    negatives = [20, 21, 22, 23, 24, 25, 26]
    processor = SteerLogitsProcessor(
        model=aux(2),
        base_model=aux(1),
        negatives=leading if normalise else negatives,
        contrast=0.4,
        repulsion=0.3,
        plausibility=None if normalise else 1e-3,
        normalise=normalise,
        protect_ids=[] if normalise else [4, 5],
    )

    def reference(view: View, plain: Tensor) -> Tensor:
        def formula(tuned: Tensor, base: Tensor, negative: Tensor) -> Tensor:
            if normalise:
                return steer(tuned, base, negative, contrast=0.4, repulsion=0.3, normalise=True)
            protected = torch.zeros(tuned.shape[-1], dtype=torch.bool)
            protected[[4, 5]] = True
            negative = torch.where(protected, tuned, negative)
            scores = steer(tuned, base, negative, contrast=0.4, repulsion=0.3, normalise=False)
            return keep(scores, plausible(tuned, 1e-3))

        context = leading if normalise else lambda prompt: negatives
        return redistribute(plain, formula, view.read(aux(1)), view.read(aux(2), context))

    return processor, reference


def gedi_case(main: PreTrainedModel, aux: Auxiliary, *, several: bool = False) -> Case:
    guide = aux(1)
    codes, secondary = ([5, 6, 7], [9, 10]) if several else ([5, 6], [])
    bias = {5: 0.2, 6: -0.4} if several else {}
    settings = {"filter_p": 0.0, "target_p": 0.8} if several else {"filter_p": 0.7, "target_p": 0.6}
    if guide.config.model_type in ("mistral", "mamba"):
        # They soon forget the code: all posteriors are then equal, and rounding alone would put the tokens in order.
        settings["filter_p"] = 0.0
    strength, scale, class_bias = (0.5, 0.3, 0.0) if several else (4.0, 0.8, 0.3)
    processor = GeDiLogitsProcessor(
        guide,
        desired=codes[0],
        undesired=codes[1:],
        strength=strength,
        scale=scale,
        bias=bias,
        class_bias=class_bias,
        secondary_code=secondary or None,
        length_normalise=not several,
        **settings,
    )

    def reference(view: View, plain: Tensor) -> Tensor:
        bos = guide.config.bos_token_id
        conditional, running, lengths = [], [], []
        for code in codes:
            sums, nexts, counts = [], [], []

            def with_code(prompt: Ids, code: int = code) -> Ids:
                start = 1 if prompt[0] == bos else 0
                return [*prompt[:start], code, *secondary, *prompt[start:]]

            for ids, logits in view.logits(guide, with_code):
                values = logits[:, : plain.shape[-1]].log_softmax(-1)
                first = ids.index(code) + 1  # no prompt of these tests has a code in it
                # Each token given those before it; an id that only the main model has says nothing about the class.
                scored = [float(values[i - 1, ids[i]]) for i in range(first, len(ids)) if ids[i] < values.shape[-1]]
                sums.append(sum(scored))
                counts.append(len(ids) - first)
                nexts.append(values[-1])
            conditional.append(torch.stack(nexts))
            running.append(sums)
            lengths = counts
        log_posterior = class_log_posterior(
            torch.stack(conditional),
            torch.tensor(running),
            torch.tensor(lengths),
            scale=scale,
            bias=torch.tensor([bias.get(code, 0.0) + class_bias * (code == codes[0]) for code in codes]),
            length_normalise=not several,
        )
        shared = log_posterior.shape[-1]

        def formula(head: Tensor) -> Tensor:
            return gedi_filter(head + strength * log_posterior, log_posterior, **settings)

        # The posterior is no distribution over tokens: give `redistribute` the shared part alone.
        if shared == plain.shape[-1]:
            return redistribute(plain, formula)
        head = plain[:, :shared]
        mass = head.logsumexp(-1, keepdim=True)
        return torch.cat([redistribute(head.log_softmax(-1), formula) + mass, plain[:, shared:]], dim=-1)

    return processor, reference


def refusal_case(main: PreTrainedModel, aux: Auxiliary, *, mode: str) -> Case:
    categories, respond = {"a": 30, "b": 31}, 32
    settings: dict[str, Any] = {
        "single": {"refuse": 30, "threshold": 0.02},
        "category": {"refuse": categories, "threshold": {"a": 0.01}, "softmax_temperature": 2.0},
        "sum": {"refuse": categories, "threshold": 0.03},
        "bias": {"refuse": categories, "bias": {"a": 1.5, "b": -0.5}},
    }[mode]
    processor = RefusalTokenLogitsProcessor(respond=respond, mode=mode, **settings)

    def reference(view: View, plain: Tensor) -> Tensor:
        if view.rows[0][2]:
            return plain
        both, probs = torch.tensor([30, 31]), plain.softmax(-1)
        if mode == "bias":
            push = torch.zeros(plain.shape[-1])
            push[both] = torch.tensor([1.5, -0.5])
            return (plain + push).log_softmax(-1)
        if mode == "single":
            chosen = choose_single(probs, refuse=30, respond=respond, threshold=0.02)
        elif mode == "sum":
            chosen = choose_sum(probs, categories=both, respond=respond, threshold=0.03)
        else:
            bounds = torch.tensor([[0.01, math.nan]]).expand(len(plain), 2)
            probs = (plain / 2.0).softmax(-1)
            chosen = choose_category(probs, categories=both, respond=respond, thresholds=bounds)
            chosen = torch.where(chosen < 0, plain.argmax(-1), chosen)
        forced = torch.full_like(plain, -math.inf)
        for row, token in enumerate(chosen.tolist()):
            forced[row, token] = 0.0
            if plain[row, token].isneginf():
                forced[row] = plain[row]
        return forced

    return processor, reference


def adaptive_case(main: PreTrainedModel, aux: Auxiliary, *, timing: str, threshold: float = 2.5) -> Case:
    large, window, min_stay = aux(1), 2, 2 if timing == "now" else 1
    processor = EntropyAdaptiveLogitsProcessor(
        large, threshold=threshold, window=window, min_stay=min_stay, timing=timing
    )

    def reference(view: View, plain: Tensor) -> Tensor:
        output = []
        for item, prompt, new in view.rows:
            at_work, stay, bits = False, 0, []
            # The whole history again, from the scores that were shown for each beginning of this row.
            for length in range(len(new) + 1):
                prefix = new[:length]
                small = view.shown[tuple(prompt), tuple(prefix)][None]
                answer = redistribute(
                    small,
                    lambda head, other: other,
                    View([(item, prompt, prefix)], view.vocab, {}).read(large),
                )
                bits.append(float(entropy(answer if at_work else small)))
                mean = sum(bits[-window:]) / len(bits[-window:])
                chooses = at_work
                if timing == "next":
                    stay += 1
                if (mean > threshold) != at_work and stay >= min_stay:
                    at_work, stay = not at_work, 0
                if timing == "now":
                    chooses, stay = at_work, stay + 1
            output.append(answer if chooses else small)
        return torch.cat(output)

    return processor, reference


def lqcd_case(main: PreTrainedModel, aux: Auxiliary, *, layout: str) -> Case:
    other = leading if layout == "neutral" else without_context
    processor = LQCDLogitsProcessor(aux(1), other, main=layout, contrast=0.7, plausibility=0.03)

    def reference(view: View, plain: Tensor) -> Tensor:
        def formula(head: Tensor, read: Tensor) -> Tensor:
            neutral, lead = (head, read) if layout == "neutral" else (read, head)
            # What an earlier processor has banned is not plausible under either question.
            neutral = torch.where(head.isneginf(), -math.inf, neutral)
            return leading_query_contrast(neutral, lead, contrast=0.7, plausibility=0.03)

        return redistribute(plain, formula, view.read(aux(1), other))

    return processor, reference


def fusion_case(main: PreTrainedModel, aux: Auxiliary, *, experts: int = 1, **settings: Any) -> Case:
    models = [aux(seed) for seed in range(1, experts + 2)]
    tuned = models[1] if experts == 1 else models[1:]
    processor = DynamicFusionLogitsProcessor(models[0], tuned, max_weight=1.5, step=0.5, **settings)
    grid = [0.0, 0.5, 1.0, 1.5]

    def formula(big: Tensor, small: Tensor, *tuned: Tensor) -> Tensor:
        live = ~big.isneginf()
        small, others = (
            torch.where(live, values, -math.inf).log_softmax(-1) for values in (small, torch.stack(tuned))
        )
        directions = torch.where(live, others - small, 0.0)
        targets = fusion_targets(small, others)
        if "weight" in settings:
            weights = torch.full(directions.shape[:2], settings["weight"])
        elif settings.get("combine") == "joint":
            weights = grid_weights(big, directions, targets, grid=grid)[0]
        else:
            found = [
                exact_weight(big, direction, targets, max_weight=1.5)
                if settings.get("solver") == "exact"
                else grid_weights(big, direction[None], targets, grid=grid)
                for direction in directions
            ]
            best = torch.stack([loss for _, loss in found]).argmin(0).tolist()
            weights = torch.zeros(directions.shape[:2])
            for row, expert in enumerate(best):
                weights[expert, row] = found[expert][0].view(-1)[row]
        return big + sum(weight[:, None] * direction for weight, direction in zip(weights, directions, strict=True))

    def reference(view: View, plain: Tensor) -> Tensor:
        return redistribute(plain, formula, *(view.read(model) for model in models))

    return processor, reference


def cfg_case(main: PreTrainedModel, aux: Auxiliary, *, negative: Any = None) -> Case:
    processor = MixtureLogitsProcessor.cfg(aux(1), negative, scale=1.6)
    prompt = last_token if negative is None else negative

    def reference(view: View, plain: Tensor) -> Tensor:
        return redistribute(plain, _sum(1.6, -0.6), view.read(aux(1), prompt))

    return processor, reference


def context_aware_case(main: PreTrainedModel, aux: Auxiliary) -> Case:
    processor = MixtureLogitsProcessor.context_aware(aux(1), without_context, contrast=0.5)

    def reference(view: View, plain: Tensor) -> Tensor:
        return redistribute(plain, _sum(1.5, -0.5), view.read(aux(1), without_context))

    return processor, reference


def proxy_case(main: PreTrainedModel, aux: Auxiliary) -> Case:
    processor = MixtureLogitsProcessor.proxy(aux(1), aux(2), weight=0.8, prompt=leading)

    def reference(view: View, plain: Tensor) -> Tensor:
        return redistribute(plain, _sum(1.0, 0.8, -0.8), view.read(aux(1), leading), view.read(aux(2)))

    return processor, reference


def dexperts_case(main: PreTrainedModel, aux: Auxiliary, *, lonely: bool = False) -> Case:
    processor = MixtureLogitsProcessor.dexperts(None if lonely else aux(1), aux(2), weight=0.5, filter_p=0.95)

    def reference(view: View, plain: Tensor) -> Tensor:
        def formula(main: Tensor, *others: Tensor) -> Tensor:
            expert, anti = (main, *others) if lonely else others
            return keep(main + 0.5 * torch.where(main.isneginf(), 0.0, expert - anti), top_p(main, 0.95))

        return redistribute(plain, formula, *(view.read(aux(seed)) for seed in ((2,) if lonely else (1, 2))))

    return processor, reference


def contrastive_case(main: PreTrainedModel, aux: Auxiliary, *, strength: float | None = None) -> Case:
    settings: dict[str, Any] = (
        {"amateur_temperature": 2.0, "ignore_prompt": True, "min_tokens_to_keep": 2}
        if strength is None
        else {"strength": strength}
    )
    processor = MixtureLogitsProcessor.contrastive(aux(1), plausibility=0.05, **settings)

    def reference(view: View, plain: Tensor) -> Tensor:
        def formula(main: Tensor, amateur: Tensor) -> Tensor:
            if strength is None:
                return keep(_sum(1.0, -0.5)(main, amateur), plausible(main, 0.05, min_tokens_to_keep=2))
            return keep(_sum(1.0 + strength, -strength)(main, amateur), plausible(main, 0.05))

        return redistribute(plain, formula, view.read(aux(1), last_token if strength is None else list))

    return processor, reference


def _sum(main_weight: float, *weights: float) -> Callable[..., Tensor]:
    return lambda main, *others: mixture(main, others, main_weight=main_weight, weights=weights)


GUIDED: dict[str, Callable[..., Case]] = {
    "steer": steer_case,
    "steer_normalised": functools.partial(steer_case, normalise=True),
    "gedi": gedi_case,
    "gedi_three_codes": functools.partial(gedi_case, several=True),
    "adaptive_now": functools.partial(adaptive_case, timing="now"),
    "adaptive_next": functools.partial(adaptive_case, timing="next"),
    "lqcd_neutral": functools.partial(lqcd_case, layout="neutral"),
    "lqcd_leading": functools.partial(lqcd_case, layout="leading"),
    "fusion_grid": fusion_case,
    "fusion_exact": functools.partial(fusion_case, solver="exact"),
    "fusion_fixed": functools.partial(fusion_case, weight=0.7),
    "fusion_best_of_two": functools.partial(fusion_case, experts=2),
    "fusion_joint": functools.partial(fusion_case, experts=2, combine="joint"),
    "cfg": cfg_case,
    "cfg_negative": functools.partial(cfg_case, negative=leading),
    "context_aware": context_aware_case,
    "proxy": proxy_case,
    "dexperts": dexperts_case,
    "dexperts_one_model": functools.partial(dexperts_case, lonely=True),
    "contrastive": contrastive_case,
    "contrastive_strength": functools.partial(contrastive_case, strength=0.6),
}
"""With an auxiliary model."""

ALONE: dict[str, Callable[..., Case]] = {
    f"refusal_{mode}": functools.partial(refusal_case, mode=mode) for mode in ("single", "category", "sum", "bias")
}
"""Without one."""

TABLE = GUIDED | ALONE

TOLERANCE = {
    # A minimum is flat: the seventh digit of the loss decides on the fourth of the weight.
    "fusion_exact": 2e-2
}


@functools.cache
def main_model() -> PreTrainedModel:
    return tiny.llama(0)


@functools.cache
def auxiliary(kind: str, seed: int) -> PreTrainedModel:
    return tiny.DECODERS[kind](seed)


@functools.cache
def draft_model() -> PreTrainedModel:
    """The main model with some noise, so that some of its drafts are taken and others are not."""
    model, generator = tiny.llama(0), torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.update(
        num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return model


def build(name: str, kind: str = "llama", main: PreTrainedModel | None = None) -> Case:
    return TABLE[name](main or main_model(), functools.partial(auxiliary, kind))


def judged(name: str, kind: str = "llama") -> tuple[LogitsProcessor, Judge]:
    """A processor of the table with its judge, who is still to be told the prompts."""
    processor, reference = build(name, kind)
    nothing = torch.empty(0, 0, dtype=torch.long)
    return processor, Judge(reference, nothing, nothing, tolerance=TOLERANCE.get(name, 1e-5))


def generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, processors: Sequence[LogitsProcessor] = (), **settings
):
    torch.manual_seed(0)  # of sampling
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
    return model.generate(ids, attention_mask=mask, logits_processor=processors, **settings)


# --- line 1: decoding modes ------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "returned_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        *itertools.product(GUIDED, tiny.DECODERS, ["greedy", "returned_sequences", "beams", "beam_sampling"]),
        # One sequence is a special case of several.
        *itertools.product(GUIDED, ["llama", "bamba"], ["sampling"]),
        *itertools.product(ALONE, ["llama"], MODES),
    ],
)
def test_every_call_agrees_with_recomputing(name, kind, mode):
    """Lines 1, 2, 4, 9 and half of 8: of a padded batch of two, with prompts longer than the sliding window."""
    processor, judge = judged(name, kind)
    judge.prompt(*tiny.prompts())
    generate(main_model(), judge.ids, judge.mask, judge.around(processor), **MODES[mode])
    width = judge.ids.shape[1]
    assert judge.lengths == list(range(width, width + NEW_TOKENS))


@pytest.mark.parametrize(
    ("name", "kind", "helper"),
    [
        *itertools.product(GUIDED, tiny.DECODERS, ["draft_model"]),
        *itertools.product(GUIDED, ["llama", "mistral", "bamba"], ["prompt_lookup"]),
        *itertools.product(ALONE, ["llama"], ["draft_model", "prompt_lookup"]),
    ],
)
def test_assisted_decoding_changes_no_token(name, kind, helper):
    """Lines 1 and 4. The processor also sees draft tokens with the draft's scores, or made-up ones, and goes back."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    if name.startswith("gedi"):
        ids += 10  # no control codes in the prompt
    mask = torch.ones_like(ids)
    plainly, assisted = judged(name, kind), judged(name, kind)
    outputs = []
    for (processor, judge), settings in (
        (plainly, {}),
        (
            assisted,
            {"assistant_model": draft_model()} if helper == "draft_model" else {"prompt_lookup_num_tokens": 3},
        ),
    ):
        judge.prompt(ids, mask)
        outputs.append(generate(main_model(), ids, mask, judge.around(processor), max_new_tokens=10, **settings))
    assert torch.equal(*outputs)
    assert assisted[1].went_back and not plainly[1].went_back
    # The last generation's trace is that of the tokens which were taken in the end.
    for key, values in plainly[0].stats.trace.items():
        again = assisted[0].stats.trace[key][:, : values.shape[1]]
        torch.testing.assert_close(again, values, rtol=0.0, atol=10 * assisted[1].tolerance, equal_nan=True)
