"""Ridge regression from streamed sums, against the direct ways."""

import math

import pytest
import torch

from hf_logits.ridge import RidgeStatistics, fit_ridge


OBJECTIVES = ["help", "truth", "verbosity"]


def rated(rows=60, width=5, missing=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    truth = torch.randn(3, width, generator=generator, dtype=torch.float64)
    targets = features @ truth.T + 0.1 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    if missing:
        targets[:20, 0] = math.nan
        targets[10:30, 1] = math.nan
    return features, targets


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 20, 33]])
def test_streamed_sums_with_missing_labels_are_a_ridge_regression_of_each_target(sizes):
    features, targets = rated()
    statistics = RidgeStatistics(5, 3)
    for part, labels in zip(features.split(sizes), targets.split(sizes), strict=True):
        statistics.add(part, labels)
    penalties = [1e-4, 1.0, 1e3]
    weights = statistics.solve(penalties)
    errors = statistics.mean_squared_error(weights)
    for index, penalty in enumerate(penalties):
        for target in range(3):
            rows = ~targets[:, target].isnan()
            h, y = features[rows], targets[rows, target]
            direct = torch.linalg.solve(h.T @ h + penalty * torch.eye(5), h.T @ y)
            torch.testing.assert_close(weights[index, target], direct, atol=1e-11, rtol=0)
            torch.testing.assert_close(errors[index, target], (y - h @ direct).square().mean(), atol=1e-10, rtol=0)
    assert len(statistics.grams) == 4  # patterns of missing labels
    assert statistics.counts.tolist() == [40, 40, 60]


def test_the_penalty_is_the_best_on_held_out_rows():
    features, targets = rated(width=20, missing=False)
    fit = fit_ridge([(features, targets)], names=OBJECTIVES, penalties=[1e-4, 1e3])
    assert fit.penalties.tolist() == [1e-4] * 3 and fit.errors.max() < 0.05
    noise = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert fit_ridge([(features, noise)], names=OBJECTIVES, penalties=[1e-4, 1e3]).penalties.tolist() == [1e3] * 3
    again = fit_ridge(iter([(features, targets)]), names=OBJECTIVES, penalties=[1e-4, 1e3])
    torch.testing.assert_close(again.weights, fit.weights, atol=0, rtol=0)


def test_bfloat16_embeddings_are_fit_in_float64():
    features, targets = rated(missing=False)
    rounded = features.bfloat16()
    fit = fit_ridge([(rounded, targets.float())], names=OBJECTIVES)
    torch.testing.assert_close(fit.weights, fit_ridge([(rounded.double(), targets)], names=OBJECTIVES).weights)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no batches"),
        ([(torch.randn(9, 4), torch.full((9, 3), math.nan))], "'help' has 0 labels to fit on"),
        ([(torch.full((9, 4), math.nan), torch.randn(9, 3))], "feature is NaN"),
        ([(torch.randn(9, 4), torch.full((9, 3), math.inf))], "target infinite"),
        ([(torch.randn(9, 4), torch.randn(9, 2))], "3 targets a row; got 4 and 2"),
    ],
)
def test_ratings_that_cannot_be_fit(batches, match):
    with pytest.raises(ValueError, match=match):
        fit_ridge(batches, names=OBJECTIVES)
    with pytest.raises(ValueError, match="validation_fraction"):
        fit_ridge(batches, names=OBJECTIVES, validation_fraction=1.0)
