"""The contract again, through `custom_generate=hf_logits.generate`.

The same tables, references and judge; but the generating model is now one of the models that the processor reads, so that its
contexts become rows of the generating model's batch. Whoever decodes is told apart by counting.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import test_processor_contract as contract
import test_processor_modes as modes
from test_processor_contract import GUIDED, MODES, NEW_TOKENS

import hf_logits
import tiny
from hf_logits import generation


JOINING = [name for name in GUIDED if not name.startswith("adaptive")]
"""Methods that mix: what picks a model has its tests in test_generation.py."""

HERE = ["greedy", "sampling", "returned_sequences"]
"""The modes that the loop decodes itself."""

KINDS = ["llama", "gpt2", "mistral", "tied_llama"]
"""Models whose rows can be padded beside longer ones."""


class Door:
    """Sends every generation of the two files through the loop, from one of the auxiliary models of the table."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.decoded = monkeypatch, 0
        decode, generate = generation._decode, contract.generate

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.decoded += 1
            return decode(*args, **kwargs)

        def through(model: Any, ids: Any, mask: Any, processors: Any = (), **settings: Any) -> Any:
            if "assistant_model" in settings:  # `generate` keeps it from functions
                settings["assistant"] = settings.pop("assistant_model")
            return generate(model, ids, mask, processors, custom_generate=hf_logits.generate, **settings)

        monkeypatch.setattr(generation, "_decode", counted)
        for module in (contract, modes):
            monkeypatch.setattr(module, "generate", through)

    def main(self, kind: str, seed: int) -> None:
        for module in (contract, modes):
            self.monkeypatch.setattr(module, "main_model", lambda: contract.auxiliary(kind, seed))


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    yield Door(monkeypatch)


def seat(name: str) -> int:
    """An auxiliary model that the method reads, to be the generating one."""
    # Behind their own small base, two experts are equally good at a weight of 1: rounding alone would choose.
    return 2 if name in ("dexperts_one_model", "fusion_best_of_two", "fusion_joint") else 1


@pytest.mark.parametrize("mode", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOINING)
def test_every_call_agrees_with_recomputing(door, name, kind, mode):
    door.main(kind, seat(name))
    contract.test_every_call_agrees_with_recomputing(name, kind, mode)
    assert door.decoded == 1


@pytest.mark.parametrize("name", ["steer", "steer_normalised", "fusion_grid", "fusion_exact", "proxy", "dexperts"])
def test_any_of_several_models_may_be_the_generating_one(door, name):
    door.main("llama", 2)
    contract.test_every_call_agrees_with_recomputing(name, "llama", "greedy")
    assert door.decoded == 1


@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", "beams"), ("gpt2", "beam_sampling"), ("mamba", "greedy"), ("bamba", "sampling")]
)
@pytest.mark.parametrize("name", JOINING)
def test_what_the_loop_does_not_do_runs_as_without_it(door, name, kind, mode):
    door.main(kind, seat(name))
    contract.test_every_call_agrees_with_recomputing(name, kind, mode)
    assert door.decoded == 0


@pytest.mark.parametrize("helper", ["draft_model", "prompt_lookup"])
@pytest.mark.parametrize("name", JOINING)
def test_assisted_decoding_changes_no_token(door, name, helper):
    door.main("llama", seat(name))
    contract.test_assisted_decoding_changes_no_token(name, "llama", helper)
    assert door.decoded == 1  # the judge's run without a helper


@pytest.mark.parametrize("padding", modes.PADDINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", JOINING)
def test_a_padded_row_is_the_row_alone(door, name, kind, padding):
    door.main(kind, seat(name))
    modes.test_a_padded_row_is_the_row_alone(name, kind, padding)


@pytest.mark.parametrize("name", JOINING)
def test_finished_rows_do_not_disturb_the_others(door, name):
    door.main("llama", seat(name))
    modes.test_finished_rows_do_not_disturb_the_others(name)
    assert door.decoded == 2


@pytest.mark.parametrize("name", JOINING)
def test_an_object_serves_one_generation_after_another(door, name):
    door.main("llama", seat(name))
    modes.test_an_object_serves_one_generation_after_another(name, "llama")
    assert door.decoded == 11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOINING)
def test_a_static_cache_changes_nothing(door, name, kind):
    door.main(kind, seat(name))
    modes.test_a_static_cache_of_the_main_model_changes_nothing(name, kind)
    assert door.decoded == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", JOINING)
def test_what_was_banned_stays_banned(door, name, mode):
    door.main("llama", seat(name))
    modes.test_what_was_banned_stays_banned(name, mode)


@pytest.mark.parametrize("mode", HERE)
@pytest.mark.parametrize("name", JOINING)
def test_the_trace_follows_the_rows(door, name, mode):
    door.main("llama", seat(name))
    modes.test_the_trace_follows_the_rows(name, mode)
    assert door.decoded == 1


@pytest.mark.parametrize("name", JOINING)
def test_the_returned_logits_are_the_plain_ones(door, name):
    door.main("llama", seat(name))
    modes.test_the_returned_logits_are_the_plain_ones(name)


@pytest.mark.parametrize("mode", HERE)
def test_the_repetition_penalty_behind_gedi(door, mode):
    door.main("llama", 1)
    modes.test_the_repetition_penalty_behind_gedi(mode)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", modes.COST)
def test_one_forward_a_token_for_all_that_the_weights_read(door, monkeypatch, name, kind):
    """And no token is read twice: the processor's own count, and that of the shared batch."""
    main = contract.auxiliary(kind, seat(name))
    door.main(kind, seat(name))
    forwards = 0
    forward = main.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return forward(*args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(main, "forward", counted)
    processor, _ = contract.build(name, kind, main)
    ids, mask = tiny.prompts(batch=3)
    ids[1], mask[1] = ids[2], mask[2]  # a prompt that is there twice is read once
    contract.generate(main, ids, mask, [processor])
    assert forwards == NEW_TOKENS
    prompts = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    read = 0
    for contexts in modes.COST[name].values():
        unique = {tuple(make(prompt)) for make in contexts for prompt in prompts}
        read += sum(len(prompt) for prompt in unique) + len(contexts) * len(ids) * (NEW_TOKENS - 1)
    stats = processor.stats
    assert (stats.calls, stats.forwards) == (NEW_TOKENS, NEW_TOKENS * (len(modes.COST[name]) - 1))
    assert stats.tokens == read
