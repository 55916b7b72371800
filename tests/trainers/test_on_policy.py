"""Pairs from a policy's own samples, mixtures with offline data, and training without a push away from bad answers."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, RLOOConfig, RLOOTrainer

import preferences
import tiny
from hf_logits.completions import sample_completions
from hf_logits.trainers import (
    FDPOConfig,
    FDPOTrainer,
    RPOConfig,
    RPOTrainer,
    build_pairs,
    mix_datasets,
    without_negative_gradient,
)
from hf_logits.trainers.on_policy import best_and_worst, detach_rejected, keep_positive


# --- data ----------------------------------------------------------------------------------------------------------------


def words(completions, **_):
    return [float(len(completion.split())) for completion in completions]


def canned(*samples):
    """A policy that answers each prompt with the same samples."""
    return lambda prompts, num_samples: [list(samples) for _ in prompts]


@pytest.mark.parametrize(
    ("rewards", "margin", "expected"),
    [
        ([0.0, 2.0, 1.0], 0.0, (1, 0)),
        ([None, 2.0, 1.0, None], 0.0, (1, 2)),
        ([2.0, 2.0], 0.0, None),
        ([2.0, 1.0], 1.0, None),
        ([2.0, 0.9], 1.0, (0, 1)),
        ([None, 1.0], 0.0, None),
        ([None, None], 0.0, None),
    ],
)
def test_the_best_is_chosen_over_the_worst(rewards, margin, expected):
    assert best_and_worst(rewards, min_margin=margin) == expected


def test_pairs_of_samples_with_their_rewards():
    data = Dataset.from_dict({"prompt": ["a ", "b ", "c "], "bonus": [0.0, None, 5.0]})

    def reward(prompts, completions, bonus):
        return [None if b is None else n + b for n, b in zip(words(completions), bonus, strict=True)]

    pairs = build_pairs(data, canned("w6", "w6 w7 w8", "w6 w7"), reward, num_samples=3, batch_size=2)
    assert pairs.to_list() == [
        {
            "prompt": prompt,
            "chosen": "w6 w7 w8",
            "rejected": "w6",
            "on_policy": True,
            "chosen_reward": 3.0 + bonus,
            "rejected_reward": 1.0 + bonus,
        }
        for prompt, bonus in (("a ", 0.0), ("c ", 5.0))
    ]


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_of_a_model_train_dpo(conversational, tmp_path):
    data = preferences.pairs(8, conversational=conversational).select_columns("prompt")
    generate = functools.partial(sample_completions, tiny.llama(), preferences.tokenizer(), max_new_tokens=5)
    torch.manual_seed(0)

    def reward(completions, **_):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(sum(ord(letter) for letter in text) % 7) for text in texts]

    pairs = build_pairs(data, generate, reward)
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
    trainer = preferences.make(DPOTrainer, DPOConfig, tmp_path, data=pairs, max_steps=1)
    trainer.train()
    assert math.isfinite(preferences.logged(trainer, "loss")[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_samples": 1}, "two samples"),
        ({"min_margin": -1.0}, "min_margin"),
        ({"reward": lambda completions, **_: [math.nan for _ in completions]}, "returned nan"),
        ({"reward": lambda completions, **_: [1.0]}, "1 rewards for"),
        ({"reward": lambda completions, **_: [1.0 for _ in completions]}, "None of the 2 prompts"),
        ({"generate": canned("w6")}, "2 completions for each"),
        ({"generate": canned("w6", "w6"), "reward": lambda completions, **_: [1.0, 2.0] * 2}, "None of the 2 prompts"),
        ({"dataset": Dataset.from_dict({"text": ["a"]})}, "column 'prompt'"),
    ],
)
def test_pairs_that_cannot_be_built(change, match):
    given = {
        "dataset": Dataset.from_dict({"prompt": ["a ", "b "]}),
        "generate": canned("w6", "w6 w7"),
        "reward": words,
        "num_samples": 2,
    }
    with pytest.raises(ValueError, match=match):
        build_pairs(**(given | change))


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, (10, 10)), (0.75, (30, 10)), (0.9, (36, 4)), (0.1, (1, 10))])
def test_a_mixture_has_its_fraction_and_no_row_twice(fraction, expected):
    own, offline = preferences.pairs(10, seed=1), preferences.pairs(36, seed=2)
    mixed = mix_datasets(own.add_column("chosen_reward", [1.0] * 10), offline, offline_fraction=fraction)
    assert (len(mixed) - sum(mixed["on_policy"]), sum(mixed["on_policy"])) == expected
    assert sorted(mixed.column_names) == ["chosen", "on_policy", "prompt", "rejected"]
    assert len(set(mixed["chosen"])) == len(mixed)
    assert 0 < sum(mixed["on_policy"][: len(mixed) // 2]) or min(expected) < 3
    again = mix_datasets(own, offline, offline_fraction=fraction)
    assert mixed["chosen"] == again["chosen"]


def test_a_mixture_of_one_is_that_one():
    own, offline = preferences.pairs(4, seed=1), preferences.pairs(4, seed=2)
    assert mix_datasets(own, offline, offline_fraction=0.0) is own
    assert mix_datasets(own, offline, offline_fraction=1.0) is offline
    with pytest.raises(ValueError, match="cannot be mixed"):
        mix_datasets(own, Dataset.from_dict({"text": ["a"]}), offline_fraction=0.5)
    with pytest.raises(ValueError, match="cannot be mixed"):
        mix_datasets(own, offline.select([]), offline_fraction=0.5)
    with pytest.raises(ValueError, match="offline_fraction"):
        mix_datasets(own, offline, offline_fraction=1.5)


# --- the switch ----------------------------------------------------------------------------------------------------------


def test_the_rejected_half_has_values_and_no_gradient():
    log_probs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    detached = detach_rejected(log_probs)
    torch.testing.assert_close(detached, log_probs)
    weights = torch.randn(4, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((detached * weights).sum(), log_probs)
    torch.testing.assert_close(gradient, torch.cat([weights[:2], torch.zeros(2, 3, dtype=torch.float64)]))
    assert keep_positive(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 2.0]


def first_step(trainer):
    """The loss of the first batch, and its gradient in each weight."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("trainer", "config"),
    [(DPOTrainer, DPOConfig), (RPOTrainer, RPOConfig), (FDPOTrainer, FDPOConfig)],
    ids=["dpo", "rpo", "f-dpo"],
)
def test_pairs_without_negatives_have_the_loss_and_only_the_chosen_gradient(trainer, config, tmp_path):
    switched = without_negative_gradient(trainer)
    assert issubclass(switched, trainer) and switched.__name__ == f"{trainer.__name__}WithoutNegativeGradient"
    stock_loss, stock_gradient = first_step(preferences.make(trainer, config, tmp_path))
    loss, gradient = first_step(preferences.make(switched, config, tmp_path))
    assert torch.equal(loss, stock_loss)
    assert preferences.distance(gradient, stock_gradient) > 1e-4


def test_the_gradient_is_that_of_the_chosen_log_probs(tmp_path):
    trainer = preferences.make(without_negative_gradient(DPOTrainer), DPOConfig, tmp_path)
    _, gradient = first_step(trainer)
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    reference = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    tokens = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    chosen, rejected = (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    delta = trainer.beta * ((chosen - reference[0]) - (rejected.detach() - reference[1]))
    (-F.logsigmoid(delta).mean()).backward()
    direct = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert preferences.distance(gradient, direct) < 1e-5


def test_it_trains_evaluates_and_names_itself(tmp_path):
    trainer = preferences.make(
        without_negative_gradient(RPOTrainer), RPOConfig, tmp_path, evaluation=preferences.pairs(4, seed=1), lora=True
    )
    before = preferences.weights(trainer)
    trainer.train()
    assert preferences.distance(before, preferences.weights(trainer)) > 0
    assert "eval_rewards/accuracies" in trainer.evaluate()
    trainer.create_model_card()
    assert "RPO without negative gradient" in (tmp_path / "README.md").read_text()


ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@pytest.mark.parametrize("kind", ONLINE)
def test_rollouts_without_negatives_keep_positive_advantages_only(kind, tmp_path):
    trainer, config = ONLINE[kind]
    found = {}
    for switched in (trainer, without_negative_gradient(trainer)):
        made = switched(
            model=tiny.llama(),
            reward_funcs=words,
            args=preferences.arguments(
                config,
                tmp_path,
                num_generations=4,
                per_device_train_batch_size=8,
                max_completion_length=6,
                beta=0.0,
                max_steps=2,
            ),
            train_dataset=preferences.pairs(8).select_columns("prompt"),
            processing_class=preferences.tokenizer(),
        )
        torch.manual_seed(0)
        batch = next(iter(made.get_train_dataloader()))
        found[switched] = made._generate_and_score_completions(batch)["advantages"]
        made.train()
    stock, positive = found.values()
    assert stock.min() < 0
    torch.testing.assert_close(positive, stock.clamp(min=0))


def test_other_trainers_have_no_such_switch():
    with pytest.raises(TypeError, match="KTOTrainer"):
        without_negative_gradient(KTOTrainer)


def test_the_push_away_finds_a_far_optimum_faster():
    """The bandit of the paper: 100 arms, a policy far from the best one, pairs of its own samples."""

    def train(negative):
        generator = torch.Generator().manual_seed(0)
        rewards = torch.linspace(0, 1, 100)
        logits = (-4 * rewards).clone().requires_grad_()
        reference = logits.detach().log_softmax(0)
        optimizer = torch.optim.SGD([logits], lr=10.0)
        for _ in range(300):
            arms = torch.multinomial(logits.detach().softmax(0), 128, replacement=True, generator=generator).view(
                2, 64
            )
            better = rewards[arms[0]] >= rewards[arms[1]]
            chosen, rejected = torch.where(better, arms[0], arms[1]), torch.where(better, arms[1], arms[0])
            log_probs = logits.log_softmax(0)
            pairs = torch.cat([log_probs[chosen], log_probs[rejected]]).unsqueeze(1)
            pairs = pairs if negative else detach_rejected(pairs)
            first, second = (pairs.squeeze(1) - reference[torch.cat([chosen, rejected])]).chunk(2)
            loss = -F.logsigmoid(0.3 * (first - second)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (logits.softmax(0) * rewards).sum().item()

    with_push, without = train(True), train(False)
    assert with_push > without + 0.1
