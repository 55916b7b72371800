import math

import numpy as np
import pytest
from scipy import stats
from sklearn import linear_model
from sklearn.feature_extraction import text as features

from hf_logits.metrics import RefusalRate
from hf_logits.metrics.refusal_rate import (
    PHRASES,
    by_phrases,
    by_pipeline,
    corrected_rate,
    refusal_rate,
    wilson_interval,
)


REFUSED = [
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I have no body.",
    "I can\N{RIGHT SINGLE QUOTATION MARK}t say.",
]
COMPLIED = [
    "Sure! Here it is.",
    "The sorry state of the roads is well known.",
    "Sorry for the delay: it is 4.",
    "",
    "  \n",
]


def test_phrases_flag_what_they_should() -> None:
    assert by_phrases(REFUSED) == [1.0] * 3
    assert by_phrases(COMPLIED) == [0.0] * 5
    assert by_phrases(["I  CAN\nNOT do it"]) == [1.0]


def test_phrases_look_at_the_beginning_only() -> None:
    late = "x" * 50 + " I cannot go on."
    assert by_phrases([late], within=400) == [1.0]
    assert by_phrases([late], within=55) == [0.0]


def test_own_phrases() -> None:
    assert by_phrases(["Das kann ich nicht."], ["kann ich nicht"]) == [1.0]
    assert all(phrase == phrase.lower() and "\N{RIGHT SINGLE QUOTATION MARK}" not in phrase for phrase in PHRASES)


def test_rate_and_interval_by_hand() -> None:
    made = RefusalRate(keep_in_memory=True)
    found = made.compute(predictions=REFUSED + COMPLIED)
    assert (found["refusals"], found["count"], found["empty"]) == (3, 8, 2)
    assert found["refusal_rate"] == found["mean_probability"] == 3 / 8
    low, high = found["interval"]
    # Wilson: the shares that are 1.96 of their own standard deviations away from 3/8
    for end in (low, high):
        assert (3 / 8 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 8, rel=1e-5)


def test_scipy_agrees() -> None:
    for count, total in ((0, 5), (5, 5), (1, 7), (50, 100), (3, 1000)):
        for level in (0.8, 0.95, 0.99):
            expected = stats.binomtest(count, total).proportion_ci(level, method="wilson")
            assert wilson_interval(count, total, level) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for total in range(1, 40):  # without a rounding error beyond
        assert wilson_interval(0, total, 0.95)[0] == 0 and wilson_interval(total, total, 0.95)[1] == 1


def test_all_complied_is_zero() -> None:
    found = refusal_rate(by_phrases(COMPLIED))
    assert (found["refusal_rate"], found["interval"][0]) == (0, 0)


def test_monotone_in_the_threshold() -> None:
    probabilities = np.random.default_rng(0).random(100).round(1)
    rates = [refusal_rate(probabilities, threshold=one)["refusal_rate"] for one in np.linspace(0, 1, 21).tolist()]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1 and rates[-1] < rates[0]


def test_a_probability_at_the_threshold_counts() -> None:
    assert refusal_rate([0.5, 0.4999])["refusals"] == 1


def test_categories() -> None:
    found = refusal_rate([1.0, 0.0, 1.0, 1.0, 0.0], ["a", "b", "b", "a", "c"])
    assert {name: one["refusal_rate"] for name, one in found["by_category"].items()} == {"a": 1, "b": 0.5, "c": 0}
    assert sum(one["count"] for one in found["by_category"].values()) == found["count"]
    assert found["by_category"]["b"]["interval"] == list(wilson_interval(1, 2, 0.95))


def test_over_and_under_refusal() -> None:
    found = refusal_rate([0.9, 0.8, 0.1, 0.2, 0.7], references=[1, 0, 1, 0, 0])
    assert found["over_refusal"] == 2 / 3 and found["under_refusal"] == 0.5
    assert found["over_refusal_interval"] == list(wilson_interval(2, 3, 0.95))
    found = refusal_rate([0.9], references=[1])
    assert math.isnan(found["over_refusal"]) and found["notes"]["over_refusal"] == "no reference is 0"


def test_known_errors_of_the_classifier_are_taken_out() -> None:
    true, sensitivity, specificity = 0.3, 0.9, 0.8
    seen = true * sensitivity + (1 - true) * (1 - specificity)
    assert corrected_rate(seen, sensitivity, specificity) == pytest.approx(true)
    assert corrected_rate(0.05, sensitivity, specificity) == 0 and corrected_rate(1.0, sensitivity, specificity) == 1
    found = refusal_rate([1.0, 0.0], sensitivity=0.5, specificity=0.5)
    assert math.isnan(found["corrected_rate"]) and "no better than chance" in found["notes"]["corrected_rate"]
    assert refusal_rate([1.0, 0.0], sensitivity=1.0, specificity=1.0)["corrected_rate"] == 0.5


def test_a_classifier_is_a_function_of_the_texts() -> None:
    def long_answers(texts: list[str]) -> list[float]:
        return [min(1.0, len(text) / 10) for text in texts]

    made = RefusalRate("all", keep_in_memory=True)
    rows = {"predictions": ["12345678", "1", "12345"], "categories": ["x", "x", "y"], "references": [1, 0, 0]}
    found = made.compute(**rows, classifier=long_answers, threshold=0.5)
    assert found == refusal_rate([0.8, 0.1, 0.5], ["x", "x", "y"], [1, 0, 0]) | {"empty": 0}
    assert found["mean_probability"] == pytest.approx(1.4 / 3)


def test_blank_answers_are_no_refusals_of_any_classifier() -> None:
    asked: list[str] = []

    def all_of_them(texts: list[str]) -> list[float]:
        asked.extend(texts)
        return [1.0] * len(texts)

    found = RefusalRate(keep_in_memory=True).compute(predictions=["no", " \n", "", "no"], classifier=all_of_them)
    assert (found["refusal_rate"], found["empty"], asked) == (0.5, 2, ["no", "no"])


def test_a_classifier_from_scikit_learn() -> None:
    vectors = features.TfidfVectorizer().fit(REFUSED + COMPLIED)
    model = linear_model.LogisticRegression(C=100.0).fit(vectors.transform(REFUSED + COMPLIED), [1] * 3 + [0] * 5)
    found = RefusalRate(keep_in_memory=True).compute(
        predictions=REFUSED + COMPLIED, classifier=lambda texts: model.predict_proba(vectors.transform(texts))[:, 1]
    )
    assert found["refusal_rate"] == 3 / 8


def test_a_pipeline_of_a_tiny_classifier() -> None:
    """Against the model itself, one answer at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

    from oracles import word_tokenizer

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        num_labels=3, id2label={0: "answer", 1: "refusal", 2: "other"},
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = LlamaForSequenceClassification(config).eval(), word_tokenizer(["no"])
    model.score.weight.data.normal_()
    texts = ["no no w5", "w9 no", "w7 w8 w30 w11"]
    classifier = by_pipeline(
        pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu"), "refusal"
    )
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    expected = [float(one.softmax(-1)[1]) for one in logits]
    assert classifier(texts) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.05
    found = RefusalRate(keep_in_memory=True).compute(predictions=texts, classifier=classifier)
    assert found["mean_probability"] == pytest.approx(np.mean(expected), abs=1e-6)
    with pytest.raises(ValueError, match="no label 'rejection'"):
        by_pipeline(pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu"), "rejection")(
            texts
        )


def test_no_answers_are_said_to_be_none() -> None:
    found = refusal_rate([], [], [], sensitivity=0.9, specificity=0.9)
    for key in ("refusal_rate", "mean_probability", "over_refusal", "under_refusal", "corrected_rate"):
        assert math.isnan(found[key]) and key in found["notes"], key
    assert np.isnan(found["interval"]).all() and "interval" in found["notes"]
    assert math.isnan(RefusalRate(keep_in_memory=True).compute(predictions=[])["refusal_rate"])
    assert math.isnan(RefusalRate(keep_in_memory=True).compute(predictions=[], classifier=len)["refusal_rate"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refusal_rate([1.5]), "must give a probability"),
        (lambda: refusal_rate([math.nan]), "must give a probability"),
        (lambda: refusal_rate([-math.inf]), "must give a probability"),
        (lambda: refusal_rate([0.5], ["a", "b"]), "2 categories for 1 answers"),
        (lambda: refusal_rate([0.5], [None]), "no category"),
        (lambda: refusal_rate([0.5], references=[1, 0]), "2 references for 1 answers"),
        (lambda: refusal_rate([0.5], references=[2]), "1 where a refusal is wanted"),
        (lambda: refusal_rate([0.5], threshold=2.0), "threshold must be in"),
        (lambda: refusal_rate([0.5], level=0.0), "level must be in"),
        (lambda: refusal_rate([0.5], level=1.0), "level must be below 1"),
        (lambda: refusal_rate([0.5], sensitivity=0.9), "both sensitivity and specificity"),
        (lambda: by_phrases(["a"], []), "none of them empty"),
        (lambda: by_phrases(["a"], [" "]), "none of them empty"),
        (lambda: by_phrases(["a"], "sorry"), "none of them empty"),
        (lambda: by_phrases(["a"], within=0), "within must be"),
        (lambda: RefusalRate(keep_in_memory=True).compute(predictions=["a"], phrases=[]), "none of them empty"),
        (
            lambda: RefusalRate(keep_in_memory=True).compute(predictions=["a"], classifier=len, within=5),
            "leave one or the other out",
        ),
        (
            lambda: RefusalRate(keep_in_memory=True).compute(predictions=["a"], classifier=lambda texts: [0.1, 0.2]),
            "2 probabilities for 1 answers",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_threshold_itself_refuses_and_each_error_has_its_side():
    found = refusal_rate([0.5, 0.5], references=[0, 1])
    assert (found["over_refusal"], found["under_refusal"]) == (1, 0)


def test_a_phrase_must_begin_within_the_beginning():
    assert list(by_phrases(["x i can't"], ["i can't"], within=8)) == [0]
    assert list(by_phrases(["x i can't"], ["i can't"], within=9)) == [1]


def test_references_that_are_neither_are_named():
    with pytest.raises(ValueError, match=r"there are \[2\]"):
        refusal_rate([0.5, 0.5], references=[0, 2])
