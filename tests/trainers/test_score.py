"""SCoRe: rewards and advantages by hand, rollouts in two turns, exact gradients on a toy, and what is refused or left out."""

import itertools
import logging
import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import preferences
import rollouts
import tiny
from hf_logits.second_turn import second_turn
from hf_logits.trainers import SCoReConfig, SCoReTrainer, self_correction_rates
from hf_logits.trainers.score import edit_ratio, leave_one_out, shaped_reward, turn_advantages, turn_masks
from preferences import equal, logged, weights


NAN = math.nan
CORRECTION = "w9 w10 w11"


def make(folder, **settings):
    return rollouts.make(
        SCoReTrainer, SCoReConfig, folder, **(rollouts.GROUPS | {"score_correction_prompt": CORRECTION} | settings)
    )


def rollout(trainer, batch=None):
    """One generation batch of training, scored. Row by row beside it: the attempts and what stands between them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    output = trainer._generate_and_score_completions(batch or next(iter(trainer.get_train_dataloader())))
    return output, trainer._attempts


def token_log_probs(model, output):
    """The slow path: log-probs of the completion's tokens, from all logits."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None])[..., 0][:, -output["completion_ids"].size(1) :]


def gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}


# --- the arithmetic ------------------------------------------------------------------------------------------------------


def test_progress_is_paid_and_spoiling_costs():
    first, second = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert shaped_reward(first, second, alpha=10.0).tolist() == [0.0, 11.0, -10.0, 1.0]
    assert torch.equal(shaped_reward(first, second, alpha=0.0), second)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 2.0, 2.0])
    assert leave_one_out(rewards, 3).tolist() == [1.0, -0.5, -0.5, 3.0, -1.5, -1.5]
    assert leave_one_out(torch.tensor([1.0, NAN, 0.0, NAN, NAN, 2.0]), 3).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    assert leave_one_out(rewards, 1).tolist() == [0.0] * 6


def test_stage_one_is_plain_leave_one_out_of_the_second_attempt():
    first, second = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    settings = {"alpha": 10.0, "group": 2}
    turn_1, turn_2 = turn_advantages(first, second, stage=1, credit="none", **settings)
    assert turn_1.tolist() == [0.0] * 4 and turn_2.tolist() == [-1.0, 1.0, 1.0, -1.0]
    both = turn_advantages(first, second, stage=1, credit="to_go", **settings)  # a plain RLOO of the two turns
    assert torch.equal(both[0], leave_one_out(second, 2)) and torch.equal(both[1], both[0])
    assert torch.equal(turn_advantages(first, second, stage=1, credit="own", **settings)[0], leave_one_out(first, 2))


def test_stage_two_pays_the_second_attempt_for_progress_only():
    first, second = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    for credit, earned in (("none", torch.zeros(4)), ("own", first), ("to_go", first + second)):
        turn_1, turn_2 = turn_advantages(first, second, stage=2, alpha=10.0, credit=credit, group=2)
        assert torch.equal(turn_1, leave_one_out(earned, 2))
        assert turn_2.tolist() == [-21.0, 21.0, 1.0, -1.0]  # of -10, 11 and of 1, 0
    assert torch.equal(
        turn_advantages(first, second, stage=2, alpha=0.0, credit="own", group=2)[1], leave_one_out(second, 2)
    )


def test_a_row_without_one_of_its_rewards_is_left_out():
    first, second = torch.tensor([1.0, 0.0, NAN]), torch.tensor([1.0, 0.0, 1.0])
    turn_1, turn_2 = turn_advantages(first, second, stage=2, alpha=0.0, credit="own", group=3)
    assert turn_1.tolist() == turn_2.tolist() == [1.0, -1.0, 0.0]


def test_masks_are_disjoint_and_cover_all_but_the_environment():
    lengths = torch.tensor([[2, 3, 1], [1, 2, 4]])
    first, second = turn_masks(lengths, 8)
    assert first.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert second.tolist() == [[0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]


def test_rates_add_up():
    first, second = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, NAN]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    found = self_correction_rates(first, second, threshold=0.5)
    assert found == pytest.approx(
        {
            "accuracy_1": 0.4,
            "accuracy_2": 0.6,
            "delta": 0.2,
            "incorrect_to_correct": 0.4,
            "correct_to_incorrect": 0.2,
        }
    )
    empty = self_correction_rates(first[-1:], second[-1:], threshold=0.5)
    assert empty.keys() == found.keys() and all(math.isnan(value) for value in empty.values())


def slow_edit_distance(first, second):
    if not first or not second:
        return len(first) + len(second)
    return min(
        slow_edit_distance(first[1:], second) + 1,
        slow_edit_distance(first, second[1:]) + 1,
        slow_edit_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


def test_the_edit_ratio_is_that_of_the_plain_recursion():
    rng = random.Random(0)
    rows = [[[rng.randint(0, 3) for _ in range(rng.randint(0, 6))] for _ in range(40)] for _ in range(2)]
    expected = [slow_edit_distance(*pair) / max(1, *map(len, pair)) for pair in zip(*rows, strict=True)]
    torch.testing.assert_close(edit_ratio(*rows), torch.tensor(expected))
    assert edit_ratio([[1, 2, 3], [], []], [[1, 2, 3], [], [4]]).tolist() == [0.0, 0.0, 1.0]


# --- the second turn -----------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "w6 w7"}]


def template(tokenizer, text):
    tokenizer.chat_template = text
    return tokenizer


def test_the_chat_template_writes_what_stands_between():
    tokenizer = preferences.tokenizer()
    turn = second_turn(CHAT, CORRECTION, tokenizer)
    start = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    whole = [*CHAT, {"role": "assistant", "content": "w20 w21"}, {"role": "user", "content": CORRECTION}]
    rendered = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("w20 w21").input_ids
    ended = [*answer, tokenizer.eos_token_id]
    assert (
        start + answer + turn.after(answer, [tokenizer.eos_token_id]) == rendered
    )  # cut short: the template ends the turn
    assert start + ended + turn.after(ended, [tokenizer.eos_token_id]) == rendered  # the answer ended it itself
    other = tokenizer("w22").input_ids  # an end of the model's that the template does not write
    assert turn.after(answer + other, [tokenizer.eos_token_id, *other]) == turn.ids


def test_a_plain_prompt_is_followed_by_the_instruction_as_it_stands():
    tokenizer = preferences.tokenizer()
    turn = second_turn("w6 w7 ", CORRECTION, tokenizer)
    assert turn.after([20, tokenizer.eos_token_id], [tokenizer.eos_token_id]) == tokenizer(CORRECTION).input_ids


FIRST_ONLY = "{% for m in messages[:2] %}{{ m['content'] + ' <eos> ' }}{% endfor %}assistant "
USERS_ONLY = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] + ' <eos> ' }}{% endfor %}assistant "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": template(preferences.tokenizer(), None)}, "no chat template"),
        ({"tokenizer": template(preferences.tokenizer(), FIRST_ONLY)}, "drops the instruction 'w9 w10 w11'"),
        ({"tokenizer": template(preferences.tokenizer(), USERS_ONLY)}, "drops the answer"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "w8"}]}, "ends with its message 'w8'"),
        ({"prompt": "w6 ", "instruction": ""}, "at least one token"),
        ({"instruction": " "}, "drops the instruction ' '"),
    ],
)
def test_a_second_turn_that_cannot_be_written_is_refused(given, message):
    settings = {"prompt": CHAT, "instruction": CORRECTION, "tokenizer": preferences.tokenizer()} | given
    with pytest.raises(ValueError, match=message):
        second_turn(**settings)


def test_a_template_that_hides_how_the_turn_began_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr("hf_logits.second_turn.logger.warning_once", said.append)
    second_turn(CHAT, CORRECTION, preferences.tokenizer())
    assert not said
    hides = preferences.tokenizer().chat_template.replace("assistant {% endif", "assistant w63 {% endif")
    second_turn(CHAT, CORRECTION, template(preferences.tokenizer(), hides))
    assert "as it was sampled" in said[0]


# --- rollouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_a_completion_is_both_attempts_and_a_masked_middle(conversational, tmp_path):
    asked = []
    trainer = make(tmp_path, data=rollouts.questions(conversational=conversational), per_device_train_batch_size=8)
    generate = trainer._generate_single_turn

    def watched(prompt_ids, images, fields, generations):
        found = generate(prompt_ids, images, fields, generations)
        asked.append((prompt_ids, found[0]))
        return found

    trainer._generate_single_turn = watched
    output, attempts = rollout(trainer)
    (starts, first), (again, second) = asked
    tokenizer = preferences.tokenizer()
    for row, (one, middle, two) in enumerate(attempts):
        assert one == first[row] and two == second[row]
        assert again[row] == starts[row] + one + middle
        assert CORRECTION in tokenizer.decode(middle)
        length = len(one) + len(middle) + len(two)
        assert output["completion_ids"][row, :length].tolist() == one + middle + two
        assert output["completion_mask"][row].sum() == length
        mask = [1] * len(one) + [0] * len(middle) + [1] * len(two)
        assert output["tool_mask"][row, :length].tolist() == mask
        assert output["first_attempt"][row].tolist() == [1] * len(one) + [0] * (
            output["completion_ids"].size(1) - len(one)
        )
    assert len({tuple(one) for one, _, _ in attempts}) > 4
    ended = {one[-1] == tokenizer.eos_token_id for one, _, _ in attempts}
    if conversational:  # then the template's own end is left out
        assert all(
            (middle[0] == tokenizer.eos_token_id) != (one[-1] == tokenizer.eos_token_id) for one, middle, _ in attempts
        )
    assert ended <= {True, False}


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_the_verifier_sees_either_attempt_as_an_ordinary_completion(conversational, tmp_path):
    calls = []

    def verifier(prompts, completions, completion_ids, answer, log_extra, log_metric, **_):
        calls.append((prompts, completions, completion_ids, answer))
        log_extra("seen", [len(calls)] * len(completions))
        log_metric("calls", len(calls))
        return rollouts.verifier(completions)

    data = rollouts.questions(conversational=conversational).add_column("answer", list(range(8)))
    trainer = make(tmp_path, data=data, reward=verifier)
    batch = next(iter(trainer.get_train_dataloader()))
    _, attempts = rollout(trainer, batch)
    tokenizer = preferences.tokenizer()
    assert len(calls) == 2
    for place, (prompts, completions, ids, answers) in zip((0, 2), calls, strict=True):
        assert prompts == [row["prompt"] for row in batch] and answers == [row["answer"] for row in batch]
        assert ids == [row[place] for row in attempts]
        plain = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        assert completions == ([[{"role": "assistant", "content": t}] for t in plain] if conversational else plain)
    assert list(trainer._logs["extra"]["first_attempt/seen"]) == [1] * 4
    assert list(trainer._logs["extra"]["seen"]) == [2] * 4
    assert trainer._metrics["train"]["calls"] == [2.0]
    first = rollouts.verifier(calls[0][1])
    assert list(trainer._logs["extra"]["first_attempt/reward"]) == first
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) == 4


@pytest.mark.parametrize(
    "settings",
    [{"score_stage": 1}, {"score_stage": 2}, {"score_stage": 2, "score_turn1_credit": "to_go", "score_alpha": 2.0}],
    ids=["one", "two", "to-go"],
)
def test_the_advantages_lie_on_the_tokens_of_their_turn(settings, tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=8, **settings)
    output, attempts = rollout(trainer)
    tokenizer = preferences.tokenizer()
    first, second = (
        torch.tensor(
            rollouts.verifier(tokenizer.batch_decode([row[place] for row in attempts], skip_special_tokens=True))
        )
        for place in (0, 2)
    )
    assert 0 < first.mean() < 1 and 0 < second.mean() < 1
    expected = torch.zeros_like(output["advantages"])
    for row, (one, middle, two) in enumerate(attempts):
        sibling = row ^ 1
        earned = second if settings["score_stage"] == 1 else second + trainer.args.score_alpha * (second - first)
        credit = trainer.args.score_turn1_credit or {1: "none", 2: "own"}[settings["score_stage"]]
        own = {"none": 0 * first, "own": first, "to_go": first + second}[credit]
        expected[row, : len(one)] = own[row] - own[sibling]
        start = len(one) + len(middle)
        expected[row, start : start + len(two)] = earned[row] - earned[sibling]
    assert torch.equal(output["advantages"], expected)
    rates = self_correction_rates(first, second, threshold=0.5)
    metrics = trainer._metrics["train"]
    assert {name: metrics[f"score/{name}"] for name in rates} == {name: [value] for name, value in rates.items()}
    changed = edit_ratio([row[0] for row in attempts], [row[2] for row in attempts])
    assert metrics["score/edit_ratio"] == [pytest.approx(changed.mean().item())]
    cut = [sum(row[place][-1] != tokenizer.eos_token_id for row in attempts) / 8 for place in (0, 2)]
    assert [metrics["score/truncated_1"], metrics["score/truncated_2"]] == [[cut[0]], [cut[1]]]


# --- the loss ------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_weighted_log_probs_and_the_kl(tmp_path):
    trainer = make(tmp_path, score_beta2=0.7, beta=0.3)
    other = tiny.llama(3)
    trainer.ref_model.load_state_dict(other.state_dict())  # a reference that is far away
    output, attempts = rollout(trainer)
    found = gradient(trainer, trainer.compute_loss(trainer.model, output))

    log_probs = token_log_probs(trainer.model, output)
    away = log_probs.detach() - token_log_probs(other, output).detach()
    total = 0.0
    for row, (one, middle, two) in enumerate(attempts):
        places = [*range(len(one)), *range(len(one) + len(middle), len(one) + len(middle) + len(two))]
        for place in places:
            weight = output["advantages"][row, place] - 0.3 * away[row, place]
            if place < len(one):
                weight = weight - 0.7 * away[row, place]
            total = total - weight * log_probs[row, place] / len(attempts)
    assert preferences.distance(found, gradient(trainer, total)) < 1e-4
    assert max(value.abs().max().item() for value in found.values()) > 1.0
    expected = (((-away).exp() + away - 1) * output["first_attempt"]).sum(1).mean().item()
    assert trainer._metrics["train"]["score/kl_1"] == [pytest.approx(expected, rel=1e-4)]


def test_the_environments_tokens_have_no_part_in_the_loss(tmp_path, monkeypatch):
    trainer = make(tmp_path, score_stage=1, score_beta2=0.5)
    output, _ = rollout(trainer)
    stock = GRPOTrainer._get_per_token_logps_and_entropies
    losses = []
    for shift in (0.0, 3.0):

        def moved(self, *args, **kwargs):
            log_probs, *rest = stock(self, *args, **kwargs)
            return log_probs - shift * (1 - output["tool_mask"]), *rest  # noqa: B023

        monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", moved)
        losses.append(trainer.compute_loss(trainer.model, output).item())
    assert losses[0] == losses[1]


class Toy:
    """A policy over five tokens whose attempts are one token each, so that all 25 outcomes can be gone through."""

    def __init__(self, folder, **settings):
        config = LlamaConfig(
            vocab_size=5, **(tiny._SMALL | {"num_hidden_layers": 1, "pad_token_id": 0, "eos_token_id": 4})
        )
        self.model = tiny.spread(LlamaForCausalLM(config), 5).double()
        self.model.save_pretrained(folder / "toy")
        self.model.config._name_or_path = str(folder / "toy")
        small = preferences.word_tokenizer(["a", "b"])
        small = type(small)(tokenizer_object=_five_words(), pad_token="p", eos_token="e", padding_side="left")
        self.trainer = rollouts.make(
            SCoReTrainer,
            SCoReConfig,
            folder,
            model=self.model,
            processing_class=small,
            data=Dataset.from_dict({"prompt": ["a b"] * 4}),
            **(rollouts.GROUPS | {"max_completion_length": 1, "score_correction_prompt": "b a"} | settings),
        )
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.outcomes = torch.tensor(list(itertools.product(range(5), repeat=2)))
        generator = torch.Generator().manual_seed(1)
        self.rewards = (
            torch.randint(0, 2, (5,), generator=generator).double(),
            torch.rand(5, 5, generator=generator).double(),
        )

    def tables(self, model):
        """log p(y1 | x) as `[5]` and log p(y2 | x, y1) as `[5, 5]`, from all logits."""
        one = model(torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[1, 2, token, 2, 1] for token in range(5)])
        return one, model(rows).logits[:, -1].log_softmax(-1)

    def batch(self, advantages):
        first, second = self.outcomes.T
        rows, middle = len(first), torch.tensor([2, 1])
        ids = torch.cat([first[:, None], middle.expand(rows, 2), second[:, None]], 1)
        ones, between = torch.ones(rows, 4, dtype=torch.long), torch.tensor([1, 0, 0, 1])
        turns = turn_masks(torch.tensor([[1, 2, 1]] * rows), 4)
        return {
            "prompt_ids": torch.tensor([[1, 2]] * rows),
            "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
            "completion_ids": ids,
            "completion_mask": ones,
            "tool_mask": between.expand(rows, 4),
            "first_attempt": turns[0],
            "advantages": advantages[0][:, None] * turns[0] + advantages[1][:, None] * turns[1],
        }


def _five_words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"p": 0, "a": 1, "b": 2, "c": 3, "e": 4}, unk_token="c"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.mark.parametrize(
    ("stage", "credit"), [(1, "none"), (1, "own"), (1, "to_go"), (2, "none"), (2, "own"), (2, "to_go")]
)
def test_the_expected_gradient_is_that_of_the_objective(stage, credit, tmp_path):
    """All pairs of outcomes of a group of two, each with its probability, against the objective in closed form."""
    toy = Toy(tmp_path, score_stage=stage, score_turn1_credit=credit, score_alpha=3.0, beta=0.0, score_beta2=0.0)
    first, second = toy.outcomes.T
    reward_1, reward_2 = toy.rewards[0][first], toy.rewards[1][first, second]
    log_1, log_2 = toy.tables(toy.model)
    chances = (log_1[first] + log_2[first, second]).exp().detach()
    assert chances.sum().item() == pytest.approx(1.0)
    expected = [torch.zeros(25, dtype=torch.float64) for _ in range(2)]
    for sibling in range(25):  # each row meets every sibling as often as that one is sampled
        pairs = [torch.stack([each, each[sibling].expand(25)], 1).view(-1) for each in (reward_1, reward_2)]
        found = turn_advantages(*pairs, stage=stage, alpha=3.0, credit=credit, group=2)
        for turn in (0, 1):
            expected[turn] += chances[sibling] * found[turn].view(25, 2)[:, 0]
    batch = toy.batch([25 * chances * advantage for advantage in expected])
    ours = gradient(toy.trainer, toy.trainer.compute_loss(toy.trainer.model, batch))

    log_1, log_2 = toy.tables(toy.model)
    fixed = log_1.detach().exp()  # what the second attempt earns does not move the first one, unless it is credited
    shaped = toy.rewards[1] + (3.0 * (toy.rewards[1] - toy.rewards[0][:, None]) if stage == 2 else 0.0)
    objective = (fixed[:, None] * log_2.exp() * shaped).sum()
    if credit == "own":
        objective = objective + (log_1.exp() * toy.rewards[0]).sum()
    if credit == "to_go":
        later = (log_2.detach().exp() * toy.rewards[1]).sum(1)
        objective = objective + (log_1.exp() * (later + (toy.rewards[0] if stage == 2 else 0.0))).sum()
    theirs = gradient(toy.trainer, -objective)
    assert max(value.abs().max().item() for value in theirs.values()) > 1e-3
    assert preferences.distance(ours, theirs) < 1e-6
    if (stage, credit) == (1, "to_go"):  # then nothing is held fixed: the gradient of the mean reward itself
        log_1, log_2 = toy.tables(toy.model)
        whole = (log_1.exp()[:, None] * log_2.exp() * toy.rewards[1]).sum()
        assert preferences.distance(ours, gradient(toy.trainer, -whole)) < 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_the_expected_penalty_is_the_reverse_kl_of_each_token(stage, tmp_path):
    toy = Toy(tmp_path, score_stage=stage, beta=0.3, score_beta2=0.7)
    reference = tiny.spread(LlamaForCausalLM(toy.model.config), 6).double()
    first, second = toy.outcomes.T
    log_1, log_2 = (table.detach() for table in toy.tables(toy.model))
    chances = (log_1[first] + log_2[first, second]).exp()
    zero = torch.zeros(25, dtype=torch.float64)
    batch = toy.batch([zero, zero])
    # The ratio of new to old weighs the KL of a row: here with the row's probability.
    batch["old_per_token_logps"] = token_log_probs(toy.model, batch).detach() - (25 * chances).log()[:, None]
    batch["ref_per_token_logps"] = token_log_probs(reference, batch).detach()
    ours = gradient(toy.trainer, toy.trainer.compute_loss(toy.trainer.model, batch))

    log_1, log_2 = toy.tables(toy.model)
    ref_1, ref_2 = (table.detach() for table in toy.tables(reference))
    kl_1 = (log_1.exp() * (log_1 - ref_1)).sum()
    kl_2 = (log_1.detach().exp() * (log_2.exp() * (log_2 - ref_2)).sum(1)).sum()
    theirs = gradient(toy.trainer, 0.3 * (kl_1 + kl_2) + (0.7 * kl_1 if stage == 1 else 0.0))
    assert max(value.abs().max().item() for value in theirs.values()) > 1e-3
    assert preferences.distance(ours, theirs) < 1e-5


def test_a_heavy_penalty_keeps_the_first_attempt_as_it_is(tmp_path):
    """Both attempts want the reward of the second one. The heavier the penalty, the less the first one moves."""
    moved, earned = [], []
    for penalty in (0.0, 3.0, 1000.0):
        toy = Toy(tmp_path, score_stage=1, score_turn1_credit="to_go", beta=1e-9, score_beta2=penalty)
        first, second = toy.outcomes.T
        start = [table.detach() for table in toy.tables(toy.model)]
        reference = token_log_probs(toy.model, toy.batch(torch.zeros(2, 25, dtype=torch.float64))).detach()
        optimizer = torch.optim.Adam(toy.model.parameters(), lr=0.01)
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 40)
            log_1, log_2 = (table.detach() for table in toy.tables(toy.model))
            advantage = 25 * (log_1[first] + log_2[first, second]).exp() * (toy.rewards[1][first, second] - 0.5)
            batch = toy.batch([advantage, advantage]) | {"ref_per_token_logps": reference}
            optimizer.zero_grad()
            toy.trainer.compute_loss(toy.model, batch).backward()
            optimizer.step()
        now = [table.detach() for table in toy.tables(toy.model)]
        moved.append((now[0].exp() * (now[0] - start[0])).sum().item())
        earned.append([(one.exp()[:, None] * two.exp() * toy.rewards[1]).sum().item() for one, two in (start, now)])
    assert moved[0] > 0.1 and moved[1] < 0.5 * moved[0] and moved[2] < 0.01 * moved[0]
    assert all(after > before + 0.05 for before, after in earned[:2])


def test_old_samples_are_weighed_by_their_ratio(tmp_path):
    trainer = make(tmp_path, num_iterations=2, max_steps=4, score_stage=1)
    trainer.train()
    assert logged(trainer, "loss")[1] != logged(trainer, "loss")[0]
    assert "old_per_token_logps" in trainer._buffered_inputs[0]


# --- what is left out or refused -----------------------------------------------------------------------------------------


def test_attempts_without_a_reward_are_left_out_and_counted(tmp_path):
    calls = []

    def verifier(completions, **_):
        calls.append(1)
        rewards = rollouts.verifier(completions)
        return [None if len(calls) == 2 and row < 3 else value for row, value in enumerate(rewards)]

    trainer = make(tmp_path, per_device_train_batch_size=8, reward=verifier, num_generations=4)
    output, _ = rollout(trainer)
    assert (output["advantages"][:3] == 0).all()
    assert (output["advantages"][3] == 0).all()  # it has nobody left to be compared with
    assert trainer._metrics["train"]["score/unscored"] == [3 / 8]
    assert all(value.isfinite().all() for value in output.values())


def test_a_verifier_that_never_says_anything_changes_nothing(tmp_path, caplog):
    logging.getLogger("trl").addHandler(caplog.handler)
    trainer = make(tmp_path, reward=lambda completions, **_: [None] * len(completions), beta=0.0, score_beta2=0.0)
    before = weights(trainer)
    trainer.train()
    assert equal(before, weights(trainer))
    assert logged(trainer, "score/unscored") == [1.0] * 3
    assert logged(trainer, "score/accuracy_1") == [None] * 3  # the host's word for a mean over nothing


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **_: [NAN] * len(completions), "returned nan for the completion"),
        (lambda completions, **_: [math.inf] * len(completions), "returned inf for the completion"),
        (lambda completions, **_: [1.0], "returned 1 rewards for 4 completions"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_that_is_no_number_is_refused(reward, message, asynchronous, tmp_path):
    async def later(completions, **rest):
        return reward(completions, **rest)

    trainer = make(tmp_path, reward=later if asynchronous else reward)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_several_rewards_are_added_and_keep_their_names(tmp_path):
    def never(completions, **_):
        return [None] * len(completions)

    async def bonus(completions, **_):
        return [1.0] * len(completions)

    trainer = make(tmp_path, reward=[rollouts.verifier, never, bonus], reward_weights=[2.0, 1.0, 0.5])
    output, attempts = rollout(trainer)
    tokenizer = preferences.tokenizer()
    for place, rewards in zip((0, 2), trainer._rewards, strict=True):
        plain = tokenizer.batch_decode([row[place] for row in attempts], skip_special_tokens=True)
        assert rewards.tolist() == [2 * value + 0.5 for value in rollouts.verifier(plain)]
    assert {"rewards/verifier/mean", "rewards/bonus/mean"} <= trainer._metrics["train"].keys()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_without_a_correct_attempt_is_warned_of_and_breaks_nothing(stage, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_logits.trainers.score.logger.warning", said.append)
    nothing = {"reward": lambda completions, **_: [0.0] * len(completions), "beta": 0.0, "score_beta2": 0.0}
    trainer = make(tmp_path, score_stage=stage, **nothing)
    before = weights(trainer)
    trainer.train()
    assert equal(before, weights(trainer))
    assert len(said) == 1 and "Not one of 24 attempts was correct, a rate of 0, until step 3" in said[0]
    make(tmp_path).train()
    assert len(said) == 1


def test_truncated_attempts_can_be_left_out(tmp_path):
    trainer = make(tmp_path, mask_truncated_completions=True)
    eos = preferences.tokenizer().eos_token_id
    answers = iter([[[6, eos], [7, 8], [9, eos], [10, 11]], [[6, eos], [7, eos], [9, 9], [10, 10]]])
    trainer._generate_single_turn = lambda *_: (next(answers), None)
    output, _ = rollout(trainer)
    # The host sees how a row ends, and would let the second one pass.
    assert (output["completion_mask"].sum(1) > 0).tolist() == [True, False, False, False]
    assert trainer._metrics["train"]["score/truncated_1"] == trainer._metrics["train"]["score/truncated_2"] == [0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_stage": 3}, "score_stage must be 1 or 2, got 3"),
        ({"score_turn1_credit": "all"}, "score_turn1_credit must be 'none', 'own' or 'to_go', got 'all'"),
        ({"score_alpha": -1.0}, "score_alpha must be in"),
        ({"score_beta2": math.nan}, "score_beta2 must be in"),
        ({"beta": 0.0}, "made only for beta > 0"),
        ({"score_correction_prompt": " "}, "score_correction_prompt must be a text"),
        ({"loss_type": "dapo"}, "loss_type must be 'luspo' for SCoRe, got 'dapo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
        ({"scale_rewards": "group"}, "scale_rewards must be 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "must be 'sum_then_normalize'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        preferences.arguments(SCoReConfig, tmp_path, num_generations=2, **settings)


def test_the_second_attempt_must_have_a_place(tmp_path):
    model = rollouts.policy()
    model.config.max_position_embeddings = 16  # for a prompt of four or more and one attempt, but not for the rest
    with pytest.raises(ValueError, match="an answer to it can have 5 .* holds 16"):
        rollout(make(tmp_path, model=model))


def test_other_arguments_are_refused(tmp_path):
    make(tmp_path, reward=(rollouts.verifier,))
    with pytest.raises(ValueError, match="has 1 prompts, but a generation batch takes 2"):
        make(tmp_path, data=rollouts.questions(1))
    with pytest.raises(TypeError, match="SCoReConfig"):
        rollouts.make(SCoReTrainer, GRPOConfig, tmp_path, **rollouts.GROUPS)
    with pytest.raises(TypeError, match="must be a function"):
        make(tmp_path, reward=3)
    chats = rollouts.questions(conversational=True)
    with pytest.raises(ValueError, match="no chat template"):
        make(tmp_path, data=chats, processing_class=template(preferences.tokenizer(), None))
    with pytest.raises(ValueError, match="drops the instruction"):
        make(tmp_path, data=chats, processing_class=template(preferences.tokenizer(), FIRST_ONLY))
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make(tmp_path, data=chats.rename_column("prompt", "question"))


@pytest.mark.parametrize(("stage", "credit"), [(1, "none"), (2, "own")])
def test_stages_credit_the_first_attempt_by_default(stage, credit, tmp_path):
    default, given = (
        rollout(make(tmp_path, score_stage=stage, **settings))[0] for settings in ({}, {"score_turn1_credit": credit})
    )
    assert torch.equal(default["advantages"], given["advantages"])
    assert ((default["advantages"] * default["first_attempt"]).abs().sum() > 0) == (stage == 2)


def test_no_advice_is_given_that_would_be_wrong_here(tmp_path, caplog):
    host = logging.getLogger("trl.trainer.grpo_trainer")
    host.addHandler(caplog.handler)
    try:
        make(tmp_path)
        assert "luspo" not in caplog.text
        rollouts.make(GRPOTrainer, GRPOConfig, tmp_path, loss_type="luspo", **rollouts.GROUPS)
        assert "luspo" in caplog.text
    finally:
        host.removeHandler(caplog.handler)
