"""Rewards that stop paying above a reference, and that only add up if all are good; inside TRL's online trainers."""

import functools
import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import preferences
import tiny
from hf_logits.completions import conversation_text, sample_completions
from hf_logits.trainers import (
    ConjunctionReward,
    LogSigmoidCenteredReward,
    add_reference_rewards,
    log_sigmoid_centered,
    reward_model_as_function,
)
from hf_logits.trainers.reward_transform import conjunction, normal_quantile


def lengths(completions, **_):
    return [float(len(completion.split())) for completion in completions]


def shortness(completions, **_):
    return [-value for value in lengths(completions)]


def reward_model(seed=0):
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tiny.PAD,
    )
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


# --- the arithmetic ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    rewards = torch.tensor([-2.0, 0.0, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    values = log_sigmoid_centered(rewards, 1.0)
    (slopes,) = torch.autograd.grad(values.sum(), rewards)
    torch.testing.assert_close(
        values, torch.tensor([-3.048587, -1.313262, -0.693147, -0.048587]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(slopes, torch.tensor([0.952574, 0.731059, 0.5, 0.047426]).double(), atol=1e-6, rtol=0)


def test_a_conjunction_is_the_log_of_a_product():
    both = conjunction(torch.tensor([[3.0, -1.0]]), torch.tensor([1.0, 0.5]))
    assert both.item() == pytest.approx(-1.828341, abs=1e-6)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, -1.5)]
    assert both.item() == pytest.approx(math.log(sigmoid[0] * sigmoid[1]), abs=1e-6)


def test_advantages_keep_their_order_and_the_top_is_compressed():
    raw = torch.tensor([-2.0, 0.0, 1.0, 4.0])

    def advantages(rewards):
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    torch.testing.assert_close(advantages(raw), torch.tensor([-1.0999, -0.3, 0.1, 1.2999]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        advantages(log_sigmoid_centered(raw, 1.0)),
        torch.tensor([-1.3744, -0.0290, 0.4518, 0.9516]),
        atol=1e-4,
        rtol=0,
    )


def test_scale_undoes_a_temperature():
    rewards = torch.tensor([-2.0, 0.5, 7.0])
    torch.testing.assert_close(log_sigmoid_centered(rewards / 4, 0.25, scale=4.0), log_sigmoid_centered(rewards, 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_rewards_stay_finite(dtype):
    rewards = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    values = log_sigmoid_centered(rewards, 0.0)
    (slopes,) = torch.autograd.grad(values.sum(), rewards)
    assert values.isfinite().all() and slopes.isfinite().all()
    torch.testing.assert_close(values[:2].float(), rewards[:2].detach().float())
    assert values[3] == 0


def test_gradient():
    rewards = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, ref: log_sigmoid_centered(r, ref, scale=0.7), (rewards, reference))
    assert torch.autograd.gradcheck(lambda r, ref: conjunction(r, ref), (rewards, reference))


@pytest.mark.parametrize(("rewards", "reference"), [([math.nan], 0.0), ([1.0], math.nan), ([math.inf], math.inf)])
def test_nan_is_refused(rewards, reference):
    with pytest.raises(ValueError, match="NaN"):
        log_sigmoid_centered(torch.tensor(rewards), reference)


def test_a_quantile_of_a_normal_distribution():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
    torch.testing.assert_close(
        normal_quantile(rewards, quantile=0.85), torch.tensor([1 + 1.0364334, 3.0]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(normal_quantile(rewards[:, :1], quantile=0.5), torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="two samples"):
        normal_quantile(rewards[:, :1], quantile=0.85)
    with pytest.raises(ValueError, match="between 0 and 1"):
        normal_quantile(rewards, quantile=1.0)


# --- reward functions ----------------------------------------------------------------------------------------------------

PROMPTS, COMPLETIONS = ["a ", "b "], ["w6 w7", "w8"]


@pytest.mark.parametrize(
    ("reference", "columns"),
    [
        (1.5, {}),
        ("acceptable", {"acceptable": [1.5, 1.5]}),
        (lambda prompts, **_: [1.5] * len(prompts), {"other": [0, 0]}),
    ],
)
def test_each_kind_of_reference(reference, columns):
    reward = LogSigmoidCenteredReward(lengths, reference=reference, scale=2.0)
    expected = log_sigmoid_centered(torch.tensor([2.0, 1.0]), 1.5, scale=2.0)
    torch.testing.assert_close(torch.tensor(reward(PROMPTS, COMPLETIONS, **columns)), expected)
    assert reward.__name__ == "log_sigmoid_lengths"


def test_what_does_not_apply_stays_none():
    first = LogSigmoidCenteredReward(lambda **_: [None, 1.0, None], reference="ref")
    second = LogSigmoidCenteredReward(lambda **_: [2.0, 1.0, None], reference=0.0)
    columns = {"ref": [None, 0.5, None]}
    assert first(["p"] * 3, ["c"] * 3, **columns)[::2] == [None, None]
    logged = {}
    values = ConjunctionReward([first, second])(["p"] * 3, ["c"] * 3, log_metric=logged.__setitem__, **columns)
    assert values[0] == pytest.approx(math.log(1 / (1 + math.exp(-2))))
    assert values[1] == pytest.approx(conjunction(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0])).item())
    assert values[2] is None
    assert list(logged) == ["rewards/conjunction/log_sigmoid_<lambda>"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named(value):
    def broken(completions, **_):
        return [1.0, value]

    with pytest.raises(ValueError, match=r"broken returned .* for the completion 'w8'"):
        LogSigmoidCenteredReward(broken, reference=0.0)(PROMPTS, COMPLETIONS)


async def slow(completions, **_):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LogSigmoidCenteredReward(reward_model(), reference=0.0), TypeError, "reward_model_as_function"),
        (lambda: LogSigmoidCenteredReward(slow, reference=0.0), TypeError, "asynchronous"),
        (lambda: LogSigmoidCenteredReward(functools.partial(slow), reference=0.0), TypeError, "asynchronous"),
        (lambda: LogSigmoidCenteredReward(lengths, reference=math.nan), ValueError, "reference"),
        (lambda: LogSigmoidCenteredReward(lengths, reference=0.0, scale=0.0), ValueError, "scale"),
        (lambda: ConjunctionReward([]), ValueError, "at least one"),
        (lambda: ConjunctionReward([lengths]), TypeError, "LogSigmoidCenteredReward"),
        (
            lambda: LogSigmoidCenteredReward(lengths, reference="ref")(PROMPTS, COMPLETIONS),
            ValueError,
            "no column 'ref'",
        ),
        (
            lambda: LogSigmoidCenteredReward(lengths, reference="ref")(PROMPTS, COMPLETIONS, ref=[1.0, None]),
            ValueError,
            "no reference reward for the prompt 'b '",
        ),
        (
            lambda: LogSigmoidCenteredReward(lengths, reference=lambda **_: [1.0])(PROMPTS, COMPLETIONS),
            ValueError,
            "1 reference rewards for 2",
        ),
        (
            lambda: LogSigmoidCenteredReward(lambda **_: [1.0], reference=0.0)(PROMPTS, COMPLETIONS),
            ValueError,
            "1 rewards for 2",
        ),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model_as_a_function_is_the_model_row_by_row(conversational):
    model, tokenizer = reward_model(), preferences.tokenizer()
    data = preferences.pairs(5, conversational=conversational)
    rate = reward_model_as_function(model, tokenizer, batch_size=2, name="judge")
    rewards = rate(prompts=data["prompt"], completions=data["chosen"], more=[1] * 5)
    assert rate.__name__ == "judge"
    for row, reward in zip(data, rewards, strict=True):
        ids = tokenizer(conversation_text(row["prompt"], row["chosen"], tokenizer), add_special_tokens=False)
        alone = model(torch.tensor([ids["input_ids"]])).logits.item()
        assert reward == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_has_one_label_and_a_padding_token():
    model, tokenizer = reward_model(), preferences.tokenizer()
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="has 2"):
        reward_model_as_function(model, tokenizer)
    model.config.num_labels = 1
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        reward_model_as_function(model, tokenizer)
    with pytest.raises(TypeError, match="both be lists"):
        conversation_text("a", [{"role": "assistant", "content": "b"}], tokenizer)


# --- references for each prompt ------------------------------------------------------------------------------------------


def test_references_are_quantiles_of_what_the_policy_earns():
    data = preferences.pairs(3).select_columns("prompt").add_column("bonus", [0.0, 10.0, 20.0])
    canned = iter([["w6"] * 1 + ["w6 w7"], ["w6", "w6 w7"], ["w6", "w6 w7"]])

    def reward(prompts, completions, bonus):
        return [value + extra for value, extra in zip(lengths(completions), bonus, strict=True)]

    def generate(prompts, num_samples):
        return [next(canned) for _ in prompts]

    found = add_reference_rewards(data, generate, reward, num_samples=2, batch_size=2)
    expected = 1.5 + 1.0364334 * math.sqrt(0.5)
    assert found["reference_reward"] == pytest.approx([expected, expected + 10, expected + 20], abs=1e-6)
    assert data.column_names == ["prompt", "bonus"]


@pytest.mark.parametrize("conversational", [False, True])
def test_references_from_a_model(conversational):
    data = preferences.pairs(3, conversational=conversational).select_columns("prompt")
    model = tiny.llama().train()
    generate = functools.partial(sample_completions, model, preferences.tokenizer(), max_new_tokens=4, batch_size=2)
    torch.manual_seed(0)
    samples = generate(data["prompt"], num_samples=3)
    assert model.training and [len(own) for own in samples] == [3, 3, 3]
    assert isinstance(samples[0][0], list if conversational else str)
    judge = reward_model_as_function(reward_model(), preferences.tokenizer())
    found = add_reference_rewards(data, generate, judge, num_samples=3, column="ref_help")
    assert all(map(math.isfinite, found["ref_help"]))


def test_sampling_greedily_is_generate_row_by_row():
    model, tokenizer = tiny.llama(), preferences.tokenizer()
    prompts = preferences.pairs(4)["prompt"]
    sampled = sample_completions(
        model, tokenizer, prompts, num_samples=1, max_new_tokens=5, batch_size=3, do_sample=False
    )
    for prompt, (text,) in zip(prompts, sampled, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tiny.PAD)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="at least one token"):
        sample_completions(model, tokenizer, [""], num_samples=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"column": "prompt"}, "there already"),
        ({"generate": lambda prompts, num_samples: [["w6"] for _ in prompts]}, "2 completions for each"),
        ({"reward": lambda completions, **_: [None for _ in completions]}, "No sample for the prompt"),
        ({"reward": lambda completions, **_: [math.nan for _ in completions]}, "returned nan"),
    ],
)
def test_bad_references(change, match):
    given = {"generate": lambda prompts, num_samples: [["w6"] * num_samples for _ in prompts], "reward": lengths}
    given |= {"num_samples": 2} | change
    data = preferences.pairs(3).select_columns("prompt")
    with pytest.raises(ValueError, match=match):
        add_reference_rewards(data, **given)
    with pytest.raises(TypeError, match="IterableDataset"):
        add_reference_rewards(data.to_iterable_dataset(), **given)


# --- inside TRL ----------------------------------------------------------------------------------------------------------

ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def online(kind, rewards, folder, data=None, **settings):
    trainer, config = ONLINE[kind]
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6} | settings
    if kind == "grpo":
        settings = {"scale_rewards": "none"} | settings
    return trainer(
        model=tiny.llama(),
        reward_funcs=rewards,
        args=preferences.arguments(config, folder, **({"per_device_eval_batch_size": 8, "beta": 0.0} | settings)),
        train_dataset=preferences.pairs(8).select_columns("prompt") if data is None else data,
        eval_dataset=data,
        processing_class=preferences.tokenizer(),
    )


@pytest.mark.parametrize("kind", ONLINE)
def test_inside_an_online_trainer(kind, tmp_path):
    tokenizer = preferences.tokenizer()
    judge = reward_model_as_function(reward_model(), tokenizer, name="judge")
    data = preferences.pairs(8, conversational=True).select_columns("prompt").add_column("ref_judge", [0.5] * 8)
    rewards = [
        LogSigmoidCenteredReward(judge, reference="ref_judge"),
        LogSigmoidCenteredReward(lambda completions, **_: [1.0 for _ in completions], reference=0.0, name="one"),
    ]
    trainer = online(kind, [ConjunctionReward(rewards), judge], tmp_path, data)
    before = preferences.weights(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert preferences.distance(before, preferences.weights(trainer)) > 0
    assert all(value <= 0 for value in preferences.logged(trainer, "rewards/conjunction/mean"))
    assert len(preferences.logged(trainer, "rewards/conjunction/log_sigmoid_judge")) == 3
    assert "eval_rewards/conjunction/mean" in metrics


@pytest.mark.parametrize("kind", ONLINE)
def test_a_wrapped_reward_model_trains_as_the_model_itself(kind, tmp_path):
    def run(reward, folder, **settings):
        trainer = online(kind, reward, tmp_path / folder, **settings)
        trainer.train()
        return trainer

    tokenizer = preferences.tokenizer()
    wrapped = run(reward_model_as_function(reward_model(), tokenizer), "wrapped")
    trainer, _ = ONLINE[kind]
    stock = trainer(
        model=tiny.llama(),
        reward_funcs=reward_model(),
        reward_processing_classes=tokenizer,
        args=wrapped.args,
        train_dataset=preferences.pairs(8).select_columns("prompt"),
        processing_class=tokenizer,
    )
    stock.train()
    assert preferences.distance(preferences.weights(wrapped), preferences.weights(stock)) < 1e-6


@pytest.mark.parametrize("kind", ONLINE)
def test_one_transformed_sum_is_a_sum_of_transformed(kind, tmp_path):
    parts = [
        LogSigmoidCenteredReward(lengths, reference=4.0),
        LogSigmoidCenteredReward(shortness, reference=-4.0, scale=0.5),
    ]
    trained = []
    for rewards in (ConjunctionReward(parts), parts):
        trainer = online(kind, rewards, tmp_path, optim="sgd", learning_rate=0.01)
        trainer.train()
        trained.append(preferences.weights(trainer))
    assert preferences.distance(*trained) < 1e-6


def test_a_row_without_any_reward_moves_nothing(tmp_path):
    nothing = LogSigmoidCenteredReward(lambda completions, **_: [None for _ in completions], reference=0.0)
    trainer = online("grpo", [nothing], tmp_path, max_steps=1)
    before = preferences.weights(trainer)
    trainer.train()
    assert preferences.distance(before, preferences.weights(trainer)) == 0


def test_a_missing_reference_stops_the_run(tmp_path):
    trainer = online("grpo", LogSigmoidCenteredReward(lengths, reference="ref"), tmp_path)
    with pytest.raises(ValueError, match="no column 'ref'"):
        trainer.train()


def test_the_and_is_met_more_often_than_by_the_sum():
    """A softmax bandit with two rewards of equal mean: one arm is good in both, others are excellent in one only."""
    rewards = torch.tensor([[2.0, 2.0], [9.0, -4.0], [-4.0, 9.0], [0.0, 0.0]], dtype=torch.float64)

    def optimum(values):  # of the KL-regularised objective, from a uniform start
        return (values / 2.0).softmax(0)

    summed = optimum(rewards.sum(-1))
    both = optimum(2 * conjunction(rewards, torch.tensor([1.0, 1.0], dtype=torch.float64)))
    assert summed[0] < 0.3 and both[0] > 0.8


def test_a_dataset_in_memory_is_enough():
    assert isinstance(
        add_reference_rewards(
            Dataset.from_dict({"prompt": ["w6 "]}),
            lambda prompts, num_samples: [["w7"]],
            lengths,
            num_samples=1,
            quantile=0.5,
        ),
        Dataset,
    )
