"""Distinct n-grams and self-BLEU, against numbers by hand and against counting the slow way."""

import math
import random

import pytest

from hf_logits.ngrams import distinct, ngrams, self_bleu


REPEATED = "a b c a b c a b d".split()


def slow_bleu(text: list[str], others: list[list[str]], max_n: int, smoothing: float) -> float:
    """One text against all references, n-gram by n-gram."""
    precisions = []
    for n in range(1, max_n + 1):
        hits = 0
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        for i, gram in enumerate(grams):
            before = grams[:i].count(gram)
            allowed = max([other[j : j + n] for j in range(len(other) - n + 1)].count(gram) for other in others)
            hits += before < allowed
        if n == 1 and not hits:
            return 0.0
        precisions.append((hits or smoothing) / max(1, len(grams)))
    if 0 in precisions:
        return 0.0
    nearest = sorted((abs(len(other) - len(text)), len(other)) for other in others)[0][1]
    brevity = 1.0 if len(text) > nearest else math.exp(1 - nearest / len(text))
    return brevity * math.prod(precisions) ** (1 / max_n)


@pytest.mark.parametrize(("n", "share"), [(1, 4 / 9), (2, 4 / 8), (3, 4 / 7), (4, 4 / 6)])
def test_distinct_by_hand(n, share):
    assert distinct([REPEATED], n) == pytest.approx(share, abs=1e-15)
    assert distinct([list(map(ord, REPEATED))], n) == distinct([REPEATED], n)


def test_no_ngram_crosses_texts():
    assert ngrams("abc", 2) == [("a", "b"), ("b", "c")] and ngrams("a", 2) == []
    assert distinct(["ab", "ab", "a"], 2) == 0.5
    assert math.isnan(distinct(["a", "b", ""], 2)) and math.isnan(distinct([], 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_self_bleu_is_that_of_each_text_to_all_others(smoothing, seed):
    rng = random.Random(seed)
    texts = [rng.choices("abcdef"[: 3 + seed], k=rng.randint(1, 25)) for _ in range(12)]
    texts += [texts[0], texts[3]]  # repeated
    found = self_bleu(texts, smoothing=smoothing)
    slow = [slow_bleu(text, texts[:i] + texts[i + 1 :], 4, smoothing) for i, text in enumerate(texts)]
    assert found == pytest.approx(slow, abs=1e-12)
    assert len({round(value, 6) for value in slow}) > 3


def test_self_bleu_by_hand():
    # 3 of 4 words, 2 of 3 pairs; the nearest of the lengths 3 and 5 is the shorter one, which is no penalty
    texts = ["a b c d".split(), "a b c".split(), "x x x x x".split()]
    assert self_bleu(texts, max_n=2)[0] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    assert self_bleu(texts, max_n=2)[1] == pytest.approx(math.exp(1 - 4 / 3))
    assert self_bleu(texts)[2] == 0
    assert self_bleu([REPEATED, REPEATED, REPEATED]) == pytest.approx([1, 1, 1])
    # no word twice as often as in another text
    assert self_bleu([["a", "a"], ["a"]], max_n=1)[0] == 0.5
