"""Texts with a topic, parted by topic once and for all, and the words that are typical of a topic.

The texts are MMLU's worked examples, as lm-eval 0.4.13 has them (MIT), a few subjects of chatterbot-corpus 1.3.3 (BSD-3), and some of the
VADER paper's sentences of reviews (vaderSentiment 0.5, MIT). A topic is one word. The topics of validation and test are never topics in
training, under whatever name: what is nearest to them is left out altogether (*prehistory*, *econometrics*, *anatomy*, *virology*, *money*; but
*medicine* and *accounting* are in training), and so are collections without a topic (*miscellaneous*, *trivia*, *gossip*, ...).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from exam import worked_examples
from harmful_requests import as_question, small_talk
from rated_sentences import rated_sentences
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS


TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "accounting": ("professional_accounting",),
        "advertising": ("marketing", "public_relations"),
        "aging": ("human_aging",),
        "algebra": ("abstract_algebra",),
        "astronomy": ("astronomy",),
        "electricity": ("electrical_engineering",),
        "ethics": ("business_ethics", "moral_disputes"),
        "geography": ("high_school_geography",),
        "humor": ("talk: humor",),
        "literature": ("talk: literature",),
        "logic": ("formal_logic", "logical_fallacies"),
        "management": ("management",),
        "mathematics": ("college_mathematics", "elementary_mathematics", "high_school_mathematics"),
        "medicine": ("clinical_knowledge", "college_medicine", "professional_medicine"),
        "movies": ("talk: movies", "rated: movieReviewSnippets"),
        "nutrition": ("nutrition",),
        "philosophy": ("philosophy",),
        "physics": ("college_physics", "conceptual_physics", "high_school_physics"),
        "religion": ("world_religions",),
        "sexuality": ("human_sexuality",),
        "shopping": ("rated: amazonReviewSnippets",),
        "sociology": ("sociology",),
        "sports": ("talk: sports",),
        "statistics": ("high_school_statistics",),
    },
    "validation": {
        "computers": (
            "college_computer_science",
            "computer_security",
            "high_school_computer_science",
            "machine_learning",
            "talk: computers",
        ),
        "politics": ("high_school_government_and_politics", "security_studies", "talk: politics", "us_foreign_policy"),
        "psychology": ("high_school_psychology", "professional_psychology", "talk: psychology"),
    },
    "test": {
        "biology": ("college_biology", "high_school_biology", "medical_genetics"),
        "chemistry": ("college_chemistry", "high_school_chemistry"),
        "economics": ("high_school_macroeconomics", "high_school_microeconomics"),
        "history": (
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "talk: history",
        ),
        "law": ("international_law", "jurisprudence", "professional_law"),
    },
}
"""Of each part, its topics and where their texts are: subjects of MMLU, of chatterbot-corpus (`talk:`) and kinds of rated sentences (`rated:`)."""
RATED = 60
"""Sentences that are taken of a kind of rated ones, so that no topic has many more texts than the others."""
PIECE = 12
"""Words that a piece of a text has at least."""


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", " ".join(text.split()))


def _reasoned(question: str, target: str) -> str:
    """A question, its choices as one sentence, and its reasoning, without what is said in each of them and of single choices."""
    told = r"think step by step|We refer to|The answer is|This question refers|\([A-D]\)"
    question, *choices = re.split(r"\s*\([A-D]\)\s*", question)
    sentences = [*_sentences(question), ", ".join(one.rstrip(".") for one in choices) + ".", *_sentences(target)]
    return " ".join(one for one in sentences if not re.search(told, one))


@cache
def documents(part: str) -> tuple[tuple[str, str], ...]:
    """Whole texts and their topics.

    Args:
        part: `"train"`, `"validation"` or `"test"`, which share no text, no source and no topic.
    """
    texts = [(subject, _reasoned(question, target)) for subject, question, target in worked_examples()]
    for topic, turns in small_talk():
        if len(turns) >= 2 and all(turns[:2]):
            texts.append((f"talk: {topic}", f"{as_question(turns[0])} {turns[1]}"))
    for kind, rated in rated_sentences(("amazonReviewSnippets", "movieReviewSnippets")).items():
        long = sorted(text for text, _ in rated if len(text.split()) >= PIECE)
        texts += [(f"rated: {kind}", text) for text in random.Random(0).sample(long, min(RATED, len(long)))]
    topic_of = {source: topic for topic, sources in TOPICS[part].items() for source in sources}
    return tuple((text, topic_of[source]) for source, text in texts if source in topic_of and text)


def pieces(part: str) -> tuple[tuple[str, str], ...]:
    """A sentence or a few of a text, and its topic. Arguments as in [`documents`]."""
    found = []
    for text, topic in documents(part):
        words: list[str] = []
        for sentence in _sentences(text):
            words += sentence.split()
            if len(words) >= PIECE:
                found.append((" ".join(words), topic))
                words = []
        if len(words) >= PIECE // 2:
            found.append((" ".join(words), topic))
    return tuple(found)


# --- the judge -----------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    return re.findall(r"(?<![\\a-z])[a-z]{4,}", text.casefold())  # no commands of LaTeX


def log_odds(mine: Counter[str], rest: Counter[str]) -> dict[str, float]:
    """Of each word of `mine`, how much likelier it is there: the log-odds ratio over its standard deviation.

    The prior is both together, with as much weight as the smaller (Monroe et al. 2008, "Fightin' Words").
    """
    prior, weight = mine + rest, min(mine.total(), rest.total())
    scores = {}
    for word in mine:
        share = prior[word] / prior.total() * weight
        counts = [(counted[word] + share, counted.total() + weight) for counted in (mine, rest)]
        own, other = (math.log(count / (total - count)) for count, total in counts)
        scores[word] = (own - other) / math.sqrt(sum(1 / count for count, _ in counts))
    return scores


def typical_words(own: Sequence[str], contrasts: Sequence[Sequence[str]], topic: str, *, count: int) -> list[str]:
    """The words that tell texts of a topic best from each of several collections of other texts: at most `count`, the best first.

    A word is in two texts of the topic at least, and is not among those that any text has (scikit-learn's list).

    Args:
        own, contrasts: texts about the topic, and collections of texts that are not.
        topic: the word itself. Words that begin with its first five letters, or are its beginning, are not among those found.
        count: how many are wanted.
    """
    mine = Counter(word for text in own for word in words_of(text))
    texts = Counter(word for text in own for word in set(words_of(text)))
    scores = [log_odds(mine, Counter(word for text in other for word in words_of(text))) for other in contrasts]
    worst = {
        word: min(found[word] for found in scores)
        for word in mine
        if texts[word] > 1 and word not in ENGLISH_STOP_WORDS and word[:5] != topic[:5]
    }
    return sorted((word for word in worst if worst[word] > 0), key=lambda word: (-worst[word], word))[:count]


@cache
def judges(part: str, count: int = 20, *, new: bool = False) -> dict[str, frozenset[str]]:
    """Typical words of each topic of a held-out part. Training saw none of the texts that tell: those of both held-out parts, and tweets.

    Args:
        new: leave out words that some training text has, be it about something else, and the control codes.
    """
    held_out = [*documents("validation"), *documents("test")]
    tweets = [text for text, _ in rated_sentences(("tweets",))["tweets"]]
    learned = {"true", "false"} | {word for text, _ in documents("train") for word in words_of(text)} if new else set()
    found = {}
    for topic in TOPICS[part]:
        own = [text for text, its in held_out if its == topic]
        others = [text for text, its in held_out if its != topic]
        words = typical_words(own, [others, tweets], topic, count=10**6)
        found[topic] = frozenset([word for word in words if word not in learned][:count])
    return found
