import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import balanced_accuracy_score

from hf_logits.metrics import VerbalizerGap
from hf_logits.metrics.verbalizer_gap import swapped, verbalizer_gap, with_verbalizer


WORDS = {
    "natural": ["positive|negative", "1|0", "yes|no"],
    "neutral": ["foo|bar", "bar|foo", "sfo|lax", "lax|sfo"],
    "unnatural": ["negative|positive", "0|1", "no|yes"],
}
CLASSES = [0, 1] * 10


def asked(answer: Any, words: dict[str, list[str]] = WORDS) -> dict[str, Any]:
    """What comes out when `answer(words, class, number)` is which of the words is said."""
    rows = [
        (answer(one.split("|"), label, number), label, one, group)
        for group, own in words.items()
        for one in own
        for number, label in enumerate(CLASSES)
    ]
    return verbalizer_gap(*map(list, zip(*rows, strict=True)))


def accuracies(found: dict[str, Any]) -> list[float]:
    return [found[f"accuracy_{group}"] for group in WORDS]


def test_a_model_that_follows_only_its_prior() -> None:
    """Right in 8 of 10 by the natural words, whatever it is told; of foo and bar it always says foo, of sfo and lax lax."""

    def answer(words: list[str], label: int, number: int) -> int:
        right = label if number < 16 else 1 - label
        for natural in WORDS["natural"]:
            if set(natural.split("|")) == set(words):
                return words.index(natural.split("|")[right])
        return words.index("foo" if "foo" in words else "lax")

    found = asked(answer)
    assert accuracies(found) == pytest.approx([0.8, 0.5, 0.2])
    assert found["follow_gap"] == pytest.approx(0.6)
    assert found["prior_following"] == pytest.approx(0.8) == 1 - found["accuracy_unnatural"]
    pair = [found["by_verbalizer"][one]["accuracy"] for one in ("foo|bar", "bar|foo")]
    assert sum(pair) == 1


def test_a_model_that_follows_the_instruction() -> None:
    found = asked(lambda words, label, number: label if number < 16 else 1 - label)
    assert accuracies(found) == pytest.approx([0.8] * 3) and found["follow_gap"] == pytest.approx(0)
    assert found["prior_following"] == pytest.approx(0.2)


def test_a_model_that_always_says_the_same() -> None:
    assert accuracies(asked(lambda words, label, number: 0)) == [0.5] * 3


def test_words_and_answers_that_are_swapped_together() -> None:
    rng = np.random.default_rng(0)
    picked, gold = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    one = verbalizer_gap(picked, gold, ["foo|bar"] * 40, ["neutral"] * 40)
    other = verbalizer_gap(1 - picked, 1 - gold, ["bar|foo"] * 40, ["neutral"] * 40)
    assert one["accuracy_neutral"] == other["accuracy_neutral"]


def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    gold = (rng.random(60) < 0.2).astype(int)
    picked = np.where(rng.random(60) < 0.7, gold, 0)
    found = verbalizer_gap(picked, gold, ["a|b"] * 60, ["natural"] * 60)
    assert found["balanced_accuracy_natural"] == pytest.approx(balanced_accuracy_score(gold, picked))
    assert found["balanced_accuracy_natural"] != found["accuracy_natural"]


def test_verbalizers_of_a_group_weigh_the_same() -> None:
    found = verbalizer_gap([0, 0, 0, 1], [0, 0, 0, 0], ["a|b"] * 3 + ["c|d"], ["neutral"] * 4)
    assert found["accuracy_neutral"] == 0.5


def test_answers_that_are_no_word() -> None:
    found = verbalizer_gap([-1, 0], [0, 0], ["a|b", "b|a"], ["natural", "unnatural"])
    assert found["invalid_rate"] == 0.5 and found["accuracy_natural"] == 0
    assert found["by_verbalizer"]["a|b"]["frequencies"] == [0, 0]
    assert found["prior_following"] == 0
    assert verbalizer_gap([-1], [0], ["a|b"], ["unnatural"])["invalid_rate"] == 1


def test_more_than_two_classes() -> None:
    natural = ["good", "bad", "fair"]
    turned = swapped(natural)
    assert turned == ["bad", "fair", "good"]
    rows = [(turned.index(natural[label]), label) for label in range(3)]
    picked, gold = zip(*rows, strict=True)
    found = verbalizer_gap(
        [*picked, 0], [*gold, 0], ["|".join(turned)] * 3 + ["|".join(natural)], ["unnatural"] * 3 + ["natural"]
    )
    assert found["prior_following"] == 1 and found["accuracy_unnatural"] == 0 and found["follow_gap"] == 1


def test_what_is_missing_is_said() -> None:
    found = verbalizer_gap([0], [0], ["a|b"], ["unnatural"])
    assert math.isnan(found["follow_gap"]) and "natural and unnatural" in found["notes"]["follow_gap"]
    assert math.isnan(found["prior_following"]) and "words of a natural" in found["notes"]["prior_following"]
    assert math.isnan(found["accuracy_neutral"]) and "no verbalizer is neutral" in found["notes"]["accuracy_neutral"]
    some = verbalizer_gap([0] * 3, [0] * 3, ["a|b", "b|a", "c|d"], ["natural", "unnatural", "unnatural"])
    assert some["prior_following"] == 0 and some["notes"]["prior_following"].startswith("1 unnatural rows")
    assert "there are no rows" in verbalizer_gap([], [], [], [])["notes"]["invalid_rate"]


def test_tables_of_log_probs() -> None:
    table = np.log([[0.4, 0.1], [0.1, 0.2]]).tolist()
    found = VerbalizerGap("logprobs", keep_in_memory=True).compute(
        predictions=table, references=[0, 0], verbalizer=["a|b", "b|a"], group=["natural", "unnatural"]
    )
    assert found["accuracy_natural"] == 1 and found["accuracy_unnatural"] == 0
    assert found["attentiveness"] == pytest.approx(0.4)
    assert [one["attentiveness"] for one in found["by_verbalizer"].values()] == pytest.approx([0.5, 0.3])
    assert found["tie_rate"] == 0
    nothing = VerbalizerGap("logprobs", keep_in_memory=True).compute(
        predictions=[], references=[], verbalizer=[], group=[]
    )
    assert math.isnan(nothing["attentiveness"]) and nothing["notes"]["attentiveness"] == "there are no rows"
    tied = np.log([[0.7, 0.7]]).tolist()
    rows = {"predictions": tied, "references": [0], "verbalizer": ["foo|foobar"], "group": ["neutral"]}
    with pytest.raises(ValueError, match="1.4 of probability.*Give distinct="):
        VerbalizerGap("logprobs", keep_in_memory=True).compute(**rows)
    found = VerbalizerGap("logprobs", keep_in_memory=True).compute(**rows, distinct=[[True, False]])
    assert found["attentiveness"] == pytest.approx(0.7) and found["tie_rate"] == 1
    with pytest.raises(ValueError, match="one log-prob for each word"):
        VerbalizerGap("logprobs", keep_in_memory=True).compute(
            predictions=[[-1.0, -2.0]], references=[0], verbalizer=["a|b|c"], group=["natural"]
        )


def test_prompts_with_a_verbalizer() -> None:
    data = Dataset.from_dict({"text": ["a {strange} one"], "label": [1]})
    made = with_verbalizer(data, ["bar", "foo"], "{text}\nSay {0} if good, {1} if bad.\n", group="neutral")
    assert made[0] == {
        "text": "a {strange} one",
        "label": 1,
        "prompt": "a {strange} one\nSay bar if good, foo if bad.\n",
        "choices": ["bar", "foo"],
        "verbalizer": "bar|foo",
        "group": "neutral",
    }


@pytest.mark.parametrize(
    ("words", "template", "options", "message"),
    [
        (["a"], "{text}{0}", {"group": "natural"}, "two or more different words"),
        (["a", "a"], "{text}{0}{1}", {"group": "natural"}, "different words"),
        (["a", "b|c"], "{text}{0}{1}", {"group": "natural"}, "without '|'"),
        (["a", "b"], "{text}{0}", {"group": "natural"}, "must have {text} and {0} to {1}"),
        (["a", "b"], "{text}{0}{1}", {"group": "odd"}, "group is 'odd'"),
        (["a", "b"], "{text}{0}{1}", {"group": "natural", "text_column": "review"}, "no column 'review'"),
    ],
)
def test_bad_verbalizers(words: list[str], template: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("|", r"\|")):
        with_verbalizer(Dataset.from_dict({"text": ["x"]}), words, template, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0, 1], ["a|b"], ["natural"]), "1 predictions, 2 references"),
        (([0], [0], ["a|b"], ["odd"]), "group is 'odd'"),
        (([0], [2], ["a|b"], ["natural"]), "references has 2"),
        (([2], [0], ["a|b"], ["natural"]), "predictions has 2"),
        (([0], [0], ["a"], ["natural"]), "two or more"),
        (([0, 0], [0, 0], ["a|b"] * 2, ["natural", "neutral"]), "in the groups natural and neutral"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verbalizer_gap(*arguments)


def test_what_was_not_understood_follows_nothing():
    found = verbalizer_gap([0, -1], [0, 0], ["good|bad", "bad|good"], ["natural", "unnatural"])
    assert found["prior_following"] == 0


def test_classes_that_never_occur_have_no_recall():
    found = verbalizer_gap([0, 0], [0, 0], ["a|b|c"] * 2, ["natural"] * 2)
    assert found["balanced_accuracy_natural"] == 1


def test_the_gap_is_one_of_accuracies_and_not_of_balanced_ones():
    names, groups = ["good|bad"] * 3 + ["bad|good"] * 3, ["natural"] * 3 + ["unnatural"] * 3
    found = verbalizer_gap([0, 0, 0, 1, 1, 1], [0, 0, 1] * 2, names, groups)
    assert found["follow_gap"] == pytest.approx(1 / 3)
