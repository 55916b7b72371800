"""How much token sequences repeat: themselves, by distinct n-grams, and each other, by self-BLEU. Tokens are ids or words."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


Tokens = Sequence[Hashable]


def ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """Different n-grams of all texts over their number, none across texts (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    NaN where no text has n tokens.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[Tokens], *, max_n: int = 4, smoothing: float = 0.1) -> list[float]:
    """BLEU of each text with all the others as its references (Zhu et al. 2018, https://arxiv.org/abs/1802.01886). 1: repeated.

    With h its number of n-grams, each counted no oftener than in the text that has it most often, and t all its n-grams:
    `exp(min(0, 1 - r / c)) * (prod_n h_n / t_n) ** (1 / max_n)`, c its length and r the length that is nearest among the others,
    the shorter one of two. Time and memory are linear in the number of tokens.

    Args:
        texts: of one token each, at least; two of them.
        max_n: the longest n-gram.
        smoothing: h where it is 0, in each order but the first: NLTK's method 1. Without a word in common, it is 0 anyway.
    """
    logs = [0.0] * len(texts)
    for n in range(1, max_n + 1):
        counts = [Counter(ngrams(text, n)) for text in texts]
        most: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # how often at most, by whom, how often by another
        for place, count in enumerate(counts):
            for gram, times in count.items():
                first, owner, second = most.get(gram, (0, -1, 0))
                most[gram] = (times, place, first) if times > first else (first, owner, max(second, times))
        for place, count in enumerate(counts):
            others = {gram: most[gram][2 if most[gram][1] == place else 0] for gram in count}
            hits: float = sum(min(times, others[gram]) for gram, times in count.items())
            if not hits and n > 1:
                hits = smoothing
            logs[place] += math.log(hits / max(1, count.total())) / max_n if hits else -math.inf
    lengths = Counter(len(text) for text in texts)
    for place, text in enumerate(texts):
        own = len(text)
        other = (length for length, times in lengths.items() if length != own or times > 1)
        nearest = min(other, key=lambda length: (abs(length - own), length))
        logs[place] += min(0.0, 1 - nearest / own)
    return [math.exp(log) for log in logs]
