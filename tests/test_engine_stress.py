"""The engine against a plain recomputation, over random sequences of everything that `generate` may do to it.

By default 500 sequences run, always the same ones. `HF_LOGITS_STRESS_SEQUENCES=10000` runs that many, drawn anew.
"""

import os
from functools import cache, lru_cache
from itertools import cycle

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tiny
from hf_logits.auxiliary import AuxiliaryLM, Context


FAMILIES = {
    "llama": lambda: tiny.llama(num_hidden_layers=1),
    "gpt2": tiny.gpt2,
    "mistral": tiny.mistral,  # two layers, so that what left the window of one is still seen through the other
    "mamba": lambda: tiny.mamba(num_hidden_layers=1),
    "bamba": tiny.bamba,
}
ASKED_FOR = os.environ.get("HF_LOGITS_STRESS_SEQUENCES")
SEQUENCES = -(-int(ASKED_FOR or 500) // len(FAMILIES))
LONGEST = 24

CODE, OTHER = [5, 6], [9, 4, 4, 7, 11]
CONTEXTS = {
    "identity": (None, lambda prompt: prompt),
    "code": (lambda prompt, row, rows: CODE + prompt, lambda prompt: CODE + prompt),
    "other": (lambda prompt, row, rows: OTHER, lambda prompt: OTHER),
    "last token": (lambda prompt, row, rows: prompt[-1:], lambda prompt: prompt[-1:]),
}

build = cache(lambda family: FAMILIES[family]())


@lru_cache(maxsize=20_000)
@torch.no_grad()
def from_scratch(family: str, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits behind each of the ids, without cache or padding."""
    return build(family)(torch.tensor([ids]), use_cache=False).logits[0].float()


class Naive:
    """What a tracker has to find out, in plain Python: where the prompts end and where they are padded."""

    def __init__(self):
        self.known: list[list[int]] | None = None
        self.padding: dict[tuple[int, ...], int] = {}
        self.prompt_length = 0

    def continues(self, rows: list[list[int]]) -> bool:
        if self.known is None or len(rows[0]) <= self.prompt_length:
            return False
        return all(any(old[: len(row) - 1] == row[:-1] for old in self.known) for row in rows)

    def see(self, rows: list[list[int]], bound: list[int] | None) -> None:
        if not self.continues(rows):
            self.prompt_length = len(rows[0])
            runs = bound if bound is not None else [self.leading(row) for row in rows]
            self.padding = {tuple(row): run for row, run in zip(rows, runs, strict=True)}
        self.known = rows

    def leading(self, row: list[int]) -> int:
        return next((i for i, token in enumerate(row) if token != tiny.PAD), len(row) - 1)

    def split(self, row: list[int]) -> tuple[list[int], list[int]]:
        prompt = row[: self.prompt_length]
        return prompt[self.padding[tuple(prompt)] :], row[self.prompt_length :]


class Session:
    """An engine, the rows that generation would show it now, and the plain truth about them."""

    def __init__(self, family: str, contexts: list[str], score_tokens: bool | str, vocab_size: int | None, chunk: int):
        self.family, self.names, self.vocab_size = family, contexts, vocab_size
        self.engine = AuxiliaryLM(
            build(family),
            [Context(CONTEXTS[name][0]) for name in contexts],
            score_tokens=score_tokens,
            prefill_chunk=chunk,
        )
        self.naive = Naive()
        self.rows: list[list[int]] = [[3]]
        self.bound: tuple[list[list[int]], list[int]] | None = None  # prompts and the widths of their padding

    def observe(self):
        if self.bound is not None and self.rows != self.bound[0] and not self.naive.continues(self.rows):
            self.unbind()  # the mask belongs to other prompts
        self.naive.see(self.rows, None if self.bound is None else self.bound[1])
        return self.engine.tracker.observe(torch.tensor(self.rows))

    def check(self) -> None:
        ids, step = torch.tensor(self.rows), self.observe()
        found = self.engine(ids, step=step, vocab_size=self.vocab_size)
        assert found.shape == (len(self.names), len(self.rows), self.vocab_size or tiny.VOCAB)
        for c, name in enumerate(self.names):
            for r, row in enumerate(self.rows):
                prompt, generated = self.naive.split(row)
                read = CONTEXTS[name][1](prompt) + generated
                truth = from_scratch(self.family, tuple(read))[:, : self.vocab_size].log_softmax(-1)
                torch.testing.assert_close(found[c, r], truth[-1], atol=1e-5, rtol=0)
                if self.engine.score_tokens:
                    self.check_scores(self.engine.token_log_probs[c, r], read, truth, len(generated))

    def check_scores(self, found: torch.Tensor, read: list[int], truth: torch.Tensor, generated: int) -> None:
        scores = [0.0 if i >= truth.shape[1] else truth[t, i].item() for t, i in enumerate(read[1:])]
        if self.engine.score_tokens == "generated":
            scores = scores[len(scores) - generated :]
        expected = torch.tensor([0.0] * (len(found) - len(scores)) + scores)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    # --- what may happen ---------------------------------------------------------------------------------------------------

    def advance(self, tokens: list[int]) -> None:
        if len(self.rows[0]) < LONGEST:
            self.rows = [[*row, tokens[r % len(tokens)]] for r, row in enumerate(self.rows)]

    def beams(self, parents: list[int], tokens: list[int]) -> None:
        self.rows = [self.rows[p % len(self.rows)] for p in parents]
        self.advance(tokens)

    def select(self, parents: list[int]) -> None:
        self.rows = [self.rows[p % len(self.rows)] for p in parents]

    def roll_back(self, count: int, tokens: list[int]) -> None:
        count = min(count, len(self.rows[0]) - 1)
        self.rows = [row[: len(row) - count] for row in self.rows]
        if tokens:
            self.advance(tokens)

    def new_prompt(self, width: int, padding: list[int], tokens: list[int], bind: bool) -> None:
        runs = [min(run, width - 1) for run in padding]
        at = cycle(tokens)
        self.rows = [[tiny.PAD] * run + [next(at) for _ in range(width - run)] for run in runs]
        self.unbind()
        if bind:  # the mask says it, so real tokens may look like padding
            known: dict[tuple[int, ...], int] = {}
            runs = [known.setdefault(tuple(row), run) for row, run in zip(self.rows, runs, strict=True)]
            mask = torch.tensor([[0] * run + [1] * (width - run) for run in runs])
            self.engine.tracker.bind(mask, torch.tensor(self.rows))
            self.naive.known, self.bound = None, (self.rows, runs)

    def unbind(self) -> None:
        self.engine.tracker.bind(None)
        self.bound = None

    def next_turn(self, tokens: list[int]) -> None:
        """A prompt that extends the old one and its answer."""
        self.rows = [[*row, *tokens] for row in self.rows] if len(self.rows[0]) < LONGEST else self.rows

    def skip(self, tokens: list[int]) -> None:
        """Steps at which nobody asks the engine."""
        for token in tokens:
            self.advance([token, token + 1])
            self.observe()

    def reject(self, count: int, tokens: list[int]) -> None:
        """A rejected draft, replaced in one go, and then asked for once more a token earlier."""
        self.roll_back(count, [])
        self.skip(tokens)
        self.check()
        self.roll_back(1, [])

    def forget(self) -> None:
        self.engine.reset()
        self.naive.known = None

    def fail(self, tokens: list[int]) -> None:
        """A forward that breaks off after the cache has moved, as an interrupt or a full memory would break it off."""
        self.advance(tokens)
        step = self.observe()
        with self.engine.model.get_output_embeddings().register_forward_hook(_break):
            try:
                self.engine(torch.tensor(self.rows), step=step, vocab_size=self.vocab_size)
            except KeyboardInterrupt:
                pass

    def repeat(self) -> None:
        """The same call again."""


def _break(*_) -> None:
    raise KeyboardInterrupt


def rows_of(strategy, least=1):
    return st.lists(strategy, min_size=least, max_size=4)


# Few ids, so that rows meet again: now and then they are padding, the end of text, or beyond the main vocabulary.
TOKEN = st.one_of(st.integers(3, 6), st.integers(0, tiny.VOCAB - 2))
OPERATIONS = {
    "advance": st.tuples(rows_of(TOKEN)),
    "beams": st.tuples(rows_of(st.integers(0, 3)), rows_of(TOKEN)),
    "select": st.tuples(rows_of(st.integers(0, 3))),
    "roll_back": st.tuples(st.integers(1, 5), rows_of(TOKEN, 0)),
    "new_prompt": st.tuples(st.integers(1, 9), rows_of(st.integers(0, 8)), rows_of(TOKEN), st.booleans()),
    "next_turn": st.tuples(st.lists(TOKEN, min_size=1, max_size=4)),
    "skip": st.tuples(rows_of(TOKEN)),
    "reject": st.tuples(st.integers(1, 4), rows_of(TOKEN)),
    "forget": st.tuples(),
    "fail": st.tuples(rows_of(TOKEN)),
    "repeat": st.tuples(),
}
# Steps are what generations are made of.
WEIGHTED = [*OPERATIONS, "advance", "advance", "beams", "beams", "new_prompt", "roll_back"]
OPERATION = st.sampled_from(WEIGHTED).flatmap(lambda name: st.tuples(st.just(name), OPERATIONS[name]))


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=SEQUENCES,
    derandomize=ASKED_FOR is None,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink] if ASKED_FOR else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    contexts=st.lists(st.sampled_from(list(CONTEXTS)), min_size=1, max_size=3),
    score_tokens=st.sampled_from([False, True, "generated"]),
    vocab_size=st.sampled_from([None, None, 40]),
    chunk=st.sampled_from([1024, 3]),
    prompt=OPERATIONS["new_prompt"],
    operations=st.lists(OPERATION, min_size=3, max_size=12),
)
def test_engine_equals_recomputation_whatever_happens(
    family, contexts, score_tokens, vocab_size, chunk, prompt, operations
):
    session = Session(family, contexts, score_tokens, vocab_size, chunk)
    session.new_prompt(*prompt)
    session.check()
    for name, arguments in operations:
        getattr(session, name)(*arguments)
        session.check()
