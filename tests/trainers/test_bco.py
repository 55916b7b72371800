"""BCO: its numbers by hand, the shift, the weights, and what it shares bit for bit with TRL."""

import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from hf_logits.trainers.bco import BCOConfig, BCOTrainer, RewardShift, bco_loss
from preferences import equal, logged, make, pairs, unpaired, weights


W = torch.tensor([2.0, -1.0], dtype=torch.float64)
L = torch.tensor([0.5, -3.0, -2.0], dtype=torch.float64)


# --- the numbers ---------------------------------------------------------------------------------------------------------


def test_the_terms_by_hand():
    none = W[:0]
    terms = [bco_loss(row, none, beta=0.1, shift=0.0) for row in W.split(1)]
    terms += [bco_loss(none, row, beta=0.1, shift=0.0) for row in L.split(1)]
    expected = [0.598139, 0.744397, 0.718460, 0.554355, 0.598139]
    assert torch.allclose(torch.stack(terms), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "undesirable_weights", "expected"),
    [
        (0.0, None, 0.642698),
        (-0.07, None, 0.649088),  # the mean of all rewards
        (-0.05, None, 0.647138),  # the midpoint of both classes
        (-0.07, [0.5, 1.5, 10.0], 1.766533),
    ],
)
def test_the_loss_by_hand(shift, undesirable_weights, expected):
    given = None if undesirable_weights is None else torch.tensor(undesirable_weights, dtype=torch.float64)
    assert math.isclose(
        bco_loss(W, L, beta=0.1, shift=shift, undesirable_weights=given).item(), expected, abs_tol=1e-6
    )


def test_the_loss_bounds_that_of_dpo_most_closely_at_the_midpoint():
    reward_w, reward_l = (torch.tensor([value], dtype=torch.float64) for value in (1.2, -0.4))

    def bce(shift: float) -> float:
        return 2 * bco_loss(reward_w, reward_l, beta=1.0, shift=shift).item()

    dpo = -torch.nn.functional.logsigmoid(reward_w - reward_l).item()
    assert math.isclose(dpo, 0.183901, abs_tol=1e-6)
    for shift, expected in [(0.4, 0.742201), (0.0, 0.776298), (1.0, 0.818556)]:
        assert math.isclose(bce(shift), expected, abs_tol=1e-6)
        assert dpo < bce(0.4) <= bce(shift)


def test_rewards_and_shift_move_together():
    moved = bco_loss(W + 30.0, L + 30.0, beta=0.1, shift=3.0 - 0.07)
    assert torch.allclose(moved, bco_loss(W, L, beta=0.1, shift=-0.07))


def test_the_gradient_is_that_of_the_formula():
    good, bad, weight = (tensor.clone().requires_grad_() for tensor in (W, L, torch.tensor([0.5, 1.5, 10.0]).double()))
    assert torch.autograd.gradcheck(
        lambda a, b, c: bco_loss(a, b, beta=0.1, shift=-0.07, undesirable_weights=c), (good, bad, weight)
    )


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_log_ratios_stay_finite(size):
    good, bad = (torch.tensor([size, -size, 0.0], requires_grad=True) for _ in range(2))
    loss = bco_loss(good, bad, beta=0.1, shift=0.5)
    loss.backward()
    assert loss.isfinite() and good.grad.isfinite().all() and bad.grad.isfinite().all()


def test_the_averages_of_each_class_by_hand():
    shift = RewardShift()
    values = []
    for mean in (1.0, 2.0, 3.0):
        shift.average([2 * mean, 4 * mean], [2.0, 4.0], decay=0.9)
        values.append(shift.value("ema"))
    assert values == pytest.approx([1.0, 1.1, 1.29])
    shift.average([0.0, 9.0], [0.0, 1.0], decay=0.9)  # a step without desirable rows
    assert (shift.desirable, shift.undesirable) == pytest.approx((1.29, 0.9 * 1.29 + 0.9))


def test_a_class_never_seen_counts_as_the_reference():
    shift = RewardShift()
    assert shift.value("ema") == 0.0
    shift.average([3.0, 0.0], [2.0, 0.0], decay=0.9)
    assert shift.value("ema") == 0.75


def test_the_two_shifts_differ_with_unequal_classes():
    rewards = ([0.2, -0.1], [0.05, -0.3, -0.2])
    sums, counts = [sum(part) for part in rewards], [float(len(part)) for part in rewards]
    shift = RewardShift()
    shift.average(sums, counts, decay=0.9)
    shift.accumulate(sums, counts)
    assert shift.value("ema") == pytest.approx(-0.05)
    assert shift.value("running_mean") == pytest.approx(-0.07)
    assert shift.value("none") == 0.0


def test_the_running_mean_is_that_of_all_rewards():
    rewards = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    shift = RewardShift()
    for part in rewards.split([3, 1, 9, 7]):
        shift.accumulate([part[:1].sum().item(), part[1:].sum().item()], [1.0, len(part) - 1.0])
    assert shift.mean == pytest.approx(rewards.mean().item())


# --- the trainer against TRL ---------------------------------------------------------------------------------------------


def by_turns(data: Dataset) -> Dataset:
    """Unpaired rows in the order in which DPO sees a pair."""
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in data
        for kind in ("chosen", "rejected")
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precompute_ref_log_probs", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_without_a_shift_it_is_the_pair_loss_of_dpo_bit_for_bit(
    lora, precompute_ref_log_probs, gradient_accumulation_steps, tmp_path
):
    settings = {
        "lora": lora,
        "precompute_ref_log_probs": precompute_ref_log_probs,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    stock = make(
        DPOTrainer,
        DPOConfig,
        tmp_path / "dpo",
        loss_type="bco_pair",
        per_device_train_batch_size=1,
        learning_rate=0.125,
        **settings,
    )
    # two rows are one pair, and a mean over rows is half of a sum over the pair
    ours = make(
        BCOTrainer,
        BCOConfig,
        tmp_path / "bco",
        data=by_turns(pairs()),
        reward_shift="none",
        learning_rate=0.25,
        **settings,
    )
    before = weights(ours)
    stock.train()
    ours.train()
    assert equal(weights(ours), weights(stock))
    assert not equal(weights(ours), before)
    assert [2 * loss for loss in logged(ours, "loss")] == logged(stock, "loss")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_metrics_are_those_of_stock_kto(lora, tmp_path):
    settings = {"data": unpaired(), "lora": lora, "max_steps": 1, "per_device_train_batch_size": 4}
    stock = make(KTOTrainer, KTOConfig, tmp_path / "kto", loss_type="apo_zero_unpaired", **settings)
    ours = make(BCOTrainer, BCOConfig, tmp_path / "bco", train_sampling_strategy="sequential", **settings)
    stock.train()
    ours.train()
    expected, found = stock.state.log_history[0], ours.state.log_history[0]
    assert found.keys() - expected.keys() == {"rewards/shift"}
    assert {key: found[key] for key in expected if key not in ("loss", "grad_norm")} == {
        key: value for key, value in expected.items() if key not in ("loss", "grad_norm")
    }


def test_paired_data_is_unpaired(tmp_path):
    trainer = make(BCOTrainer, BCOConfig, tmp_path, data=pairs())
    assert len(trainer.train_dataset) == 2 * len(pairs())
    assert sum(trainer.train_dataset["label"]) == len(pairs())
    trainer.train()


def test_rows_are_shuffled(tmp_path):
    trainer = make(BCOTrainer, BCOConfig, tmp_path, data=unpaired(32))
    sampler = trainer._get_train_sampler()
    assert list(sampler) != list(range(32))


def test_kto_does_not_advise_on_class_weights(tmp_path, caplog):
    data = unpaired(12)
    make(BCOTrainer, BCOConfig, tmp_path, data=data.select([0, 1, 2, 4, 6, 8, 10]))
    assert "desirable_weight" not in caplog.text


# --- the shift -----------------------------------------------------------------------------------------------------------


def spied(trainer: BCOTrainer) -> list[tuple[Tensor, Tensor, float]]:
    """Rewards, labels and the shift of every training micro-batch, taken at the replay and at the log."""
    found: list[tuple[Tensor, Tensor, float]] = []
    stock = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        loss = stock(model, inputs, *args, **kwargs)
        if trainer.model.training:
            with torch.no_grad():
                plain = {key: value for key, value in inputs.items() if key != "udm_weight"}
                outputs = trainer.run_once(trainer.model, plain)
                ratios = outputs.log_probs.sum(1) - trainer.reference(plain)["ref_logps"]
            label = inputs["label"].bool()
            found.append((trainer.beta * ratios, label, trainer._metrics["train"]["rewards/shift"][-1]))
        return loss

    trainer.compute_loss = compute_loss
    return found


def test_the_moving_average_lags_a_step_and_the_mean_does_not(tmp_path):
    settings = {"data": unpaired(16), "max_steps": 4, "learning_rate": 1e-2}
    average = make(BCOTrainer, BCOConfig, tmp_path / "ema", shift_decay=0.75, **settings)
    seen = spied(average)
    average.train()
    desirable = undesirable = None
    for rewards, label, used in seen:
        parts = [one for one in (desirable, undesirable) if one is not None]
        assert used == pytest.approx(sum(parts) / 2, abs=1e-5)
        old = (desirable, undesirable)
        new = [rewards[kind].mean().item() if kind.any() else None for kind in (label, ~label)]
        desirable, undesirable = (
            o if n is None else n if o is None else 0.75 * o + 0.25 * n for o, n in zip(old, new, strict=True)
        )
    running = make(BCOTrainer, BCOConfig, tmp_path / "mean", reward_shift="running_mean", **settings)
    seen = spied(running)
    running.train()
    for step in range(len(seen)):
        assert seen[step][2] == pytest.approx(torch.cat([one[0] for one in seen[: step + 1]]).mean().item(), abs=1e-5)


def test_the_shift_does_not_depend_on_micro_batches(tmp_path):
    shifts, losses = [], []
    for batch in (1, 2, 4):
        trainer = make(
            BCOTrainer,
            BCOConfig,
            tmp_path / str(batch),
            data=unpaired(16),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_steps=4,
            learning_rate=1e-2,
        )
        trainer.train()
        shifts.append(trainer.shift.value("ema"))
        losses.append(logged(trainer, "loss"))
    assert shifts == pytest.approx([shifts[0]] * 3, abs=1e-5)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert abs(shifts[0]) > 1e-3


@pytest.mark.parametrize("mode", ["ema", "running_mean"])
def test_evaluation_does_not_move_the_shift(mode, tmp_path):
    trainer = make(BCOTrainer, BCOConfig, tmp_path, data=unpaired(), evaluation=unpaired(6, seed=1), reward_shift=mode)
    trainer.train()
    before = vars(trainer.shift).copy()
    metrics = trainer.evaluate()
    assert vars(trainer.shift) == before
    assert metrics["eval_rewards/shift"] == trainer.shift.value(mode) != 0.0


@pytest.mark.parametrize("mode", ["ema", "running_mean"])
def test_the_shift_survives_a_kill(mode, tmp_path):
    settings = {
        "data": unpaired(16),
        "reward_shift": mode,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2.0,
    }
    whole = make(BCOTrainer, BCOConfig, tmp_path / "whole", **settings)
    whole.train()
    resumed = make(BCOTrainer, BCOConfig, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(weights(resumed), weights(whole))
    assert repr(resumed.shift) == repr(whole.shift)
    assert whole.shift.value(mode) != 0.0


def test_a_checkpoint_without_a_shift_is_refused(tmp_path):
    settings = {"data": unpaired(), "max_steps": 1, "save_strategy": "steps", "save_steps": 1.0}
    stock = make(KTOTrainer, KTOConfig, tmp_path, loss_type="apo_zero_unpaired", **settings)
    stock.train()
    with pytest.raises(ValueError, match="has no reward_shift.safetensors"):
        make(BCOTrainer, BCOConfig, tmp_path, **settings).train(resume_from_checkpoint=True)


# --- underlying distribution matching ------------------------------------------------------------------------------------


def topics(rows: int = 24) -> Dataset:
    """Thumbs up come from one topic; thumbs down from that one in one case of four, else from another."""
    found = []
    for index in range(rows):
        good = index % 2 == 0
        topic = "w10" if good or index % 8 == 1 else "w20"
        found.append({"prompt": f"{topic} w{30 + index % 3} ", "completion": f"w{6 + index % 30}", "label": good})
    return Dataset.from_list(found)


def embed(prompts: list[str]) -> Tensor:
    assert len(set(prompts)) == len(prompts)
    return torch.tensor([[float("w10" in prompt), float("w20" in prompt)] for prompt in prompts])


def test_undesirable_rows_weigh_as_their_prompts_occur_among_desirable_ones(tmp_path):
    trainer = make(
        partial(BCOTrainer, prompt_embedder=embed),
        BCOConfig,
        tmp_path,
        data=topics(),
        evaluation=topics(4),
        udm_penalty=1e-3,
        udm_min_weight=0.25,
    )
    for row in trainer.train_dataset:
        # p(w10 | up) / p(w10 | down) = 1 / (1/4), and w20 never occurs among desirable rows: clipped
        expected = 1.0 if row["label"] else 4.0 if "w10" in row["prompt"] else 0.25
        assert row["udm_weight"] == pytest.approx(expected, rel=0.05)
    assert {round(value, 1) for value in trainer.eval_dataset["udm_weight"]} <= {1.0, 4.0, 0.2}
    trainer.train()


def test_weights_of_the_data_enter_the_loss(tmp_path):
    data = unpaired(4)
    heavy = data.add_column("udm_weight", [1.0 if label else 3.0 for label in data["label"]])
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0}
    losses = {}
    for name, rows in {"plain": data, "heavy": heavy, "ones": data.add_column("udm_weight", [1.0] * 4)}.items():
        trainer = make(BCOTrainer, BCOConfig, tmp_path / name, data=rows, **settings)
        seen = spied(trainer)
        trainer.train()
        losses[name] = logged(trainer, "loss")[0]
    rewards, label, _ = seen[0]
    by_class = [
        -torch.nn.functional.logsigmoid(sign * rewards[kind]).sum() for sign, kind in ((1, label), (-1, ~label))
    ]
    assert losses["heavy"] == pytest.approx((by_class[0] + 3 * by_class[1]).item() / 4, abs=1e-4)
    assert losses["ones"] == losses["plain"] == pytest.approx((by_class[0] + by_class[1]).item() / 4, abs=1e-4)


# --- what cannot be learned from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_are_refused(label, tmp_path):
    data = unpaired().filter(lambda row: row["label"] == label)
    with pytest.raises(ValueError, match=f"All 4 labels of the train dataset are {label}"):
        make(BCOTrainer, BCOConfig, tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.remove_columns("label"), "no column 'label'"),
        (lambda data: data.remove_columns("completion"), "no column 'completion'"),
        (lambda data: data.map(lambda row: {"completion": ""}), "8 of the 8 rows .* completion is empty"),
        (lambda data: data.remove_columns("label").add_column("label", [0.5] * 8), "neither true nor false"),
        (lambda data: data.add_column("udm_weight", [math.nan] + [1.0] * 7), "1 of the 8 rows .* finite number"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(BCOTrainer, BCOConfig, tmp_path, data=change(unpaired()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_shift": "mean"}, "reward_shift must be"),
        ({"loss_type": "kto"}, "BCO has a loss of its own"),
        ({"desirable_weight": 2.0}, "does not weigh classes"),
        ({"shift_decay": 1.5}, "shift_decay must be in"),
        ({"udm_min_weight": 3.0, "udm_max_weight": 2.0}, "udm_max_weight must be in"),
        ({"udm_penalty": 0.0}, "udm_penalty must be in"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BCOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_stream_cannot_be_embedded(tmp_path):
    with pytest.raises(ValueError, match="needs a map-style dataset"):
        make(partial(BCOTrainer, prompt_embedder=embed), BCOConfig, tmp_path, data=topics().to_iterable_dataset())


def test_a_stream_trains(tmp_path):
    make(BCOTrainer, BCOConfig, tmp_path, data=unpaired().to_iterable_dataset()).train()
