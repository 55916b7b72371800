"""Rates of a score, by hand, by counting pairs, and against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from hf_logits.roc import (
    NEVER,
    auc,
    auc_interval,
    rate,
    roc_curve,
    threshold_for_false_rate,
    threshold_for_true_rate,
)


POSITIVE = np.array([0.9, 0.8, 0.8, 0.4])
NEGATIVE = np.array([0.8, 0.4, 0.3, 0.1, 0.0])


def scores(seed, *, ties=True):
    """Probabilities, with many ties or none."""
    generator = np.random.default_rng(seed)
    both = generator.beta(2, 1, 23), generator.beta(1, 2, 31)
    return [np.float32(np.round(one, 1) if ties else one).astype(np.float64) for one in both]


def test_by_hand():
    curve = roc_curve(POSITIVE, NEGATIVE)
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.8, 0.4, 0.3, 0.1, 0.0]
    assert curve.true_rates.tolist() == [0, 0.25, 0.75, 1, 1, 1, 1]
    assert curve.false_rates.tolist() == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1])
    # of 20 pairs, 5 + 2 x 4.5 + 3.5 are won
    assert curve.auc == 17.5 / 20


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_is_the_share_of_pairs_that_are_won(ties):
    for seed in range(5):
        positive, negative = scores(seed, ties=ties)
        won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
        assert auc(positive, negative) == won / (len(positive) * len(negative))
        curve = roc_curve(positive, negative)
        widths, heights = np.diff(curve.false_rates), (curve.true_rates[1:] + curve.true_rates[:-1]) / 2
        assert (widths * heights).sum() == pytest.approx(curve.auc)  # the trapezoids below
        assert auc(-positive, -negative) == pytest.approx(1 - curve.auc)


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_agrees(ties):
    positive, negative = scores(0, ties=ties)
    labels, both = np.repeat([1, 0], [len(positive), len(negative)]), np.concatenate([positive, negative])
    false_rates, true_rates, thresholds = metrics.roc_curve(labels, both, drop_intermediate=False)
    curve = roc_curve(positive, negative)
    np.testing.assert_allclose(curve.false_rates, false_rates)
    np.testing.assert_allclose(curve.true_rates, true_rates)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    assert curve.auc == pytest.approx(metrics.roc_auc_score(labels, both), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_a_threshold_is_the_best_that_keeps_its_promise(ties, wanted):
    for seed in range(5):
        positive, negative = scores(seed, ties=ties)
        tried = [*np.unique(np.concatenate([positive, negative])), NEVER]
        enough = threshold_for_true_rate(positive, negative, wanted)
        assert rate(positive, enough) >= wanted
        # no threshold above does, up to rates that are the same
        best = max(bound for bound in tried if rate(positive, bound) >= wanted)
        assert (rate(positive, enough), rate(negative, enough)) == (rate(positive, best), rate(negative, best))
        few = threshold_for_false_rate(positive, negative, wanted)
        assert rate(negative, few) <= wanted
        best = min(bound for bound in tried if rate(negative, bound) <= wanted)
        assert (rate(positive, few), rate(negative, few)) == (rate(positive, best), rate(negative, best))


def test_a_threshold_keeps_its_distance_from_scores():
    assert threshold_for_true_rate(POSITIVE, NEGATIVE, 0.5) == pytest.approx(0.6)
    assert threshold_for_true_rate(POSITIVE, NEGATIVE, 1.0) == pytest.approx(0.35)
    assert threshold_for_true_rate(POSITIVE, NEGATIVE, 0.0) == NEVER
    assert threshold_for_false_rate(POSITIVE, NEGATIVE, 0.2) == pytest.approx(0.6)
    assert threshold_for_false_rate(POSITIVE, NEGATIVE, 0.19) == pytest.approx(0.85)
    assert threshold_for_false_rate(POSITIVE, NEGATIVE, 1.0) == 0.0
    assert threshold_for_false_rate(np.array([1.0]), np.array([1.0]), 0.0) > 1
    # neighbours in float32, between which there is nothing
    low, high = (float(np.nextafter(np.float32(0.5), np.float32(side))) for side in (0, 1))
    assert threshold_for_true_rate(np.array([high]), np.array([0.5]), 1.0) == high
    assert threshold_for_false_rate(np.array([0.5]), np.array([low]), 0.0) == 0.5
    assert threshold_for_true_rate(np.array([1e-30]), np.array([0.0]), 1.0) == pytest.approx(5e-31, rel=1e-5)


def test_what_cannot_be_reached_is_not_promised():
    positive, negative = np.array([0.9, -1.0, -1.0, -1.0]), np.array([0.2, -1.0])
    bound = threshold_for_true_rate(positive, negative, 0.5)
    assert bound == 0.0 and rate(positive, bound) == 0.25
    # nothing has to stay below: half-way down from the lowest score that can be reached
    assert threshold_for_false_rate(positive, np.array([-1.0, -1.0]), 0.0) == pytest.approx(0.45)
    assert threshold_for_false_rate(np.array([0.0]), np.array([-1.0]), 0.0) == 0.0
    assert 0.2 < threshold_for_false_rate(positive, negative, 0.0) < 0.9


def test_the_bootstrap():
    positive, negative = scores(0)
    low, high = auc_interval(positive, negative, resamples=300)
    assert 0.5 < low < auc(positive, negative) < high < 1
    assert auc_interval(positive, negative, resamples=300) == (low, high)
    narrow = auc_interval(np.repeat(positive, 16), np.repeat(negative, 16), resamples=300)
    assert (high - low) / 6 < narrow[1] - narrow[0] < (high - low) / 2.5  # four times as narrow
    assert auc_interval(np.ones(3), np.zeros(3), resamples=10) == (1.0, 1.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no negative score"):
        auc(POSITIVE, np.array([]))
    with pytest.raises(ValueError, match="positive scores must be finite; 1"):
        roc_curve(np.array([np.nan, 0.1]), NEGATIVE)
    for choose in (threshold_for_true_rate, threshold_for_false_rate):
        with pytest.raises(ValueError, match="wanted"):
            choose(POSITIVE, NEGATIVE, 1.1)
    with pytest.raises(ValueError, match="resamples"):
        auc_interval(POSITIVE, NEGATIVE, resamples=0)
