"""Refusal tokens: their rows, their data, what TRL trains of them, and the loss of single rows against the whole table."""

import copy
import os
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

import tiny
from hf_logits.new_tokens import frozen_rows
from hf_logits.trainers import refusal_tokens
from hf_logits.trainers.refusal_tokens import (
    RefusalTokenConfig,
    RefusalTokens,
    RefusalTokenTrainer,
    add_refusal_tokens,
    prepend_refusal_token,
    refusal_lora_config,
    weigh_tokens,
)
from preferences import Stop, StopAt, arguments, distance, equal, logged, weights
from preferences import tokenizer as word_tokenizer


SINGLE = RefusalTokens()
CATEGORIES = RefusalTokens({"safety": "[Requests with safety concerns]", "unsupported": "[Unsupported requests]"})
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {"tied": tiny.tied_llama, "untied": tiny.llama, "gpt2": lambda seed: tiny.gpt2(seed, **NO_DROPOUT)}
MODULES = {"gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}}
every_model = pytest.mark.parametrize("kind", MODELS)
STRIPPING = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def prepared(kind="tied", tokens=SINGLE, like=None):
    """A model and a tokenizer that know the tokens."""
    model, tokenizer = MODELS[kind](0), word_tokenizer()
    ids = add_refusal_tokens(tokenizer, model, tokens, like=like)
    return model, tokenizer, ids


def rows(count=8, *, kind="text", seed=0):
    """Prompts with the word w10 are refused, those with w11 are answered."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        refused = index % 2 == 0
        words = [f"w{rng.randint(20, 40)}" for _ in range(rng.randint(2, 5))]
        words.insert(rng.randint(0, len(words)), "w10" if refused else "w11")
        prompt, answer = " ".join(words) + " ", "w50 w51" if refused else "w60 w61"
        if kind == "text":
            row = {"prompt": prompt, "completion": answer}
        else:
            user, assistant = ({"role": r, "content": c} for r, c in (("user", prompt), ("assistant", answer)))
            row = (
                {"messages": [user, assistant]}
                if kind == "messages"
                else {"prompt": [user], "completion": [assistant]}
            )
        found.append(row | {"label": refused})
    return Dataset.from_list(found)


def make(folder, model, tokenizer, *, data=None, trainer=RefusalTokenTrainer, config=RefusalTokenConfig, **settings):
    given = {name: settings.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in settings}
    args = arguments(config, folder, **settings)
    data = rows() if data is None else data
    return trainer(model, args, train_dataset=data, processing_class=tokenizer, **given)


def lora(model, tokenizer, kind="tied", tokens=SINGLE):
    modules = MODULES.get(kind, {"target_modules": ["q_proj", "v_proj"]})
    return refusal_lora_config(model, tokenizer, tokens, r=4, lora_alpha=8, **modules)


# --- tokens and rows -----------------------------------------------------------------------------------------------------


@every_model
def test_new_rows_are_the_mean_and_old_ones_stay(kind):
    before = MODELS[kind](0)
    model, tokenizer, ids = prepared(kind, CATEGORIES)
    assert ids == [64, 65, 66] and len(tokenizer) == 67 == model.config.vocab_size
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (kind != "untied")
    for old, new in (
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:64], old.weight)
        torch.testing.assert_close(new.weight[64:], old.weight.mean(0).expand(3, -1))
    assert tokenizer(CATEGORIES.refuse["unsupported"] + "w9").input_ids == [65, 9]
    assert tokenizer.decode([65, 9], skip_special_tokens=True) == "w9"


@every_model
def test_adding_twice_changes_nothing(kind):
    model, tokenizer, ids = prepared(kind)
    model.get_input_embeddings().weight.data[ids[0]] = 7.0  # trained, say
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_refusal_tokens(tokenizer, model, SINGLE) == ids
    assert equal(kept, model.state_dict()) and len(tokenizer) == 66


def test_a_saved_tokenizer_and_the_base_model_find_each_other_again(tmp_path):
    model, tokenizer, ids = prepared()
    tokenizer.save_pretrained(tmp_path)
    again, base = type(tokenizer).from_pretrained(tmp_path), tiny.tied_llama(0)
    assert add_refusal_tokens(again, base, SINGLE) == ids
    assert equal(dict(model.state_dict()), dict(base.state_dict()))


def test_a_token_starts_from_words_that_mean_it():
    base = tiny.llama(0)
    model, _, ids = prepared("untied", like={"[refuse]": "w9 w12"})
    for old, new in (
        (base.get_input_embeddings(), model.get_input_embeddings()),
        (base.get_output_embeddings(), model.get_output_embeddings()),
    ):
        torch.testing.assert_close(new.weight[ids[0]], old.weight[[9, 12]].mean(0))
        torch.testing.assert_close(new.weight[ids[1]], old.weight.mean(0))


def test_a_padded_vocabulary_does_not_shrink_and_its_padding_is_no_part_of_the_mean():
    model, tokenizer = tiny.tied_llama(0, vocab_size=80), word_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_refusal_tokens(tokenizer, model, SINGLE)
    after = model.get_input_embeddings().weight
    assert after.shape == before.shape and ids == [64, 65]
    torch.testing.assert_close(after[64:66], before[:64].mean(0).expand(2, -1))
    assert torch.equal(after[66:], before[66:])


def test_a_bias_of_the_head_starts_at_its_mean_too_and_single_rows_are_refused():
    model, tokenizer = tiny.llama(0), word_tokenizer()
    model.lm_head = torch.nn.Linear(32, 64, bias=True)
    mean = model.lm_head.bias.mean().item()
    ids = add_refusal_tokens(tokenizer, model, SINGLE)
    assert model.lm_head.bias[ids].tolist() == pytest.approx([mean, mean])
    with pytest.raises(ValueError, match="modules_to_save"):
        refusal_lora_config(model, tokenizer, SINGLE)


def test_tokens_that_are_none_are_refused():
    for refuse, respond in (("[a]", "[a]"), ("", "[b]"), ({}, "[b]"), ({"x": "[a]", "y": "[a]"}, "[b]"), ("[a]", " ")):
        with pytest.raises(ValueError, match="tokens"):
            RefusalTokens(refuse, respond)
    with pytest.raises(ValueError, match="respond"):
        RefusalTokens({"respond": "[a]"})
    model, tokenizer, _ = prepared()
    with pytest.raises(ValueError, match=r"\[maybe\]"):
        add_refusal_tokens(tokenizer, model, SINGLE, like={"[maybe]": "w9"})
    with pytest.raises(ValueError, match="no words"):
        add_refusal_tokens(tokenizer, model, SINGLE, like={"[refuse]": ""})
    with pytest.raises(ValueError, match="row"):
        refusal_lora_config(tiny.llama(0), tokenizer, SINGLE)
    adapted = PeftModel(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="adapter"):
        add_refusal_tokens(tokenizer, adapted, SINGLE)


# --- data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "label", "token"),
    [
        (SINGLE, True, "[refuse]"), (SINGLE, 1, "[refuse]"), (SINGLE, "refuse", "[refuse]"), (SINGLE, False, "[respond]"),
        (SINGLE, 0, "[respond]"), (SINGLE, None, "[respond]"), (SINGLE, "respond", "[respond]"),
        (CATEGORIES, "unsupported", "[Unsupported requests]"), (CATEGORIES, None, "[respond]"),
        (CATEGORIES, False, "[respond]"), (CATEGORIES, "respond", "[respond]"),
    ],
)  # fmt: skip
def test_what_a_label_means(tokens, label, token):
    row = {"prompt": "p", "completion": " said", "label": label}
    assert prepend_refusal_token(row, tokens=tokens) == {"completion": f"{token} said"}


@pytest.mark.parametrize(("tokens", "label"), [(SINGLE, "safety"), (SINGLE, 2), (CATEGORIES, True), (CATEGORIES, "x")])
def test_an_unknown_label_is_refused(tokens, label):
    with pytest.raises(ValueError, match="label"):
        prepend_refusal_token({"prompt": "p", "completion": "c", "label": label}, tokens=tokens)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_conversations():
    row = {"prompt": chat("q"), "completion": chat("", "\n a")[1:], "kind": "safety"}
    found = prepend_refusal_token(row, tokens=CATEGORIES, label_column="kind")
    assert found == {"completion": [{"role": "assistant", "content": "[Requests with safety concerns]a"}]}
    row = {"messages": chat("q", "a", "r", "b"), "label": True}
    found = prepend_refusal_token(row, tokens=SINGLE)
    assert [m["content"] for m in found["messages"]] == ["q", "[respond]a", "r", "[refuse]b"]
    assert row["messages"] == chat("q", "a", "r", "b")  # the caller's stays
    each = prepend_refusal_token(row | {"label": [True, False]}, tokens=SINGLE)
    assert [m["content"] for m in each["messages"]] == ["q", "[refuse]a", "r", "[respond]b"]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    found = prepend_refusal_token({"prompt": chat("q"), "completion": parts, "label": False}, tokens=SINGLE)
    assert found["completion"][0]["content"][0]["text"] == "[respond]a" and parts[0]["content"][0]["text"] == "a"
    calls = [{"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "1"}, chat("", "a")[1]]
    found = prepend_refusal_token({"messages": [*chat("q"), *calls], "label": False}, tokens=SINGLE)
    assert found["messages"][1:3] == calls[:2] and found["messages"][3]["content"] == "[respond]a"


@pytest.mark.parametrize("kind", ["text", "completion", "messages"])
def test_a_token_is_put_there_once(kind):
    once = rows(kind=kind).map(prepend_refusal_token, fn_kwargs={"tokens": SINGLE})
    twice = once.map(prepend_refusal_token, fn_kwargs={"tokens": SINGLE})
    assert once.to_list() == twice.to_list() != rows(kind=kind).to_list()
    with pytest.raises(ValueError, match="already"):
        prepend_refusal_token(once[0] | {"label": False}, tokens=SINGLE)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "c"}, "label_column"),
        ({"text": "t", "label": True}, "where the answer begins"),
        ({"prompt": chat("q"), "completion": chat("q"), "label": True}, "assistant"),
        ({"prompt": chat("q"), "completion": [{"role": "assistant", "tool_calls": []}], "label": True}, "text"),
        ({"messages": chat("q"), "label": True}, "0 answers"),
        ({"messages": chat("q", "a"), "label": [True, False]}, "2 labels"),
    ],
)
def test_rows_without_an_answer_to_begin_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        prepend_refusal_token(row, tokens=SINGLE)


@pytest.mark.parametrize("kind", ["text", "completion", "messages"])
@pytest.mark.parametrize("stripping", [False, True])
def test_the_token_is_the_first_that_is_trained_and_the_rest_is_plain_data(kind, stripping, tmp_path):
    model, tokenizer, (refuse, respond) = prepared()
    if stripping or kind == "messages":
        tokenizer.chat_template = STRIPPING
    settings = {"assistant_only_loss": True} if kind == "messages" else {}
    ours = make(tmp_path, model, tokenizer, data=rows(kind=kind), **settings)
    stock = make(
        tmp_path, model, tokenizer, data=rows(kind=kind), trainer=SFTTrainer, config=SFTConfig, **settings
    )  # fmt: skip
    for index, (mine, plain) in enumerate(zip(ours.train_dataset, stock.train_dataset, strict=True)):
        first = next(place for place, label in enumerate(mine["labels"]) if label != -100)
        assert mine["labels"][first] == mine["input_ids"][first] == (refuse if index % 2 == 0 else respond)
        for column in ("input_ids", "labels"):
            assert mine[column][:first] + mine[column][first + 1 :] == plain[column]
        # generation begins where the token stands
        if kind == "completion":
            prompt = rows(kind=kind)[index]["prompt"]
            begun = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert mine["input_ids"][:first] == begun


def test_what_a_template_writes_before_the_answer_is_found(tmp_path):
    model, tokenizer, _ = prepared()
    tokenizer.chat_template = STRIPPING.replace("{{ message['content'] | trim + ' <eos> ' }}{% end", "{{ 'w4 ' + message['content'] + ' <eos> ' }}{% end")  # fmt: skip
    with pytest.raises(ValueError, match="chat template writes something"):
        make(tmp_path, model, tokenizer, data=rows(kind="completion"))
    with pytest.raises(ValueError, match="8 of the 8 rows.*prepend_refusal_token"):
        make(tmp_path, model, tokenizer, data=rows().remove_columns("label"))
    already = rows().map(prepend_refusal_token, fn_kwargs={"tokens": SINGLE}).remove_columns("label")
    assert make(tmp_path, model, tokenizer, data=already).train_dataset[0]["labels"][-4:] == [64, 50, 51, 2]


# --- training ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_gradient_of_the_rows_is_that_of_a_whole_table_on_all_logits(kind, weight, tmp_path):
    model, tokenizer, ids = prepared(kind)
    whole = copy.deepcopy(model)
    config = lora(model, tokenizer, kind)
    trainer = make(tmp_path, model, tokenizer, peft_config=config, refusal_token_weight=weight)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    found = {
        "input" if "embed" in name or "wte" in name else "output": parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if "trainable_tokens_delta" in name
    }
    # the slow obvious way: no adapter (LoRA's B is zero at first), all logits, the whole table
    logits = whole(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    weighed = torch.where(torch.isin(labels, torch.tensor(ids)), weight * losses, losses)
    expected = weighed.sum() / (labels != -100).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    tables = {"input": whole.get_input_embeddings().weight.grad, "output": whole.get_output_embeddings().weight.grad}
    assert set(found) == ({"input", "output"} if kind == "untied" else {"input"})
    for side, gradient in found.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, tables[side][ids], atol=1e-6, rtol=1e-4)


def test_stock_trl_fails_on_tied_rows_and_leaves_the_output_rows_of_untied_ones_alone(tmp_path, monkeypatch):
    """Why there is a trainer of our own. If this fails, TRL has learned it."""
    data = rows().map(prepend_refusal_token, fn_kwargs={"tokens": SINGLE})
    model, tokenizer, _ = prepared()
    stock = make(
        tmp_path, model, tokenizer, data=data, trainer=SFTTrainer, config=SFTConfig, peft_config=lora(model, tokenizer)
    )
    with pytest.raises(AttributeError, match="bias"):
        stock.train()
    model, tokenizer, ids = prepared("untied")
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids}
    )
    said = []
    monkeypatch.setattr(refusal_tokens.logger, "warning_once", said.append)
    assert frozen_rows(make(tmp_path, model, tokenizer, peft_config=config).model, ids) == ["output"]
    assert "in the output embedding are not trained" in said[0]
    make(tmp_path, *prepared("untied")[:2])
    assert len(said) == 1


@every_model
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_logits_survive_a_save(kind, adapter, tmp_path):
    model, tokenizer, ids = prepared(kind, CATEGORIES)
    data = rows().map(lambda row: {"label": "unsupported" if row["label"] else None})
    config = lora(model, tokenizer, kind, CATEGORIES) if adapter else None
    before = {side: getattr(model, f"get_{side}_embeddings")().weight.detach().clone() for side in ("input", "output")}
    trainer = make(
        tmp_path, model, tokenizer, data=data, peft_config=config, refuse=dict(CATEGORIES.refuse), max_steps=4, learning_rate=1e-2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    assert frozen_rows(trainer.model, ids) == []
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    base = MODELS[kind](0)
    base.config._name_or_path = ""
    if adapter:
        again = type(tokenizer).from_pretrained(tmp_path / "saved")
        assert add_refusal_tokens(again, base, CATEGORIES, like={"[respond]": "w9"}) == ids
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
        for folder in ("saved", "checkpoint-4"):
            kept = load_file(tmp_path / folder / "adapter_model.safetensors")
            assert max(value.numel() for value in kept.values()) < 64 * 32  # no whole table
            assert sum("trainable_tokens" in name for name in kept) == (2 if kind == "untied" else 1)
    else:
        loaded = type(base).from_pretrained(tmp_path / "saved")
    probe = torch.tensor([[5, 10, 64, 66, 30, 65]])
    trainer.model.eval(), loaded.eval()
    with torch.no_grad():
        expected = trainer.model(probe).logits
        assert torch.equal(loaded(probe).logits, expected)
        if adapter:
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(probe).logits, expected, atol=1e-5, rtol=1e-4)
            for side, table in before.items():
                trained = getattr(merged, f"get_{side}_embeddings")().weight
                assert torch.equal(trained[:64], table[:64])
                moved = (trained[64:] - table[64:]).abs().amax(-1)
                assert moved[1:].min() > 1e-4
                # the category that does not occur is never read, but is pushed down among the outputs
                assert moved[0] > 1e-4 or (kind, side, moved[0].item()) == ("untied", "input", 0.0)


def test_an_adapter_saved_from_a_base_on_disk_holds_no_table_either(tmp_path):
    """Where PEFT finds the base, it sees that the vocabulary has grown, and would save both embeddings."""
    tiny.tied_llama(0).save_pretrained(tmp_path / "base")
    model = type(tiny.tied_llama(0)).from_pretrained(tmp_path / "base")
    tokenizer = word_tokenizer()
    add_refusal_tokens(tokenizer, model, SINGLE)
    trainer = make(tmp_path / "run", model, tokenizer, peft_config=lora(model, tokenizer), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert os.path.getsize(tmp_path / "saved" / "adapter_model.safetensors") < 64 * 32 * 4
    assert "save_pretrained" not in vars(trainer.model)
    base = type(model).from_pretrained(tmp_path / "base")
    add_refusal_tokens(tokenizer, base, SINGLE)
    loaded, probe = PeftModel.from_pretrained(base, tmp_path / "saved").eval(), torch.tensor([[5, 64, 65]])
    with torch.no_grad():
        assert torch.equal(loaded(probe).logits, trainer.model.eval()(probe).logits)


def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "linear"}
    found = []
    for stop in (None, 3):
        for resumed in [False, True] if stop else [False]:
            model, tokenizer, _ = prepared()
            callbacks = [StopAt(stop)] if stop and not resumed else None
            folder, config = tmp_path / str(stop), lora(model, tokenizer)
            trainer = make(folder, model, tokenizer, peft_config=config, callbacks=callbacks, **settings)
            if callbacks:
                with pytest.raises(Stop):
                    trainer.train()
            else:
                trainer.train(resume_from_checkpoint=resumed)
                found.append(weights(trainer))
    assert equal(*found)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_weight_of_one_is_stock_sft_bit_for_bit(adapter, tmp_path):
    data = rows().map(prepend_refusal_token, fn_kwargs={"tokens": SINGLE})
    found = []
    for trainer, config in ((SFTTrainer, SFTConfig), (RefusalTokenTrainer, RefusalTokenConfig)):
        model, tokenizer, _ = prepared()
        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if adapter else None
        found.append(
            make(tmp_path, model, tokenizer, data=data, trainer=trainer, config=config, peft_config=peft_config, gradient_accumulation_steps=2)
        )  # fmt: skip
        found[-1].train()
    assert equal(*map(weights, found))
    assert logged(found[0], "loss") == logged(found[1], "loss")


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}], ids=lambda s: next(iter(s)))  # fmt: skip
def test_rows_are_trained_under_other_settings_too(settings, tmp_path):
    model, tokenizer, ids = prepared()
    trainer = make(tmp_path, model, tokenizer, peft_config=lora(model, tokenizer), **settings)
    before = weights(trainer)
    trainer.train()
    moved = {name: (value - before[name]).abs().amax(-1) for name, value in weights(trainer).items()}
    (rows_moved,) = (value for name, value in moved.items() if "trainable_tokens" in name)
    assert rows_moved.min() > 1e-4


def test_a_heavier_token_is_learned_sooner_and_accumulation_does_not_matter(tmp_path):
    model, tokenizer, _ = prepared()
    losses, found = {}, []
    for weight in (0.0, 1.0, 5.0):
        trainer = make(
            tmp_path, copy.deepcopy(model), tokenizer, refusal_token_weight=weight, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
            max_steps=6, per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
        losses[weight] = logged(trainer, "refusal/token_loss")
        assert len(logged(trainer, "refusal/token_accuracy")) == 6
    assert losses[0.0][0] == losses[1.0][0] == losses[5.0][0]
    assert losses[5.0][-1] < losses[1.0][-1] < losses[0.0][-1]
    for size, steps in ((4, 1), (1, 4)):
        trainer = make(
            tmp_path, copy.deepcopy(model), tokenizer, refusal_token_weight=3.0, optim="sgd", learning_rate=0.01, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        found.append(weights(trainer))
    assert distance(*found) < 1e-6


def test_weights_by_hand():
    log_probs, chosen = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[True, False, False]])
    assert weigh_tokens(log_probs, chosen, 4.0).tolist() == [[-4.0, -2.0, 0.0]]
    assert torch.equal(weigh_tokens(log_probs, chosen, 1.0), log_probs)


def test_evaluation_and_streams(tmp_path):
    model, tokenizer, _ = prepared()
    trainer = make(tmp_path, copy.deepcopy(model), tokenizer, eval_dataset=rows(4, seed=1))
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_refusal/token_loss"] > 0 and 0 <= found["eval_refusal/token_accuracy"] <= 1
    assert trainer.evaluate(rows(4, seed=1))["eval_loss"] == found["eval_loss"]
    stream = make(
        tmp_path,
        copy.deepcopy(model),
        tokenizer,
        data=rows().to_iterable_dataset(),
        train_sampling_strategy="sequential",
    )
    whole = make(tmp_path, copy.deepcopy(model), tokenizer, train_sampling_strategy="sequential")
    stream.train()
    whole.train()
    assert equal(weights(stream), weights(whole))


def test_bad_settings_are_refused(tmp_path):
    model, tokenizer, _ = prepared()
    with pytest.raises(TypeError, match="RefusalTokenConfig"):
        make(tmp_path, model, tokenizer, config=SFTConfig)
    with pytest.raises(ValueError, match="refusal_token_weight"):
        arguments(RefusalTokenConfig, tmp_path, refusal_token_weight=-1.0)
    with pytest.raises(ValueError, match="plain likelihoods"):
        arguments(RefusalTokenConfig, tmp_path, refusal_token_weight=2.0, loss_type="dft")
    with pytest.raises(ValueError, match="different tokens"):
        arguments(RefusalTokenConfig, tmp_path, refuse="[respond]")
    with pytest.raises(ValueError, match="add_refusal_tokens"):
        make(tmp_path, tiny.tied_llama(0), tokenizer)
    with pytest.raises(ValueError, match=r"\[refuse\].*unknown|\[refuse\].*not one"):
        make(tmp_path, tiny.tied_llama(0), word_tokenizer())
    assert arguments(RefusalTokenConfig, tmp_path, refuse='{"a": "[a]"}').tokens.categories == {"a": "[a]"}
