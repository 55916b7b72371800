"""MMLU's example questions with four choices, in 57 subjects; read from the wheel of lm-eval 0.4.13 (MIT), which is not installed."""

import re
from dataclasses import dataclass
from functools import cache

import yaml
from packages import wheel


LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the place of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


@cache
def worked_examples() -> tuple[tuple[str, str, str], ...]:
    """Subject, question with its choices, and how it is reasoned and answered, in the order of their subjects."""
    found = []
    with wheel("lm-eval", "0.4.13") as opened:
        for name in sorted(opened.namelist()):
            if re.search(r"mmlu/flan_cot_fewshot/mmlu_\w+\.yaml$", name):
                # the loader's own tags say where else to look, which nobody needs here
                read = yaml.safe_load(re.sub(r"!\w+", "", opened.read(name).decode()))
                for sample in read.get("fewshot_config", {}).get("samples", []):
                    found.append((read["dataset_name"], sample["question"], sample["target"]))
    return tuple(found)


@cache
def exam() -> tuple[Question, ...]:
    """All 281 questions that name their answer, in the order of their subjects."""
    found = []
    for subject, text, target in worked_examples():
        answer = re.search(r"The answer is \(([A-D])\)", target)
        if answer:
            question, *choices = (part.strip() for part in re.split(r"\([A-D]\)", text, maxsplit=4))
            found.append(Question(subject, question, tuple(choices), LETTERS.index(answer.group(1))))
    return tuple(found)
