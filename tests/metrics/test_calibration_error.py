import math

import numpy as np
import pytest
from sklearn import calibration, metrics

from hf_logits.metrics import CalibrationError
from hf_logits.metrics.calibration_error import best_choices, calibration_error


CONFIDENCES = (0.95, 0.85, 0.75, 0.65, 0.55, 0.95, 0.45, 0.35)
CORRECT = (1, 1, 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(("n_bins", "ece", "mce"), [(10, 0.375, 0.75), (5, 0.2875, 0.65), (1, 0.0625, 0.0625)])
def test_errors_by_hand(n_bins: int, ece: float, mce: float) -> None:
    found = calibration_error(CONFIDENCES, CORRECT, n_bins=n_bins)
    assert found["ece"] == pytest.approx(ece, abs=1e-12)
    assert found["mce"] == pytest.approx(mce, abs=1e-12)


def test_every_binning_is_at_least_the_mean_gap() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.random(200)
    correct = (rng.random(200) < 0.5).astype(int)
    for scheme in ("equal_width", "equal_mass"):
        for n_bins in (1, 3, 10, 50, 400):
            found = calibration_error(confidences, correct, n_bins=n_bins, scheme=scheme)
            assert found["ece"] >= abs(found["gap"]) - 1e-12
            assert sum(one["count"] for one in found["bins"]) == 200


def test_probabilities_of_all_choices() -> None:
    made = CalibrationError("choices", keep_in_memory=True)
    found = made.compute(predictions=[[0.9, 0.1], [0.2, 0.3, 0.5], [0.4, 0.6]], references=[0, 1, 1], n_bins=5)
    assert found == calibration_error([0.9, 0.5, 0.6], [1, 0, 1], n_bins=5)
    assert math.isnan(made.compute(predictions=[], references=[])["ece"])
    for row, message in (([0.9, 0.2], "1 together"), ([1.0], "two choices"), ([1.5, -0.5], "1 together")):
        with pytest.raises(ValueError, match=message):
            made.compute(predictions=[row], references=[0])
    with pytest.raises(ValueError, match="references has 2"):
        made.compute(predictions=[[0.5, 0.5]], references=[2])


def test_bins_are_closed_on_the_right() -> None:
    found = calibration_error([0.0, 0.1, 0.2, 0.2000001, 1.0], [0, 0, 0, 0, 1], n_bins=10)
    assert [one["count"] for one in found["bins"]] == [2, 1, 1, 1]


def test_bins_of_equal_mass_hold_the_same_number() -> None:
    confidences = np.random.default_rng(0).random(100) ** 3
    found = calibration_error(confidences, [1] * 100, n_bins=5, scheme="equal_mass")
    assert [one["count"] for one in found["bins"]] == [20] * 5


def test_certainty_that_is_right_costs_nothing_and_wrong_everything() -> None:
    found = calibration_error([1.0, 0.0], [1, 0])
    assert (found["ece"], found["brier"], found["nll"]) == (0, 0, 0)
    assert calibration_error([1.0], [0])["nll"] == math.inf


def test_no_rows_are_said_to_be_none() -> None:
    found = calibration_error([], [])
    assert math.isnan(found["ece"]) and found["notes"]["ece"] == "there are no rows"


def test_bins_are_a_whole_number() -> None:
    with pytest.raises(TypeError, match="n_bins must be a whole number"):
        calibration_error([0.5], [1], n_bins=True)
    with pytest.raises(TypeError, match="n_bins"):  # the types, checked in tests, are quicker
        calibration_error([0.5], [1], n_bins=2.5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.5], [1, 0]), {}, "one number of each"),
        (([1.5], [1]), {}, "must be probabilities"),
        (([math.nan], [1]), {}, "must be probabilities"),
        (([0.5], [2]), {}, "must be 0 or 1"),
        (([0.5], [1]), {"n_bins": 0}, "at least 1"),
        (([0.5], [1]), {"scheme": "round"}, "equal_width"),
        # also where there is nothing to bin
        (([], []), {"n_bins": 0}, "at least 1"),
        (([], []), {"scheme": "round"}, "equal_width"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(*arguments, **options)


def test_scikit_learn_agrees() -> None:
    rng = np.random.default_rng(0)
    confidences, correct = rng.random(500), (rng.random(500) < 0.6).astype(int)
    for ours, theirs in (("equal_width", "uniform"), ("equal_mass", "quantile")):
        found = calibration_error(confidences, correct, n_bins=10, scheme=ours)
        accuracy, confidence = calibration.calibration_curve(correct, confidences, n_bins=10, strategy=theirs)
        assert [one["accuracy"] for one in found["bins"]] == pytest.approx(accuracy, abs=1e-12)
        assert [one["confidence"] for one in found["bins"]] == pytest.approx(confidence, abs=1e-12)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(correct, confidences), abs=1e-12)
    assert found["nll"] == pytest.approx(metrics.log_loss(correct, confidences), abs=1e-12)
    assert found["accuracy"] == correct.mean()


def test_ties_share_a_bin_and_edges_are_exact() -> None:
    # each tenth is the right edge of its own bin, as it is written
    tenths = [place / 10 for place in range(1, 11)]
    assert [one["count"] for one in calibration_error(tenths, [1] * 10, n_bins=10)["bins"]] == [1] * 10
    for scheme in ("equal_width", "equal_mass"):
        found = calibration_error([0.7] * 6, [1, 1, 1, 0, 0, 0], n_bins=4, scheme=scheme)
        assert [one["count"] for one in found["bins"]] == [6]
        assert found["ece"] == pytest.approx(0.2)


def test_answers_that_are_all_right_or_all_wrong() -> None:
    assert calibration_error([0.9, 0.6], [1, 1])["gap"] == pytest.approx(-0.25)
    assert calibration_error([0.9, 0.6], [0, 0])["ece"] == pytest.approx(0.75)


def test_bins_of_equal_mass_are_cut_where_a_score_is():
    found = calibration_error([0.1, 0.2, 0.3, 0.4, 0.5], [0, 0, 0, 1, 1], n_bins=3, scheme="equal_mass")
    assert [one["count"] for one in found["bins"]] == [2, 2, 1]


def test_choices_may_exceed_one_by_rounding_and_no_more():
    assert best_choices([[1.0005, 0.0]], [0])[0].tolist() == [1.0]
    with pytest.raises(ValueError, match="1 together"):
        best_choices([[0.5, 0.45]], [0])
