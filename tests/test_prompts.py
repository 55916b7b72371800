"""Every way in which a prompt, a token or a tokenizer can be given."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from hf_logits.prompts import as_rewrite, check_same_tokenizer, control_code, single_token, tokenize


WORDS = ["<pad>", "<s>", "<unk>", "red", "green", "blue", "is", "a", "colour"]
MAIN = [1, 3, 6, 7, 8]
"""The ids of "red is a colour", begin of text included."""


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One word, one token; every text begins with `<s>`."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def rewritten(prompt, rows: int = 2) -> list[list[int]]:
    rewrite = as_rewrite(prompt, tokenizer())
    return [rewrite(MAIN, row, rows) for row in range(rows)]


def test_no_prompt_is_the_main_one():
    assert as_rewrite(None) is None


@pytest.mark.parametrize(
    "prompt",
    ["green is", [1, 4, 6], (1, 4, 6), torch.tensor([1, 4, 6]), lambda main: [1, 4, 6], lambda main: "green is"],
    ids=["text", "list", "tuple", "tensor", "callable to ids", "callable to text"],
)
def test_one_prompt_for_all(prompt):
    assert rewritten(prompt, 3) == [[1, 4, 6]] * 3


@pytest.mark.parametrize(
    "prompt",
    [
        ["green is", "blue"],
        [[1, 4, 6], [1, 5]],
        [torch.tensor([1, 4, 6]), torch.tensor([1, 5])],
        ["green is", [1, 5]],
        {"input_ids": [[1, 4, 6], [1, 5]]},
        {"input_ids": [[1, 4, 6], [0, 1, 5]], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
        {
            "input_ids": torch.tensor([[1, 4, 6], [1, 5, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        },
        BatchEncoding({"input_ids": [[1, 4, 6], [1, 5]]}),
        tokenizer()(["green is", "blue"], return_tensors="pt", padding=True),
    ],
    ids=["texts", "lists", "tensors", "mixed", "ids", "left", "right", "encoding", "tokenizer"],
)
def test_one_prompt_for_each_item(prompt):
    assert rewritten(prompt, 2) == [[1, 4, 6], [1, 5]]
    # beams and returned sequences lie next to each other
    assert rewritten(prompt, 6) == [[1, 4, 6]] * 3 + [[1, 5]] * 3


def test_two_dimensional_tensors():
    assert rewritten(torch.tensor([[1, 4], [1, 5]]), 4) == [[1, 4], [1, 4], [1, 5], [1, 5]]


def test_one_item_as_the_tokenizer_returns_it_without_a_batch():
    assert rewritten({"input_ids": [1, 4], "attention_mask": [1, 1]}) == [[1, 4]] * 2
    assert rewritten({"input_ids": torch.tensor([1, 4])}) == [[1, 4]] * 2


@pytest.mark.parametrize("key", ["red is a colour", tuple(MAIN)], ids=["text", "ids"])
@pytest.mark.parametrize("value", ["green is", [1, 4, 6], torch.tensor([1, 4, 6])], ids=["text", "list", "tensor"])
def test_prompts_by_content(key, value):
    assert rewritten({"blue": "red", key: value}, 3) == [[1, 4, 6]] * 3


def test_callables_see_the_ids_of_the_main_prompt():
    seen = []

    def prompt(main):
        seen.append(main)
        return torch.cat([main[:1], main[-1:]])

    assert rewritten(prompt, 1) == [[1, 8]]
    assert seen[0].dtype == torch.long and seen[0].tolist() == MAIN


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ([], ValueError, "empty"),
        ([[1, 2], []], ValueError, "empty"),
        (torch.zeros(0, dtype=torch.long), ValueError, "empty"),
        ({"input_ids": []}, ValueError, "no prompt or an empty one"),
        ({"input_ids": [[5, 0]], "attention_mask": [[0, 0]]}, ValueError, "empty one"),
        (5, TypeError, "text or a flat list"),
        ([1.5], TypeError, "text or a flat list"),
        ([-1], TypeError, "text or a flat list"),
        ([[[1]]], TypeError, "text or a flat list"),
        ({"red": 5}, TypeError, "text or a flat list"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, error, match):
    with pytest.raises(error, match=match):
        as_rewrite(prompt, tokenizer(), what="negative_prompt")


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"negative_prompt was given as text \('green'\): pass tokenizer="):
        as_rewrite("green", what="negative_prompt")
    with pytest.raises(ValueError, match="negative_prompt is empty"):
        as_rewrite(lambda main: [], what="negative_prompt")(MAIN, 0, 1)


@pytest.mark.parametrize("prompt", [[[1], [2]], {"input_ids": torch.tensor([[1], [2]])}])
def test_as_many_prompts_as_items(prompt):
    with pytest.raises(ValueError, match="holds 2 prompts, but generation runs 3 rows"):
        as_rewrite(prompt)(MAIN, 0, 3)


def test_an_unknown_main_prompt_shows_its_ids():
    rewrite = as_rewrite({"blue": "red"}, tokenizer())
    with pytest.raises(ValueError, match=r"no entry for the prompt with ids \[1, 3, 6, 7, 8\] \(of 1 entries\)"):
        rewrite(MAIN, 0, 1)


# --- tokens and tokenizers -----------------------------------------------------------------------------------------------


def test_tokenize():
    assert tokenize("red is", tokenizer(), what="text") == [1, 3, 6]
    assert tokenize("red is", tokenizer(), what="text", special_tokens=False) == [3, 6]


@pytest.mark.parametrize("value", [4, "green"])
def test_single_tokens(value):
    assert single_token(value, tokenizer(), what="code") == 4


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("red green", ValueError, r"code='red green' is 2 tokens \(\[3, 4\]\)"),
        ("", ValueError, "is 0 tokens"),
        ("violet", ValueError, "unknown to the tokenizer"),
        (-1, ValueError, ">= 0"),
        (True, TypeError, "token id or a token's text"),
        (1.0, TypeError, "token id or a token's text|parameter 'value'"),  # the tests' shape checks may come first
        (None, TypeError, "token id or a token's text|parameter 'value'"),
    ],
)
def test_not_a_single_token(value, error, match):
    with pytest.raises(error, match=match):
        single_token(value, tokenizer(), what="code")


@pytest.mark.parametrize(("code", "expected"), [(4, 4), ("green", 4), ("green red", 4)])
def test_a_control_code_is_the_first_token(code, expected):
    assert control_code(code, tokenizer()) == expected


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        ("", ValueError, "control code '' has no tokens"),
        ("violet", ValueError, "unknown to the tokenizer"),
        (-1, TypeError, "must be a token id or a text"),
        (True, TypeError, "must be a token id or a text"),
    ],
)
def test_not_a_control_code(code, error, match):
    with pytest.raises(error, match=match):
        control_code(code, tokenizer())


def test_a_token_as_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="pass tokenizer="):
        single_token("green", None, what="code")
    assert single_token(4, None, what="code") == 4


def test_tokenizers_that_agree():
    check_same_tokenizer(tokenizer(), tokenizer())
    longer = tokenizer([*WORDS, "extra", "tokens"])
    check_same_tokenizer(tokenizer(), longer)  # either may know more behind the last id of the other
    check_same_tokenizer(longer, tokenizer())


@pytest.mark.parametrize("place", [3, len(WORDS) - 1])
def test_the_first_differing_token_is_named(place):
    other = [*WORDS]
    other[place] = "yellow"
    with pytest.raises(
        ValueError, match=f"id {place} is '{WORDS[place]}' for the main model and 'yellow' for the aux"
    ):
        check_same_tokenizer(tokenizer(), tokenizer(other))


def test_a_hole_is_a_difference():
    other = tokenizer()
    with_hole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS) if i != 4}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="id 4 is 'green' for the main model and None"):
        check_same_tokenizer(other, PreTrainedTokenizerFast(tokenizer_object=with_hole))
