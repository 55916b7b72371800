"""Kinds of text, parted once and for all: film reviews are the domain to stay in; a judge that no recipe learns from tells the kinds apart."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from math import exp, log

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


def self_bleu(written: Sequence[Sequence[int]], order: int = 4) -> float:
    """How much the texts are alike: the mean BLEU of each against all others, from 0 to 1. Needs two texts or more.

    Orders 1 to `order` count alike; an order without a match counts as a tenth of one, one that the text is too short for does not
    count.
    """
    longest = Counter(map(len, written))
    counts = [[Counter(_grams(text, n)) for n in range(1, order + 1)] for text in written]
    best: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])  # the two largest counts in one text
    for own in counts:
        for grams in own:
            for gram, count in grams.items():
                best[gram] = sorted([*best[gram], count])[1:]
    scores = []
    for text, own in zip(written, counts, strict=True):
        precisions = []
        for grams in own:
            total = sum(grams.values())
            # what the others have at most: the second largest count, where the largest is this text's own
            others = {
                gram: best[gram][0] if count == best[gram][1] else best[gram][1] for gram, count in grams.items()
            }
            matches = sum(min(count, others[gram]) for gram, count in grams.items())
            if total:
                precisions.append(log(max(matches, 0.1) / total))
        lengths = longest - Counter([len(text)])
        nearest = min(lengths, key=lambda length: (abs(length - len(text)), length))
        brevity = min(0.0, 1 - nearest / len(text)) if text else 0.0
        scores.append(exp(brevity + sum(precisions) / len(precisions)) if precisions else 0.0)
    return sum(scores) / len(scores)


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
