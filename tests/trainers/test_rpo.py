"""RPO: the card's numbers, the identities, and stock DPO as the judge."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from hf_logits.trainers.rpo import RPOConfig, RPOTrainer, rpo_loss, rpo_penalty
from preferences import arguments, distance, equal, logged, make, pairs, weights


def numbers(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


CARD = numbers(-12.0), numbers(-9.0), numbers(-11.5), numbers(-9.5), torch.tensor([4])
"""Log-probs of chosen and rejected, those of the reference, and the length of chosen."""


# --- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "eta", "reduction", "expected"),
    [
        (0.05, 0.0, "sum", 0.718460),
        (0.05, 0.005, "sum", 0.721460),
        (0.5, 0.0, "sum", 0.974077),
        (0.5, 0.2, "sum", 2.174077),
        (0.5, 0.2, "mean", 1.574077),
        (0.5, 0.2, "token_mean", 1.574077),
    ],
)
def test_numbers_of_the_card(beta, eta, reduction, expected):
    loss = rpo_loss(*CARD, beta=beta, eta=eta, reduction=reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sums = [-torch.rand(3, dtype=torch.float64, generator=generator) * 9 for _ in range(4)]
    return *sums, torch.tensor([2, 5, 3])


def test_the_three_averages_by_hand():
    chosen, _, _, _, lengths = random_batch()
    rows = list(zip(chosen.tolist(), lengths.tolist(), strict=True))
    expected = {
        "sum": -0.3 * sum(total for total, _ in rows) / 3,
        "mean": -sum(total / length for total, length in rows) / 3,
        "token_mean": -sum(total for total, _ in rows) / 10,
    }
    for reduction, value in expected.items():
        assert rpo_penalty(chosen, lengths, beta=0.3, reduction=reduction).item() == pytest.approx(value)


def test_the_gradient_of_the_chosen_log_prob_moves_by_eta_beta():
    batch = random_batch()
    gradients = []
    for eta in (0.0, 0.2):
        chosen = batch[0].clone().requires_grad_()
        rpo_loss(chosen, *batch[1:], beta=0.3, eta=eta, reduction="sum").backward()
        gradients.append(chosen.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], torch.full((3,), -0.2 * 0.3 / 3, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
def test_gradients_are_those_of_finite_differences(reduction):
    *sums, lengths = random_batch()
    assert torch.autograd.gradcheck(
        lambda *x: rpo_loss(*x, lengths, beta=0.3, eta=0.2, reduction=reduction), [x.requires_grad_() for x in sums]
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
def test_no_log_prob_is_too_large(reduction):
    grid = torch.tensor([-10_000.0, -1.0, 0.0])
    sums = [part.flatten().clone().requires_grad_() for part in torch.meshgrid(*[grid] * 4, indexing="ij")]
    lengths = torch.arange(81) % 3  # an empty completion too
    loss = rpo_loss(*sums, lengths, beta=0.5, eta=0.2, reduction=reduction)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, sums))


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
def test_an_eta_of_zero_is_dpo(reduction):
    *sums, lengths = random_batch()
    margin = 0.3 * ((sums[0] - sums[2]) - (sums[1] - sums[3]))
    expected = torch.nn.functional.softplus(-margin).mean()
    torch.testing.assert_close(rpo_loss(*sums, lengths, beta=0.3, eta=0.0, reduction=reduction), expected)


def test_an_unknown_reduction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="token_mean"):
        rpo_loss(*CARD, beta=0.1, eta=0.1, reduction="batchmean")
    with pytest.raises(ValueError, match="token_mean"):
        arguments(RPOConfig, tmp_path, rpo_reduction="batchmean")
    with pytest.raises(ValueError, match="rpo_eta"):
        arguments(RPOConfig, tmp_path, rpo_eta=-0.1)
    with pytest.raises(ValueError, match="rpo_eta"):
        arguments(RPOConfig, tmp_path, rpo_eta=float("nan"))


# --- the trainer ---------------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"lora": True},
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2},
    {"precompute_ref_log_probs": True},
    {"ld_alpha": 0.5, "use_weighting": True},
    {"loss_type": ["ipo"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "plain")
def test_an_eta_of_zero_is_stock_dpo_bit_for_bit(settings, tmp_path):
    stock = make(DPOTrainer, DPOConfig, tmp_path / "stock", **settings)
    ours = make(RPOTrainer, RPOConfig, tmp_path / "ours", rpo_eta=0.0, **settings)
    stock.train()
    ours.train()
    assert equal(weights(stock), weights(ours))
    assert logged(stock, "loss") == logged(ours, "loss")


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=lambda settings: "-".join(settings) or "plain")
def test_the_token_mean_is_the_sft_loss_of_trl(settings, tmp_path):
    """Up to how TRL averages: over the tokens of a micro-batch, so with completions of one length."""
    data = pairs(8).map(lambda row: {"chosen": " ".join(row["chosen"].split()[:2])})
    common = {"data": data, "beta": 0.1, "optim": "sgd", "learning_rate": 1e-2} | settings
    stock = make(
        DPOTrainer, DPOConfig, tmp_path / "stock", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], **common
    )
    stock.train()
    for reduction in ("mean", "token_mean"):
        ours = make(RPOTrainer, RPOConfig, tmp_path / reduction, rpo_eta=0.2, rpo_reduction=reduction, **common)
        ours.train()
        assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
        assert distance(weights(stock), weights(ours)) < 1e-6


def test_the_loss_is_that_of_the_formula_and_the_term_is_logged(tmp_path):
    for reduction in ("sum", "mean", "token_mean"):
        common = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4}
        stock = make(DPOTrainer, DPOConfig, tmp_path, **common)
        ours = make(RPOTrainer, RPOConfig, tmp_path, rpo_eta=0.3, rpo_reduction=reduction, **common)
        stock.train()
        ours.train()
        (nll,) = logged(ours, "rpo/nll")
        assert logged(ours, "loss")[0] == pytest.approx(logged(stock, "loss")[0] + 0.3 * nll, abs=2e-4)
        if reduction == "sum":
            assert nll == pytest.approx(-0.1 * logged(stock, "logps/chosen")[0], rel=1e-5)


def test_weightings_of_the_preference_loss_leave_the_likelihood_alone(tmp_path):
    terms = []
    for settings in ({}, {"ld_alpha": 0.0, "use_weighting": True}):
        ours = make(RPOTrainer, RPOConfig, tmp_path, learning_rate=0.0, max_steps=1, **settings)
        ours.train()
        terms.append(logged(ours, "rpo/nll"))
    assert terms[0] == terms[1]


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
def test_evaluation_adds_the_term_too(reduction, tmp_path):
    data = pairs(4, seed=5)
    ours = make(
        RPOTrainer, RPOConfig, tmp_path, data=data, evaluation=data, rpo_eta=0.3, rpo_reduction=reduction,
        learning_rate=0.0, per_device_train_batch_size=4, max_steps=1,
    )  # fmt: skip
    ours.train()
    found = ours.evaluate()
    assert found["eval_loss"] == pytest.approx(logged(ours, "loss")[0], rel=1e-5)
    assert found["eval_rpo/nll"] == pytest.approx(logged(ours, "rpo/nll")[0], rel=1e-5)


def test_the_chosen_completion_is_displaced_less(tmp_path):
    """Near-duplicate pairs: DPO lowers both log-probs, RPO lowers the chosen one less, the more so the larger eta."""
    data = pairs(8).map(lambda row: {"rejected": " ".join(row["chosen"].split()[:-1] + ["w4"])})
    changes = []
    for eta in (0.0, 0.2, 2.0):
        ours = make(
            RPOTrainer, RPOConfig, tmp_path, data=data, rpo_eta=eta, optim="sgd", learning_rate=0.1, max_steps=8,
            per_device_train_batch_size=8, max_grad_norm=0.0,
        )  # fmt: skip
        ours.train()
        likelihood = logged(ours, "logps/chosen")
        changes.append(likelihood[-1] - likelihood[0])
    assert changes[0] < changes[1] < changes[2]
