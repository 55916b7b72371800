"""Judges of tiny models: against one forward a prompt, without padding, and against a model that says what it is told."""

import logging
import math
import random
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

import tiny
from hf_logits.metrics import JudgePosition, judge_by_log_probs, judge_by_samples
from hf_logits.metrics.judge_position import judge_position
from hf_logits.metrics.judges import SCORE_TEMPLATE, VERDICT_TEMPLATE, read_scores
from oracles import word_tokenizer


QUESTIONS = ["w20 w21 w22", "w23", "w24 w25"]
FIRST = ["w30 w31", "w32 w33 w34 w35", "w36"]
SECOND = ["w40", "w41", "w42 w43 w44"]
TEMPLATE = "w10 {question} w11 {first} w12 {second} w13"
CHAT = "{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w50 {% endif %}"


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerBase:
    made = word_tokenizer(["1", "2"])
    made.chat_template = CHAT if chat else None
    return made


def one_by_one(
    model: Any, words: PreTrainedTokenizerBase, first: list[str], second: list[str], **options: Any
) -> list:
    """The slow obvious path: one prompt, one forward, no padding."""
    found = []
    for question, one, other in zip(QUESTIONS, first, second, strict=True):
        text = TEMPLATE.format(question=question, first=one, second=other)
        text = f"<bos> {text} w50" if options.get("chat") else text
        ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        found.append(logits[words.convert_tokens_to_ids(["1", "2"])].softmax(-1).tolist())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_probs_are_those_of_single_prompts(name: str, chat: bool, batch_size: int) -> None:
    model, words = tiny.DECODERS[name](seed=3), tokenizer(chat=chat)
    model.train()
    scores = judge_by_log_probs(model, words, QUESTIONS, FIRST, SECOND, template=TEMPLATE, batch_size=batch_size)
    assert model.training
    model.eval()
    ab, ba = (one_by_one(model, words, *pair, chat=chat) for pair in ((FIRST, SECOND), (SECOND, FIRST)))
    for row, (one, other) in enumerate(zip(ab, ba, strict=True)):
        assert scores["predictions1"][row][0] == pytest.approx(one, abs=1e-5)
        assert scores["predictions2"][row][0] == pytest.approx(other[::-1], abs=1e-5)
        assert sum(one) == pytest.approx(1)
    assert max(abs(one[0] - other[1]) for one, other in zip(ab, ba, strict=True)) > 0.01  # the orders do differ


def test_the_scores_go_into_the_metric() -> None:
    scores = judge_by_log_probs(tiny.llama(seed=3), tokenizer(), QUESTIONS, FIRST, SECOND, template=TEMPLATE)
    found = JudgePosition(keep_in_memory=True).compute(**scores)
    means = [
        (scores["predictions1"][row][0][0] + scores["predictions2"][row][0][0]) / 2 for row in range(len(QUESTIONS))
    ]
    assert found["verdicts"] == ["win" if one > 0.5 else "lose" for one in means]
    # equal answers look the same in both orders: whatever the position does, it cancels out
    same = judge_by_log_probs(tiny.llama(seed=3), tokenizer(), QUESTIONS, FIRST, FIRST, template=TEMPLATE)
    found = JudgePosition(keep_in_memory=True).compute(**same)
    assert (found["tie"], found["conflict_rate"]) == (1, 1)


class Prefer(LogitsProcessor):
    """Adds to one token."""

    def __init__(self, token: int, bias: float):
        self.token, self.bias = token, bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] += self.bias
        return scores


def test_a_steered_judge() -> None:
    model, words = tiny.llama(seed=3), tokenizer()
    plain = judge_by_log_probs(model, words, QUESTIONS, FIRST, SECOND, template=TEMPLATE)
    nothing = judge_by_log_probs(
        model, words, QUESTIONS, FIRST, SECOND, template=TEMPLATE, logits_processor=[Prefer(20, 1.0)]
    )
    steered = judge_by_log_probs(
        model,
        words,
        QUESTIONS,
        FIRST,
        SECOND,
        template=TEMPLATE,
        logits_processor=[Prefer(words.convert_tokens_to_ids("1"), 1.0)],
    )
    for row in range(3):
        before, after = plain["predictions1"][row][0], steered["predictions1"][row][0]
        assert nothing["predictions1"][row][0] == pytest.approx(before, abs=1e-6)
        assert math.log(after[0] / after[1]) == pytest.approx(math.log(before[0] / before[1]) + 1, abs=1e-4)


def test_a_judge_that_would_rather_say_something_else_is_told_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_logits"):
        judge_by_log_probs(
            tiny.llama(seed=3),
            tokenizer(),
            QUESTIONS,
            FIRST,
            SECOND,
            template=TEMPLATE,
            logits_processor=[Prefer(9, 50.0)],
        )
    assert "of the judge's probability" in caplog.text


# --- samples -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Both are fine.\nScore of answer 1: 8\nScore of answer 2: 7", (8, 7)),
        ("**Score of answer 1:** 8.5\n\n**Score of answer 2: 10**  \n", (8.5, 10)),
        ("The score of Assistant 1: 3/10\nThe score of Assistant 2: 4/10.", (3, 4)),
        ("Score of answer 1: 9\nScore of answer 2: 2\nScore of answer 1: 1\nScore of answer 2: 3", (1, 3)),
        ("Score of answer 1: 8", None),
        ("Score of answer 1: 8\nScore of answer 2: good", None),
        ("Score of answer 1: 8\nScore of answer 2: 11", None),
        ("Score of answer 1: 0\nScore of answer 2: 5", None),
        ("Score of answer 1: 8\nScore of answer 2: 7\nI hope this helps!", None),
        ("Score of answer 2: 8\nScore of answer 1: 3", (3, 8)),
        ("Score of answer 1: 8\nScore of answer 1: 3", None),
        ("Score of answer 2: 8\nScore of answer 3: 3", None),
        ("First: 8\nSecond: 3", (8, 3)),
        ("Score of answer 1: 8\nMean: 3", None),
        ("", None),
    ],
)
def test_scores_are_read_off_the_last_two_lines(text: str, scores: tuple | None) -> None:
    assert read_scores(text) == scores


def read_words(text: str) -> tuple[float, float] | None:
    """Scores from the first two words of tiny models, by their numbers."""
    numbers = [float(word.removeprefix("w")) for word in text.split()[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and min(numbers) > 10 else None


@pytest.mark.parametrize("chat", [False, True])
def test_samples_are_the_models_own(chat: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, words = tiny.llama(seed=3), tokenizer(chat=chat)
    options = {"template": TEMPLATE, "read": read_words, "max_new_tokens": 3}
    with caplog.at_level(logging.WARNING, "hf_logits"):
        greedy = judge_by_samples(
            model, words, QUESTIONS, FIRST, SECOND, num_samples=1, do_sample=False, temperature=None, top_p=None,
            top_k=None, **options,
        )  # fmt: skip
    lost = 0
    for key, (one, other) in (("predictions1", (FIRST, SECOND)), ("predictions2", (SECOND, FIRST))):
        for row in range(3):
            text = TEMPLATE.format(question=QUESTIONS[row], first=one[row], second=other[row])
            ids = words(f"<bos> {text} w50" if chat else text, add_special_tokens=False)["input_ids"]
            for _ in range(3):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            pair = read_words(words.decode(ids[-3:], skip_special_tokens=True))
            lost += pair is None
            expected = [] if pair is None else [list(pair if key == "predictions1" else pair[::-1])]
            assert greedy[key][row] == expected
    assert lost < 6
    assert (f"{lost} of 6 samples" in caplog.text) == bool(lost)
    torch.manual_seed(0)
    drawn = judge_by_samples(
        model, words, QUESTIONS, FIRST, SECOND, num_samples=8, template=TEMPLATE, max_new_tokens=3,
        read=lambda text: (float(len(text)), 2.0),
    )  # fmt: skip
    assert all(len(row) == 8 for row in drawn["predictions1"] + drawn["predictions2"])
    assert len({tuple(pair) for row in drawn["predictions1"] for pair in row}) > 1
    assert {pair[0] for row in drawn["predictions2"] for pair in row} == {2.0}


def test_templates_name_their_places() -> None:
    for template in (VERDICT_TEMPLATE, SCORE_TEMPLATE):
        text = template.format(question="{why}", first="{0}", second="a{b}")
        assert "{why}" in text and text.index("{0}") < text.index("a{b}")
    model_text = SCORE_TEMPLATE.format(question="q", first="a", second="b").replace("<score>", "5")
    assert read_scores(model_text) == (5, 5)


def test_no_pairs() -> None:
    for judge in (judge_by_log_probs, judge_by_samples):
        empty = judge(tiny.llama(), tokenizer(), [], [], [])
        assert empty == {"predictions1": [], "predictions2": [], "swapped_back": True}


@pytest.mark.parametrize("judge", [judge_by_log_probs, judge_by_samples])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": SECOND[:2]}, "3 questions, 3 first and 2 second answers"),
        ({"template": "{question} {first}"}, "lacks {second}"),
        ({"template": "no places"}, "lacks {question}, {first}, {second}"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_input(judge: Any, options: dict, message: str) -> None:
    given = {"questions": QUESTIONS, "first": FIRST, "second": SECOND, "template": TEMPLATE} | options
    with pytest.raises(ValueError, match=message):
        judge(tiny.llama(), tokenizer(), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("1", "1")}, "different tokens"),
        ({"labels": ("1", "1 2")}, "not one"),
        ({"labels": ("1", "unheard")}, "unknown to the tokenizer"),
        (
            {"logits_processor": [Prefer(4, -math.inf), Prefer(5, -math.inf)]},
            "neither verdict",
        ),
    ],
)
def test_bad_verdicts(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_by_log_probs(tiny.llama(), tokenizer(), QUESTIONS, FIRST, SECOND, template=TEMPLATE, **options)


def test_the_scores_are_the_last_ones_said():
    assert read_scores("Of 2 answers, answer 1: 7\nOf 2 answers, answer 2: 8") == (7, 8)


def untemplated(words):
    made = word_tokenizer(words)
    made.chat_template = None
    return made


JUDGED = "w10 {question} w11 {first} w12 {second} w13"


def test_one_verdict_can_be_forbidden():
    words = untemplated(["1", "2"])
    one = words.convert_tokens_to_ids("1")

    def ban(input_ids, scores):
        return scores.index_fill(1, torch.tensor([one]), -math.inf)

    found = judge_by_log_probs(
        tiny.llama(seed=3), words, ["w20"], ["w30"], ["w40"], template=JUDGED, logits_processor=[ban]
    )
    assert (found["predictions1"], found["predictions2"]) == ([[[0.0, 1.0]]], [[[1.0, 0.0]]])


def test_equal_answers_are_ties_however_they_are_batched():
    rng = random.Random(0)
    questions, answers = (
        [" ".join(f"w{rng.randrange(20, 60)}" for _ in range(rng.randrange(1, 9))) for _ in range(41)]
        for _ in range(2)
    )
    found = judge_by_log_probs(
        tiny.gpt2(seed=3), untemplated(["1", "2"]), questions, answers, answers, template=JUDGED, batch_size=3
    )
    assert judge_position(found["predictions1"], found["predictions2"], swapped_back=True)["tie"] == 1
