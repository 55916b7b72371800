"""Sentences with a sentiment, parted once and for all, and two judges that no recipe learns from."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from common import tenth
from rated_sentences import rated_sentences
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


KINDS = ("tweets", "nytEditorialSnippets", "amazonReviewSnippets", "movieReviewSnippets")
PARTS = {"train": range(5), "validation": range(5, 6), "judge": range(6, 9), "test": range(9, 10)}
"""Tenths. The judge's part is for the classifier that judges."""


@cache
def sentences(part: str, *, clear: float = 1.0, kinds: tuple[str, ...] = KINDS) -> tuple[tuple[str, str], ...]:
    """Sentences and `"positive"` or `"negative"`, for ratings of `clear` or more in size; the same ones at each call.

    A sentence's part is decided by its words alone, so that none is in two of them however often it occurs.
    """
    found = {}
    for kind in rated_sentences(kinds).values():
        for text, rating in kind:
            words = " ".join(text.casefold().split())
            if abs(rating) >= clear and tenth(text) in PARTS[part]:
                found[words] = (text, "positive" if rating > 0 else "negative")
    return tuple(found[words] for words in sorted(found))


def word_classifier(rows: Sequence[tuple[str, str]], **options: Any) -> Pipeline:
    """Learns labels of texts from words and pairs of words. `options` are of scikit-learn's `LogisticRegression`."""
    texts, labels = zip(*rows, strict=True)
    made = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, **options),
    )
    return made.fit(list(texts), list(labels))


@cache
def classifier() -> Pipeline:
    """Learned from the judge's part."""
    return word_classifier(sentences("judge"))


def judged_by_classifier(texts: Sequence[str]) -> list[str]:
    return [str(label) for label in classifier().predict(list(texts))]


def judged_by_lexicon(texts: Sequence[str]) -> list[str]:
    """By VADER's rules and lexicon; `"neither"` where it finds no sentiment."""
    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(text)["compound"] for text in texts]
    return ["positive" if score > 0 else "negative" if score < 0 else "neither" for score in scores]
