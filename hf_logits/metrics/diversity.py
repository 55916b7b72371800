"""Diversity: how much texts repeat themselves and each other, and how near they are to real ones.

Distinct n-grams (Li et al. 2016, https://arxiv.org/abs/1510.03055), self-BLEU (Zhu et al. 2018,
https://arxiv.org/abs/1802.01886), MAUVE (Pillutla et al. 2021, https://arxiv.org/abs/2102.01454), and what STEER (O'Neill et
al. 2023, https://arxiv.org/abs/2308.07645) reports of synthetic texts beside real ones.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from datasets import Value

from hf_logits.checks import check_count, check_number
from hf_logits.metrics import module
from hf_logits.metrics.embeddings import Embed, centroid_cosine, embedded, mauve, mean_cosine
from hf_logits.ngrams import distinct, self_bleu


Tokenize = Callable[[str], Sequence[Hashable]]


def normalized_ngrams(
    texts: Sequence[str], *, n: int = 3, tokenize: Tokenize = str.split, limit: int | None = None
) -> float:
    """STEER's normalised n-grams: different over all n-grams of the texts joined by spaces, of its first `limit` tokens.

    Joining makes n-grams across texts, and the number falls as the text grows: compare equal numbers of tokens.
    """
    return distinct([tokenize(" ".join(texts))[:limit]], n)


def histograms(
    real: np.ndarray, made: np.ndarray, cluster: Callable[[np.ndarray], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """How many of the real rows, and of the made ones, are in each cluster of both together."""
    if not len(real) or not len(made):
        return np.zeros(1), np.zeros(1)
    labels = np.asarray(cluster(np.concatenate([real, made])))
    if labels.shape != (len(real) + len(made),):
        raise ValueError(
            f"cluster made an array of shape {labels.shape} of {len(real) + len(made)} rows; one label each."
        )
    kinds, places = np.unique(labels, return_inverse=True)
    first, second = (np.bincount(part, minlength=len(kinds)) for part in np.split(places, [len(real)]))
    return first, second


def diversity(
    texts: Sequence[str],
    *,
    references: Sequence[str] | None = None,
    tokenize: Tokenize = str.split,
    max_n: int = 4,
    joined_n: int = 3,
    smoothing: float = 0.1,
    embed: Embed | None = None,
    cluster: Callable[[np.ndarray], Any] | None = None,
    scale: float = 5.0,
) -> dict[str, Any]:
    """Distinct n-grams of texts, their self-BLEU, and, with an embedding, their spread; beside real texts, how near they are.

    Args:
        texts (list of `str`): what was generated, prompts left out.
        references (list of `str`, *optional*): real texts, not necessarily as many.
        tokenize (`Callable`, *optional*, defaults to `str.split`): a text to its tokens, such as `tokenizer.tokenize`. Numbers
            of different tokenizers don't compare.
        max_n (`int`, *optional*, defaults to 4): the longest n-gram.
        joined_n (`int`, *optional*, defaults to 3): n of `normalized_ngrams`.
        smoothing (`float`, *optional*, defaults to 0.1): of [`~hf_logits.ngrams.self_bleu`].
        embed (`Callable`, *optional*): texts to an array of shape `[N, D]`, as [`~hf_logits.hidden.embed_texts`] with a model
            and its tokenizer.
        cluster (`Callable`, *optional*): embeddings of shape `[N, D]`, the real ones first, to a cluster for each, for `mauve`.
            Its paper takes k-means with at most a tenth as many clusters as texts and at most 500, as far as we know.
        scale (`float`, *optional*, defaults to 5.0): c of MAUVE.

    Returns:
        `dict`, every share from 0 to 1:

        - `distinct_1` to `distinct_{max_n}`: different n-grams over all of them, none across texts; `rep_1` ...: 1 less those.
        - `distinct_product`: of `distinct_n` from 2 on, what is usually called diversity; high is diverse. `repetition_product`:
          of `rep_n`, which goes by that name in public code for STEER; low is diverse. Which of them its tables have is not
          known to us.
        - `normalized_ngrams`: of the joined text. With references, also `reference_normalized_ngrams`, of as many tokens.
        - `self_bleu`: mean BLEU of a text to all others; low is diverse. Texts without tokens take no part.
        - `tokens` and `empty`, the number of texts without tokens.
        - with `embed`, `spread`: 1 less the mean cosine of two texts. With references, also `reference_spread`, and
          `centroid_cosine`, of both means; with `cluster`, `mauve`.
        - `notes`: why a value is NaN.

    Raises:
        TypeError: a single `str`, or texts that are none.
        ValueError: `max_n` below 2, embeddings that are not finite or not one a text, clusters that are not one a text,
            `cluster` without `embed` or references.
    """
    for name, given in (("texts", texts), ("references", references or [])):
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise TypeError(f"{name} must be a list of str; got {given!r:.80}.")
    check_count("max_n", max_n, minimum=2)
    check_count("joined_n", joined_n, minimum=1)
    check_number("smoothing", smoothing, minimum=0.0, maximum=1.0)
    check_number("scale", scale, minimum=0.0, above=True)
    if cluster is not None and (embed is None or references is None):
        raise ValueError("cluster is for MAUVE, which needs references and embed: give both, or leave it out.")
    notes: module.Notes = {}
    tokens = [tokenize(text) for text in texts]
    full = [text for text in tokens if len(text)]
    found: dict[str, Any] = {"tokens": sum(map(len, tokens)), "empty": len(tokens) - len(full)}
    for n in range(1, max_n + 1):
        found[f"distinct_{n}"] = distinct(tokens, n)
        found[f"rep_{n}"] = 1 - found[f"distinct_{n}"]
    found["distinct_product"] = math.prod(found[f"distinct_{n}"] for n in range(2, max_n + 1))
    found["repetition_product"] = math.prod(found[f"rep_{n}"] for n in range(2, max_n + 1))
    limit = len(tokenize(" ".join(texts)))
    if references is not None:
        limit = min(limit, len(tokenize(" ".join(references))))
        found["reference_normalized_ngrams"] = normalized_ngrams(
            references, n=joined_n, tokenize=tokenize, limit=limit
        )
    found["normalized_ngrams"] = normalized_ngrams(texts, n=joined_n, tokenize=tokenize, limit=limit)
    several = len(full) > 1
    found["self_bleu"] = float(np.mean(self_bleu(full, max_n=max_n, smoothing=smoothing))) if several else math.nan
    if embed is not None:
        ours = embedded(embed, texts)
        found["spread"] = 1 - mean_cosine(ours)
        if references is not None:
            real = embedded(embed, references)
            found["reference_spread"] = 1 - mean_cosine(real)
            found["centroid_cosine"] = centroid_cosine(ours, real)
            if cluster is not None:
                found["mauve"] = mauve(*histograms(real, ours, cluster), scale=scale)
    reasons = {
        "normalized_ngrams": f"the joined text, cut to as many tokens as the references have, has no {joined_n} tokens",
        "reference_normalized_ngrams": f"the joined references, cut to as many tokens as the texts have, have no {joined_n} tokens",
        "self_bleu": "there are fewer than two texts with tokens",
        "spread": "there are fewer than two texts, or one has an embedding of zeros",
        "reference_spread": "there are fewer than two references, or one has an embedding of zeros",
        "centroid_cosine": "there are no texts or no references, or a mean is 0",
        "mauve": "there are no texts or no references",
    }
    for name, value in found.items():
        if math.isnan(value):
            notes[name] = reasons.get(name, "no text has so many tokens")
    return found | {"notes": notes}


class Diversity(module.LogitMetric):
    """How much texts repeat themselves and each other: distinct n-grams, self-BLEU, spread of embeddings.

    `Diversity("compared")` also takes real texts, one for each: centroids, MAUVE, and the n-grams of as many real tokens.
    `diversity` itself takes any number of them.

    ```python
    from hf_logits.metrics import Diversity

    Diversity().compute(predictions=["a cat sat", "a dog sat"])["distinct_1"]  # 4 of 6
    ```
    """

    inputs = {
        "texts": {"predictions": Value("string")},
        "compared": {"predictions": Value("string"), "references": Value("string")},
    }
    paper = "O'Neill et al. 2023, Steering Language Generation, https://arxiv.org/abs/2308.07645"

    def measure(
        self,
        predictions: list[str],
        references: list[str] | None = None,
        tokenize: Tokenize = str.split,
        max_n: int = 4,
        joined_n: int = 3,
        smoothing: float = 0.1,
        embed: Embed | None = None,
        cluster: Callable[[np.ndarray], Any] | None = None,
        scale: float = 5.0,
    ) -> dict[str, Any]:
        """As `diversity`: `predictions` are the generated texts, `references` the real ones."""
        return diversity(
            predictions,
            references=references,
            tokenize=tokenize,
            max_n=max_n,
            joined_n=joined_n,
            smoothing=smoothing,
            embed=embed,
            cluster=cluster,
            scale=scale,
        )
