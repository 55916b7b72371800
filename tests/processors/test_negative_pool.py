"""The pool of texts to stay away from."""

import pytest

from hf_logits.processors.negative_pool import NegativePool
from oracles import word_tokenizer


TEXTS = [f"text {i}" for i in range(20)]


def test_a_draw_is_without_replacement_and_from_the_pool():
    pool = NegativePool(TEXTS, k=7)
    for _ in range(50):
        drawn = pool.draw()
        assert len(drawn) == len(set(drawn)) == 7
        assert set(drawn) <= set(TEXTS)


def test_ten_are_drawn_by_default_and_all_if_there_are_fewer():
    assert len(NegativePool(TEXTS).draw()) == 10
    assert sorted(NegativePool(TEXTS[:4]).draw()) == TEXTS[:4]


def test_every_text_is_drawn_at_some_time_and_draws_differ():
    pool = NegativePool(TEXTS, k=5)
    draws = [pool.draw() for _ in range(60)]
    assert {text for drawn in draws for text in drawn} == set(TEXTS)
    assert len({tuple(drawn) for drawn in draws}) > 30


def test_a_seed_settles_the_draws():
    first, second, other = (NegativePool(TEXTS, seed=seed) for seed in (1, 1, 2))
    draws = [[pool.draw() for _ in range(3)] for pool in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]


def test_what_was_written_joins_the_pool_and_the_given_list_is_left_alone():
    given = ["a"]
    pool = NegativePool(given)
    pool.add("b", "c")
    pool.add("d")
    assert sorted(pool.draw()) == ["a", "b", "c", "d"]
    assert given == ["a"]


def test_a_text_may_be_in_the_pool_twice():
    assert NegativePool(["a", "a"]).draw() == ["a", "a"]


def test_examples_that_do_not_fit_are_left_out_whole():
    tokenizer = word_tokenizer()
    texts = ["w4 w5 w6 w7 w8", "w9", "w10 w11"]
    # each example counts its tokens and one for the space that joins it to the next
    for room, expected in ((2, {"w9"}), (5, {"w9", "w10 w11"}), (11, set(texts))):
        pool = NegativePool(texts, tokenizer=tokenizer, max_tokens=room)
        for _ in range(20):
            drawn = pool.draw()
            assert set(drawn) <= set(texts)
            assert sum(len(text.split()) + 1 for text in drawn) <= room
            if room != 5:
                assert set(drawn) == expected
    small = NegativePool(texts[1:], tokenizer=tokenizer, max_tokens=5)
    assert set(small.draw()) == set(texts[1:])


def test_no_example_that_fits_is_an_error():
    pool = NegativePool(["w4 w5 w6"], tokenizer=word_tokenizer(), max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens=3: raise it, or add shorter examples"):
        pool.draw()
