"""Personality: whether a model's answers to a questionnaire are its own, or those of the wording and of whom it speaks about.

Consistency, robustness and fairness as in "Can ChatGPT Assess Human Personalities?" (Rao, Leung and Miao 2023,
https://arxiv.org/abs/2303.01248), for scores of any questionnaire that is asked again and again.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from datasets import List, Value
from jaxtyping import Float64
from numpy import ndarray

from hf_logits.checks import check_count, check_number
from hf_logits.metrics import module


def stability(distance: float, alpha: float) -> float:
    """1 without a distance, a half at `alpha`."""
    return alpha / (alpha + distance)


def consistency(scores: Float64[ndarray, "N K"], *, alpha: float = 100.0) -> float:
    """How near independent tests are to their mean: `alpha / (alpha + mean_i |X_i - mean X|)`. NaN of fewer than two."""
    if len(scores) < 2:
        return math.nan
    return stability(float(np.linalg.norm(scores - scores.mean(0), axis=1).mean()), alpha)


def trait_scores(
    answers: Sequence[Sequence[int]], questions: Sequence[Mapping[str, Any]], *, options: int = 7
) -> tuple[list[str], Float64[ndarray, "N K"]]:
    """Answers to a questionnaire as one score a trait, from 0 to 100: the mean agreement with its statements.

    The paper took its scores from a web site that does not say how it counts, so this is our own way.

    Args:
        answers (list of lists of `int`): for each test, for each question, from 1, disagreement, to `options`, agreement.
        questions (list of `dict`): `trait`, a name; `sign`, 1, or -1 where agreement speaks against the trait, *optional*.
            Whatever else they have, such as the statement, is not looked at.
        options (`int`, *optional*, defaults to 7): answers to choose from.

    Returns:
        The traits in the order in which they first occur, and an array of shape `[tests, traits]`.
    """
    check_count("options", options, minimum=2)
    for place, question in enumerate(questions):
        if not isinstance(question.get("trait"), str) or question.get("sign", 1) not in (1, -1):
            raise ValueError(
                f"Question {place} must have a trait, a str, and a sign of 1 or -1; got {dict(question)!r:.80}."
            )
    wrong = [place for place, row in enumerate(answers) if len(row) != len(questions)]
    if not len(questions) or wrong:
        place = wrong[0] if wrong else 0
        raise ValueError(
            f"{len(questions)} questions and {len(answers[place]) if answers else 0} answers in row {place}; give one answer each."
        )
    found = np.asarray(answers, dtype=np.float64).reshape(len(answers), len(questions))
    if not np.isin(found, np.arange(1, options + 1)).all():
        other = found[~np.isin(found, np.arange(1, options + 1))][:5]
        raise ValueError(f"Answers must be whole numbers from 1 to {options}; {other} are not.")
    signs = np.array([question.get("sign", 1) for question in questions])
    agreement = 50 + 50 * signs * ((found - 1) * 2 / (options - 1) - 1)
    names = [question["trait"] for question in questions]
    traits = list(dict.fromkeys(names))
    columns = [agreement[:, [name == trait for name in names]].mean(1) for trait in traits]
    return traits, np.stack(columns, axis=1)


def personality(
    scores: Sequence[Sequence[float]] | np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    fixed: str = "fixed",
    permuted: str = "permuted",
    alpha: float = 100.0,
) -> dict[str, Any]:
    """Consistency of repeated tests, robustness to the order of the options, fairness between subjects.

    With mean scores m of a group and D the Euclidean distance: consistency of a group `alpha / (alpha + mean_i D(X_i, m))`;
    robustness `alpha / (alpha + D(m_fixed, m_permuted))`; fairness of two groups with consistencies c and d
    `alpha c d / (alpha + D(m, m'))`. All are in (0, 1], and 1 where nothing differs. They depend on alpha, on the scale and on
    the number of traits: numbers of different questionnaires don't compare.

    Args:
        scores (array of `float`, shape `[N, K]`): of independent tests, K traits from 0 to 100 in the paper, where each question is
            asked once a test, with the options in an order of its own, about a general subject such as "men".
        groups (list of `str`, *optional*): what each test belongs to, such as its subject. Defaults to one group.
        fixed (`str`, *optional*, defaults to `"fixed"`): the group that was asked with the options in a fixed order.
        permuted (`str`, *optional*, defaults to `"permuted"`): the group that was asked the same in changing orders.
        alpha (`float`, *optional*, defaults to 100.0): the distance at which a value is a half.

    Returns:
        `dict`: `consistency`, the mean of those of the groups, `consistency_by_group`; `robustness`, where there are both of its
        groups; `fairness`, the mean over all pairs of the other groups, `fairness_by_pair` (under `"a, b"`), `means` and `counts` by
        group, and `notes`.

    Raises:
        ValueError: rows of different lengths, scores that are not finite, groups that are not one a row, `alpha` that is not above 0.
    """
    check_number("alpha", alpha, minimum=0.0, above=True)
    widths = sorted({len(row) for row in scores})
    if len(widths) > 1 or widths == [0]:
        raise ValueError(f"Each test needs a score for each trait; there are rows of {widths} scores.")
    found = np.asarray(scores, dtype=np.float64).reshape(len(scores), widths[0] if widths else 0)
    if not np.isfinite(found).all():
        raise ValueError(
            f"Scores must be finite; those of the tests {np.flatnonzero(~np.isfinite(found).all(1))[:5]} are not."
        )
    if fixed == permuted:
        raise ValueError(f"fixed and permuted are both {fixed!r}; robustness compares two groups.")
    labels = ["all"] * len(found) if groups is None else list(groups)
    if len(labels) != len(found):
        raise ValueError(f"{len(found)} tests and {len(labels)} groups; give one group for each test.")
    notes: module.Notes = {}
    rows = {name: found[[label == name for label in labels]] for name in dict.fromkeys(labels)}
    means = {name: part.mean(0) for name, part in rows.items()}
    within = {name: consistency(part, alpha=alpha) for name, part in rows.items()}

    def between(one: str, other: str) -> float:
        return stability(float(np.linalg.norm(means[one] - means[other])), alpha)

    alone = [name for name, part in rows.items() if len(part) < 2]
    once = f"a single test is always consistent; of {', '.join(map(repr, alone))} there is one" if alone else ""
    notes |= {f"consistency_by_group.{name}": "a single test is always consistent" for name in alone}
    average = float(np.mean(list(within.values()))) if rows else math.nan
    if math.isnan(average):
        notes["consistency"] = once or "there are no tests"
    robust = math.nan
    if fixed in rows and permuted in rows:
        robust = between(fixed, permuted)
    else:
        notes["robustness"] = f"it needs tests of the groups {fixed!r} and {permuted!r}"
    subjects = [name for name in rows if name not in (fixed, permuted)]
    pairs = {f"{a}, {b}": within[a] * within[b] * between(a, b) for a, b in combinations(subjects, 2)}
    notes |= {
        f"fairness_by_pair.{a}, {b}": "a single test is always consistent"
        for a, b in combinations(subjects, 2)
        if math.isnan(pairs[f"{a}, {b}"])
    }
    fair = float(np.mean(list(pairs.values()))) if pairs else math.nan
    if math.isnan(fair):
        notes["fairness"] = once if pairs else "it needs tests of two subjects or more"
    return {
        "consistency": average,
        "consistency_by_group": within,
        "robustness": robust,
        "fairness": fair,
        "fairness_by_pair": pairs,
        "means": {name: mean.tolist() for name, mean in means.items()},
        "counts": {name: len(part) for name, part in rows.items()},
        "notes": notes,
    }


class Personality(module.LogitMetric):
    """Whether answers to a questionnaire stay the same: consistency, robustness and fairness.

    ```python
    from hf_logits.metrics import Personality

    tests = [[60.0, 50.0], [64.0, 52.0], [40.0, 45.0], [38.0, 47.0]]
    Personality().compute(predictions=tests, references=["men", "men", "women", "women"])["fairness"]
    ```

    `Personality("answers")` takes answers from 1 to 7 and, as `questions=`, what each question asks about.
    """

    inputs = {
        "scores": {"predictions": List(Value("float64")), "references": Value("string")},
        "answers": {"predictions": List(Value("int64")), "references": Value("string")},
    }
    paper = "Rao, Leung and Miao 2023, Can ChatGPT Assess Human Personalities?, https://arxiv.org/abs/2303.01248"

    def measure(
        self,
        predictions: list[list[Any]],
        references: list[str],
        questions: Sequence[Mapping[str, Any]] | None = None,
        options: int = 7,
        fixed: str = "fixed",
        permuted: str = "permuted",
        alpha: float = 100.0,
    ) -> dict[str, Any]:
        """As `personality`: `predictions` are scores, or answers as `trait_scores` takes them; `references` are the groups."""
        if self.config_name != "answers":
            return personality(predictions, references, fixed=fixed, permuted=permuted, alpha=alpha)
        if questions is None:
            raise ValueError('Answers need questions=[{"trait": ..., "sign": 1 or -1}, ...], one for each answer.')
        traits, scores = trait_scores(predictions, questions, options=options)
        return {"traits": traits} | personality(scores, references, fixed=fixed, permuted=permuted, alpha=alpha)
