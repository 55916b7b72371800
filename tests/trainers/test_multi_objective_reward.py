"""The multi-objective reward model: its two stages against numbers by hand, its texts against rows one by one, its life in TRL."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

import preferences
import tiny
from hf_logits.completions import conversation_text
from hf_logits.correlation import spearman
from hf_logits.reply import pattern_position, reply_pattern
from hf_logits.ridge import fit_ridge
from hf_logits.trainers import (
    MultiObjectiveGateConfig,
    MultiObjectiveGateTrainer,
    MultiObjectiveRewardConfig,
    MultiObjectiveRewardModel,
    cache_embeddings,
    embed_ratings,
    reward_model_as_function,
)
from hf_logits.trainers.multi_objective_reward import SHARES, debias_transform, fit_shares, gated_score
from launching import LAUNCH, run


OBJECTIVES = ["help", "truth", "verbosity"]


def armo(backbone=None, **config):
    torch.manual_seed(0)
    tokenizer = preferences.tokenizer()
    settings = {"objectives": OBJECTIVES, "prompt_pattern": reply_pattern(tokenizer), "gate_hidden_size": 16} | config
    return MultiObjectiveRewardModel.from_backbone(tiny.llama() if backbone is None else backbone, **settings)


def texts(rows=5, seed=0):
    tokenizer = preferences.tokenizer()
    data = preferences.pairs(rows, conversational=True, seed=seed)
    return [conversation_text(row["prompt"], row["chosen"], tokenizer) for row in data]


def encoded(rows, side="right"):
    return preferences.tokenizer()(rows, return_tensors="pt", padding=True, padding_side=side)


def random_pairs(rows=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_embedding", "chosen_embedding", "rejected_embedding")
    return Dataset.from_dict({name: torch.randn(rows, width, generator=generator).numpy() for name in names})


def gate_trainer(folder, model=None, data=None, **settings):
    return MultiObjectiveGateTrainer(
        armo() if model is None else model,
        preferences.arguments(MultiObjectiveGateConfig, folder, **settings),
        train_dataset=random_pairs() if data is None else data,
        eval_dataset=random_pairs(8, seed=1),
        processing_class=preferences.tokenizer(),
    )


# --- the score -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    rewards, gate = torch.tensor([[0.6, 0.4, 0.8]]), torch.tensor([[0.2, 0.5, 0.3]])
    transform = debias_transform(torch.tensor([0.3, 0.95, 1.0]), 2)
    torch.testing.assert_close(transform, torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.3, -0.95, 0]]))
    assert (rewards @ transform)[0, 2] == 0
    coefficients = gate @ transform.T
    torch.testing.assert_close(coefficients, torch.tensor([[0.2, 0.5, -0.535]]))
    assert gated_score(rewards, gate, transform).item() == pytest.approx(-0.108, abs=1e-6)
    assert (coefficients * rewards).sum().item() == pytest.approx(-0.108, abs=1e-6)


def test_gradient():
    shape = {"dtype": torch.float64, "requires_grad": True}
    transform = debias_transform(torch.tensor([0.3, 0.95, 1.0], dtype=torch.float64), 2)
    assert torch.autograd.gradcheck(
        lambda r, g: gated_score(r, g, transform), (torch.randn(2, 3, **shape), torch.rand(2, 3, **shape))
    )


def test_as_little_verbosity_as_needed_is_taken_off():
    generator = torch.Generator().manual_seed(0)
    verbosity = torch.randn(2000, generator=generator, dtype=torch.float64)
    noise = torch.randn(2000, generator=generator, dtype=torch.float64)
    rewards = torch.stack([0.3 * verbosity + 0.5 * noise, noise - verbosity, verbosity], dim=-1)
    shares = fit_shares(rewards, 2)
    assert shares.tolist() == pytest.approx([0.3, 0.0, 1.0], abs=0.051)
    assert spearman((rewards[:, 0] - shares[0] * verbosity).numpy(), verbosity.numpy()) <= 0.028
    before = SHARES[SHARES.index(pytest.approx(shares[0].item())) - 1]
    assert spearman((rewards[:, 0] - before * verbosity).numpy(), verbosity.numpy()) > 0.028
    assert len(SHARES) == 24


def test_a_share_that_does_not_suffice_is_all_of_it(caplog):
    verbosity = torch.arange(50.0)
    shares = fit_shares(torch.stack([3 * verbosity, verbosity], dim=-1), 1)
    assert shares.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="same in every row"):
        fit_shares(torch.ones(5, 2), 0)


# --- the model -----------------------------------------------------------------------------------------------------------


def test_the_gate_is_a_softmax_over_objectives_not_over_the_pair():
    """The released script's softmax runs over chosen and rejected, whose prompts are the same: 0.5 everywhere, no gradient."""
    model = armo()
    state = torch.randn(1, 32).expand(2, 32)
    gate = model.gating(state)
    torch.testing.assert_close(gate.sum(-1), torch.ones(2))
    assert (gate - 0.5).abs().min() > 0.05
    gate.square().sum().backward()
    assert model.gating.output.weight.grad.abs().max() > 1e-5
    with torch.no_grad():
        model.gating.scale.fill_(2.5)
    torch.testing.assert_close(model.gating(state).sum(-1), torch.full((2,), 2.5))


def test_the_score_uses_the_debiased_ratings():
    """The released script works them out, and then trains and evaluates on the others."""
    model = armo()
    embeddings, prompts = torch.randn(4, 32), torch.randn(4, 32)
    plain = model(embeddings=embeddings, prompt_embeddings=prompts)
    model.reward_transform_matrix.copy_(debias_transform(torch.tensor([0.3, 0.95, 1.0]), 2))
    debiased = model(embeddings=embeddings, prompt_embeddings=prompts)
    torch.testing.assert_close(plain.rewards, debiased.rewards)
    ratings, gate = debiased.rewards, debiased.gating_output
    expected = gate[:, 0] * (ratings[:, 0] - 0.3 * ratings[:, 2]) + gate[:, 1] * (ratings[:, 1] - 0.95 * ratings[:, 2])
    torch.testing.assert_close(debiased.score, expected)
    assert (debiased.score - plain.score).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_its_rows_one_by_one(kind, side):
    model = armo(tiny.DECODERS[kind]())
    batch = encoded(texts(), side)
    together = model(**batch)
    for row, text in enumerate(texts()):
        alone = model(**encoded([text]))
        for key in ("score", "rewards", "gating_output"):
            torch.testing.assert_close(together[key][row], alone[key][0], atol=2e-5, rtol=1e-4)
    assert together.logits.shape == (5, 1)


def test_the_states_are_those_of_the_last_token_and_of_the_end_of_the_prompt():
    model, tokenizer = armo(), preferences.tokenizer()
    turns = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]
    chat = [*turns, {"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    position = tokens.index("w11") + 1  # the end of the LAST user turn
    assert tokens[position : position + 2] == ["<eos>", "assistant"]
    hidden = model.model(ids).last_hidden_state[0]
    last, prompt = model.embed(ids)
    torch.testing.assert_close(last[0], hidden[-1])
    torch.testing.assert_close(prompt[0], hidden[position])
    _, by_length = model.embed(ids, prompt_lengths=torch.tensor([position + 1]))
    torch.testing.assert_close(by_length, prompt)


def test_a_pattern_is_found_where_it_is_attended():
    ids = torch.tensor([[7, 8, 7, 8, 9], [7, 8, 9, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert pattern_position(ids, mask, [7, 8]).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"do not occur in rows \[1\]"):
        pattern_position(ids, mask, [8, 7])
    with pytest.raises(ValueError, match=r"do not occur in rows \[0, 1\]"):
        pattern_position(ids[:, :1], mask[:, :1], [7, 8])


def test_a_template_without_a_pattern():
    tokenizer = preferences.tokenizer()
    assert tokenizer.convert_ids_to_tokens(reply_pattern(tokenizer)) == ["<eos>", "assistant"]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="prompt_lengths"):
        reply_pattern(tokenizer)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda: armo(objectives=[]), "distinct objectives"),
        (lambda: armo(objectives=["a", "a"]), "distinct objectives"),
        (lambda: armo(gate_temperature=0.0), "gate_temperature"),
        (lambda: armo(gate_dropout=1.0), "gate_dropout"),
        (lambda: MultiObjectiveRewardModel(MultiObjectiveRewardConfig(objectives=["a"])), "text_config"),
        (lambda: armo(prompt_pattern=None)(**encoded(texts(2))), "prompt_pattern"),
        (lambda: armo()(torch.tensor([[5, 6, 7]])), "do not occur"),
        (lambda: armo()(torch.tensor([[5, 6]]), torch.zeros(1, 2, dtype=torch.long)), "no attended token"),
        (lambda: armo()(torch.tensor([[5, 6]]), prompt_lengths=torch.tensor([3])), "prompt_lengths"),
        (lambda: armo()(), "Pass input_ids"),
        (lambda: armo().debias(torch.randn(4, 32), "length"), "verbosity must be one of"),
    ],
)
def test_bad_input(run, match):
    with pytest.raises(ValueError, match=match):
        run()


def test_the_backbone_is_taken_over_not_copied(tmp_path):
    backbone = tiny.llama()
    model = armo(backbone)
    assert model.model is backbone.model
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    backbone.save_pretrained(tmp_path)
    loaded = MultiObjectiveRewardModel.from_backbone(str(tmp_path), objectives=["one"])
    torch.testing.assert_close(loaded.model.embed_tokens.weight, backbone.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_and_loads_as_any_model(dtype, tmp_path):
    model = armo().to(dtype)
    model.regression_layer.weight.data.normal_()
    model.reward_transform_matrix.copy_(debias_transform(torch.tensor([0.25, 0.5, 1.0]), 2))
    model.save_pretrained(tmp_path)
    for loader in (MultiObjectiveRewardModel, AutoModelForSequenceClassification):
        loaded = loader.from_pretrained(tmp_path, dtype=dtype)
        assert type(loaded) is MultiObjectiveRewardModel and loaded.config.objectives == OBJECTIVES
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        if dtype == torch.float32:  # `to` also rounds the backbone's rotary frequencies, loading does not
            assert torch.equal(loaded(**encoded(texts())).score, model(**encoded(texts())).score)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_over_the_hub(hub, tmp_path):
    model = armo()
    model.push_to_hub("tester/armo", token="hf_of_the_tests")
    loaded = AutoModelForSequenceClassification.from_pretrained("tester/armo", num_labels=1)
    assert torch.equal(loaded(**encoded(texts())).score, model(**encoded(texts())).score)


# --- stage 2 -------------------------------------------------------------------------------------------------------------


def test_cached_embeddings_give_the_scores_of_the_texts():
    model, tokenizer = armo(), preferences.tokenizer()
    data = preferences.pairs(5, conversational=True).add_column("margin", [0.0, 0.1, 0.2, 0.3, 0.4])
    cached = cache_embeddings(model, tokenizer, data, batch_size=2).with_format("torch")
    assert sorted(cached.column_names) == ["chosen_embedding", "margin", "prompt_embedding", "rejected_embedding"]
    rows = cached[:]
    for side in ("chosen", "rejected"):
        scores = model(embeddings=rows[f"{side}_embedding"], prompt_embeddings=rows["prompt_embedding"]).score
        direct = reward_model_as_function(model, tokenizer)(data["prompt"], data[side])
        torch.testing.assert_close(scores, torch.tensor(direct), atol=1e-5, rtol=1e-4)
    both = torch.cat([rows["chosen_embedding"], rows["rejected_embedding"]])
    output = model(embeddings=both, prompt_embeddings=rows["prompt_embedding"])
    torch.testing.assert_close(output.score[5:], scores)


@pytest.mark.parametrize("bf16", [False, True])
def test_only_the_gate_is_trained(bf16, tmp_path):
    trainer = gate_trainer(tmp_path, bf16=bf16)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("gating.")}
    assert {"eval_loss", "eval_accuracy", "eval_margin"} <= trainer.evaluate().keys()


def test_the_loss_is_that_of_the_debiased_scores(tmp_path):
    model = armo(gate_dropout=0.0)
    model.reward_transform_matrix.copy_(debias_transform(torch.tensor([0.3, 0.95, 1.0]), 2))
    trainer = gate_trainer(tmp_path, model)
    batch = trainer.data_collator([random_pairs()[row] for row in range(4)])
    rows = random_pairs().with_format("torch")[:4]
    chosen, rejected = (
        model(embeddings=rows[f"{side}_embedding"], prompt_embeddings=rows["prompt_embedding"]).score
        for side in ("chosen", "rejected")
    )
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_accumulated_steps_are_one_large_one(tmp_path):
    trained = []
    for size, accumulated in ((1, 4), (2, 2), (4, 1)):
        trainer = gate_trainer(
            tmp_path,
            armo(gate_dropout=0.0),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        trained.append(preferences.weights(trainer))
    assert preferences.distance(trained[0], trained[1]) < 1e-6
    assert preferences.distance(trained[0], trained[2]) < 1e-6


PROGRAM = """
import sys
from safetensors.torch import save_file
from launching import leave
from test_multi_objective_reward import armo, gate_trainer, preferences
trainer = gate_trainer(sys.argv[1] + "/run", armo(gate_dropout=0.0), per_device_train_batch_size=2, optim="sgd", learning_rate=0.1)
assert trainer.accelerator.num_processes == 2
trainer.train()
trainer.evaluate()
if trainer.accelerator.is_main_process:
    save_file(preferences.weights(trainer), sys.argv[1] + "/two.safetensors")
leave()
"""


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run(tmp_path / "program.py", tmp_path, folder=tmp_path, launch=LAUNCH)
    one = gate_trainer(tmp_path, armo(gate_dropout=0.0), per_device_train_batch_size=4, optim="sgd", learning_rate=0.1)
    start = preferences.weights(one)
    one.train()
    moved = preferences.distance(start, preferences.weights(one))
    assert preferences.distance(load_file(tmp_path / "two.safetensors"), preferences.weights(one)) < 1e-3 * moved


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole = gate_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    half = gate_trainer(tmp_path / "half", max_steps=4, save_strategy="steps", save_steps=2)
    half.train()
    resumed = gate_trainer(tmp_path / "half", max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert preferences.equal(preferences.weights(whole), preferences.weights(resumed))


def test_the_card_names_the_paper(tmp_path):
    trainer = gate_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "ArmoRM gate" in card and "2406.12845" in card and "armorm" in card
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**encoded(texts())).score, trainer.model.eval()(**encoded(texts())).score)


def test_defaults_are_those_of_the_released_script(tmp_path):
    args = MultiObjectiveGateConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.learning_rate, args.weight_decay, args.max_steps) == (1e-3, 0.0, 2000)
    assert args.per_device_train_batch_size == 1024 and args.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": tiny.llama()}, TypeError, "LlamaForCausalLM"),
        ({"train_dataset": preferences.pairs(2)}, ValueError, "no column 'prompt_embedding'"),
        ({"peft_config": LoraConfig()}, ValueError, "peft_config"),
    ],
)
def test_bad_input_of_the_gate_trainer(change, error, match, tmp_path):
    args = preferences.arguments(MultiObjectiveGateConfig, tmp_path)
    given = {"model": armo(), "args": args, "train_dataset": random_pairs()} | change
    with pytest.raises(error, match=match):
        MultiObjectiveGateTrainer(processing_class=preferences.tokenizer(), **given)


def test_bad_preferences_are_refused_before_they_are_embedded():
    model, tokenizer = armo(), preferences.tokenizer()
    with pytest.raises(ValueError, match="nothing to prefer"):
        cache_embeddings(model, tokenizer, Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["b"]}))
    with pytest.raises(ValueError, match="no column 'truth'"):
        next(embed_ratings(model, tokenizer, Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "help": [1.0]})))


# --- the whole, and in TRL -----------------------------------------------------------------------------------------------


def skilful():
    """Prompts of two kinds: after w6 replies with w8 are wanted, after w7 those with w9. Each objective rates one of the words."""
    words = [f"w{i}" for i in range(12, 40)]
    generator = torch.Generator().manual_seed(3)

    def pick(count):
        return [words[i] for i in torch.randint(len(words), (count,), generator=generator)]

    def chat(role, *parts):
        return [{"role": role, "content": " ".join(parts)}]

    rated_rows, pairs = [], []
    for index in range(96):
        kind = index % 2
        replies = [[*pick(1), *["w8"] * 4], [*pick(1), *["w9"] * 4]]
        prompt = chat("user", *pick(1), *[f"w{6 + kind}"] * 3)
        for which, reply in enumerate(replies):
            rating = {"first": float(which == 0), "second": float(which == 1)}
            # Each data set rates one objective only.
            rating["second" if index % 3 == 0 else "first"] = None
            rated_rows.append({"prompt": prompt, "completion": chat("assistant", *reply), **rating})
        pairs.append(
            {
                "prompt": prompt,
                "chosen": chat("assistant", *replies[kind]),
                "rejected": chat("assistant", *replies[1 - kind]),
            }
        )
    return Dataset.from_list(rated_rows), Dataset.from_list(pairs)


def test_the_gate_learns_which_objective_a_prompt_asks_for(tmp_path):
    model, tokenizer = armo(objectives=["first", "second"], gate_temperature=1.0), preferences.tokenizer()
    ratings, pairs = skilful()
    fit = fit_ridge(embed_ratings(model, tokenizer, ratings, batch_size=32), names=["first", "second"])
    assert fit.errors.max() < 0.15
    model.set_heads(fit)
    cached = cache_embeddings(model, tokenizer, pairs, batch_size=32)
    train, held_out = cached.select(range(64)), cached.select(range(64, 96))
    rows = held_out.with_format("torch")[:]
    difference = (rows["chosen_embedding"] - rows["rejected_embedding"]) @ model.regression_layer.weight.T
    alone = (difference > 0).float().mean(0)
    mean = (difference.mean(-1) > 0).float().mean()
    trainer = gate_trainer(
        tmp_path, model, train, per_device_train_batch_size=32, max_steps=60, learning_rate=3e-3, logging_steps=20.0
    )
    trainer.train()
    accuracy = trainer.evaluate(held_out)["eval_accuracy"]
    assert accuracy > 0.9 and accuracy > max(*alone.tolist(), mean.item()) + 0.2


def test_inside_the_reward_trainer(tmp_path):
    model = armo()
    trainer = RewardTrainer(
        model=model,
        args=preferences.arguments(RewardConfig, tmp_path, gradient_checkpointing=True),
        train_dataset=preferences.pairs(8, conversational=True),
        eval_dataset=preferences.pairs(4, conversational=True, seed=1),
        processing_class=preferences.tokenizer(),
    )
    before = preferences.weights(trainer)
    trainer.train()
    after = preferences.weights(trainer)
    assert all((before[name] != after[name]).any() for name in ("model.norm.weight", "gating.scale"))
    assert "eval_accuracy" in trainer.evaluate()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_inside_the_reward_trainer_with_lora(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["regression_layer", "gating"], **preferences.LORA)
    trainer = RewardTrainer(
        model=armo(),
        args=preferences.arguments(RewardConfig, tmp_path),
        train_dataset=preferences.pairs(8, conversational=True),
        processing_class=preferences.tokenizer(),
        peft_config=config,
    )
    before = preferences.weights(trainer)
    trainer.train()
    assert preferences.distance(before, preferences.weights(trainer)) > 0
    assert all("lora" in name or "modules_to_save" in name for name in before)


def test_as_a_reward_model_of_grpo(tmp_path):
    model, tokenizer = armo(), preferences.tokenizer()
    model.save_pretrained(tmp_path / "armo")
    tokenizer.save_pretrained(tmp_path / "armo")
    trainer = GRPOTrainer(
        model=tiny.llama(1),
        reward_funcs=str(tmp_path / "armo"),
        args=preferences.arguments(
            GRPOConfig,
            tmp_path,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=6,
            log_completions=False,
        ),
        train_dataset=preferences.pairs(8, conversational=True).select_columns("prompt"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert all(map(math.isfinite, preferences.logged(trainer, "rewards/armo/mean")))
