"""Kinds of text, parted once and for all: film reviews are the domain to stay in; a judge that no recipe learns from tells the kinds apart."""

from collections.abc import Sequence
from functools import cache

from common import tenth
from rated_sentences import rated_sentences
from sentiment import KINDS, PARTS
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline


FILMS = "movieReviewSnippets"
PROMPT = "A sentence from a film review:\n"
"""What the expert writes behind."""


@cache
def texts(part: str) -> tuple[tuple[str, str], ...]:
    """Sentences and their kind, whatever their rating; the same ones at each call, and each in one part and of one kind."""
    found = {}
    for kind, rows in rated_sentences(KINDS).items():
        for text, _ in rows:
            if text and tenth(text) in PARTS[part]:
                found[" ".join(text.casefold().split())] = (text, kind)
    return tuple(found[words] for words in sorted(found))


def films(part: str) -> list[str]:
    """The sentences of film reviews."""
    return [text for text, kind in texts(part) if kind == FILMS]


@cache
def classifier() -> Pipeline:
    """Words and pairs of words, learned from the judge's part; the kinds count alike."""
    own, kinds = zip(*texts("judge"), strict=True)
    made = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )
    return made.fit(list(own), list(kinds))


def judged(written: Sequence[str]) -> list[str]:
    """The kind that each text looks like."""
    return [str(kind) for kind in classifier().predict(list(written))]
