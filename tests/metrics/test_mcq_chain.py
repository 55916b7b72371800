import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, brier_score_loss

from hf_logits.metrics import McqChain
from hf_logits.metrics.mcq_chain import STAGES, chain, compute_correlations, correlations, mcq_chain, spread


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ((-2, -3, -4, -4), (-2, 0.135335, 0.610296, 0.215920, 0.053980, 1)),
        ((-5, -6, -7, -7), (-5, 0.006738, 0.610296, 0.215920, 0.053980, 1)),
        ((-3, -2, -4, -4), (-3, math.exp(-3), 0.224515, 0.987481, 0.246870, 0)),
        ((-2, -2, -2, -2), (-2, math.exp(-2), 0.25, 0.75, 0.1875, 1)),
    ],
)
def test_by_hand(logprobs: Any, expected: Any) -> None:
    row = [list(map(float, logprobs))]
    found = mcq_chain(row, [0])
    values = [found[key] for key in ("log_p_vocab", "p_vocab", "p_choices", "brier")]
    values += [mcq_chain(row, [0], reduction="mean")["brier"], found["accuracy"]]
    assert values == pytest.approx(expected, abs=1e-6)
    assert found["p_vocab_choices"] == pytest.approx(sum(np.exp(row[0])))
    assert found["p_vocab_incorrect"] == pytest.approx(found["p_vocab_choices"] - found["p_vocab"])
    assert found["tie_rate"] == (logprobs[0] == logprobs[1])


def table(rows: int = 50) -> tuple[list[list[float]], list[int]]:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 4)) - 4).tolist(), rng.integers(0, 4, rows).tolist()


def test_the_numbers_of_scikit_learn_and_lm_eval() -> None:
    values, gold = table()
    found = mcq_chain(values, gold)
    shares = scipy.special.softmax(values, axis=1)
    assert found["brier"] == pytest.approx(brier_score_loss(gold, shares, labels=range(4), scale_by_half=False))
    # lm-eval: the mean over questions of the sum over choices
    assert found["brier"] == pytest.approx(np.mean(np.sum((shares - np.eye(4)[gold]) ** 2, axis=1)))
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, np.argmax(values, axis=1)))


def test_mass_that_is_counted_twice() -> None:
    """The union of "a" and "a b" has the probability of "a"."""
    row = np.log([[0.4, 0.4, 0.3]]).tolist()
    with pytest.raises(ValueError, match="row 0 have 1.1 of probability.*Give distinct="):
        mcq_chain(row, [0])
    found = mcq_chain(row, [0], distinct=[[True, False, True]])
    assert found["p_vocab_choices"] == pytest.approx(0.7) and found["p_choices"] == pytest.approx(4 / 11)
    given = {"predictions": row, "references": [0], "distinct": [[True, False, True]]}
    assert McqChain("distinct", keep_in_memory=True).compute(**given) == found
    assert McqChain(keep_in_memory=True).compute(**given) == found
    with pytest.raises(ValueError, match="of probability together"):
        compute_correlations([row] * 2, [[0]] * 2, [1.0, 2.0])
    assert "log_p_choices" not in found


def test_ragged_rows() -> None:
    values = [[-1.0, -2.0], [-3.0, -1.0, -2.0]]
    both = mcq_chain(values, [1, 0], reduction="mean", return_samples=True)
    for place, row in enumerate(values):
        alone = mcq_chain([row], [1 - place], reduction="mean")
        assert {key: value[place] for key, value in both["samples"].items()} == {
            key: alone[key] for key in both["samples"]
        }


def test_impossible_answers() -> None:
    found = mcq_chain([[-math.inf, -1.0]], [0])
    assert (found["log_p_vocab"], found["p_vocab"], found["p_choices"], found["brier"]) == (-math.inf, 0, 0, 2)
    assert found["notes"] == {}
    found = mcq_chain([[-math.inf] * 2, [-1.0, -2.0]], [0, 0])
    assert math.isnan(found["p_choices"]) and math.isnan(found["brier"]) and found["accuracy"] == 0.5
    assert "1 rows have no choice" in found["notes"]["brier"]


def test_very_improbable_answers_still_have_shares() -> None:
    assert mcq_chain([[-2000.0, -2001.0]], [0])["p_choices"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_no_rows() -> None:
    found = mcq_chain([], [])
    assert math.isnan(found["brier"]) and found["notes"]["brier"] == "there are no rows"


# --- against compute -------------------------------------------------------------------------------------------------------


def test_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=7)
    scores = np.round(rng.normal(size=(7, 20)) + x[:, None], 1)
    scores[:, 0], scores[3, 1], x[2] = scores[1, 0], scores[2, 1], x[4]  # a constant, ties
    with np.errstate(invalid="ignore"):
        for kind, theirs in (
            ("pearson", scipy.stats.pearsonr),
            ("spearman", scipy.stats.spearmanr),
            ("kendall", scipy.stats.kendalltau),
        ):
            ours = correlations(x, scores, kind)
            assert math.isnan(ours[0])
            assert ours[1:] == pytest.approx([theirs(x, column)[0] for column in scores.T[1:]])


def test_spread_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(size=30).clip(-1, 1)
    found = spread(np.append(values, [np.nan] * 10))
    assert found["frac_nan"] == 0.25
    assert found["skewness"] == pytest.approx(scipy.stats.skew(values))
    assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(values))
    assert found["energy_distance"] == pytest.approx(scipy.stats.energy_distance(values, [1.0]))
    assert found["ks"] == pytest.approx(scipy.stats.ks_2samp(values, np.ones(30)).statistic)
    # the exact area under the share above t
    grid = np.linspace(-1, 1, 200_001)
    above = np.searchsorted(np.sort(-values), -grid, side="left") / len(values)
    assert found["auc"] == pytest.approx(np.trapezoid(above, grid), abs=1e-4)
    assert 1 - found["mean"] == pytest.approx(scipy.stats.wasserstein_distance(values, [1.0]))


@pytest.mark.parametrize(("value", "auc"), [(1.0, 2.0), (0.5, 1.5), (-1.0, 0.0)])
def test_the_area_is_exact(value: float, auc: float) -> None:
    assert spread(np.array([value] * 3))["auc"] == pytest.approx(auc)


def family() -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Twelve levels of compute, in which the right choice gains a little more than the wrong ones, which go together up and down."""
    rng = np.random.default_rng(0)
    level = np.linspace(0, 1, 12)
    right = 0.9 * level[:, None] + 0.05 * rng.normal(size=(12, 400)) + rng.normal(size=400)
    wrong = 0.75 * level[:, None, None] + 0.15 * rng.normal(size=(12, 400, 3)) + rng.normal(size=(400, 3))
    values = np.concatenate([right[..., None], wrong], axis=-1) - 8
    return values, [[0] * 400] * 12, 10.0 ** (18 + 4 * level)


def test_correlation_decays_along_the_chain() -> None:
    values, gold, compute = family()
    found = compute_correlations(values, gold, compute)
    means = [found[stage]["spearman"]["mean"] for stage in STAGES]
    assert means[0] == means[1] > 0.9  # ranks cannot see the exponential
    assert means[1] > means[2] + 0.1 and means[2] > means[3] - 0.02 and means[3] > means[4]
    assert found["p_vocab"]["pearson"]["mean"] != found["log_p_vocab"]["pearson"]["mean"]
    missing = found["accuracy"]["spearman"]["frac_nan"]
    assert missing > 0.3
    assert f"{missing:.3f} of the questions" in found["notes"]["accuracy.spearman"]
    assert f"nothing varies in {round(missing * 400)}" in found["notes"]["accuracy.pearson"]
    assert set(found["notes"]) == {f"accuracy.{kind}" for kind in ("pearson", "spearman", "kendall")}
    one = chain(values[:, 0], [0] * 12, reduction="sum")
    assert compute_correlations(values[:, :1], [[0]] * 12, compute)["negative_brier"]["kendall"][
        "mean"
    ] == pytest.approx(scipy.stats.kendalltau(compute, -one["brier"])[0])


def test_answers_too_improbable_for_a_float_keep_their_correlations() -> None:
    """Correlations do not know the scale of a score."""
    values, gold, compute = family()
    values, gold = values[:, :40], [row[:40] for row in gold]
    plain, low = compute_correlations(values, gold, compute), compute_correlations(values - 800, gold, compute)
    assert np.exp(values - 800).max() == 0
    for kind in ("pearson", "spearman", "kendall"):
        for stage in STAGES:
            assert low[stage][kind] == pytest.approx(plain[stage][kind], abs=1e-9, nan_ok=True), (stage, kind)
    # the right answer alone falls out of the range of floats
    values[..., 0] -= 760
    x, right = np.log10(compute), values[..., 0]
    shares = np.exp(right - scipy.special.logsumexp(values, axis=-1) + 760)
    expected = np.mean([scipy.stats.pearsonr(x, column)[0] for column in shares.T])
    assert compute_correlations(values, gold, compute)["p_choices"]["pearson"]["mean"] == pytest.approx(expected)


def test_models_without_compute_are_left_out_and_said() -> None:
    values, gold, compute = family()
    compute = np.concatenate([[0.0], compute])
    longer = compute_correlations(np.concatenate([values[:1], values]), [*gold, gold[0]], compute)
    assert "1 models" in longer["notes"]["compute"]
    assert longer["p_choices"] == compute_correlations(values, gold, compute[1:])["p_choices"]


def test_impossible_answers_have_ranks_but_no_pearson() -> None:
    values = np.log([[[0.2, 0.3]], [[0.3, 0.3]], [[0.5, 0.3]]])
    values[0, 0, 0] = -np.inf
    found = compute_correlations(values, [[0]] * 3, [1.0, 10.0, 100.0])
    assert found["log_p_vocab"]["spearman"]["mean"] == pytest.approx(1.0)
    assert math.isnan(found["log_p_vocab"]["pearson"]["mean"]) and found["log_p_vocab"]["pearson"]["frac_nan"] == 1
    notes = found["notes"]
    assert "a score is infinite in 1" in notes["log_p_vocab.pearson"] and "log_p_vocab.spearman" not in notes
    assert notes["log_p_vocab.spearman.skewness"] == "all correlations are the same"
    values[0, 0] = -np.inf
    found = compute_correlations(values, [[0]] * 3, [1.0, 10.0, 100.0])
    assert "gives no choice any probability in 1" in found["notes"]["p_choices.kendall"]


def test_the_configuration_for_a_family() -> None:
    values, gold, compute = family()
    found = McqChain("family", keep_in_memory=True).compute(
        predictions=values[:, :5].tolist(), references=[row[:5] for row in gold], compute=compute.tolist()
    )
    expected = compute_correlations(values[:, :5], [row[:5] for row in gold], compute)
    assert repr(found) == repr(expected)


def test_a_family_without_questions_or_models() -> None:
    for rows in (([], [], []), ([[], []], [[], []], [1.0, 2.0])):
        found = compute_correlations(*rows)
        assert all(math.isnan(found[stage]["kendall"]["mean"]) for stage in STAGES)
        assert found["notes"]["accuracy.kendall"] == "there are no rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[[-1.0, -2.0]]], [[0], [0]], [1.0]), "1 tables, 2 lists"),
        (([[[-1.0, -2.0]]] * 2, [[0], [1]], [1.0, 2.0]), "references differ between models"),
        (([[[-1.0, -2.0]], [[-1.0, -2.0, -3.0]]], [[0], [0]], [1.0, 2.0]), "numbers of choices differ"),
        (([[[-1.0, -2.0]]] * 2, [[0], [0]], [1.0, -2.0]), "at least 0"),
        (([[[-1.0, -2.0]]] * 2, [[0], [0]], [1.0, math.nan]), "at least 0"),
        (([[[-1.0, -2.0]]] * 2, [[0], [0]], [1.0, 0.0]), "1 models have a finite compute"),
    ],
)
def test_bad_families(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_correlations(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[-1.0, -2.0]], []), {}, "0 references for 1 rows"),
        (([[-1.0]], [0]), {}, "two or more"),
        (([[-1.0, -2.0]], [5]), {}, "no choice there"),
        (([[-1.0, math.nan]], [0]), {}, "NaN"),
        (([[1.0, -2.0]], [0]), {}, "at most 0"),
        (([[-1.0, -2.0]], [0]), {"reduction": "total"}, "'sum'.*'mean'"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mcq_chain(*arguments, **options)


def test_the_mass_of_wrong_choices_is_never_negative():
    assert mcq_chain(np.log([[0.4, 0.3]]).tolist(), [0], distinct=[[False, True]])["p_vocab_incorrect"] == 0


def test_a_question_that_no_model_gives_mass_to_does_not_hide_the_others():
    family = [[[-3.0, -1.0], [-1002.0, -1.0]], [[-2.5, -1.0], [-1001.0, -1.0]], [[-2.0, -1.0], [-1000.5, -1.0]]]
    found = compute_correlations(family, [[0, 0]] * 3, [1.0, 10.0, 100.0])
    assert found["p_vocab"]["pearson"]["frac_nan"] == 0


@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_rounding_is_no_correlation(kind):
    """Log-probs that are shifted alike leave p(right) among the choices as it is, but for its last bits."""
    family = [[[value - shift for value in (-2.0, -3.1, -4.7)]] for shift in (0.0, 0.37, 1.1, 2.3, 5.9)]
    found = compute_correlations(family, [[0]] * 5, [1.0, 10.0, 100.0, 1e3, 1e4])
    for stage in ("p_choices", "negative_brier"):
        assert found[stage][kind]["frac_nan"] == 1
