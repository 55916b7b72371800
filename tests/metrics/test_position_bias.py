import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, recall_score

from hf_logits.metrics import PositionBias
from hf_logits.metrics.position_bias import contents, permutation_consistency, position_bias, rotations


BALANCED = [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([0] * 8, (0.25, 0.433013, 0, 0.75, math.log(4), 1)),
        (BALANCED, (1, 0, 1, 0, 0, 0)),
        ([0, 0, 0, 1, 0, 2, 0, 3], (0.625, 0.216506, 0.774397, 0.375, 0.312752, 0.5)),
    ],
)
def test_by_hand(predictions: list[int], expected: Any) -> None:
    found = position_bias(predictions, BALANCED, num_choices=4)
    assert [found[key] for key in ("accuracy", "rstd", "entropy", "tv", "kl", "anchored")] == pytest.approx(
        expected, abs=1e-6
    )
    assert found["frequencies"] == [predictions.count(place) / 8 for place in range(4)]
    assert found["gold_frequencies"] == [0.25] * 4 and found["notes"] == {} and found["none_rate"] == 0


def test_the_numbers_of_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(0)
    picked, gold = rng.integers(0, 5, 200), rng.integers(0, 5, 200) ** 2 // 5
    found = position_bias(picked, gold, num_choices=5)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, picked))
    recalls = recall_score(gold, picked, average=None, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(found["recall"], recalls)
    assert found["rstd"] == pytest.approx(np.nanstd(recalls))
    assert found["entropy"] == pytest.approx(scipy.stats.entropy(found["frequencies"]) / math.log(5))
    uneven = position_bias([0, 0, 1, 2], [0, 1, 2, 2], num_choices=3)
    assert uneven["kl"] == pytest.approx(scipy.stats.entropy([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))


def test_any_place_may_be_the_anchor() -> None:
    found = position_bias([2, 2, 2, 0], [2, 0, 1, 0], num_choices=3, anchor=2)
    assert found["anchored"] == pytest.approx(2 / 3)


def test_rows_without_an_answer() -> None:
    found = position_bias([-1, 0, 1, 1], [0, 0, 1, 0], num_choices=2)
    assert found["none_rate"] == 0.25 and found["accuracy"] == 0.5
    assert found["frequencies"] == pytest.approx([1 / 3, 2 / 3]) and found["recall"] == pytest.approx([1 / 3, 1])
    found = position_bias([-1, -1], [0, 1], num_choices=2)
    assert math.isnan(found["entropy"]) and found["notes"]["tv"] == "no row has an answer"


def test_right_places_that_are_all_the_same() -> None:
    found = position_bias([0, 1, 1], [0, 0, 0], num_choices=2)
    assert math.isnan(found["recall"][1]) and "[1]" in found["notes"]["recall"]
    # one recall has no spread: 0 would say that there is no bias
    assert math.isnan(found["rstd"]) and found["notes"]["rstd"] == "fewer than two places are ever right"
    assert position_bias([0, 1, 1], [0, 0, 1], num_choices=3)["rstd"] == 0.25
    assert math.isnan(found["anchored"]) and "wrong choice" in found["notes"]["anchored"]
    assert found["kl"] == math.inf and "never right" in found["notes"]["kl"]
    assert found["tv"] == pytest.approx(2 / 3)


def test_unequal_numbers_of_choices_are_told_apart() -> None:
    found = position_bias([0, 1, 2, 3], [0, 0, 2, 1], num_choices=[2, 2, 4, 4], anchor=1)
    assert found["accuracy"] == 0.5 and math.isnan(found["entropy"]) and "by_num_choices" in found["notes"]["entropy"]
    parts = found["by_num_choices"]
    assert repr(parts[2]) == repr(position_bias([0, 1], [0, 0], num_choices=2, anchor=1))
    assert repr(parts[4]) == repr(position_bias([2, 3], [2, 1], num_choices=4, anchor=1))
    beyond = position_bias([0, 1, 2], [0, 0, 3], num_choices=[2, 2, 4], anchor=2)
    assert beyond["anchored"] == 1 and math.isnan(beyond["by_num_choices"][2]["anchored"])


# --- rotations -------------------------------------------------------------------------------------------------------------


def test_each_choice_is_once_at_each_place() -> None:
    turned = rotations(["a", "b", "c"])
    assert turned == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert (
        contents([0, 0, 0], 3) == [0, 1, 2]
        and contents([1, 0, 2], 3) == [1, 1, 1]
        and contents([-1, 2, 0], 3) == [-1, 0, 2]
    )
    for picks in ([0, 1, 2], [2, 2, 1]):
        assert [turned[turn][place] for turn, place in enumerate(picks)] == ["abc"[one] for one in contents(picks, 3)]


def test_consistency_by_hand() -> None:
    found = permutation_consistency([[2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 1, 1]], [2, 1, 1])
    assert found["consistency"] == pytest.approx(0.6667, abs=1e-4)
    assert found["majority_share"] == pytest.approx(0.9167, abs=1e-4)
    assert found["accuracy_per_rotation"] == pytest.approx([2 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert found["accuracy_range"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(7 / 12)
    # the miss: rotation 1, where the right choice 1 is at place 0
    assert found["delta"][0] == pytest.approx(1 / 3 - 7 / 12) and found["delta"][1] == pytest.approx(2 / 3 - 7 / 12)


def test_always_the_same_place() -> None:
    for count in (2, 3, 5):
        rows = [contents([1] * count, count)] * 4
        found = permutation_consistency(rows, [0, 1, 0, 1])
        assert found["consistency"] == 0 and found["majority_share"] == pytest.approx(1 / count)
        assert found["frequencies"] == [float(place == 1) for place in range(count)]
        assert found["entropy"] == 0 and found["accuracy"] == pytest.approx(1 / count)
        assert found["delta"] == pytest.approx([(place == 1) - 1 / count for place in range(count)])
        assert found["anchored"] == 0


def test_rotations_without_an_answer_do_not_agree() -> None:
    found = permutation_consistency([[-1, -1], [0, -1]], [0, 0])
    assert found["consistency"] == 0 and found["majority_share"] == 0.25 and found["none_rate"] == 0.75


def test_ragged_rotations() -> None:
    found = permutation_consistency([[1, 1], [2, 2, 2]], [1, 0])
    assert found["consistency"] == 1 and found["accuracy"] == 0.4
    for key in ("accuracy_per_rotation", "accuracy_range", "delta"):
        assert math.isnan(found[key]) and "see by_num_choices" in found["notes"][key]
    assert repr(found["by_num_choices"]) == repr(
        {2: permutation_consistency([[1, 1]], [1]), 3: permutation_consistency([[2, 2, 2]], [0])}
    )
    mixed = permutation_consistency([[1, 1], [2, 2, 2]], [1, 0], num_choices=3)
    assert math.isnan(mixed["accuracy_range"]) and "unequal numbers of rotations" in mixed["notes"]["delta"]
    assert "by_num_choices" not in mixed
    fewer = permutation_consistency([[1, 1]], [1], num_choices=4)
    assert len(fewer["frequencies"]) == 4 and fewer["frequencies"] == [0.5, 0.5, 0, 0]
    assert np.isnan(fewer["delta"]).tolist() == [False, False, True, True]
    assert fewer["notes"]["delta"] == "the right choice was never at the places [2, 3]"


def test_the_configurations() -> None:
    rows = [[2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 1, 1]]
    found = PositionBias("permuted", keep_in_memory=True).compute(predictions=rows, references=[2, 1, 1])
    assert repr(found) == repr(permutation_consistency(rows, [2, 1, 1]))
    table = [[-1.0, -2.0, -3.0], [-1.0, -1.0, -2.0], [-3.0, -4.0, -2.5]]
    found = PositionBias("logprobs", keep_in_memory=True).compute(predictions=table, references=[1, 0, 2])
    expected = position_bias([0, 0, 2], [1, 0, 2], num_choices=3)
    assert {key: found[key] for key in expected} == expected
    assert found["tie_rate"] == pytest.approx(1 / 3)
    assert found["anchor_gap"] == pytest.approx(((-1 + 2) + (-3 + 2.5)) / 2)


def test_the_gap_of_a_table_that_has_none() -> None:
    made = PositionBias("logprobs", keep_in_memory=True)
    found = made.compute(predictions=[[-1.0, -2.0]], references=[0])
    assert math.isnan(found["anchor_gap"]) and "anchor for a wrong choice" in found["notes"]["anchor_gap"]
    # a banned choice leaves its row out, and not the others
    found = made.compute(predictions=[[-1.0, -3.0], [-1.0, -math.inf]], references=[1, 1])
    assert found["anchor_gap"] == 2 and found["notes"]["anchor_gap"].startswith("1 rows")
    with pytest.raises(ValueError, match="num_choices is not for log-probs"):
        made.compute(predictions=[[-1.0, -3.0]], references=[1], num_choices=2)
    assert made.compute(predictions=[], references=[])["notes"]["tie_rate"] == "there are no rows"
    found = made.compute(predictions=[[-math.inf, -math.inf]], references=[1])
    assert math.isnan(found["anchor_gap"]) and found["none_rate"] == 1 and found["accuracy"] == 0


def test_no_rows() -> None:
    for found in (position_bias([], [], num_choices=4), permutation_consistency([], [])):
        assert math.isnan(found["accuracy"]) and found["notes"]["accuracy"] == "there are no rows"
    assert math.isnan(found["consistency"]) and found["notes"]["consistency"] == "there are no rows"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: position_bias([0], [0, 1], num_choices=2), "2 references for 1 rows"),
        (lambda: position_bias([0], [0], num_choices=1), "num_choices is 1"),
        (lambda: position_bias([0], [0], num_choices=[2, 2]), "2 numbers of choices for 1 rows"),
        (lambda: position_bias([2], [0], num_choices=2), "predictions has 2.*-1 for no answer"),
        (lambda: position_bias([0], [-1], num_choices=2), "references has -1"),
        (lambda: position_bias([0], [0], num_choices=2, anchor=2), "anchor is 2"),
        (lambda: permutation_consistency([[0]], [0]), "1 rotations"),
        (lambda: permutation_consistency([[0, 0, 0]], [0], num_choices=2), "more rotations than choices"),
        (lambda: permutation_consistency([[0, 0]], [0, 0]), "2 references"),
        (lambda: permutation_consistency([[0, 2]], [0]), "predictions has 2"),
        (lambda: permutation_consistency([[0, 1]], [0], anchor=2), "anchor is 2"),
        (
            lambda: PositionBias(keep_in_memory=True).compute(predictions=[0], references=[0]),
            "num_choices is needed",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_majority_is_one_of_the_turns_and_a_variation_one_of_all_places():
    found = permutation_consistency([[2, 2], [0, 1]], [2, 0], num_choices=3)
    assert found["majority_share"] == 0.75
    assert position_bias([0, 0, 1, 1], [2, 2, 3, 3], num_choices=4)["tv"] == 1


def test_half_a_choice_is_refused():
    with pytest.raises((ValueError, TypeError), match=r"2\.7"):  # the tests' type checker is quicker
        position_bias([0, 1], [0, 1], num_choices=2.7)
