"""Which kind of text is it, and is it positive or negative? A task with an answer of several tokens, on the rated sentences."""

import random

from sentiment import sentences


NAMES = {
    "tweets": "tweet",
    "nytEditorialSnippets": "newspaper",
    "amazonReviewSnippets": "product review",
    "movieReviewSnippets": "film review",
}
QUESTION = "Text: {text}\nFrom a tweet, newspaper, product review or film review? Positive or negative?\nAnswer:"


def examples(part: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `question`, `kind` and `sentiment`: as many of each pair as there are, up to the eighth part of `count`."""
    rng = random.Random(seed)
    found = []
    for kind, name in NAMES.items():
        for label in ("positive", "negative"):
            own = [text for text, sentiment in sentences(part, kinds=(kind,)) if sentiment == label]
            for text in rng.sample(own, min(len(own), count // 8)):
                found.append({"question": QUESTION.format(text=text), "kind": name, "sentiment": label})
    rng.shuffle(found)
    return found


def answer(row: dict[str, str]) -> str:
    return f" {row['kind']}, {row['sentiment']}"


def marks(row: dict[str, str], said: str) -> tuple[float, float, float]:
    """Whether both are right, the kind, the sentiment: a name counts wherever it is said, if no other one of its sort is."""
    said = said.casefold()
    kinds = [name for name in NAMES.values() if name in said]
    feelings = [name for name in ("positive", "negative") if name in said]
    kind, feeling = kinds == [row["kind"]], feelings == [row["sentiment"]]
    return float(kind and feeling), float(kind), float(feeling)
