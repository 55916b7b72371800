import math

import pytest
import torch

import hf_logits
import tiny
from hf_logits.metrics import SteeringCost
from hf_logits.metrics.steering_cost import steering_cost
from hf_logits.processors import EntropyAdaptiveLogitsProcessor
from oracles import COSTS


NAN = math.nan


@pytest.mark.parametrize("case", COSTS, ids=str)
def test_the_published_savings(case):
    small, large, share = case
    saved, saved_here = COSTS[case]
    row = [1.0] * round(100 * share) + [0.0] * round(100 * (1 - share))
    found = steering_cost([row], small=small, large=large)
    assert found["saved"] == pytest.approx(saved, abs=6e-5)
    assert 1 - found["relative_cost_here"] == pytest.approx(saved_here, abs=6e-4)
    assert found["relative_flops_without_catch_up"] == found["relative_cost"]


def test_one_generation_by_hand():
    # prompt of 3; S S L L S: with "now" the large model reads at 2, 3 and 4, there to find that it is over
    found = steering_cost([[0, 0, 1, 1, 0]], small=1, large=10, prompt_tokens=3, runs="active")
    assert (found["share"], found["tokens"], found["switches"]) == (2 / 5, 5, 2)
    assert (found["small_forwards"], found["large_forwards"]) == (4, 3)  # 0, 1, 2, 4 and 2, 3, 4
    # for the token at 4, the prompt and four tokens, however late a model began
    assert (found["small_tokens"], found["large_tokens"]) == (7, 7)
    assert found["flops"] == 2 * (7 * 1 + 7 * 10) and found["relative_flops"] == pytest.approx(77 / 70)
    assert found["flops_without_catch_up"] == 2 * (3 * 1 + 2 * 10)
    assert found["relative_flops_without_catch_up"] == found["relative_cost"] == pytest.approx(23 / 50)
    assert found["relative_cost_here"] == pytest.approx((4 * 1 + 3 * 10) / 50)
    later = steering_cost([[0, 0, 1, 1, 0]], small=1, large=10, prompt_tokens=3, runs="active", timing="next")
    assert (later["small_forwards"], later["large_forwards"]) == (3, 2)
    assert (later["small_tokens"], later["large_tokens"]) == (7, 6)
    both = steering_cost([[0, 0, 1, 1, 0]], small=1, large=10, prompt_tokens=3)
    assert (both["small_forwards"], both["large_forwards"], both["small_tokens"]) == (5, 3, 7)
    assert both["relative_cost_here"] == pytest.approx(1 / 10 + 2 / 5)
    begun = steering_cost([[0, 0]], small=1, large=10, prompt_tokens=3, start="large")
    assert (begun["large_forwards"], begun["large_tokens"]) == (1, 3)


def test_a_batch_reads_for_all_rows_and_rows_apart_do_not():
    rows, sizes = [[0, 1, 0, 0], [0, 0, NAN, NAN]], [5, 2]
    together = steering_cost(rows, small=1, large=10, prompt_tokens=sizes, timing="next")
    assert (together["large_forwards"], together["large_tokens"], together["small_tokens"]) == (1, 7 + 2, 7 + 2 * 3)
    apart = steering_cost(rows, small=1, large=10, prompt_tokens=sizes, timing="next", together=False)
    assert (apart["large_forwards"], apart["large_tokens"], apart["small_tokens"]) == (1, 5 + 1, 5 + 3 + 2 + 1)
    alone = [
        steering_cost([row], small=1, large=10, prompt_tokens=n, timing="next")
        for row, n in zip(rows, sizes, strict=True)
    ]
    for key in ("flops", "small_forwards", "large_forwards", "small_tokens", "large_tokens", "tokens", "switches"):
        assert apart[key] == sum(one[key] for one in alone)
    assert apart["share"] == together["share"] == 1 / 6


def test_the_extremes():
    small = steering_cost([[0.0] * 8], small=3.0, large=11.0, prompt_tokens=4, runs="active")
    assert (small["share"], small["large_forwards"], small["switches"]) == (0, 0, 0)
    assert small["relative_flops"] == small["relative_cost"] == small["relative_cost_here"] == 3 / 11
    large = steering_cost([[1.0] * 8], small=3.0, large=11.0, prompt_tokens=4, runs="active", start="large")
    assert large["relative_flops"] == large["relative_cost"] == large["relative_cost_here"] == 1
    assert large["small_forwards"] == 0 and large["saved"] == 0


@pytest.mark.parametrize("runs", ["both", "active"])
@pytest.mark.parametrize(
    "rules",
    [
        {"timing": "now"},
        {"timing": "next"},
        {"timing": "now", "start": "large", "min_stay": 1},
        {"timing": "next", "start": "large", "min_stay": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [False, True])
def test_it_is_what_the_processor_counts(runs, rules, ends):
    """Of a real generation: two rows with unequal prompts, of which one may end early."""
    small, large = tiny.llama(seed=1), tiny.llama(seed=2, num_hidden_layers=3)
    ids, mask = tiny.prompts()

    def generate(eos: int | None) -> tuple[EntropyAdaptiveLogitsProcessor, torch.Tensor]:
        settings = {"threshold": 5.2, "window": 1, "min_stay": 2, "pad_token_id": tiny.PAD, "eos_token_id": eos}
        processor = EntropyAdaptiveLogitsProcessor(large, **(settings | rules))
        loop = {"custom_generate": hf_logits.generate} if runs == "active" else {}
        shared = {"logits_processor": [processor], "max_new_tokens": 16, "do_sample": False}
        stop = {"eos_token_id": eos, "pad_token_id": tiny.PAD}
        return processor, small.generate(ids, attention_mask=mask, **shared, **stop, **loop)

    processor, output = generate(None)
    if ends:
        processor, _ = generate(int(output[0, ids.shape[1] + 6]))
    trace, cost = processor.stats.trace["large"], processor.cost(small)
    assert bool(trace.isnan().any()) == ends
    assert 0 < cost.share < 1
    found = SteeringCost("prompts", keep_in_memory=True).compute(
        predictions=trace,
        references=mask.sum(-1),
        small=small.num_parameters(),
        large=large.num_parameters(),
        runs=runs,
        **{"start": "small"} | {key: value for key, value in rules.items() if key != "min_stay"},
    )
    for key in ("share", "relative_cost", "relative_cost_here", "large_forwards", "flops", "relative_flops"):
        assert found[key] == pytest.approx(getattr(cost, key), rel=1e-6), key


# --- what is undefined, and what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [[]], [[NAN, NAN], []]])
def test_no_tokens_are_said_to_be_none(rows):
    for runs in ("both", "active"):
        found = steering_cost(rows, small=1.0, large=2.0, runs=runs)
        undefined = {key for key, value in found.items() if key != "notes" and math.isnan(value)}
        assert undefined == set(found["notes"])
        assert undefined >= {"share", "relative_cost", "saved", "relative_cost_here", "relative_flops"}
        assert found["flops"] == found["tokens"] == found["large_forwards"] == 0


def test_a_token_behind_nothing_is_read_from_nothing():
    found = steering_cost([[1]], small=1.0, large=2.0)
    assert math.isnan(found["relative_flops"]) and found["notes"].keys() == {"relative_flops"}
    assert found["share"] == 1


def test_a_trace_and_lists_are_the_same():
    trace = torch.tensor([[0.0, 1.0, NAN], [1.0, 1.0, 0.0]])
    of_trace = SteeringCost(keep_in_memory=True).compute(predictions=trace, small=1.0, large=2.0, prompt_tokens=4)
    assert of_trace == steering_cost([[0, 1], [1, 1, 0]], small=1.0, large=2.0, prompt_tokens=[4, 4])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[0, 2]], {}, "Row 0 has values other than 0, 1, and NaN"),
        ([[0], [0, 0.5]], {}, "Row 1 has values other than"),
        ([[0], [0, NAN, 1]], {}, "Row 1 goes on behind a NaN"),
        ([[NAN, 1]], {}, "Row 0 goes on behind a NaN"),
        ([[0]], {"small": 0.0}, "small must be in"),
        ([[0]], {"large": math.inf}, "large must be in"),
        ([[0]], {"prompt_tokens": [1, 2]}, "for each of 1 rows"),
        ([[0]], {"prompt_tokens": -1}, "whole numbers from 0"),
        ([[0]], {"runs": "large"}, "runs must be 'both' or 'active'"),
        ([[0]], {"timing": "then"}, "timing must be 'now' or 'next'"),
        ([[0]], {"start": "none"}, "start must be 'small' or 'large'"),
    ],
)
def test_bad_input(rows, options, message):
    with pytest.raises(ValueError, match=message):
        steering_cost(rows, **({"small": 1.0, "large": 2.0} | options))


def test_lengths_of_prompts_are_given_once():
    with pytest.raises(ValueError, match="give one of them"):
        SteeringCost().compute(predictions=[[1, 0]], references=[3], small=1.0, large=2.0, prompt_tokens=3)
