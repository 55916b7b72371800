import math

import numpy as np
import pytest

from hf_logits.metrics.calibration_error import calibration_error


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


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.5], [1, 0]), {}, "one number of each"),
        (([1.5], [1]), {}, "must be probabilities"),
        (([math.nan], [1]), {}, "must be probabilities"),
        (([0.5], [2]), {}, "must be 0 or 1"),
        (([0.5], [1]), {"n_bins": 0}, "at least 1"),
        (([0.5], [1]), {"scheme": "round"}, "equal_width"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(*arguments, **options)
