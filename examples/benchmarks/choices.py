"""Log-probs of the choices of questions: one prefill a prompt, against a forward of the whole text for every choice."""

from typing import Any

import torch
from common import PROMPT, alternate, model, prompts, ratio, row, seconds, table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_logits.metrics import choice_logprobs


TARGET, PAD = 1 / 3, 2
CHOICES, FEWEST, MOST = 4, 3, 8
"""Choices of a question, and tokens of a choice that is a text."""


def numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """Every id is a word, so that texts have exactly the lengths that are wanted. A special token would be found inside longer numbers."""
    words = {str(i): i for i in range(vocab_size) if i != PAD} | {"<pad>": PAD}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", padding_side="left")


@torch.no_grad()
def slow(lm: Any, questions: list[list[int]], choices: list[list[list[int]]], *, together: bool) -> list[list[float]]:
    """K forwards a question with all logits, or one forward of the K texts, padded."""
    found = []
    for question, own in zip(questions, choices, strict=True):
        texts = [question + choice for choice in own]
        width = max(map(len, texts))
        batches = [torch.tensor([text + [PAD] * (width - len(text)) for text in texts])] if together else []
        logits = [lm(input_ids=ids).logits for ids in batches] or [
            lm(input_ids=torch.tensor([t])).logits for t in texts
        ]
        rows = [row for batch in logits for row in batch]
        begin = len(question) - 1
        scores = [row[begin : begin + len(one)].log_softmax(-1) for row, one in zip(rows, own, strict=True)]
        found.append(
            [s.gather(1, torch.tensor(one)[:, None]).sum().item() for s, one in zip(scores, own, strict=True)]
        )
    return found


def run(quick: bool = False) -> str:
    lm, count = model(), 2 if quick else 8
    tokenizer = numbers(lm.config.vocab_size)
    questions = prompts(count, seed=3).tolist()
    generator = torch.Generator().manual_seed(0)

    def drawn(fewest: int, most: int) -> list[list[list[int]]]:
        sizes = torch.randint(fewest, most + 1, (count, CHOICES), generator=generator).tolist()
        return [[torch.randint(100, 40_000, (n,), generator=generator).tolist() for n in own] for own in sizes]

    lines = []
    for kind, choices in (("letters", drawn(1, 1)), (f"texts of {FEWEST} to {MOST} tokens", drawn(FEWEST, MOST))):
        texts = [[" ".join(map(str, one)) for one in own] for own in choices]
        asked = [" ".join(map(str, question)) for question in questions]
        found: dict[str, list[list[float]]] = {}

        def ours(asked: Any = asked, texts: Any = texts, found: Any = found) -> None:
            found["ours"] = choice_logprobs(lm, tokenizer, asked, texts, batch_size=4).logprobs

        def alone(choices: Any = choices, found: Any = found) -> None:
            found["alone"] = slow(lm, questions, choices, together=False)

        def padded(choices: Any = choices, found: Any = found) -> None:
            found["padded"] = slow(lm, questions, choices, together=True)

        times = alternate({"ours": ours, "alone": alone, "padded": padded}, 1 if quick else 3)
        error = (torch.tensor(found["ours"]) - torch.tensor(found["alone"])).abs().max().item()
        if not error < 1e-3:
            raise AssertionError(f"The two ways differ by {error:.3g} nats: their times can't be compared.")
        for name, what in (("alone", "a forward for each choice"), ("padded", "one padded forward a question")):
            details = (seconds(times["ours"]), seconds(times[name]), f"{error:.0e}")
            lines.append(row(f"{kind} / {what}", ratio(times["ours"], times[name]), TARGET, *details))
    head = [
        f"{count} questions of {PROMPT} tokens, {CHOICES} choices",
        "`choice_logprobs`",
        "the other",
        "worst difference",
    ]
    return table(head, lines)


if __name__ == "__main__":
    print(run())
