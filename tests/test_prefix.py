"""What is found again by comparing tokens: rows, prompts, padding and histories."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_logits.prefix import PrefixHistory, PromptTracker, Step, match_prefixes


PAD = 0


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([*rows])


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tables():
    return st.integers(0, 7).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=5)
    )


@given(new=tables(), old=tables())
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_match_prefixes_against_a_loop(new, old):
    found, parents = match_prefixes(
        torch.tensor(new, dtype=torch.long).view(len(new), -1), torch.tensor(old, dtype=torch.long).view(len(old), -1)
    )
    for r, row in enumerate(new):
        lengths = [shared(row, other) for other in old]
        assert found[r] == max(lengths)
        assert lengths[parents[r]] == max(lengths)
        if r < len(old) and lengths[r] == max(lengths):
            assert parents[r] == r  # what need not move stays


def test_match_prefixes_is_not_fooled_by_a_later_match():
    # Long rows: more equal ids than a byte can count, and an equal rest behind the first difference.
    old = torch.ones(2, 600, dtype=torch.long)
    new = old.clone()
    new[0, 400] = 2
    found, parents = match_prefixes(new, old)
    assert found.tolist() == [400, 600] and parents.tolist() == [0, 1]


# --- where a call stands -----------------------------------------------------------------------------------------------


def test_a_row_plus_a_token_continues():
    tracker = PromptTracker(PAD)
    first = tracker.observe(ids([PAD, 5], [6, 7]))
    assert first.is_new and first.position == 0 and first.parents is None
    assert first.prompt_mask.tolist() == [[False, True], [True, True]]
    step = tracker.observe(ids([PAD, 5, 3], [6, 7, PAD]))
    assert not step.is_new and step.position == 1 and step.prompt_length == 2 and step.parents is None
    assert step.prompt_mask.tolist() == [[False, True], [True, True]]  # a pad that was generated pads nothing


def test_beams_permute_and_duplicate_rows():
    tracker = PromptTracker(PAD)
    tracker.observe(ids([PAD, 5], [6, 7]))
    tracker.observe(ids([PAD, 5, 3], [6, 7, 4]))
    step = tracker.observe(ids([6, 7, 4, 8], [6, 7, 4, 9]))
    assert not step.is_new and step.position == 2
    assert step.parents.tolist() == [1, 1]
    assert step.prompt_mask.tolist() == [[True, True], [True, True]]
    # The masks of the rows that were dropped are gone, those of the rest move along.
    tracker.reset()
    tracker.observe(ids([PAD, 5], [6, 7]))
    step = tracker.observe(ids([6, 7, 4], [PAD, 5, 3]))
    assert step.parents.tolist() == [1, 0]
    assert step.prompt_mask.tolist() == [[True, True], [False, True]]


def test_tokens_are_taken_back():
    tracker = PromptTracker(PAD)
    for length in range(2, 7):
        tracker.observe(torch.arange(5, 5 + length)[None])
    step = tracker.observe(ids([5, 6, 7, 9]))  # a rejected draft: shorter, and another last token
    assert not step.is_new and step.position == 2
    step = tracker.observe(ids([5, 6, 7]))
    assert not step.is_new and step.position == 1
    step = tracker.observe(ids([5, 6]))  # back at the first position
    assert step.is_new and step.position == 0


def test_the_batch_shrinks_and_grows():
    tracker = PromptTracker(PAD)
    tracker.observe(ids([5, 6], [7, 8]))
    tracker.observe(ids([5, 6, 3], [7, 8, 3]))
    step = tracker.observe(ids([7, 8, 3, 4]))
    assert not step.is_new and step.parents.tolist() == [1]
    step = tracker.observe(ids([7, 8, 3, 4, 1], [7, 8, 3, 4, 2], [7, 8, 3, 4, 3]))
    assert not step.is_new and step.parents.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "prompt",
    [
        [[9, 9], [7, 8]],  # one row of two is new
        [[9, 6, 3, 4]],  # differs at the start
        [[5, 6, 3, 4, 4]],  # extends an answer by two tokens: nothing between was seen
        [[5, 6]],  # as long as the old prompt
        [[5]],
    ],
)
def test_everything_else_is_a_new_prompt(prompt):
    tracker = PromptTracker(PAD)
    tracker.observe(ids([5, 6], [7, 8]))
    tracker.observe(ids([5, 6, 3], [7, 8, 3]))
    step = tracker.observe(torch.tensor(prompt))
    assert step.is_new and step.position == 0 and step.prompt_length == len(prompt[0])


def test_a_prompt_that_repeats_an_answer_needs_a_reset():
    """The case that ids cannot show, as the class says."""
    tracker = PromptTracker(PAD)
    tracker.observe(ids([5, 6]))
    tracker.observe(ids([5, 6, 3]))
    assert not tracker.observe(ids([5, 6, 3, 4])).is_new  # a second turn of one token: taken for a continuation
    tracker.reset()
    assert tracker.observe(ids([5, 6, 3, 4])).is_new


def test_an_empty_prompt_can_be_continued():
    tracker = PromptTracker(PAD)
    assert tracker.observe(torch.zeros(2, 0, dtype=torch.long)).is_new
    step = tracker.observe(ids([5], [6]))
    assert not step.is_new and step.position == 1


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pad", "begins_text", "rows", "widths"),
    [
        (PAD, False, [[PAD, PAD, 5], [PAD, 5, PAD]], [2, 1]),  # a pad inside a row is a token
        (PAD, False, [[PAD, PAD, PAD]], [2]),  # a row has at least one token
        (None, False, [[PAD, PAD, 5]], [0]),
        (PAD, True, [[PAD, PAD, 5], [PAD, 5, 6]], [1, 0]),  # pad is bos: the shortest run begins a text
        (PAD, True, [[PAD, PAD, 5], [7, 5, 6]], [2, 0]),
        (PAD, True, [[PAD, 5, 6]], [0]),
        (PAD, True, [[PAD]], [0]),
    ],
)
def test_inferred_padding(pad, begins_text, rows, widths):
    step = PromptTracker(pad, begins_text=begins_text).observe(torch.tensor(rows))
    assert (~step.prompt_mask).sum(-1).tolist() == widths
    assert step.prompt_mask[:, -1].all()


def test_a_given_mask_wins_and_is_repeated_for_beams():
    tracker = PromptTracker(PAD)
    prompts = ids([PAD, PAD, 5], [PAD, 6, 7])
    tracker.bind(torch.tensor([[0, 1, 1], [1, 1, 1]]), prompts)
    step = tracker.observe(prompts.repeat_interleave(2, 0))
    assert (~step.prompt_mask).sum(-1).tolist() == [1, 1, 0, 0]
    tracker.bind(None)
    assert (~tracker.observe(prompts).prompt_mask).sum(-1).tolist() == [2, 1]


def test_binding_begins_anew():
    tracker = PromptTracker(PAD)
    tracker.observe(ids([5, 6]))
    tracker.bind(torch.tensor([[0, 1, 1]]))
    step = tracker.observe(ids([5, 6, 7]))
    assert step.is_new and step.prompt_mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("mask", "given", "match"),
    [
        ([1, 1], None, r"shape \[batch, length\]"),
        ([[1, 0]], None, "0 after a 1"),
        ([[0, 1], [1, 0]], None, "padding_side='left'"),
        ([[1, 1]], [[5, 6, 7]], "differ in shape"),
    ],
)
def test_masks_that_cannot_be_used(mask, given, match):
    with pytest.raises(ValueError, match=match):
        PromptTracker(PAD).bind(torch.tensor(mask), None if given is None else torch.tensor(given))


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([[5, 6, 7], [5, 6, 8]], "attention_mask of shape"),  # longer
        ([[5, 6], [5, 6], [5, 6]], "attention_mask of shape"),  # three rows of two items
        ([[5, 6], [5, 9]], "other input_ids"),
    ],
)
def test_masks_of_another_batch(prompts, match):
    tracker = PromptTracker(PAD)
    tracker.bind(torch.ones(2, 2), ids([5, 6], [5, 7]))
    with pytest.raises(ValueError, match=match):
        tracker.observe(torch.tensor(prompts))


# --- histories ---------------------------------------------------------------------------------------------------------


def test_history_follows_rows_and_rollback():
    tracker, history = PromptTracker(PAD), PrefixHistory()

    def record(rows: list[list[int]], *values: float) -> list[list[float]]:
        step = tracker.observe(torch.tensor(rows))
        history.append(step, torch.tensor(values, dtype=torch.float32))
        return history.values.tolist()

    assert record([[5], [6]], 1, 2) == [[1], [2]]
    assert record([[5, 3], [6, 4]], 3, 4) == [[1, 3], [2, 4]]
    assert record([[6, 4, 7], [6, 4, 8]], 5, 6) == [[2, 4, 5], [2, 4, 6]]  # row 0 now continues what was row 1
    assert record([[6, 4, 8, 9], [6, 4, 7, 9]], 7, 8) == [[2, 4, 6, 7], [2, 4, 5, 8]]
    assert record([[6, 4, 8], [6, 4, 7]], 9, 10) == [[2, 4, 9], [2, 4, 10]]  # taken back, said again
    assert record([[6, 3], [6, 4]], 11, 12) == [[2, 11], [2, 12]]
    assert record([[6], [6]], 13, 14) == [[13], [14]]  # at the first position again
    assert record([[6, 4]], 15) == [[13, 15]]
    assert record([[7, 7, 7]], 16) == [[16]]
    assert record([[8], [9], [9]], 17, 18, 19) == [[17], [18], [19]]  # a new prompt in a larger batch


def test_history_before_the_call():
    tracker, history = PromptTracker(PAD), PrefixHistory()
    step = tracker.observe(ids([5], [6]))
    assert history.before(step).shape == (2, 0)
    history.append(step, torch.tensor([1.0, 2.0]))
    step = tracker.observe(ids([6, 3], [5, 3]))
    assert history.before(step).tolist() == [[2.0], [1.0]]
    assert history.before(step).tolist() == [[2.0], [1.0]]  # looking changes nothing


def test_history_of_one_who_joined_late():
    history = PrefixHistory()
    step = Step(ids([5, 6, 7]), 1, torch.ones(1, 1, dtype=torch.bool), False, None)
    history.append(step, torch.tensor([4.0]))
    assert history.values.shape == (1, 3) and history.values[0, -1] == 4 and history.values[0, :2].isnan().all()


@pytest.mark.parametrize("lengths", [[3], [3, 4]])
def test_where_every_row_is_padded_with_a_beginning_one_of_the_pads_is_text(lengths):
    """As `pad_to_multiple_of` does it with a tokenizer like GPT-2's."""
    width = 6
    rows = [[2] * (width - n) + [5] * n for n in lengths]
    mask = PromptTracker(2, begins_text=True).observe(torch.tensor(rows)).prompt_mask
    assert mask.sum(-1).tolist() == [n + 1 for n in lengths]
