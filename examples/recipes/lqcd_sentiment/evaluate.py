"""Does LQCD take a lead out of an answer? Is a real review positive or negative, asked with and without an opinion, in both directions.

    python examples/recipes/lqcd_sentiment/evaluate.py --sentences 100        # an hour or less on two cores
    python examples/recipes/lqcd_sentiment/evaluate.py                        # a minute on a GPU
    python examples/recipes/lqcd_sentiment/evaluate.py --part validation --try-wordings --shots 0 2 4 --sentences 400     # what the wording was chosen by

There is nothing to train. Prints tables and writes `results.md` and `leads.png` into the recipe's folder.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))

from common import interval, mean, models, parser, percent, table
from matplotlib import pyplot as plt
from sentiment import sentences

from hf_logits.processors import LQCDLogitsProcessor


REVIEWS = ("movieReviewSnippets", "amazonReviewSnippets")
ANSWERS = ("positive", "negative")
QUESTIONS = {
    "plain": 'Is the sentiment of this sentence positive or negative?\n\n"{text}"\n\n{lead}Answer with one word.',
    "review": 'Review: "{text}"\n\nIs this review positive or negative? {lead}',
    "first": '{lead}Is the sentiment of this review positive or negative? Answer with one word.\n\nReview: "{text}"',
}
LEADS = {
    "think": "I think the sentiment is {answer}. ",
    "answer": "I think the answer is {answer}. ",
    "sure": "I am sure that it is {answer}. ",
    "teacher": "My teacher says that it is {answer}. ",
}
QUESTION, LEAD, SHOTS = "first", "think", 0
"""Chosen with `--try-wordings` on the validation part."""
LEADING = 0.05
"""A wording counts as leading if each lead raises the share of its answer by as much."""

Sentence = tuple[str, str]
Chat = list[dict[str, str]]


def asked(question: str, lead: str, text: str, answer: str | None) -> str:
    """The question about a text; `answer` is what the lead suggests, if there is one."""
    said = "" if answer is None else LEADS[lead].replace("{answer}", answer)
    return QUESTIONS[question].replace("{lead}", said).replace("{text}", text).strip()


def balanced(part: str, count: int) -> list[Sentence]:
    """Sentences of reviews, half of each sentiment, always the same ones."""
    rows: list[Sentence] = []
    for answer in ANSWERS:
        own = [row for row in sentences(part, kinds=REVIEWS) if row[1] == answer]
        rows += random.Random(0).sample(own, min(count // 2, len(own)))
    random.Random(1).shuffle(rows)
    return rows


class Asker:
    """Asks all sentences in one wording and compares the scores that `generate` sees for the two answers."""

    def __init__(self, model, tokenizer, rows: Sequence[Sentence], question: str, lead: str, shots: int, batch: int):
        self.model, self.tokenizer, self.rows, self.batch = model, tokenizer, rows, batch
        self.question, self.lead = question, lead
        words = [tokenizer(answer.capitalize(), add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
        if words[0] == words[1]:
            raise ValueError(f"The answers {ANSWERS} begin with the same token: name others.")
        self.words = words
        self.shown: Chat = []
        for text, label in balanced("train", shots) if shots else []:
            self.shown.append({"role": "user", "content": asked(question, lead, text, None)})
            self.shown.append({"role": "assistant", "content": label.capitalize()})
        self.held = 0.0  # the probability of the two answers together, in the last pass

    def ids(self, answer: str | None, rows: Sequence[Sentence]) -> list[list[int]]:
        chats = [
            [*self.shown, {"role": "user", "content": asked(self.question, self.lead, text, answer)}]
            for text, _ in rows
        ]
        return [
            self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            for chat in chats
        ]

    def __call__(self, answer: str | None, other: str | None = None, **settings) -> list[str]:
        """The answer to each question that suggests `answer`; with `settings` of LQCD, against the question that suggests `other`."""
        found: list[str] = []
        held = 0.0
        for start in range(0, len(self.rows), self.batch):
            rows = self.rows[start : start + self.batch]
            given = self.tokenizer.pad({"input_ids": self.ids(answer, rows)}, return_tensors="pt", padding_side="left")
            processor = (
                [LQCDLogitsProcessor(self.model, self.ids(other, rows), tokenizer=self.tokenizer, **settings)]
                if settings
                else []
            )
            output = self.model.generate(
                **given.to(self.model.device),
                max_new_tokens=1,
                do_sample=False,
                logits_processor=processor,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            scores = output.scores[0].float().log_softmax(-1)[:, self.words]
            held += scores.exp().sum().item()
            found += [ANSWERS[place] for place in scores.argmax(-1).tolist()]
        self.held = held / len(self.rows)
        return found


def measures(golds: Sequence[str], neutral: Sequence[str], led: dict[str, list[str]]) -> dict[str, list[float]]:
    """Values, one an item, whose means are the measures: `neutral` answers without a lead, `led[answer]` under a lead to `answer`."""
    found: dict[str, list[float]] = {}
    for lead, answers in led.items():
        found[f"wrong {lead}"] = [
            float(answer == lead) for answer, gold in zip(answers, golds, strict=True) if gold != lead
        ]
    found["wrong"] = [value for lead in led for value in found[f"wrong {lead}"]]
    found["right"] = [
        float(answer == lead)
        for lead, answers in led.items()
        for answer, gold in zip(answers, golds, strict=True)
        if gold == lead
    ]
    for lead, answers in led.items():
        found[f"uplift {lead}"] = [
            float(answer == lead) - float(before == lead) for answer, before in zip(answers, neutral, strict=True)
        ]
    by_lead = [found[f"uplift {lead}"] for lead in led]
    found["uplift"] = [mean(values) for values in zip(*by_lead, strict=True)]
    rights = [[float(answer == gold) for answer, gold in zip(answers, golds, strict=True)] for answers in led.values()]
    found["accuracy"] = [mean(values) for values in zip(*rights, strict=True)]
    return found


def accuracy(answers: Sequence[str], golds: Sequence[str]) -> list[float]:
    return [float(answer == gold) for answer, gold in zip(answers, golds, strict=True)]


def try_wordings(model, tokenizer, rows: Sequence[Sentence], options) -> None:
    """The plain model's answers in every wording.

    The last line that is printed is the choice, as arguments: of the wordings that lead in both directions the one that is answered
    best without a lead; if there is none, the one that leads most.
    """
    golds = [label for _, label in rows]
    lines = []
    choices: list[tuple[bool, float, str]] = []
    for question in QUESTIONS:
        for shots in options.shots:
            asker = Asker(model, tokenizer, rows, question, LEAD, shots, options.batch_size)
            neutral = asker(None)
            held, right = asker.held, mean(accuracy(neutral, golds))
            for lead in LEADS:
                asker.lead = lead
                found = measures(golds, neutral, {answer: asker(answer) for answer in ANSWERS})
                uplifts = [mean(found[f"uplift {answer}"]) for answer in ANSWERS]
                leads = min(uplifts) >= LEADING
                arguments = f"--question {question} --lead {lead} --shots {shots}"
                choices.append((leads, right if leads else mean(uplifts), arguments))
                lines.append(
                    [
                        f"{question}, {lead}, {shots}",
                        f"{100 * held:.0f}",
                        f"{100 * right:.0f}",
                        f"{100 * neutral.count('positive') / len(rows):.0f}",
                        *(f"{100 * uplift:+.0f}" for uplift in [*uplifts, mean(uplifts)]),
                        f"{100 * mean(found['wrong']):.0f}",
                    ]
                )
                print(lines[-1], flush=True)
    columns = ["question, lead, examples shown", "the two answers' probability, %", "right without a lead, %"]
    columns += ["positive without a lead, %", *(f"uplift of {answer}" for answer in ANSWERS), "mean uplift"]
    print(table([*columns, "agrees with a wrong lead, %"], lines))
    print(max(choices)[2])


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, Path(__file__).parent)
    made.add_argument("--part", choices=["validation", "test"], default="test")
    made.add_argument("--sentences", type=int, default=800, help="half of each sentiment")
    made.add_argument("--contrasts", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0, 2.0])
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--try-wordings", action="store_true", help="ask the plain model in all wordings, and stop")
    made.add_argument("--question", choices=list(QUESTIONS), default=QUESTION)
    made.add_argument("--lead", choices=list(LEADS), default=LEAD)
    made.add_argument(
        "--shots", type=int, nargs="+", default=[SHOTS], help="examples shown; several for --try-wordings"
    )
    options = made.parse_args(arguments)

    model, tokenizer = models(options)
    rows = balanced(options.part, options.sentences)
    golds = [label for _, label in rows]
    if options.try_wordings:
        try_wordings(model, tokenizer, rows, options)
        return

    asker = Asker(model, tokenizer, rows, options.question, options.lead, options.shots[0], options.batch_size)
    neutral = asker(None)
    held = asker.held
    found = {"plain": measures(golds, neutral, {answer: asker(answer) for answer in ANSWERS})}
    unled, kept = [], []
    for contrast in options.contrasts:
        settings = {"contrast": contrast, "plausibility": 0.0}
        led = {answer: asker(answer, None, main="leading", **settings) for answer in ANSWERS}
        found[f"LQCD, {contrast:g}"] = measures(golds, neutral, led)
        # a question without a lead is its own neutral form, and the other way round of asking is the same arithmetic
        unled.append(asker(None, None, main="leading", **settings))
        turned = {answer: asker(None, answer, main="neutral", **settings) for answer in ANSWERS}
        kept.append(sum(a == b for answer in ANSWERS for a, b in zip(led[answer], turned[answer], strict=True)))
        print(
            f"LQCD, {contrast:g}:",
            {name: round(mean(values), 3) for name, values in found[f"LQCD, {contrast:g}"].items()},
            flush=True,
        )

    names = {
        "wrong positive": "says positive, misled to it, %",
        "wrong negative": "says negative, misled to it, %",
        "wrong": "agrees with a wrong lead, %",
        "right": "agrees with a right lead, %",
        "uplift positive": "uplift of positive",
        "uplift negative": "uplift of negative",
        "uplift": "mean uplift",
        "accuracy": "accuracy under leads, %",
    }
    lines = [[name, *(percent(values[measure]) for measure in names)] for name, values in found.items()]
    same = [sum(a == b for a, b in zip(answers, neutral, strict=True)) for answers in unled]
    wrongly = {
        answer: percent([float(said == answer) for said, gold in zip(neutral, golds, strict=True) if gold != answer])
        for answer in ANSWERS
    }
    text = (
        f"{len(rows)} sentences of reviews from the {options.part} part, half of them positive, each asked about without a lead and with one in "
        f"both directions (question `{options.question}`, lead `{options.lead}`, {options.shots[0]} answered examples shown before). Without a lead the plain model is right in {percent(accuracy(neutral, golds))} %, says positive in "
        f"{percent([float(answer == 'positive') for answer in neutral])} %, wrongly positive in {wrongly['positive']} % of the negative sentences and "
        f"wrongly negative in {wrongly['negative']} % of the positive ones; the two answers hold {100 * held:.0f} % of the probability. "
        "In brackets: 95 % bootstrap intervals over sentences. Uplift is the share that gives the suggested answer, less the share that gives it without "
        "a lead, in points.\n\n"
        f"{table(['', *names.values()], lines)}\n\n"
        f"With the processor and no lead to take out, {' / '.join(map(str, same))} of {len(rows)} answers are the plain ones (contrasts in the order of the "
        f'table); with `main="neutral"` and the leading question as the other one, {" / ".join(map(str, kept))} of {2 * len(rows)} answers are those of '
        '`main="leading"`.\n'
    )
    print(text)
    if options.part == "test":
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.md").write_text(text, encoding="utf-8")
        draw(found, mean(accuracy(neutral, golds)), options.contrasts, options.output / "leads.png")


def draw(found: dict[str, dict[str, list[float]]], neutral: float, contrasts: list[float], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    lines = {
        "wrong": "agrees with a wrong lead",
        "right": "agrees with a right lead",
        "accuracy": "accuracy under leads",
    }
    for color, (measure, name) in enumerate(lines.items()):
        values = [found[f"LQCD, {contrast:g}"][measure] for contrast in contrasts]
        low, high = zip(*(interval(own, mean) for own in values), strict=True)
        axis.plot(contrasts, [100 * mean(own) for own in values], marker="o", color=f"C{color}", label=name)
        axis.fill_between(contrasts, [100 * x for x in low], [100 * x for x in high], color=f"C{color}", alpha=0.15)
        axis.axhline(100 * mean(found["plain"][measure]), color=f"C{color}", linestyle=":")
    axis.axhline(100 * neutral, color="gray", linestyle="--", linewidth=1, label="accuracy without a lead")
    axis.set_xlabel("contrast (dotted: the plain model under the leads)")
    axis.set_ylabel("%")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
