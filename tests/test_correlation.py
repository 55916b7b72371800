"""Correlations under ties, against scipy and against counting every pair."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_logits.correlation import average_ranks, kendall, pearson, spearman


def test_ranks_with_ties():
    values = np.array([3.0, 1.0, 3.0, 2.0])
    assert average_ranks(values).tolist() == [3.5, 1.0, 3.5, 2.0] == stats.rankdata(values).tolist()


def pairs_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    signs = [
        (np.sign(first[i] - first[j]), np.sign(second[i] - second[j])) for i in range(len(first)) for j in range(i)
    ]
    return sum(a * b for a, b in signs) / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


@pytest.mark.parametrize("kinds", [2, 4, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_scipy(kinds, seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, kinds, 80).astype(float)
    second = np.round(first / kinds + rng.normal(size=80), 1 if kinds < 1000 else 12)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert kendall(first, second) == pytest.approx(stats.kendalltau(first, second).statistic, abs=1e-12)
    assert kendall(first, second) == pytest.approx(pairs_by_hand(first, second), abs=1e-12)


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall])
def test_identities(correlation):
    values = np.random.default_rng(0).normal(size=30)
    values[:4] = values[4:8]
    assert correlation(values, values) == pytest.approx(1, abs=1e-15)
    assert correlation(values, -values) == pytest.approx(-1, abs=1e-15)
    for scale in (1e-200, 1e200):
        assert correlation(values * scale, values + 1) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall])
def test_what_is_constant_goes_with_nothing(correlation):
    values = np.array([0.1, 0.7, 0.3])
    # whose mean is not exactly 0.1, so that the differences to it are not 0
    same = np.full(3, 0.1)
    assert math.isnan(correlation(values, same)) and math.isnan(correlation(same, values))
    assert math.isnan(correlation(values[:1], values[:1])) and math.isnan(correlation(values[:0], values[:0]))
