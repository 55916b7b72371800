"""Kinds of text, parted once and for all: film reviews are the domain to stay in; a judge that no recipe learns from tells the kinds apart."""

from collections.abc import Sequence
from functools import cache

from common import tenth
from rated_sentences import rated_sentences
from sentiment import KINDS, PARTS, word_classifier
from sklearn.pipeline import Pipeline


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
    """Learned from the judge's part; the kinds count alike."""
    return word_classifier(texts("judge"), class_weight="balanced")


def judged(written: Sequence[str]) -> list[str]:
    """The kind that each text looks like."""
    return [str(kind) for kind in classifier().predict(list(written))]
