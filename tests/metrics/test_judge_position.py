import itertools
import math

import numpy as np
import pytest
from sklearn import metrics

from hf_logits.metrics import JudgePosition
from hf_logits.metrics.judge_position import cohen_kappa, judge_position, shares, verdicts
from hf_logits.metrics.tables import entropy


AB = [(9.0, 7.0), (8.0, 7.0), (9.0, 8.0)]
BA = [(7.0, 8.0), (7.0, 7.0), (8.0, 9.0)]  # swapped back


def swapped(rows):
    """The scores of each sample exchanged."""
    return [[sample[::-1] for sample in row] for row in rows]


def random_rows(seed: int, rows: int = 40, samples: int = 3) -> list[list[list[float]]]:
    return np.random.default_rng(seed).integers(1, 6, (rows, samples, 2)).astype(float).tolist()


def test_a_row_by_hand() -> None:
    scores = np.array(AB + BA)
    assert scores.reshape(2, 3, 2).mean(1).mean(0) == pytest.approx([8.0, 23 / 3])
    assert np.bincount(verdicts(scores)).tolist() == [3, 1, 2]
    found = judge_position([AB], [BA], swapped_back=True)
    assert found["bpde"] == pytest.approx(1.011404, abs=1e-6)
    assert (found["win"], found["tie"], found["lose"], found["conflict_rate"]) == (1, 0, 0, 1)
    assert found["verdicts"] == ["win"]
    assert found["by_order"] == {
        "first": {"win": 1.0, "tie": 0.0, "lose": 0.0},
        "second": {"win": 0.0, "tie": 0.0, "lose": 1.0},
    }
    # five of six verdicts are for what stood first
    assert found["by_position"] == pytest.approx({"first": 5 / 6, "tie": 1 / 6, "second": 0})


def test_the_second_order_as_shown() -> None:
    as_shown = judge_position([AB], swapped([BA]), swapped_back=False)
    assert as_shown == judge_position([AB], [BA], swapped_back=True)


def test_every_entropy_of_six_votes() -> None:
    possible = {0, 0.450561, 0.636514, 0.693147, 0.867563, 1.011404, 1.098612}
    votes = itertools.product(range(3), repeat=6)
    assert {round(entropy(shares(np.array(vote))), 6) for vote in votes} == possible


@pytest.mark.parametrize(
    ("first", "second", "bpde", "verdict"),
    [([(2.0, 1.0)] * 3, [(2.0, 1.0)] * 3, 0.0, "win"), ([(2.0, 1.0)] * 3, [(1.0, 2.0)] * 3, math.log(2), "tie")],
)
def test_unanimous_and_split_votes(first: list, second: list, bpde: float, verdict: str) -> None:
    found = judge_position([first], [second], swapped_back=True)
    assert (found["bpde"], found["verdicts"]) == (pytest.approx(bpde, abs=1e-12), [verdict])


def test_exchanging_the_candidates_exchanges_the_verdicts() -> None:
    first, second = random_rows(0), random_rows(1)
    one = judge_position(first, second, swapped_back=True)
    # B takes A's place: what was the second order is now the first
    other = judge_position(swapped(second), swapped(first), swapped_back=True)
    assert (one["win"], one["tie"], one["lose"]) == (other["lose"], other["tie"], other["win"])
    assert one["conflict_rate"] == other["conflict_rate"] > 0
    assert one["bpde"] == pytest.approx(other["bpde"], abs=1e-12)
    assert one["review_indices"] == other["review_indices"]
    assert one["by_position"] == pytest.approx(other["by_position"])


def test_a_judge_of_position_alone_conflicts_everywhere_and_ties() -> None:
    shown = [[(7.0, 6.0)] * 3] * 5
    found = judge_position(shown, shown, swapped_back=False)
    assert (found["conflict_rate"], found["tie"]) == (1, 1)
    assert found["by_position"] == {"first": 1.0, "tie": 0.0, "second": 0.0}


def test_a_judge_of_content_alone_never_conflicts() -> None:
    rows = random_rows(2)
    found = judge_position(rows, rows, swapped_back=True)
    assert found["conflict_rate"] == 0
    assert found["by_order"]["first"] == found["by_order"]["second"]


def test_one_sample_an_order_has_two_entropies() -> None:
    rows = [random_rows(seed, samples=1) for seed in (3, 4)]
    for first, second in zip(*rows, strict=True):
        ends = judge_position([first], [second], swapped_back=True)["bpde"]
        assert ends in (0.0, pytest.approx(math.log(2), abs=1e-12))


def test_means_of_thirds_tie() -> None:
    first, second = [(0.1, 0.6), (0.2, 0.0), (0.3, 0.0)], [(0.6, 0.1), (0.0, 0.2), (0.0, 0.3)]
    assert np.mean([0.1, 0.2, 0.3]) != np.mean([0.6, 0.0, 0.0])
    assert judge_position([first], [second], swapped_back=True)["verdicts"] == ["tie"]
    assert judge_position([first], [first], swapped_back=True)["verdicts"] == ["tie"]


def test_lost_samples_do_not_bring_the_position_back() -> None:
    """A judge that adds 2 to what stands first, and loses two of three samples in one order."""
    rows = ([[(7.0, 5.0)]], [[(5.0, 7.0)] * 3])
    with pytest.raises(ValueError, match="1 samples in one order and 3 in the other.*unbalanced='average'"):
        judge_position(*rows, swapped_back=True)
    lost = judge_position(*rows, swapped_back=True, unbalanced="abstain")
    assert lost["abstained"] == [0] and "1 rows with more samples" in lost["notes"]["unbalanced"]
    fair = judge_position(*rows, swapped_back=True, unbalanced="average")
    assert fair["verdicts"] == ["tie"] and "1 rows with more samples" in fair["notes"]["unbalanced"]
    half = judge_position([*rows[0], []], [*rows[1], AB], swapped_back=True, unbalanced="average")
    assert half["abstained"] == [1]
    assert fair["bpde"] == pytest.approx(math.log(2))


def test_abstentions() -> None:
    first, second = [AB, [], AB, AB], [BA, [], AB, []]
    with pytest.raises(ValueError, match="Row 3 has 3 samples in one order and 0 in the other"):
        judge_position(first, second, swapped_back=True)
    found = judge_position(first, second, swapped_back=True, unbalanced="abstain", review=0.5)
    assert found["abstained"] == [1, 3]
    assert found["verdicts"] == ["win", None, "win", None]
    assert found["review_indices"] == [0]
    assert found["conflict_rate"] == 0.5


def test_people_review_the_rows_with_most_entropy() -> None:
    sure, unsure = [(2.0, 1.0)] * 2, [(2.0, 1.0), (1.0, 2.0)]
    rows = [sure, unsure, sure, unsure, sure]
    for review, expected in ((0.0, []), (0.2, [1]), (0.4, [1, 3]), (0.41, [0, 1, 3]), (1.0, [0, 1, 2, 3, 4])):
        found = judge_position(rows, rows, swapped_back=True, review=review)
        assert found["review_indices"] == expected
    many = [unsure, sure] * 40
    found = judge_position(many, many, swapped_back=True, review=0.25)
    assert found["review_indices"] == list(range(0, 40, 2))  # of equal ones the earlier
    said = ["win", "lose", "lose", "tie", "win"]
    found = judge_position(rows, rows, said, swapped_back=True, review=0.4)
    assert found["verdicts"] == ["win", "tie", "win", "tie", "win"]
    assert (found["accuracy"], found["accuracy_after_review"]) == (0.6, 0.8)
    assert found["kappa_after_review"] > found["kappa"]


def test_kappa_by_hand() -> None:
    assert cohen_kappa("wwtllw", "wttlww") == pytest.approx(0.478261, abs=1e-6)


def test_scikit_learn_agrees() -> None:
    rng = np.random.default_rng(0)
    for names in (["win", "tie", "lose"], ["win", "lose"]):
        one, other = rng.choice(names, 30).tolist(), rng.choice(names, 30).tolist()
        assert cohen_kappa(one, other) == pytest.approx(metrics.cohen_kappa_score(one, other), abs=1e-12)
    assert cohen_kappa(["win"] * 3, ["tie"] * 3) == metrics.cohen_kappa_score(["win"] * 3, ["tie"] * 3) == 0


def test_constant_raters_have_no_kappa() -> None:
    found = judge_position([AB], [AB], ["win"], swapped_back=True)
    assert found["accuracy"] == 1
    assert math.isnan(found["kappa"]) and "the same one thing" in found["notes"]["kappa"]


def test_no_rows_are_said_to_be_none() -> None:
    for rows in ([], [[]]):
        found = judge_position(rows, rows, ["win"] * len(rows), swapped_back=True)
        for key in ("win", "conflict_rate", "bpde", "accuracy", "kappa", "kappa_after_review"):
            assert math.isnan(found[key]) and found["notes"][key] == "no row was judged"
        assert found["abstained"] == list(range(len(rows))) and found["review_indices"] == []
    made = JudgePosition(keep_in_memory=True)
    assert math.isnan(made.compute(predictions1=[], predictions2=[], swapped_back=True)["bpde"])


def test_the_module_takes_ragged_rows_and_references() -> None:
    first, second = [AB, AB[:1], []], [BA, BA, []]
    made = JudgePosition("references", keep_in_memory=True)
    rows = {"predictions1": first, "predictions2": second, "references": ["win", "lose", "tie"]}
    options = {"swapped_back": True, "unbalanced": "average"}
    assert made.compute(**rows, **options) == judge_position(*rows.values(), **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (([AB], []), {}, "1 rows in the first order and 0"),
        (([AB], [BA], ["win", "win"]), {}, "2 references for 1 rows"),
        (([AB], [BA], ["A"]), {}, "'win', 'tie' or 'lose'"),
        (([[(1.0,)]], [BA]), {}, "a pair of scores, one a candidate; row 0"),
        (([[(1.0, 2.0, 3.0)]], [BA]), {}, "a pair of scores"),
        (([[(1.0, math.nan)]], [BA]), {}, "must be finite; row 0"),
        (([AB], [[(1.0, -math.inf)]]), {}, "must be finite; row 0"),
        (([AB], [[]]), {}, "unbalanced='abstain'"),
        (([AB], [BA]), {"review": 1.5}, "review must be in"),
        (([AB], [BA]), {"unbalanced": "drop"}, "'error', 'abstain' or 'average'"),
    ],
)
def test_bad_input(rows: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_position(*rows, swapped_back=True, **options)


def test_the_order_of_the_scores_has_to_be_said() -> None:
    with pytest.raises(TypeError, match="swapped_back"):
        JudgePosition(keep_in_memory=True).compute(predictions1=[AB], predictions2=[BA])


def test_a_win_against_a_tie_is_a_conflict():
    assert judge_position([[[8.0, 7.0]]], [[[7.0, 7.0]]], swapped_back=True)["conflict_rate"] == 1


def test_a_review_mends_what_was_most_in_doubt():
    rows = [[[9.0, 7.0]], [[9.0, 7.0]]], [[[7.0, 9.0]], [[9.0, 7.0]]]
    found = judge_position(*rows, ["lose", "win"], swapped_back=True, review=0.5)
    assert (found["accuracy"], found["accuracy_after_review"]) == (0.5, 1)
