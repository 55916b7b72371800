"""Verbalizer manipulation: does a model obey an instruction that gives classes unnatural names, or its prior?

Li, Yan et al. 2023, "Instruction-following Evaluation through Verbalizer Manipulation" (https://arxiv.org/abs/2307.10558). The rates
beside the accuracies are ours.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from hf_logits.metrics import module, tables


GROUPS = ("natural", "neutral", "unnatural")
SEPARATOR = "|"
"""Between the words of a verbalizer, which stand in the order of the classes."""


def swapped(words: Sequence[str]) -> list[str]:
    """Every class with the word of the next one: the natural words as unnatural ones."""
    return [*words[1:], words[0]]


def with_verbalizer(
    dataset: Dataset,
    words: Sequence[str],
    template: str,
    *,
    group: str,
    text_column: str = "text",
) -> Dataset:
    """Prompts that name the classes of a dataset with given words, ready for [`~hf_logits.metrics.choice_logprobs`].

    Args:
        dataset ([`~datasets.Dataset`]): texts and the numbers of their classes.
        words (`Sequence[str]`): of the classes, in their order.
        template (`str`): with `{text}` and, in the instruction, `{0}`, `{1}`, ... for the words.
        group (`str`): `"natural"`, `"neutral"` or `"unnatural"`.
        text_column (`str`, *optional*, defaults to `"text"`): where the texts are.

    Returns:
        The dataset with `prompt`, `choices` (the words), `verbalizer` and `group` beside its own columns.
    """
    _check_words(words, group)
    if "{text}" not in template or any(f"{{{place}}}" not in template for place in range(len(words))):
        raise ValueError(
            f"The template must have {{text}} and {{0}} to {{{len(words) - 1}}}, or nobody knows what to answer; got {template!r}."
        )
    if text_column not in dataset.column_names:
        raise ValueError(f"There is no column {text_column!r}; there are {dataset.column_names}.")
    same = {"choices": list(words), "verbalizer": SEPARATOR.join(words), "group": group}
    return dataset.map(lambda row: {"prompt": template.format(*words, text=row[text_column]), **same})


def _check_words(words: Sequence[str], group: str) -> None:
    if group not in GROUPS:
        raise ValueError(f"A verbalizer's group is {group!r}; it must be one of {', '.join(GROUPS)}.")
    if len(words) < 2 or len(set(words)) < len(words) or any(not word or SEPARATOR in word for word in words):
        raise ValueError(
            f"A verbalizer needs two or more different words, one for each class, without {SEPARATOR!r}; got {list(words)}."
        )


def verbalizer_gap(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    verbalizers: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Accuracy with natural, neutral and unnatural names of the classes, and what lies between.

    Args:
        predictions (`[N]`): which of its verbalizer's words a row was answered with; -1 for none of them.
        references (`[N]`): the class.
        verbalizers (`[N]`): the words of the classes, in their order, joined by `"|"`: `"positive|negative"`.
        groups (`[N]`): `"natural"`, `"neutral"` or `"unnatural"`, one for each verbalizer.

    Returns:
        `dict`: `accuracy_natural`, `accuracy_neutral`, `accuracy_unnatural` (means over the verbalizers of a group, each with the same
        weight) and the same as `balanced_accuracy_...` (the mean of the classes' recalls); `follow_gap` (natural less unnatural);
        `prior_following` (the share of unnatural rows answered with the class's natural word, among those whose words a natural
        verbalizer has; `notes` says how many others there are); `invalid_rate`; `by_verbalizer` (a `dict`
        of `group`, `count`, `accuracy`, `balanced_accuracy`, `invalid_rate` and `frequencies` for each), and `notes`.

    Raises:
        ValueError: different lengths, an unknown group or class, fewer than two words, a verbalizer in two groups.
    """
    if not len(predictions) == len(references) == len(verbalizers) == len(groups):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references, {len(verbalizers)} verbalizers and {len(groups)} groups; "
            "give one of each a row."
        )
    group_of: dict[str, str] = {}
    for verbalizer, group in dict.fromkeys(zip(verbalizers, groups, strict=True)):
        _check_words(verbalizer.split(SEPARATOR), group)
        if group_of.setdefault(verbalizer, group) != group:
            raise ValueError(f"The verbalizer {verbalizer!r} is in the groups {group_of[verbalizer]} and {group}.")
    words = {verbalizer: verbalizer.split(SEPARATOR) for verbalizer in group_of}
    sizes = np.array([len(words[one]) for one in verbalizers], dtype=int)
    picked = tables.read_labels(predictions, sizes, "predictions", none=True)
    gold = tables.read_labels(references, sizes, "references")
    which = np.array(verbalizers, dtype=object)
    by = {
        one: _of_verbalizer(picked[which == one], gold[which == one], group, len(words[one]))
        for one, group in group_of.items()
    }
    notes: module.Notes = {}
    found: dict[str, Any] = {}
    for kind in ("accuracy", "balanced_accuracy"):
        for group in GROUPS:
            own = [one[kind] for one in by.values() if one["group"] == group]
            found[f"{kind}_{group}"] = module.ratio(
                sum(own), len(own), f"{kind}_{group}", f"no verbalizer is {group}", notes
            )
    found["follow_gap"] = found["accuracy_natural"] - found["accuracy_unnatural"]
    if math.isnan(found["follow_gap"]):
        notes["follow_gap"] = "it needs natural and unnatural verbalizers"
    # the class that naturally has a word
    natural = [words[one] for one, group in group_of.items() if group == "natural"]
    meant, asked = [], 0
    for place in np.flatnonzero([group == "unnatural" for group in groups]).tolist():
        own = words[verbalizers[place]]
        known = next((one for one in natural if sorted(one) == sorted(own)), None)
        if known is not None:
            asked += 1
            meant.append(picked[place] >= 0 and known.index(own[picked[place]]) == gold[place])
    found["prior_following"] = module.ratio(
        int(sum(meant)), asked, "prior_following", "no unnatural verbalizer has the words of a natural one", notes
    )
    skipped = sum(group == "unnatural" for group in groups) - asked
    if asked and skipped:
        notes["prior_following"] = f"{skipped} unnatural rows, whose words no natural verbalizer has, are left out"
    found["invalid_rate"] = tables.mean(picked < 0)
    if not len(picked):
        notes["invalid_rate"] = "there are no rows"
    return found | {"by_verbalizer": by, "notes": notes}


def _of_verbalizer(picked: np.ndarray, gold: np.ndarray, group: str, count: int) -> dict[str, Any]:
    recalls = [float((picked[gold == label] == label).mean()) for label in range(count) if (gold == label).any()]
    return {
        "group": group,
        "count": len(picked),
        "accuracy": float((picked == gold).mean()),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "invalid_rate": float((picked < 0).mean()),
        "frequencies": (picked[:, None] == np.arange(count)).mean(0).tolist(),
    }


class VerbalizerGap(module.LogitMetric):
    """Whether a model obeys an instruction that gives the classes other names, or its prior.

    ```python
    from hf_logits.metrics import VerbalizerGap

    VerbalizerGap().compute(
        predictions=[0, 1, 1, 0],
        references=[0, 1, 0, 1],
        verbalizer=["positive|negative"] * 2 + ["negative|positive"] * 2,
        group=["natural"] * 2 + ["unnatural"] * 2,
    )["follow_gap"]
    ```

    In the configuration `"logprobs"`, `predictions` is the table of [`~hf_logits.metrics.choice_logprobs`] with the words as choices; the
    results then have `attentiveness`, the mean probability of all words together, over all rows and for each verbalizer, and `tie_rate`,
    the share of rows whose answer was the first of equals. Where a word begins with another, give `distinct`.
    Average over both orders of the words (`foo|bar` and `bar|foo`) before reading anything into a number: a preference for a word
    then cancels out.
    """

    inputs = {
        "default": {
            "predictions": Value("int64"),
            "references": Value("int64"),
            "verbalizer": Value("string"),
            "group": Value("string"),
        },
        "logprobs": {
            "predictions": List(Value("float64")),
            "references": Value("int64"),
            "verbalizer": Value("string"),
            "group": Value("string"),
        },
    }
    paper = "Li, Yan et al. 2023, Instruction-following Evaluation through Verbalizer Manipulation, https://arxiv.org/abs/2307.10558"

    def measure(
        self,
        predictions: list[Any],
        references: list[int],
        verbalizer: list[str],
        group: list[str],
        distinct: list[list[bool]] | None = None,
    ) -> dict[str, Any]:
        """As `verbalizer_gap`: `predictions` are words by number or log-probs of words, `references` the classes."""
        if self.config_name != "logprobs":
            return verbalizer_gap(predictions, references, verbalizer, group)
        values, real = tables.read_logprobs(predictions)
        found = verbalizer_gap(tables.picks(values), references, verbalizer, group)
        if [len(one.split(SEPARATOR)) for one in verbalizer] != real.sum(1).tolist():
            raise ValueError("Each row of predictions must have one log-prob for each word of its verbalizer.")
        mass = tables.mass(values, real, distinct)
        for one, own in found["by_verbalizer"].items():
            own["attentiveness"] = tables.mean(mass[np.array(verbalizer, dtype=object) == one])
        if not len(mass):
            found["notes"] |= dict.fromkeys(("attentiveness", "tie_rate"), "there are no rows")
        return found | {"attentiveness": tables.mean(mass), "tie_rate": tables.mean(tables.tied(values))}
