import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from hf_logits.metrics import OpenSet, open_set_inputs
from hf_logits.metrics.open_set import open_set, oscr, oscr_as_published


KNOWN, RIGHT, STRANGE = (5.0, 4.0, 3.0, 2.0), (1, 1, 0, 1), (3.5, 1.0, 0.5)


def measured(known: Any, right: Any, strange: Any, **options: Any) -> dict[str, Any]:
    """With class 0 for all known rows, and class 1 predicted where it is wrong."""
    predictions = [0 if one else 1 for one in right] + [0] * len(strange)
    references = [0] * len(known) + [-1] * len(strange)
    return open_set(predictions, [*known, *strange], references, **options)


def random_rows(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    known, strange = rng.normal(1, 1, 40), rng.normal(0, 1, 25)
    return (known.round(), rng.random(40) < 0.7, strange.round()) if ties else (known, rng.random(40) < 0.7, strange)


def area_by_sweeping(known: np.ndarray, right: np.ndarray, strange: np.ndarray) -> float:
    """The definition: every threshold from the highest down, and trapezoids."""
    thresholds = [np.inf, *sorted({*known, *strange}, reverse=True)]
    ccr = [(right & (known >= one)).mean() for one in thresholds]
    fpr = [(strange >= one).mean() for one in thresholds]
    return float(np.trapezoid(ccr, fpr))


def area_as_published(known: np.ndarray, right: np.ndarray, strange: np.ndarray) -> float:
    """Point by point."""
    both = np.concatenate([known, strange])
    order = both.argsort(kind="stable")
    correct = np.concatenate([right, np.zeros(len(strange))])[order]
    unknown = np.concatenate([np.zeros(len(known)), np.ones(len(strange))])[order]
    points = [(0.0, 0.0), (0.0, 0.0), (1.0, 1.0)]
    for place in range(len(both) - 1):
        points.append((unknown[place:].sum() / len(strange), correct[place + 1 :].sum() / len(known)))
    points.sort()
    return float(np.trapezoid([y for _, y in points], [x for x, _ in points]))


def test_by_hand() -> None:
    found = measured(KNOWN, RIGHT, STRANGE)
    assert found["acc"] == 0.75
    assert found["auroc"] == pytest.approx(0.833333, abs=1e-6)
    assert found["oscr"] == pytest.approx(0.666667, abs=1e-6)
    # the three unknown are found at 1, 0.5 and 3.5, behind 0, 0 and 2 known
    assert found["aupr"] == pytest.approx((1 + 1 + 3 / 5) / 3)
    assert found["fpr95"] == 0.5


@pytest.mark.parametrize(
    ("known", "right", "strange", "exact", "published"),
    [
        (KNOWN, RIGHT, STRANGE, 0.666667, 0.583333),
        (KNOWN, (1, 1, 1, 1), STRANGE, 0.833333, 0.75),
        ((5.0, 4.0, 3.0), (1, 1, 1), (2.0, 1.0), 1.0, 0.9167),
        ((1.0, 1.0, 1.0), (1, 1, 1), (1.0, 1.0), 0.5, 0.0),
    ],
)
def test_exact_and_published_areas(known: tuple, right: tuple, strange: tuple, exact: float, published: float) -> None:
    assert measured(known, right, strange)["oscr"] == pytest.approx(exact, abs=1e-6)
    assert measured(known, right, strange, compat="arpl")["oscr"] == pytest.approx(published, abs=5e-5)


def test_with_many_rows_the_published_area_is_near() -> None:
    rng = np.random.default_rng(0)
    known, right, strange = rng.normal(1, 1, 2500), rng.random(2500) < 0.8, rng.normal(0, 1, 2500)
    assert 1e-6 < abs(oscr(known, right, strange) - oscr_as_published(known, right, strange)) < 1e-3


@pytest.mark.parametrize("ties", [False, True])
def test_the_areas_are_what_sweeping_gives(ties: bool) -> None:
    for seed in range(10):
        rows = random_rows(seed, ties=ties)
        assert oscr(*rows) == pytest.approx(area_by_sweeping(*rows), abs=1e-12)
        assert oscr_as_published(*rows) == pytest.approx(area_as_published(*rows), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_identities(ties: bool) -> None:
    for seed in range(10):
        known, right, strange = random_rows(seed, ties=ties)
        found = measured(known, right, strange)
        assert found["oscr"] <= min(found["acc"], found["auroc"]) + 1e-12
        everything = np.ones_like(right)
        assert measured(known, everything, strange)["oscr"] == measured(known, everything, strange)["auroc"]
        apart = measured(known + 100, right, strange)
        assert apart["oscr"] == apart["acc"] == found["acc"] and (apart["auroc"], apart["fpr95"]) == (1, 0)
        moved = measured(np.exp(known), right, np.exp(strange))
        assert repr(moved) == repr(found)  # any increasing map of the scores


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_agrees(ties: bool) -> None:
    for seed in range(5):
        known, right, strange = random_rows(seed, ties=ties)
        found = measured(known, right, strange)
        labels, scores = np.repeat([0, 1], [len(known), len(strange)]), -np.concatenate([known, strange])
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
        assert found["aupr"] == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)
        fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
        assert found["fpr95"] == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)
        assert found["acc"] == pytest.approx(metrics.accuracy_score(np.ones(len(right)), right))


def test_logits_of_three_rows() -> None:
    logits = [[10, 9.5, 0], [3, 0, 0], [2, -5, -5]]
    most, share = open_set_inputs(logits), open_set_inputs(logits, score="max_probability")
    assert most["scores"].tolist() == [10, 3, 2] and most["predictions"].tolist() == [0, 0, 0]
    assert share["scores"] == pytest.approx([0.6224, 0.9094, 0.9982], abs=5e-5)
    # the two orders are opposite
    assert np.argsort(most["scores"]).tolist() == np.argsort(-share["scores"]).tolist()
    doubt = open_set_inputs(logits, score="entropy")["scores"]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert doubt == pytest.approx((probabilities * np.log(probabilities)).sum(1))


def test_excluded_classes_and_infinite_scores() -> None:
    logits = [[1.0, -math.inf, 0.0], [-math.inf, 2.0, -math.inf]]
    assert open_set_inputs(logits, score="entropy")["scores"].tolist() == pytest.approx([-0.582203, 0.0], abs=1e-6)
    assert open_set_inputs(logits, score="max_probability")["predictions"].tolist() == [0, 1]
    finite = measured((5.0, 4.0), (1, 0), (4.5, 3.0))
    assert repr(measured((math.inf, 4.0), (1, 0), (4.5, -math.inf))) == repr(finite)


def test_confident_logits_do_not_overflow() -> None:
    found = open_set_inputs([[1e4, -1e4], [-800.0, -801.0]], score="max_probability")
    assert found["scores"] == pytest.approx([1, 1 / (1 + math.exp(-1))])


def test_what_is_undefined_is_said_so() -> None:
    for references in ([0, 1], [-1, -1]):
        found = open_set([0, 0], [1.0, 2.0], references)
        for key in ("auroc", "oscr", "aupr", "fpr95"):
            assert math.isnan(found[key]) and found["notes"][key] == "needs known and unknown rows"
    assert math.isnan(found["acc"]) and found["notes"]["acc"] == "there is no known row"
    assert math.isnan(OpenSet(keep_in_memory=True).compute(predictions=[], scores=[], references=[])["acc"])
    assert measured((1.0, 2.0), (0, 0), (0.5,))["oscr"] == 0


def test_as_compute_metrics_of_a_trainer() -> None:
    from transformers import EvalPrediction

    rng = np.random.default_rng(0)
    evaluated = EvalPrediction(rng.normal(size=(30, 4)).astype(np.float32), rng.integers(-1, 4, 30))
    found = OpenSet(keep_in_memory=True).compute(
        **open_set_inputs(evaluated.predictions), references=evaluated.label_ids
    )
    logits = evaluated.predictions.astype(float)
    assert found == open_set(logits.argmax(1), logits.max(1), evaluated.label_ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_set([0], [1.0, 2.0], [0]), "one number of each a row"),
        (lambda: open_set([0, 0], np.ones((2, 1)), [0, 0]), "one number of each a row"),
        (lambda: open_set([0], [math.nan], [0]), "1 are NaN"),
        (lambda: open_set([0], [1.0], [-2]), "numbers from 0 on"),
        (lambda: open_set([-1], [1.0], [0]), "numbers from 0 on"),
        (lambda: open_set(np.array([0.7]), [1.0], [0]), r"predictions must be whole numbers.*\[0.7\]"),
        (lambda: open_set([0, 0], [1.0, 2.0], np.array([0, math.nan])), "references must be whole numbers"),
        (lambda: open_set([0], [1.0], [0], compat="official"), "None or 'arpl'"),
        (lambda: open_set_inputs([1.0, 2.0]), r"\[rows, classes\]"),
        (lambda: open_set_inputs([[1.0], [2.0]]), "two classes or more"),
        (lambda: open_set_inputs([[1.0, math.nan]]), "NaN or"),
        (lambda: open_set_inputs([[1.0, math.inf]]), "NaN or"),
        (lambda: open_set_inputs([[-math.inf, -math.inf]]), "no class that is not excluded"),
        (lambda: open_set_inputs([[1.0, 2.0]], score="energy"), "'max_logit'"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_exactly_the_wanted_share_is_enough():
    assert open_set([0] * 21, [5.0] + [0.0] * 19 + [10.0], [0] + [-1] * 20)["fpr95"] == 0
