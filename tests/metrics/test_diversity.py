import math
from itertools import combinations

import evaluate
import numpy as np
import pytest
import torch

import tiny
from hf_logits.hidden import embed_texts
from hf_logits.metrics import DialogueCoherence, Diversity
from hf_logits.metrics.diversity import diversity, histograms, normalized_ngrams
from hf_logits.metrics.embeddings import mauve
from preferences import tokenizer


REPEATED = "a b c a b c a b d"
REAL = ["the cat sat on the mat", "a dog ran far away", "birds sing in the morning"]
MADE = ["the cat sat on the hat", "the cat sat on the hat", "a dog ran away"]


def letters(texts: list[str]) -> np.ndarray:
    """An embedding: how often each letter occurs."""
    return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], dtype=float)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def test_shares_and_both_products_by_hand():
    found = diversity([REPEATED])
    assert [found[f"distinct_{n}"] for n in range(1, 5)] == pytest.approx([4 / 9, 4 / 8, 4 / 7, 4 / 6])
    assert [found[f"rep_{n}"] for n in range(1, 5)] == pytest.approx([5 / 9, 4 / 8, 3 / 7, 2 / 6])
    assert found["distinct_product"] == pytest.approx(0.190476, abs=5e-7)
    assert found["repetition_product"] == pytest.approx(0.071429, abs=5e-7)
    assert (found["tokens"], found["empty"]) == (9, 0)
    assert "diversity" not in found


def test_joining_makes_ngrams_across_texts():
    # a b, b a, a b: two of three pairs are different; within the texts there are none across
    assert normalized_ngrams(["a b", "a b"], n=2) == pytest.approx(2 / 3)
    assert diversity(["a b", "a b"])["distinct_2"] == 0.5
    assert normalized_ngrams(["a b", "a b"], n=2, limit=2) == 1
    assert diversity([REPEATED])["normalized_ngrams"] == pytest.approx(4 / 7)


def test_beside_real_texts_as_many_tokens_count():
    long = [REPEATED, "e f g"]
    found = diversity([REPEATED], references=long)
    assert found["reference_normalized_ngrams"] == found["normalized_ngrams"] == pytest.approx(4 / 7)
    swapped = diversity(long, references=[REPEATED])
    assert swapped["normalized_ngrams"] == pytest.approx(4 / 7)
    # what is within texts is counted whole
    assert swapped["distinct_1"] == pytest.approx(7 / 12)


def test_the_tokens_are_the_callers():
    found = diversity(["abab", "abab"], tokenize=list)
    assert found["distinct_1"] == 2 / 8 and found["tokens"] == 8
    ids = tokenizer()
    assert diversity(REAL, tokenize=ids.tokenize)["tokens"] == sum(len(ids.tokenize(text)) for text in REAL)


def test_self_bleu_falls_as_texts_differ():
    assert diversity(["a b c d"] * 3)["self_bleu"] == 1
    assert diversity(["a b c d", "e f g h"])["self_bleu"] == 0
    # those without tokens take no part
    assert diversity(["a b c d", "", "a b c d", " "])["self_bleu"] == 1


def test_spread_and_centroids_over_all_pairs():
    found = diversity(MADE, references=REAL[:2], embed=letters)
    rows, real = letters(MADE), letters(REAL[:2])
    pairs = [cosine(one, other) for one, other in combinations(rows, 2)]
    assert found["spread"] == pytest.approx(1 - np.mean(pairs))
    assert found["reference_spread"] == pytest.approx(1 - cosine(*real))
    assert found["centroid_cosine"] == pytest.approx(cosine(rows.mean(0), real.mean(0)))
    assert found["notes"] == {}
    assert diversity(["a b"] * 3, embed=letters)["spread"] == pytest.approx(0, abs=1e-12)


def test_a_model_embeds():
    model, words = tiny.llama(), tokenizer()
    model.resize_token_embeddings(len(words))
    embed = lambda texts: embed_texts(texts, model=model, tokenizer=words)  # noqa: E731
    found = diversity(MADE, references=MADE, embed=embed)
    assert found["centroid_cosine"] == pytest.approx(1) and found["spread"] == pytest.approx(found["reference_spread"])
    half = diversity(MADE, embed=lambda texts: embed(texts).to(torch.bfloat16))
    assert half["spread"] == pytest.approx(found["spread"], abs=0.02)


# --- MAUVE -----------------------------------------------------------------------------------------------------------------


def area_by_points(p: list[float], q: list[float], scale: float) -> float:
    """Of the curve through very many points."""
    p, q = np.array(p), np.array(q)
    x, y = [1.0], [0.0]
    for m in 1 / (1 + np.exp(-np.linspace(-30, 30, 40_001))):
        r = m * p + (1 - m) * q
        x.append(math.exp(-scale * sum(b * math.log(b / c) for b, c in zip(q, r, strict=True) if b)))
        y.append(math.exp(-scale * sum(a * math.log(a / c) for a, c in zip(p, r, strict=True) if a)))
    return -float(np.trapezoid([*y, 1.0], [*x, 0.0]))


def test_mauve_by_hand():
    assert mauve(np.array([3, 1, 0]), np.array([6, 2, 0])) == 1
    assert mauve(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(0.003968254, abs=1e-9)
    # Euler's integral: scale B(scale, scale + 1)
    assert mauve(np.array([1.0, 0.0]), np.array([0.0, 1.0]), scale=2.0) == pytest.approx(4 / 24, abs=1e-9)
    even, odd = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    assert mauve(even, odd) == pytest.approx(0.6713, abs=5e-5)
    assert mauve(odd, even) == pytest.approx(mauve(even, odd), abs=1e-12)


@pytest.mark.parametrize(
    "case", [([0.2, 0.3, 0.5], [0.6, 0.4, 0.0]), ([0.01, 0.99], [0, 1]), ([1, 0], [0.999, 0.001])]
)
def test_mauve_is_the_area_under_its_curve(case):
    p, q = (np.array(values, dtype=float) for values in case)
    assert mauve(p, q) == pytest.approx(area_by_points(*case, 5.0), abs=1e-6)


def test_mauve_of_clusters():
    found = diversity(MADE, references=REAL, embed=letters, cluster=lambda rows: rows[:, 1] > 0)
    counts = histograms(letters(REAL), letters(MADE), lambda rows: rows[:, 1] > 0)
    assert [list(part) for part in counts] == [[2, 1], [3, 0]]
    assert found["mauve"] == mauve(np.array([2, 1]), np.array([3, 0]))
    assert diversity(REAL, references=REAL, embed=letters, cluster=lambda rows: rows[:, 0])["mauve"] == 1


# --- what is undefined, and what is refused ----------------------------------------------------------------------------------


def test_nothing_is_said_to_be_nothing():
    found = diversity([], references=[], embed=letters, cluster=lambda rows: rows[:, 0])
    undefined = set(found) - {"notes", "tokens", "empty"}
    assert all(math.isnan(found[name]) for name in undefined) and set(found["notes"]) == undefined
    assert found["notes"]["mauve"] == "there are no texts or no references"
    short = diversity(["a b"])
    assert short["distinct_2"] == 1 and math.isnan(short["distinct_3"]) and math.isnan(short["distinct_product"])
    assert short["notes"]["distinct_3"] == short["notes"]["distinct_product"] == "no text has so many tokens"
    assert "has no 3 tokens" in short["notes"]["normalized_ngrams"]
    cut = diversity(["a b c d"], references=["a b"])["notes"]
    assert "as many tokens as the references" in cut["normalized_ngrams"]
    assert "as many tokens as the texts" in cut["reference_normalized_ngrams"]
    assert short["notes"]["self_bleu"] == "there are fewer than two texts with tokens"
    zeros = diversity(["a", "!"], references=["!"], embed=letters)
    assert math.isnan(zeros["spread"]) and math.isnan(zeros["centroid_cosine"])
    assert set(zeros["notes"]) >= {"spread", "reference_spread", "centroid_cosine"}


def test_as_a_module():
    compared = Diversity("compared", keep_in_memory=True).compute(predictions=MADE, references=REAL, embed=letters)
    assert compared == diversity(MADE, references=REAL, embed=letters)
    assert Diversity(keep_in_memory=True).compute(predictions=MADE, max_n=3) == diversity(MADE, max_n=3)
    assert "distinct_4" not in diversity(MADE, max_n=3)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("a b c", {}, TypeError, "texts must be a list of str"),
        (["a"], {"references": "a"}, TypeError, "references must be a list of str"),
        (["a"], {"max_n": 1}, ValueError, "max_n must be a whole number of at least 2"),
        (["a"], {"joined_n": 0}, ValueError, "joined_n"),
        (["a"], {"smoothing": -0.1}, ValueError, "smoothing"),
        (["a"], {"scale": 0.0}, ValueError, "scale"),
        (["a"], {"embed": lambda texts: [1.0]}, ValueError, r"must be \[texts, width\]"),
        (["a"], {"embed": lambda texts: [[1.0], [1.0]]}, ValueError, r"must be \[texts, width\]"),
        (["a"], {"embed": lambda texts: [[math.nan]]}, ValueError, "not finite of 1 texts"),
        (["a"], {"cluster": len}, ValueError, "needs references and embed"),
        (["a"], {"cluster": lambda x: [0], "embed": letters, "references": ["a"]}, ValueError, "one label each"),
    ],
)
def test_bad_input(texts, options, error, message):
    with pytest.raises(error, match=message):
        diversity(texts, **options)


def test_counts_that_are_none_have_no_area():
    assert math.isnan(mauve(np.array([0, 0]), np.array([1, 0])))
    with pytest.raises(ValueError, match="must not be below 0"):
        mauve(np.array([1, 1]), np.array([-1, 2]))


def test_combined_with_another():
    both = evaluate.combine([Diversity(keep_in_memory=True), DialogueCoherence(keep_in_memory=True)])
    found = both.compute(
        predictions=MADE, references=REAL, max_n=3, scorer=lambda contexts, responses: [1.0, 2.0, 6.0]
    )
    assert found["mean"] == 3 and found["distinct_3"] == diversity(MADE, max_n=3)["distinct_3"]
    assert "distinct_4" not in found


def test_real_texts_are_counted_apart_from_made_ones():
    real, made = histograms(np.zeros((3, 1)), np.ones((1, 1)), lambda rows: rows[:, 0].astype(int))
    assert (real.tolist(), made.tolist()) == ([3, 0], [0, 1])
