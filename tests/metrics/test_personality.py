import math

import numpy as np
import pytest

from hf_logits.metrics import Personality
from hf_logits.metrics.personality import personality, trait_scores


TESTS = [[60.0, 50.0, 40.0, 55.0, 45.0], [64.0, 52.0, 38.0, 57.0, 47.0], [56.0, 48.0, 42.0, 53.0, 43.0]]
QUESTIONS = [
    {"statement": "I like parties.", "trait": "E", "sign": 1},
    {"statement": "I like to be alone.", "trait": "E", "sign": -1},
    {"statement": "I like plans.", "trait": "J"},
]


def groups(**tests: list[list[float]]) -> tuple[list[list[float]], list[str]]:
    return [row for rows in tests.values() for row in rows], [name for name, rows in tests.items() for _ in rows]


def around(mean: list[float]) -> list[list[float]]:
    """Three tests as far from each other as those above."""
    return (np.array(TESTS) - TESTS[0] + mean).tolist()


def test_consistency_by_hand():
    found = personality(TESTS)
    # distances of 0, sqrt(32) and sqrt(32) to the mean, which is the first test
    assert found["consistency"] == pytest.approx(100 / (100 + 2 * math.sqrt(32) / 3), abs=1e-12)
    assert found["consistency"] == pytest.approx(0.963658, abs=5e-7)


def test_robustness_by_hand():
    found = personality(*groups(fixed=[[62.0, 49.0, 41.0, 54.0, 46.0]], permuted=TESTS))
    assert found["robustness"] == pytest.approx(0.972494, abs=5e-7)
    other = personality(*groups(first=[[62.0, 49.0, 41.0, 54.0, 46.0]], then=TESTS), fixed="first", permuted="then")
    assert other["robustness"] == found["robustness"]
    assert math.isnan(found["fairness"])  # fixed and permuted are no subjects


def test_fairness_by_hand():
    # means at a distance of sqrt(88) = 9.380832
    shift = np.array([6.0, 4.0, -4.0, 4.0, 2.0])
    women = around((np.array(TESTS[0]) + shift).tolist())
    found = personality(*groups(men=TESTS, women=women))
    assert found["consistency_by_group"] == pytest.approx({"men": 0.963658, "women": 0.963658}, abs=5e-7)
    assert found["fairness"] == pytest.approx(0.848994, abs=5e-7)
    assert found["fairness_by_pair"] == {"men, women": found["fairness"]}
    assert found["means"]["men"] == pytest.approx(TESTS[0]) and found["counts"] == {"men": 3, "women": 3}


def test_several_subjects_are_compared_pair_by_pair():
    tests, names = groups(a=TESTS, b=around([1.0, 2.0, 3.0, 4.0, 5.0]), c=around([9.0] * 5))
    found = personality(tests, names)
    assert list(found["fairness_by_pair"]) == ["a, b", "a, c", "b, c"]
    two = [(row, name) for row, name in zip(tests, names, strict=True) if name != "b"]
    alone = personality([row for row, _ in two], [name for _, name in two])
    assert found["fairness_by_pair"]["a, c"] == alone["fairness"]
    assert found["fairness"] == pytest.approx(np.mean(list(found["fairness_by_pair"].values())))


def test_the_order_of_tests_does_not_matter():
    tests, names = groups(fixed=TESTS, permuted=around([50.0] * 5), men=TESTS, women=around([40.0] * 5))
    order = np.random.default_rng(0).permutation(len(tests))
    mixed = personality([tests[i] for i in order], [names[i] for i in order])
    found = personality(tests, names)
    for key in ("consistency", "robustness", "fairness"):
        assert mixed[key] == pytest.approx(found[key], abs=1e-12) and 0 < found[key] < 1
    assert found["notes"] == {}


def test_what_never_differs_is_1_whatever_alpha_and_a_distance_of_alpha_a_half():
    found = personality(
        *groups(fixed=[[3.0, 4.0]] * 2, permuted=[[3.0, 4.0]] * 2, a=[[0.0] * 2] * 2, b=[[0.0] * 2] * 2), alpha=7.0
    )
    assert (found["consistency"], found["robustness"], found["fairness"]) == (1, 1, 1)
    found = personality(*groups(fixed=[[0.0, 0.0]] * 2, permuted=[[3.0, 4.0]] * 2), alpha=5.0)
    assert found["robustness"] == 0.5


# --- answers ---------------------------------------------------------------------------------------------------------------


def test_answers_are_agreement_with_a_trait():
    traits, scores = trait_scores([[7, 1, 4], [1, 7, 7], [7, 7, 2], [6, 4, 1]], QUESTIONS)
    assert traits == ["E", "J"]
    assert scores.tolist() == [
        pytest.approx(row) for row in ([100, 50], [0, 100], [50, 100 / 6], [(500 / 6 + 50) / 2, 0])
    ]
    assert trait_scores([[1, 2, 2]], QUESTIONS, options=2)[1].tolist() == [[0, 100]]


def test_answers_as_a_module():
    answers, names = [[7, 1, 4], [6, 2, 4], [1, 7, 7], [1, 7, 6]], ["men", "men", "women", "women"]
    found = Personality("answers", keep_in_memory=True).compute(
        predictions=answers, references=names, questions=QUESTIONS
    )
    assert found.pop("traits") == ["E", "J"]
    assert repr(found) == repr(personality(trait_scores(answers, QUESTIONS)[1], names))
    with pytest.raises(ValueError, match="Answers need questions="):
        Personality("answers", keep_in_memory=True).compute(predictions=answers, references=names)


# --- what is undefined, and what is refused ----------------------------------------------------------------------------------


def test_one_test_is_not_consistent_but_undefined():
    found = personality(*groups(men=TESTS, women=TESTS[:1]))
    assert math.isnan(found["consistency"]) and math.isnan(found["fairness"])
    assert found["consistency_by_group"]["men"] == pytest.approx(0.963658, abs=5e-7)
    assert (
        found["notes"]["consistency"]
        == found["notes"]["fairness"]
        == ("a single test is always consistent; of 'women' there is one")
    )
    alone = "a single test is always consistent"
    assert math.isnan(found["consistency_by_group"]["women"]) and math.isnan(found["fairness_by_pair"]["men, women"])
    assert found["notes"]["consistency_by_group.women"] == found["notes"]["fairness_by_pair.men, women"] == alone
    assert "consistency_by_group.men" not in found["notes"]
    assert found["notes"]["robustness"] == "it needs tests of the groups 'fixed' and 'permuted'"
    assert personality(TESTS)["notes"]["fairness"] == "it needs tests of two subjects or more"


def test_no_tests_are_said_to_be_none():
    for found in (personality([], []), Personality(keep_in_memory=True).compute(predictions=[], references=[])):
        assert all(math.isnan(found[key]) for key in ("consistency", "robustness", "fairness"))
        assert found["notes"]["consistency"] == "there are no tests"
    assert trait_scores([], QUESTIONS)[1].shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1.0, 2.0], [1.0]],), {}, r"rows of \[1, 2\] scores"),
        (([[], []],), {}, r"rows of \[0\] scores"),
        (([[1.0], [math.nan]],), {}, r"the tests \[1\] are not"),
        (([[1.0], [2.0]], ["a"]), {}, "2 tests and 1 groups"),
        (([[1.0]],), {"alpha": 0.0}, "alpha"),
        (([[1.0]],), {"fixed": "permuted"}, "robustness compares two groups"),
    ],
)
def test_bad_scores(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        personality(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1, 2]], QUESTIONS), {}, "3 questions and 2 answers in row 0"),
        (([[1, 2, 3], [1]], QUESTIONS), {}, "3 questions and 1 answers in row 1"),
        (([[]], []), {}, "0 questions"),
        (([[0, 2, 3]], QUESTIONS), {}, "from 1 to 7"),
        (([[1, 2, 3]], QUESTIONS), {"options": 2}, "from 1 to 2"),
        (([[1, 2, 3]], QUESTIONS), {"options": 1}, "options must be a whole number of at least 2"),
        (([[1]], [{"sign": 1}]), {}, "Question 0 must have a trait"),
        (([[1]], [{"trait": "E", "sign": 0}]), {}, "a sign of 1 or -1"),
    ],
)
def test_bad_answers(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        trait_scores(*arguments, **options)


def test_consistency_is_the_mean_over_groups():
    assert personality([[0.0], [0.0], [0.0], [200.0]], ["a", "a", "b", "b"])["consistency"] == 0.75
