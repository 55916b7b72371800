"""Thresholds from a validation set, up to a model that learned to refuse and a processor that keeps the promised rates."""

import itertools
import random
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import tiny
from hf_logits.processors import RefusalTokenLogitsProcessor
from hf_logits.trainers.refusal_calibration import (
    calibrate,
    calibrate_refusal,
    decision_scores,
    refusal_probabilities,
)
from hf_logits.trainers.refusal_tokens import (
    RefusalTokenConfig,
    RefusalTokens,
    RefusalTokenTrainer,
    add_refusal_tokens,
    refusal_lora_config,
)
from oracles import CATEGORY_LOGITS, CATEGORY_PROBS, CATEGORY_SUM, REFUSAL_LOGITS, REFUSAL_PROBS, REFUSAL_PROBS_T2
from preferences import arguments, logged
from preferences import tokenizer as word_tokenizer


NAMES = ["a", "b", "c"]
TOKENS = RefusalTokens({"a": "[a]", "b": "[b]"})
SINGLE = RefusalTokens()


# --- from probabilities --------------------------------------------------------------------------------------------------


def random_rows(seed=0, count=200):
    """Probabilities of three categories and labels that have to do with them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(-1, 3, count)
    logits = generator.normal(size=(count, 5))
    logits[np.arange(count), labels] += np.where(labels < 0, 0.0, 1.5)
    logits[:, 4] += np.where(labels < 0, 2.0, 0.0)
    probs = torch.tensor(logits).float().softmax(-1)
    return probs, probs[:, :3].double().numpy(), labels


def decided(probs, calibration, mode):
    """What the processor makes of probabilities: a category's place, or -1."""
    refuse = {"refuse": 0} if mode == "single" else {name: place for place, name in enumerate(NAMES)}
    processor = RefusalTokenLogitsProcessor(refuse=refuse, respond=4, **calibration.settings)
    chosen = processor(torch.full((len(probs), 1), 5), probs.log()).argmax(-1)
    return torch.where(chosen < (1 if mode == "single" else 3), chosen, -1).numpy()


def test_scores_of_the_oracles():
    refused, ordinary = np.array([0]), np.array([-1])
    probs = CATEGORY_PROBS[:, :3].numpy()
    both = [decision_scores(probs, one, names=NAMES, mode="category") for one in (refused, ordinary)]
    assert both[0]["a"][0] == pytest.approx([0.228801]) and len(both[0]["a"][1]) == 0
    assert [both[1][name][1].tolist() for name in NAMES] == [[pytest.approx(0.228801)], [-1.0], [-1.0]]
    assert decision_scores(probs, refused, names=NAMES, mode="sum")["refuse"][0] == pytest.approx([CATEGORY_SUM])


@pytest.mark.parametrize("mode", ["single", "category", "sum"])
@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.37, 0.8])
@pytest.mark.parametrize("kind", ["refusal_rate", "false_refusal_rate"])
def test_the_processor_has_the_rates_that_were_found(mode, kind, wanted):
    whole, probs, labels = random_rows()
    names = NAMES if mode != "single" else ["refuse"]
    if mode == "single":
        probs, labels = probs[:, :1], np.where(labels == 0, 0, -1)
    found = calibrate(probs, labels, names=names, mode=mode, **{kind: wanted})
    chosen = decided(whole, found, mode)
    for place, name in enumerate(found.roc):
        as_this = chosen == place if mode == "category" else chosen >= 0
        to_refuse = labels == place if mode == "category" else labels >= 0
        assert as_this[to_refuse].mean() == found.refusal_rates[name]
        assert as_this[labels < 0].mean() == found.false_refusal_rates[name]
        if kind == "false_refusal_rate":
            assert found.false_refusal_rates[name] <= wanted
        elif mode != "category" or wanted < 0.8:
            assert wanted <= found.refusal_rates[name] < wanted + 0.03
    assert set(found.refusal_rates) == ({"a", "b", "c"} if mode == "category" else {"refuse"})


def test_a_rate_that_other_categories_keep_out_of_reach_is_told():
    probs = np.array([[0.5, 0.1], [0.1, 0.5], [0.1, 0.2], [0.2, 0.1]])
    found = calibrate(probs, np.array([0, 0, 1, -1]), names=["a", "b"], mode="category", refusal_rate=1.0)
    assert found.threshold["a"] == 0.0 and found.refusal_rates == {"a": 0.5, "b": 1.0}


def test_moving_the_threshold_of_a_category_leaves_the_others():
    whole, probs, labels = random_rows()
    settings = {"names": NAMES, "mode": "category"}
    base = calibrate(probs, labels, false_refusal_rate=0.05, **settings)
    moved = calibrate(probs, labels, false_refusal_rate={"a": 0.3, "b": 0.05, "c": 0.05}, **settings)
    assert moved.threshold["a"] < base.threshold["a"]
    for one in ("threshold", "refusal_rates", "false_refusal_rates"):
        before, after = getattr(base, one), getattr(moved, one)
        assert before["a"] != after["a"] and all(before[name] == after[name] for name in ("b", "c"))
    first, second = (decided(whole, found, "category") for found in (base, moved))
    assert (first != second).any() and set(second[first != second]) == {0} and set(first[first != second]) == {-1}


def test_rates_are_monotone_in_the_threshold():
    _, probs, labels = random_rows()
    for mode in ("category", "sum"):
        for curve in calibrate(probs, labels, names=NAMES, mode=mode, refusal_rate=0.5).roc.values():
            assert (np.diff(curve.thresholds) < 0).all()
            assert (np.diff(curve.true_rates) >= 0).all() and (np.diff(curve.false_rates) >= 0).all()
            assert 0.6 < curve.auc < 1
        bounds = [calibrate(probs, labels, names=NAMES, mode=mode, refusal_rate=r).threshold for r in (0.2, 0.4, 0.6)]
        for low, high in itertools.pairwise(bounds[::-1]):
            assert low < high if mode == "sum" else all(low[name] < high[name] for name in NAMES)


def test_a_category_that_is_not_named_has_no_threshold():
    _, probs, labels = random_rows()
    found = calibrate(probs, labels, names=NAMES, mode="category", refusal_rate={"b": 0.5}, resamples=20)
    assert set(found.threshold) == set(found.refusal_rates) == {"b"}
    assert set(found.roc) == set(found.auc_intervals) == set(NAMES)
    low, high = found.auc_intervals["a"]
    assert low < found.roc["a"].auc < high
    RefusalTokenLogitsProcessor(refuse={"a": 0, "b": 1, "c": 2}, respond=3, **found.settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of them"),
        ({"refusal_rate": 0.5, "false_refusal_rate": 0.5}, "one of them"),
        ({"refusal_rate": 1.5}, "refusal_rate of 'a'"),
        ({"refusal_rate": {"d": 0.5}}, "names \\['d'\\]"),
        ({"refusal_rate": {}}, "empty"),
        ({"refusal_rate": 0.5, "mode": "bias"}, "mode"),
        ({"refusal_rate": 0.5, "mode": "single"}, "'category' or 'sum'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    _, probs, labels = random_rows()
    with pytest.raises(ValueError, match=message):
        calibrate(probs, labels, names=NAMES, **({"mode": "category"} | settings))


def test_a_validation_set_needs_every_kind_of_row():
    _, probs, labels = random_rows()
    for missing, message in ((1, "label 'b'"), (-1, "ordinary answer")):
        kept = labels != missing
        with pytest.raises(ValueError, match=message):
            calibrate(probs[kept], labels[kept], names=NAMES, mode="category", refusal_rate=0.5)


# --- from a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.DECODERS)
def test_probabilities_are_those_of_each_prompt_alone(kind):
    model, tokenizer = tiny.DECODERS[kind](0), word_tokenizer()
    ids = add_refusal_tokens(tokenizer, model, TOKENS, like={"[a]": "w9", "[b]": "w12"})[:-1]
    rng = random.Random(0)
    rows = [[rng.randint(6, 63) for _ in range(length)] for length in (3, 9, 5, 1, 12)]
    prompts = tokenizer.batch_decode(rows)
    model.train()
    for temperature in (1.0, 2.0):
        found = refusal_probabilities(
            model, tokenizer, prompts, tokens=TOKENS, softmax_temperature=temperature, batch_size=2
        )
        assert model.training
        expected = (tiny.recomputed(model.eval(), rows) / temperature).softmax(-1)[:, ids]
        model.train()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert found.dtype == torch.float32 and found.max() > 1e-4


@pytest.mark.parametrize(
    ("logits", "tokens", "temperature", "expected"),
    [
        (REFUSAL_LOGITS, {"refuse": 0}, 1.0, REFUSAL_PROBS[0, :1].tolist()),
        (REFUSAL_LOGITS, {"refuse": 0}, 2.0, [REFUSAL_PROBS_T2[0]]),
        (CATEGORY_LOGITS, {"a": 0, "b": 1, "c": 2}, 1.0, CATEGORY_PROBS[0, :3].tolist()),
    ],
)
def test_probabilities_of_the_oracles(logits, tokens, temperature, expected):
    """The bias of a head that reads nothing is its logits."""
    model = tiny.llama(0)
    head = torch.nn.Linear(32, 64)
    head.weight.data.zero_()
    head.bias.data.fill_(-1e4)
    head.bias.data[20 : 20 + logits.shape[1]] = logits[0].float()
    model.lm_head = head
    texts = RefusalTokens({name: f"w{20 + place}" for name, place in tokens.items()}, "w40")
    found = refusal_probabilities(model, word_tokenizer(), ["w9 w8"], tokens=texts, softmax_temperature=temperature)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


WORDS = {"w10": "a", "w11": "b", "w12": None}


def rows(count, seed):
    """Prompts with w10 are refused as a, with w11 as b, with w12 they are answered; sometimes the word is missing."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        word, label = list(WORDS.items())[index % 3]
        words = [f"w{rng.randint(20, 40)}" for _ in range(rng.randint(2, 5))]
        if rng.random() > 0.1:
            words.insert(rng.randint(0, len(words)), word)
        answer = "w60 w61" if label is None else "w50 w51"
        found.append({"prompt": " ".join(words) + " ", "completion": answer, "label": label})
    return Dataset.from_list(found)


@cache
def learned(adapter, folder):
    """A model that was taught to refuse two kinds of prompts."""
    model, tokenizer = tiny.tied_llama(0), word_tokenizer()
    add_refusal_tokens(tokenizer, model, TOKENS)
    config = refusal_lora_config(model, tokenizer, TOKENS, r=8, target_modules="all-linear") if adapter else None
    args = arguments(
        RefusalTokenConfig, folder, refuse=dict(TOKENS.refuse), per_device_train_batch_size=32, learning_rate=2e-2 if adapter else 1e-2, max_steps=40,
        refusal_token_weight=3.0,
    )  # fmt: skip
    trainer = RefusalTokenTrainer(
        model, args, train_dataset=rows(256, 0), processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    return trainer, tokenizer


def refused(model, tokenizer, data, calibration):
    """Which rows generation begins with which token."""
    processor = RefusalTokenLogitsProcessor(
        refuse=TOKENS.refuse, respond=TOKENS.respond, tokenizer=tokenizer, **calibration.settings
    )
    inputs = tokenizer(list(data["prompt"]), return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    out = model.generate(**inputs, logits_processor=[processor], max_new_tokens=1, do_sample=False)
    names = dict(zip(TOKENS.ids(tokenizer), [*TOKENS.categories, None], strict=True))
    return [names[token] for token in out[:, -1].tolist()]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_model_learns_to_refuse_and_a_processor_keeps_the_rates(adapter, tmp_path_factory):
    trainer, tokenizer = learned(adapter, str(tmp_path_factory.getbasetemp()))
    model = trainer.model
    assert isinstance(model, PeftModel) == adapter
    accuracy = logged(trainer, "refusal/token_accuracy")
    assert accuracy[0] < 0.2 and accuracy[-1] > 0.85
    validation, test = rows(150, 1), rows(150, 2)
    settings = {"tokens": TOKENS, "batch_size": 32}
    found = calibrate_refusal(model, tokenizer, validation, false_refusal_rate=0.04, **settings)
    assert found.mode == "category" and all(curve.auc > 0.9 for curve in found.roc.values())
    answers, labels = refused(model, tokenizer, validation, found), validation["label"]
    for name in TOKENS.categories:
        for rates, label in ((found.refusal_rates, name), (found.false_refusal_rates, None)):
            mine = [answer == name for answer, one in zip(answers, labels, strict=True) if one == label]
            assert np.mean(mine) == rates[name]
        assert found.refusal_rates[name] > 0.8 and found.false_refusal_rates[name] <= 0.04
    answers, labels = refused(model, tokenizer, test, found), test["label"]
    for name in TOKENS.categories:
        share = {
            label: np.mean([a == name for a, one in zip(answers, labels, strict=True) if one == label])
            for label in (name, None)
        }
        assert share[name] > 0.7 and share[None] < 0.2
    # with a stricter rate for a, no answer in b changes
    strict = calibrate_refusal(model, tokenizer, validation, false_refusal_rate={"a": 0.0, "b": 0.04}, **settings)
    other = refused(model, tokenizer, test, strict)
    assert strict.threshold["a"] > found.threshold["a"] and strict.threshold["b"] == found.threshold["b"]
    assert all(first == second or first == "a" for first, second in zip(answers, other, strict=True))


def test_messages_are_read_up_to_the_answer(tmp_path_factory):
    trainer, tokenizer = learned(False, str(tmp_path_factory.getbasetemp()))
    plain = rows(30, 3)
    chats = {"prompt": [], "messages": [], "question": []}
    for row in plain:
        user, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
        for name, messages in (("prompt", [user]), ("messages", [user, answer]), ("question", [user])):
            chats[name].append({"prompt" if name == "prompt" else "messages": messages, "label": row["label"]})
    found = [
        calibrate_refusal(
            trainer.model, tokenizer, Dataset.from_list(data), tokens=TOKENS, refusal_rate=0.5, mode="sum", resamples=5
        )
        for data in chats.values()
    ]
    assert found[0].threshold == found[1].threshold == found[2].threshold
    texts = [
        tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in chats["prompt"]
    ]
    expected = refusal_probabilities(trainer.model, tokenizer, texts, tokens=TOKENS).sum(-1)
    assert found[0].roc["refuse"].thresholds[1] == pytest.approx(expected.max().item(), rel=1e-5)
    assert set(found[0].auc_intervals) == {"refuse"}


def test_rows_and_models_that_cannot_be_calibrated_are_refused():
    model, tokenizer = tiny.tied_llama(0), word_tokenizer()
    data = Dataset.from_list([{"prompt": "w9", "label": True}, {"prompt": "w8", "label": False}])
    settings = {"tokens": SINGLE, "refusal_rate": 0.5}
    with pytest.raises(ValueError, match=r"\[refuse\]"):
        calibrate_refusal(model, tokenizer, data, **settings)
    add_refusal_tokens(tokenizer, tiny.tied_llama(0), SINGLE)
    with pytest.raises(ValueError, match="add_refusal_tokens"):
        calibrate_refusal(model, tokenizer, data, **settings)
    add_refusal_tokens(tokenizer, model, SINGLE)
    assert calibrate_refusal(model, tokenizer, data, **settings).mode == "single"
    with pytest.raises(ValueError, match="one of them"):
        calibrate_refusal(model, tokenizer, data, tokens=SINGLE)
    with pytest.raises(ValueError, match="'kind'"):
        calibrate_refusal(model, tokenizer, data, label_column="kind", **settings)
    with pytest.raises(ValueError, match="prompt or messages"):
        calibrate_refusal(model, tokenizer, data.rename_column("prompt", "text"), **settings)
    with pytest.raises(ValueError, match="softmax_temperature"):
        calibrate_refusal(model, tokenizer, data, softmax_temperature=0.0, **settings)
    with pytest.raises(ValueError, match="at least one token"):
        calibrate_refusal(model, tokenizer, Dataset.from_list([{"prompt": "", "label": True}]), **settings)
