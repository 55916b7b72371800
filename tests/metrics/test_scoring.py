"""The scoring pass against the slow obvious way: every choice alone behind its prompt, whole, without cache or padding."""

import functools
import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, pipeline

import hf_logits
import tiny
from hf_logits.metrics import choice_logprobs, tables
from hf_logits.metrics.scoring import per_prompt
from hf_logits.processors import GeDiLogitsProcessor, MixtureLogitsProcessor
from hf_logits.sharing import steering
from oracles import word_tokenizer


PROMPTS = ["w10 w11 w12 w13 w14 w15 w16 w17 w18", "w30 w31", "w20 w21 w22 w23 w24"]
CHOICES = [["w40", "w41 w42 w43 w44"], ["w40 w50", "w51", "w40 w50", "w60 w61 w62"], ["w45", "w46", "w47"]]
"""Ragged, of unequal lengths; one choice twice, and prompts that padding moves."""


def ids(text: str) -> list[int]:
    return word_tokenizer()(text)["input_ids"]


def slow(model: Any, before: list[int], choice: list[int], processors: Any = ()) -> float:
    """One forward for every token."""
    total, read = 0.0, list(before)
    for one in processors:
        if hasattr(one, "reset"):
            one.reset()
    for token in choice:
        scores = model(torch.tensor([read])).logits[:, -1].float()
        scores = LogitsProcessorList(processors)(torch.tensor([read]), scores)
        total += scores.log_softmax(-1)[0, token].item()
        read.append(token)
    return total


@torch.no_grad()
def slow_table(model: Any, processors: Any = (), prompts: Any = PROMPTS) -> list[list[float]]:
    return [
        [slow(model, ids(prompt), ids(choice), processors) for choice in own]
        for prompt, own in zip(prompts, CHOICES, strict=True)
    ]


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_plain_model(family: str, batch_size: int) -> None:
    model = tiny.DECODERS[family]()
    table = choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES, batch_size=batch_size)
    close(table.logprobs, slow_table(model))
    assert table.lengths["tokens"] == [[1, 4], [2, 1, 2, 3], [1, 1, 1]]
    assert table.lengths["chars"] == table.lengths["bytes"] == [[3, 15], [7, 3, 7, 11], [3, 3, 3]]
    assert table.distinct == [[True, True], [True, True, False, True], [True, True, True]]
    assert table.prior_logprobs is None


def made(kind: str, model: Any) -> Any:
    if kind == "mixture":
        return MixtureLogitsProcessor.cfg(model, [5, 6, 7], scale=1.7)
    if kind == "gedi":
        return GeDiLogitsProcessor(tiny.gpt2(3), desired=8, undesired=9, strength=5.0)
    return Bans()


class Bans(LogitsProcessor):
    """Depends on all ids, and forbids a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores + (input_ids.sum(-1, keepdim=True) % 7) * torch.linspace(-1, 1, scores.shape[-1])
        scores[:, ids("w41")] = -torch.inf
        return scores


@pytest.mark.parametrize("kind", ["mixture", "gedi", "bans"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "mamba"])
def test_a_steered_model(family: str, kind: str) -> None:
    model = tiny.DECODERS[family]()
    # an auxiliary mamba cannot be padded beside others in the processor's own batch
    prompts = PROMPTS if family != "mamba" else [PROMPTS[2]] * 3
    expected = slow_table(model, [made(kind, model)], prompts)
    for batch_size in (1, 8):
        table = choice_logprobs(
            model, word_tokenizer(), prompts, CHOICES, logits_processor=[made(kind, model)], batch_size=batch_size
        )
        close(table.logprobs, expected)
    if kind == "bans":
        assert table.logprobs[0][1] == -torch.inf


def test_two_processors_and_one_object_again() -> None:
    model = tiny.llama()
    processors = [made("mixture", model), made("bans", model)]
    expected = slow_table(model, processors)
    for _ in range(2):
        close(
            choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES, logits_processor=processors).logprobs, expected
        )


def test_what_generate_would_say_is_what_is_scored() -> None:
    """The scores of a steered generation add up to the table's value of what was generated."""
    model, tokenizer = tiny.llama(), word_tokenizer()
    processor = made("mixture", model)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = out.sequences[:, -4:]
    expected = sum(score.log_softmax(-1).gather(1, new[:, i : i + 1])[:, 0] for i, score in enumerate(out.scores))
    said = [[text, "w5"] for text in tokenizer.batch_decode(new)]
    table = choice_logprobs(model, tokenizer, PROMPTS, said, logits_processor=[processor])
    assert [row[0] for row in table.logprobs] == pytest.approx(expected.tolist(), abs=2e-5)


def test_rows_are_what_a_processor_for_one_batch_expects() -> None:
    """Prompts of single items, as `generate` with `num_return_sequences` would meet them."""
    model = tiny.llama()
    others = [[5, 6], [7], [8, 9, 10]]
    expected = []
    for prompt, own, other in zip(PROMPTS, CHOICES, others, strict=True):
        processor = MixtureLogitsProcessor.cfg(model, other, scale=1.7)
        with torch.no_grad():
            expected.append([slow(model, ids(prompt), ids(choice), [processor]) for choice in own])
    together = MixtureLogitsProcessor.cfg(model, others, scale=1.7)
    close(choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES, logits_processor=[together]).logprobs, expected)


def test_a_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny.llama(), []
    forward = type(model).forward

    @functools.wraps(forward)  # its signature is looked at
    def watched(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        out = forward(self, input_ids=input_ids, **kwargs)
        read.append((tuple(input_ids.shape), out.logits.shape[1]))
        return out

    monkeypatch.setattr(type(model), "forward", watched)
    choice_logprobs(model, word_tokenizer(), ["w10 w11 w12 w13"] * 2, ["w20 w21 w22", "w30", "w31", "w20 w23 w24 w25"])
    # equal prompts once, without logits but the last; then all but the last token of the four choices together
    assert read == [((1, 4), 1), ((4, 3), 3)]
    read.clear()
    choice_logprobs(model, word_tokenizer(), ["w10 w11 w12 w13", "w14"], ["w20", "w30", "w31"])
    assert read == [((2, 4), 1)]


def test_many_choices_are_read_in_parts() -> None:
    model = tiny.llama()
    choices = [f"w{10 + i} w{10 + j}" for i in range(8) for j in range(5)]
    table = choice_logprobs(model, word_tokenizer(), ["w20 w21"], choices, batch_size=1)
    with torch.no_grad():
        close(table.logprobs, [[slow(model, ids("w20 w21"), ids(one)) for one in choices]])


def test_questions_that_fit_only_by_themselves() -> None:
    """Side by side, a long prompt and a long choice would need more positions than the model has."""
    model = tiny.gpt2()
    prompts, choices = ["w10 " * 127 + "w11", "w12"], [["w20", "w21"], ["w22 w23 w24 w25", "w26"]]
    for processors in ([], [Bans()]):
        table = choice_logprobs(model, word_tokenizer(), prompts, choices, logits_processor=processors)
        with torch.no_grad():
            expected = [
                [slow(model, ids(prompt), ids(choice), processors) for choice in own]
                for prompt, own in zip(prompts, choices, strict=True)
            ]
        close(table.logprobs, expected)


# --- the prior -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_no_context_is_the_token_that_begins_texts(bos: bool) -> None:
    model, tokenizer = tiny.llama(), word_tokenizer(bos=bos)
    table = choice_logprobs(model, tokenizer, PROMPTS, CHOICES, prior="")
    with torch.no_grad():
        expected = [[slow(model, [tiny.BOS], ids(choice)) for choice in own] for own in CHOICES]
    close(table.prior_logprobs or [], expected)
    if bos:  # the tokenizer's own, in front of every prompt
        with torch.no_grad():
            assert table.logprobs[1][1] == pytest.approx(
                slow(model, [tiny.BOS, *ids("w30 w31")], ids("w51")), abs=2e-5
            )


def test_one_prior_prompt_for_all_or_one_for_each() -> None:
    model = tiny.llama()
    one = choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES, prior="w7 w8")
    each = choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES, prior=["w7 w8", "w9", "w7 w8"])
    with torch.no_grad():
        close(
            one.prior_logprobs or [], [[slow(model, ids("w7 w8"), ids(choice)) for choice in own] for own in CHOICES]
        )
        close([(each.prior_logprobs or [])[1]], [[slow(model, ids("w9"), ids(choice)) for choice in CHOICES[1]]])
    close([(one.prior_logprobs or [])[0]], [(each.prior_logprobs or [])[0]])


# --- where a choice begins -------------------------------------------------------------------------------------------------


def letters() -> PreTrainedTokenizerFast:
    """Spaces belong to the token behind them, "ab" melts, and so do two line breaks."""
    vocabulary = ["<unk>", "<bos>", "<eos>", *"abcdAB:?", " ", " A", " B", " a", "ab", "ba", "\n", "\n\n"]
    merges = [(" ", "A"), (" ", "B"), (" ", "a"), ("a", "b"), ("b", "a"), ("\n", "\n")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([])
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def lm_eval_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """How lm-eval parts a causal model's ids, in our words."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, alone = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context + continuation, context)
    )
    return alone, whole[len(alone) :]


@pytest.mark.parametrize("prompt", ["c:", "c: ", "d?d:"])
def test_the_border_is_that_of_lm_eval(prompt: str) -> None:
    model, tokenizer = tiny.llama(), letters()
    table = choice_logprobs(model, tokenizer, [prompt], ["A", "B", "ab"])
    gap = "" if prompt.endswith(" ") else " "
    with torch.no_grad():
        expected = [slow(model, *lm_eval_pair(tokenizer, prompt, gap + choice)) for choice in ("A", "B", "ab")]
    close(table.logprobs, [expected])
    assert table.lengths["chars"] == [[1, 1, 2]]


def test_a_line_break_that_no_token_of_a_choice_has_is_the_prompts() -> None:
    model, tokenizer = tiny.llama(), letters()
    table = choice_logprobs(model, tokenizer, ["c:\n"], ["A", "B"])
    before = tokenizer("c:\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        close(table.logprobs, [[slow(model, before, tokenizer(one)["input_ids"]) for one in "AB"]])


def test_letters_that_melt_are_scored_with_all_choices_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny.llama(), letters()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        table = choice_logprobs(model, tokenizer, ["c:a"], ["b", "c"], separator="")
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "'a' melts into a choice" in caplog.text
    before, melted, apart = (tokenizer(text)["input_ids"] for text in ("c:", "ab", "ac"))
    assert (len(melted), len(apart)) == (1, 2)
    with torch.no_grad():
        close(table.logprobs, [[slow(model, before, melted), slow(model, before, apart)]])
    assert table.lengths["tokens"] == [[1, 2]]


def test_the_separator() -> None:
    model, tokenizer = tiny.llama(), letters()
    default, given, own = (
        choice_logprobs(model, tokenizer, ["c:"], choices, separator=separator).logprobs
        for choices, separator in ((["A", "B"], None), (["A", "B"], " "), ([" A", " B"], None))
    )
    assert default == given == own
    close(
        choice_logprobs(model, tokenizer, ["c:"], ["A", "B"], separator="").logprobs,
        [[slow(model, tokenizer("c:")["input_ids"], tokenizer(one)["input_ids"]) for one in "AB"]],
    )


def test_choices_that_begin_with_another_are_part_of_it() -> None:
    table = choice_logprobs(tiny.llama(), word_tokenizer(), ["w10"], ["w20 w21", "w20", "w22", "w20 w21 w23"])
    assert table.distinct == [[False, True, True, False]]
    assert 0 < sum(torch.tensor(table.logprobs[0]).exp()[torch.tensor(table.distinct[0])]) < 1


def test_first_tokens_have_at_least_the_mass_of_whole_choices() -> None:
    whole = choice_logprobs(tiny.llama(), word_tokenizer(), PROMPTS, CHOICES)
    first = choice_logprobs(
        tiny.llama(), word_tokenizer(), PROMPTS, [[choice.split()[0] for choice in own] for own in CHOICES]
    )
    mass = [tables.mass(*tables.read_logprobs(one.logprobs), one.distinct) for one in (first, whole)]
    assert (mass[0] >= mass[1]).all() and (mass[0] > mass[1]).any()


class DeadEnd(LogitsProcessor):
    """Forbids a token, and everything behind it."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (banned,) = ids("w41")
        scores = scores.clone()
        scores[:, banned] = -torch.inf
        scores[input_ids[:, -1] == banned] = -torch.inf
        return scores


def test_what_follows_an_impossible_token_is_impossible() -> None:
    found = choice_logprobs(
        tiny.llama(), word_tokenizer(), ["w10"], ["w41 w42 w43", "w44"], logits_processor=[DeadEnd()]
    )
    assert found.logprobs[0][0] == -torch.inf and found.logprobs[0][1] > -torch.inf


# --- chats and pipelines ---------------------------------------------------------------------------------------------------


def chat_tokenizer() -> PreTrainedTokenizerFast:
    made = word_tokenizer(["user", "assistant"], bos=True)
    made.chat_template = (
        "{{ '<bos> ' }}{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}"
        "{% if not loop.last or message['role'] == 'user' %}{{ ' <eos> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    return made


def test_chats() -> None:
    model, tokenizer = tiny.llama(), chat_tokenizer()
    user = {"role": "user", "content": "w10 w11"}
    asked = [[user], [user, {"role": "assistant", "content": "w12 "}]]
    table = choice_logprobs(model, tokenizer, asked, ["w20", "w21 w22"], prior=[user])
    # the template has the special tokens, and no second one stands in front
    texts = ["<bos> user w10 w11 <eos> assistant", "<bos> user w10 w11 <eos> assistant w12"]
    with torch.no_grad():
        expected = [
            [
                slow(model, tokenizer(text, add_special_tokens=False)["input_ids"], ids(one))
                for one in ("w20", "w21 w22")
            ]
            for text in texts
        ]
    close(table.logprobs, expected)
    close(table.prior_logprobs or [], [expected[0], expected[0]])


def test_pipelines(tmp_path: Any) -> None:
    model, tokenizer = tiny.llama(), word_tokenizer()
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    close(choice_logprobs(plain, None, PROMPTS, CHOICES).logprobs, slow_table(model))
    processor = GeDiLogitsProcessor(tiny.gpt2(3), desired=8, undesired=9, strength=5.0)
    steered = pipeline("text-generation", model=model, tokenizer=tokenizer, logits_processor=[processor])
    expected = slow_table(model, [processor])
    close(choice_logprobs(steered, None, PROMPTS, CHOICES).logprobs, expected)


def test_pipelines_with_a_recipe(tmp_path: Any) -> None:
    model, tokenizer = tiny.llama(), word_tokenizer()
    processor = MixtureLogitsProcessor.cfg(model, [5, 6, 7], scale=1.7)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path, main_model=model)
    steered = hf_logits.pipeline("text-generation", model=str(tmp_path))
    assert len(steering(steered.model)) == 1 and not steering(model)
    close(choice_logprobs(steered, None, PROMPTS, CHOICES).logprobs, slow_table(model, [processor]))


def test_a_model_in_training_is_read_in_eval_mode() -> None:
    model = tiny.gpt2(attn_pdrop=0.5, resid_pdrop=0.5).train()
    found = choice_logprobs(model, word_tokenizer(), PROMPTS, CHOICES).logprobs
    assert model.training
    close(found, slow_table(model.eval()))


def test_no_prompts() -> None:
    table = choice_logprobs(tiny.llama(), word_tokenizer(), [], [], prior="")
    assert table.logprobs == table.distinct == table.prior_logprobs == []


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "choices", "options", "message"),
    [
        (["w5"], [["w6"]], {}, "at least two"),
        (["w5"], [["w6", "w7"], ["w6", "w7"]], {}, "1 prompts and 2 lists"),
        (["w5"], ["w6", ""], {}, "empty choice"),
        (["w5"], ["w6", " "], {}, "adds no token"),
        (["w5"], "w6", {}, "give a list of choices"),
        ("w5", ["w6", "w7"], {}, "give a list of prompts"),
        ([[{"role": "user", "content": "w5"}]], ["w6", "w7"], {}, "no chat template"),
        (["w5"], ["w6", "w7"], {"batch_size": 0}, "batch_size must be"),
        (["w5"], ["w6", "w7"], {"prior": ["w5", "w5"]}, "2 prior prompts for 1"),
        (["w5 " * 127], ["w6 w7 w8", "w7"], {}, "129 tokens to read"),
    ],
)
def test_bad_input(prompts: Any, choices: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice_logprobs(tiny.gpt2(), word_tokenizer(), prompts, choices, **options)


def test_one_chat_is_no_list_of_chats() -> None:
    with pytest.raises(ValueError, match="give a list of prompts"):
        per_prompt([{"role": "user", "content": "w5"}], ["w6", "w7"])


def test_no_empty_context_without_a_token_for_it() -> None:
    tokenizer = letters()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token that begins or ends texts"):
        choice_logprobs(tiny.llama(), tokenizer, ["c"], ["A", "B"], prior="")


def test_models_and_tokenizers_that_will_not_do() -> None:
    with pytest.raises(TypeError, match="decoder-only"):
        choice_logprobs(tiny.t5(), word_tokenizer(), ["w5"], ["w6", "w7"])
    with pytest.raises(TypeError, match="only a pipeline brings its own"):
        choice_logprobs(tiny.llama(), None, ["w5"], ["w6", "w7"])
    broken = tiny.llama()
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        choice_logprobs(broken, word_tokenizer(), ["w5"], ["w6", "w7"])


def test_bytes_are_no_characters():
    words = word_tokenizer(["é", "ab"])
    words.chat_template = None
    lengths = choice_logprobs(tiny.llama(seed=3), words, ["w20 w21"], ["é", "ab"]).lengths
    assert (lengths["chars"], lengths["bytes"]) == ([[1, 2]], [[2, 2]])
