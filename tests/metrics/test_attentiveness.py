import math
from typing import Any

import numpy as np
import pytest

from hf_logits.metrics import Attentiveness
from hf_logits.metrics.attentiveness import attentiveness
from hf_logits.metrics.tables import read_labels


def logs(*rows: Any) -> list[list[float]]:
    with np.errstate(divide="ignore"):
        return [np.log(row).tolist() for row in rows]


@pytest.mark.parametrize(
    ("probs", "mass", "gap", "resolved", "slack"),
    [
        ((0.30, 0.10, 0.05, 0.05), 0.5, 0.2, 0.0, 0.3),
        ((0.60, 0.20, 0.05, 0.05), 0.9, 0.4, 1.0, 0.0),
        ((0.25, 0.25, 0.1, 0.1), 0.7, 0.0, 0.0, 0.3),
        ((0.5, 0.3, 0.2), 1.0, 0.2, 1.0, 0.0),
    ],
)
def test_by_hand(probs: Any, mass: float, gap: float, resolved: float, slack: float) -> None:
    found = attentiveness(logs(probs), [0], return_samples=True)
    assert found["attentiveness"] == pytest.approx(mass, abs=1e-12)
    assert found["sfc_bound"] == pytest.approx(1 - mass, abs=1e-12)
    assert found["samples"]["gap"] == pytest.approx([gap], abs=1e-12)
    assert (found["resolved"], found["slack"]) == (resolved, pytest.approx(slack, abs=1e-12))
    assert math.isnan(found["attentiveness_std"]) and "two rows" in found["notes"]["attentiveness_std"]


def test_deviation_over_questions() -> None:
    found = attentiveness(logs((0.3, 0.2), (0.5, 0.4), (0.1, 0.1)), [0, 0, 0])
    assert found["attentiveness_std"] == pytest.approx(np.std([0.5, 0.9, 0.2], ddof=1))


def test_pmi_by_hand() -> None:
    numerator, denominator = (0.30, 0.10, 0.05, 0.05), (0.20, 0.02, 0.05, 0.10)
    found = attentiveness(logs(numerator, numerator), [0, 1], prior_logprobs=logs(denominator, denominator))
    assert found["accuracy"] == 0.5 and found["accuracy_pmi"] == 0.5
    one = attentiveness(logs(numerator), [1], prior_logprobs=logs(denominator))
    assert (one["accuracy"], one["accuracy_pmi"]) == (0, 1)
    constant = attentiveness(logs(numerator), [0], prior_logprobs=[[-3.0] * 4])
    assert constant["accuracy_pmi"] == constant["accuracy"] == 1


def test_lengths_by_hand() -> None:
    lengths = {"tokens": [[1, 3]], "bytes": [[5, 14]], "chars": [[4, 4]]}
    found = attentiveness([[-4.0, -6.0]], [1], lengths=lengths)
    assert [found[f"accuracy{kind}"] for kind in ("", "_token", "_byte", "_char")] == [0, 1, 1, 0]


def table(rows: int = 60, seed: int = 0) -> tuple[list[list[float]], list[int], np.random.Generator]:
    """Ragged rows of probabilities that add up to less than 1."""
    rng = np.random.default_rng(seed)
    probs = [rng.dirichlet(np.ones(rng.integers(3, 7))).tolist()[:-1] for _ in range(rows)]
    return logs(*probs), [int(rng.integers(len(row))) for row in probs], rng


def test_a_constant_that_is_added_scales_the_mass_and_nothing_else() -> None:
    values, gold, rng = table()
    prior = [rng.normal(size=len(row)).clip(max=0).tolist() for row in values]
    plain = attentiveness(values, gold, prior_logprobs=prior)
    moved = attentiveness([[one - 1.5 for one in row] for row in values], gold, prior_logprobs=prior)
    for key in ("accuracy", "accuracy_pmi", "tie_rate"):
        assert moved[key] == plain[key]
    assert moved["attentiveness"] == pytest.approx(plain["attentiveness"] * math.exp(-1.5))


def test_a_constant_that_is_added_does_change_accuracy_by_length() -> None:
    """By tokens, -0.2 and -3 / 3 become -4.2 and -7 / 3."""
    for shift, right in ((0.0, 1.0), (-4.0, 0.0)):
        found = attentiveness([[shift - 0.2, shift - 3.0]], [0], lengths={"tokens": [[1, 3]]})
        assert found["accuracy"] == 1 and found["accuracy_token"] == right
    values, gold, rng = table()
    sizes = {"tokens": [rng.integers(1, 5, len(row)).tolist() for row in values]}
    moved = [[one - 5 for one in row] for row in values]
    assert attentiveness(values, gold)["accuracy"] == attentiveness(moved, gold)["accuracy"]
    plain, lower = (attentiveness(rows, gold, lengths=sizes)["accuracy_token"] for rows in (values, moved))
    assert plain != lower


def test_nothing_is_resolved_with_half_the_mass_or_less() -> None:
    values, gold, _ = table(500)
    samples = attentiveness(values, gold, return_samples=True)["samples"]
    mass, resolved = np.array(samples["mass"]), np.array(samples["resolved"])
    assert ((mass > 0) & (mass <= 1)).all() and resolved.any() and (mass <= 0.5).any()
    assert not resolved[mass <= 0.5].any()


def test_the_numbers_of_lm_eval() -> None:
    """Its accuracies are the share of argmax = gold, of the log-probs divided by characters or bytes, or less the prior's."""
    values, gold, rng = table()
    chars = [rng.integers(1, 20, len(row)).tolist() for row in values]
    sizes = [[one + int(rng.integers(0, 4)) for one in row] for row in chars]
    prior = [(-rng.exponential(2.0, len(row))).tolist() for row in values]
    found = attentiveness(values, gold, prior_logprobs=prior, lengths={"chars": chars, "bytes": sizes})
    expected = {"accuracy": 0.0, "accuracy_char": 0.0, "accuracy_byte": 0.0, "accuracy_pmi": 0.0}
    for ll, right, c, b, p in zip(map(np.array, values), gold, chars, sizes, prior, strict=True):
        scores = (ll, ll / np.array(c, float), ll / np.array(b, float), ll - np.array(p))
        for key, score in zip(expected, scores, strict=True):
            expected[key] += float(np.argmax(score) == right) / len(gold)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12)
    assert len(set(expected.values())) > 2


def test_equal_choices_add_once_and_leave_no_gap() -> None:
    found = attentiveness(logs((0.4, 0.4, 0.1)), [0], distinct=[[True, False, True]], return_samples=True)
    assert found["attentiveness"] == pytest.approx(0.5)
    assert found["samples"]["gap"] == [0.0] and found["resolved"] == 0 and found["tie_rate"] == 1


def test_a_choice_within_another_is_not_counted_twice() -> None:
    found = attentiveness(logs((0.4, 0.3)), [0], distinct=[[True, False]])
    assert found["attentiveness"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match="row 0 have 1.1 of probability together.*distinct="):
        attentiveness(logs((0.6, 0.5)), [0])


def test_ties_are_counted_and_the_first_wins() -> None:
    found = attentiveness([[-1.0, -1.0], [-1.0, -2.0], [-2.0, -1.0, -1.0]], [1, 0, 1])
    assert found["tie_rate"] == pytest.approx(2 / 3) and found["accuracy"] == pytest.approx(2 / 3)


def test_impossible_choices() -> None:
    found = attentiveness(
        logs((0.0, 0.5), (0.0, 0.0), (0.2, 0.3)), [1, 0, 0], prior_logprobs=logs((0.1, 0.1), (0.1, 0.1), (0.1, 0.0))
    )
    assert found["attentiveness"] == pytest.approx(1 / 3) and found["accuracy"] == pytest.approx(1 / 3)
    assert "1 rows have no choice" in found["notes"]["accuracy"]
    assert found["accuracy_pmi"] == pytest.approx(2 / 3) and "1 choices have no" in found["notes"]["accuracy_pmi"]
    assert found["tie_rate"] == 0


def test_no_rows_and_what_was_not_given() -> None:
    found = attentiveness([], [])
    assert math.isnan(found["attentiveness"]) and found["notes"]["accuracy"] == "there are no rows"
    found = attentiveness(logs((0.1, 0.2)), [0])
    assert math.isnan(found["accuracy_pmi"]) and math.isnan(found["accuracy_byte"])
    assert found["notes"]["accuracy_byte"] == "lengths in bytes were not given"


def test_the_configurations_take_it_batch_by_batch() -> None:
    values, gold, rng = table(4)
    sizes = [rng.integers(1, 9, len(row)).tolist() for row in values]
    more: dict[str, Any] = {"prior_logprobs": values[::1], "distinct": [[True] * len(row) for row in values]}
    more["prior_logprobs"] = [[one - 0.1 * place for place, one in enumerate(row)] for row in values]
    whole = Attentiveness(keep_in_memory=True).compute(
        predictions=values, references=gold, **more, lengths={"tokens": sizes, "chars": sizes, "bytes": sizes}
    )
    lengths = {f"{unit}_lengths": sizes for unit in ("token", "char", "byte")}
    made = Attentiveness("full", keep_in_memory=True)
    for part in (slice(0, 2), slice(2, 4)):
        made.add_batch(
            predictions=values[part],
            references=gold[part],
            **{key: value[part] for key, value in (more | lengths).items()},
        )
    assert made.compute() == whole and whole["notes"] == {}


def test_labels_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="must be whole numbers"):
        read_labels([0.5], np.array([2]), "references")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[-1.0, -2.0]], [0, 1]), {}, "2 references for 1 rows"),
        (([[-1.0]], [0]), {}, "Row 0 of predictions has 1 choices"),
        (([[-1.0, -2.0]], [2]), {}, "references has 2 in row 0.*0 to 1"),
        (([[-1.0, -2.0]], [-1]), {}, "references has -1"),
        (([[-1.0, math.nan]], [0]), {}, "predictions has NaN, first in row 0"),
        (([[-1.0, -2.0], [0.3, -1.0]], [0, 0]), {}, "at most 0; row 1 has 0.3"),
        (([[-1.0, -2.0]], [0]), {"prior_logprobs": [[-1.0]]}, r"prior_logprobs has \[1\] entries"),
        (([[-1.0, -2.0]], [0]), {"prior_logprobs": [[0.5, -1.0]]}, "prior_logprobs must be log-probabilities"),
        (([[-1.0, -2.0]], [0]), {"prior_logprobs": [[math.nan, -1.0]]}, "prior_logprobs has NaN"),
        (([[-1.0, -2.0]], [0]), {"lengths": {"tokens": [[1, 0]]}}, "above 0; the smallest is 0"),
        (([[-1.0, -2.0]], [0]), {"lengths": {"words": [[1, 1]]}}, r"lengths are in \['words'\]"),
        (([[-1.0, -2.0]], [0]), {"distinct": [[True]]}, "distinct has"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attentiveness(*arguments, **options)


def test_a_gap_as_large_as_the_missing_mass_resolves_nothing():
    found = attentiveness(logs((0.5, 0.25)), [0], return_samples=True)
    assert (found["resolved"], found["samples"]["resolved"], found["slack"]) == (0, [False], 0)


def test_rounding_leaves_no_negative_bound_and_hides_no_positive_log_prob():
    assert attentiveness(logs((0.50004, 0.50001)), [0])["sfc_bound"] == 0
    with pytest.raises(ValueError, match="at most 0"):
        attentiveness([[0.01, -9.0]], [0], distinct=[[False, True]])
