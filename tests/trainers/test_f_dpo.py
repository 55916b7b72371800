"""f-DPO: the card's numbers, the identities, extreme log-ratios, and TRL as the judge where it has the divergence."""

import math

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from hf_logits.trainers.f_dpo import DIVERGENCES, FDPOConfig, FDPOTrainer, divergence_score, f_dpo_loss
from preferences import arguments, distance, equal, logged, make, pairs, weights


Z = torch.tensor([1.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
NUMBERS = [  # divergence, alpha, difference of scores and loss at Z with beta 0.1
    ("reverse_kl", None, 3.0, 0.554355),
    ("forward_kl", None, 7.021177, 0.402484),
    ("js", None, 1.813666, 0.606570),
    ("alpha", 0.3, 3.604335, 0.529082),
    ("alpha", 0.5, 4.223502, 0.504106),
    ("alpha", 0.7, 5.083735, 0.470924),
    ("hellinger", None, 2.111751, 0.593124),
    ("jeffreys", None, 10.021177, 0.312693),
    ("chi2_kl", None, 5.582947, 0.452466),
    ("neyman_chi2", None, 54.462815, 0.004303),
]
SLOPES = {  # f''(u) u, in z = log u
    "reverse_kl": lambda z: torch.ones_like(z),
    "forward_kl": lambda z: (-z).exp(),
    "js": lambda z: torch.sigmoid(-z),
    "alpha": lambda z: (-0.4 * z).exp(),
    "hellinger": lambda z: (-z / 2).exp() / 2,
    "neyman_chi2": lambda z: 2 * (-2 * z).exp(),
    "jeffreys": lambda z: 1 + (-z).exp(),
    "chi2_kl": lambda z: z.exp() + 1,
}
ALL = [(name, 0.4 if name == "alpha" else None) for name in DIVERGENCES]
EXTREMES = [-10_000.0, -1000.0, -161.0, -160.0, -101.0, -100.0, -30.0, 0.0, 30.0, 100.0, 10_000.0]


# --- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "alpha", "difference", "loss"), NUMBERS)
def test_numbers_of_the_card(divergence, alpha, difference, loss):
    scores = [divergence_score(z, divergence=divergence, alpha=alpha) for z in Z]
    assert (scores[0] - scores[1]).item() == pytest.approx(difference, abs=1e-6)
    assert f_dpo_loss(*Z, beta=0.1, divergence=divergence, alpha=alpha).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("divergence", "alpha"), ALL)
def test_the_slope_is_that_of_the_divergence_and_the_reference_scores_zero(divergence, alpha):
    z = torch.linspace(-10, 10, 41, dtype=torch.float64, requires_grad=True)
    score = divergence_score(z, divergence=divergence, alpha=alpha)
    (slope,) = torch.autograd.grad(score.sum(), z)
    torch.testing.assert_close(slope, SLOPES[divergence](z.detach()))
    assert divergence_score(torch.zeros(1), divergence=divergence, alpha=alpha).item() == 0
    assert (score.diff() > 0).all()


@pytest.mark.parametrize(("divergence", "alpha"), ALL)
def test_equal_log_ratios_lose_log_2(divergence, alpha):
    z = torch.linspace(-20, 20, 9)
    loss = f_dpo_loss(z, z.clone(), beta=0.3, divergence=divergence, alpha=alpha)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("divergence", "alpha"), ALL)
def test_gradients_are_those_of_finite_differences(divergence, alpha):
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda *z: f_dpo_loss(*z, beta=0.1, divergence=divergence, alpha=alpha), z, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "alpha"), [*ALL, ("alpha", 0.999), ("alpha", 1e-6)])
def test_no_log_ratio_is_too_large(divergence, alpha, dtype):
    grid = torch.tensor(EXTREMES, dtype=dtype)
    z = [side.flatten().clone().requires_grad_() for side in torch.meshgrid(grid, grid, indexing="ij")]
    loss = f_dpo_loss(*z, beta=0.1, divergence=divergence, alpha=alpha)
    gradients = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    if dtype != torch.float16:  # its largest number is 65,504
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("divergence", "alpha"), ALL)
def test_far_away_the_order_stays_and_the_gradient_does_not_die(divergence, alpha):
    """Where TRL's clamp and its overflow give a difference of zero, or NaN."""
    z = torch.tensor([-10_000.0, -300.0, -200.0, -101.0, -100.0], requires_grad=True)
    score = divergence_score(z, divergence=divergence, alpha=alpha)
    assert (score.diff() > 0).all()
    (gradient,) = torch.autograd.grad(score.sum(), z)
    assert (gradient > 0).all()
    worse, better = torch.tensor([-300.0], requires_grad=True), torch.tensor([-200.0])
    (pull,) = torch.autograd.grad(f_dpo_loss(worse, better, beta=0.1, divergence=divergence, alpha=alpha), worse)
    assert pull.item() < 0
    norm = torch.linalg.vector_norm(pull.expand(10_000))
    assert norm.isfinite()


def test_small_alpha_is_the_reverse_and_alpha_near_1_the_forward_kl():
    z = [torch.tensor([1.0, -3.0, 0.1]), torch.tensor([-2.0, 2.0, 0.0])]
    near_0, near_1 = (f_dpo_loss(*z, beta=0.1, divergence="alpha", alpha=alpha) for alpha in (1e-6, 1 - 1e-6))
    assert near_0.item() == pytest.approx(f_dpo_loss(*z, beta=0.1, divergence="reverse_kl").item(), abs=1e-5)
    assert near_1.item() == pytest.approx(f_dpo_loss(*z, beta=0.1, divergence="forward_kl").item(), abs=1e-4)


def test_hellinger_is_alpha_one_half_at_half_the_beta():
    first = f_dpo_loss(*Z, beta=0.4, divergence="hellinger")
    torch.testing.assert_close(first, f_dpo_loss(*Z, beta=0.2, divergence="alpha", alpha=0.5))


@pytest.mark.parametrize(
    ("divergence", "alpha", "message"),
    [
        ("pearson_chi2", None, "above -2"),
        ("chi2", None, "chi2_kl"),
        ("le_cam", None, "above -3"),
        ("total_variation", None, "no inverse"),
        ("renyi", None, "must be one of reverse_kl"),
        ("alpha", None, "needs alpha"),
        ("alpha", 0.0, "reverse_kl"),
        ("alpha", 1.0, "1 - alpha"),
        ("alpha", -0.5, "between 0 and 1"),
        ("js", 0.5, "belongs to"),
    ],
)
def test_a_divergence_that_breaks_the_conditions_is_refused_with_the_reason(divergence, alpha, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        f_dpo_loss(*Z, beta=0.1, divergence=divergence, alpha=alpha)
    with pytest.raises(ValueError, match=message):
        arguments(FDPOConfig, tmp_path, divergence=divergence, divergence_alpha=alpha)


def test_names_of_trl_are_understood():
    for theirs, ours in {"js_divergence": "js", "alpha_divergence": "alpha", "chi2+KL": "chi2_kl"}.items():
        alpha = 0.5 if ours == "alpha" else None
        assert torch.equal(*(f_dpo_loss(*Z, beta=0.1, divergence=name, alpha=alpha) for name in (theirs, ours)))


# --- the trainer ---------------------------------------------------------------------------------------------------------

STOCK = [  # ours, TRL's
    ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    (
        {"divergence": "alpha", "divergence_alpha": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
]
SETTINGS = [
    {},
    {"lora": True},
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2},
    {"precompute_ref_log_probs": True},
    {"ld_alpha": 0.5, "use_weighting": True},
    {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.3, 0.1]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "plain")
def test_the_reverse_kl_is_stock_dpo_bit_for_bit(settings, tmp_path):
    stock = make(DPOTrainer, DPOConfig, tmp_path / "stock", **settings)
    ours = make(FDPOTrainer, FDPOConfig, tmp_path / "ours", divergence="reverse_kl", **settings)
    stock.train()
    ours.train()
    assert equal(weights(stock), weights(ours))
    assert logged(stock, "loss") == logged(ours, "loss")


@pytest.mark.parametrize(
    ("divergence", "theirs", "settings"),
    [(*STOCK[0], {}), (*STOCK[1], {}), *((*STOCK[2], settings) for settings in SETTINGS)],
    ids=lambda value: "-".join(value) or "plain",
)
def test_what_trl_has_comes_out_the_same(divergence, theirs, settings, tmp_path):
    common = {"optim": "sgd", "learning_rate": 1e-2, "beta": 0.1}
    stock = make(DPOTrainer, DPOConfig, tmp_path / "stock", **theirs, **settings, **common)
    ours = make(FDPOTrainer, FDPOConfig, tmp_path / "ours", **divergence, **settings, **common)
    stock.train()
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=2e-4)
    assert distance(weights(stock), weights(ours)) < 1e-5


def test_the_logged_rewards_are_those_of_the_divergence(tmp_path):
    ours = make(FDPOTrainer, FDPOConfig, tmp_path, divergence="forward_kl", max_steps=1, learning_rate=0.0)
    stock = make(DPOTrainer, DPOConfig, tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=2)
    ours.train()
    stock.train()
    for side in ("chosen", "rejected"):
        assert logged(ours, f"logps/{side}") == logged(stock, f"logps/{side}")
        # 1 - e^-z is below z
        assert logged(ours, f"rewards/{side}")[0] < logged(stock, f"rewards/{side}")[0]
    loss = math.log1p(math.exp(-logged(ours, "rewards/margins")[0]))
    assert loss <= logged(ours, "loss")[0] + 1e-4  # Jensen


def test_a_policy_far_from_its_reference_trains_on(tmp_path):
    """The forward KL of completions that the policy has lost: TRL's loss is NaN there."""
    model = _far_away()
    ours = make(FDPOTrainer, FDPOConfig, tmp_path, divergence="forward_kl", model=model, max_steps=2)
    ours.train()
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(ours, key))
    assert all(value.isfinite().all() for value in weights(ours).values())
    assert logged(ours, "grad_norm")[0] > 0
    theirs = make(DPOTrainer, DPOConfig, tmp_path, f_divergence_type="forward_kl", model=_far_away(), max_steps=1)
    theirs.train()
    assert not all(value.isfinite().all() for value in weights(theirs).values())


def _far_away():
    import tiny

    model = tiny.llama(0)
    model.lm_head.weight.data *= 40
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"f_divergence_type": "js_divergence"}, "instead of TRL's"),
        ({"f_alpha_divergence_coef": 0.3}, "1 - f_alpha_divergence_coef"),
        ({"loss_type": ["bco_pair"]}, "cancels only"),
        ({"loss_type": ["aot"]}, "cancels only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(FDPOConfig, tmp_path, **settings)


def test_other_losses_go_with_the_reverse_kl(tmp_path):
    assert arguments(FDPOConfig, tmp_path, divergence="reverse_kl", loss_type=["aot"]).loss_type == ["aot"]


def test_evaluation_scores_as_training_does(tmp_path):
    data = pairs(4, seed=5)
    ours = make(
        FDPOTrainer, FDPOConfig, tmp_path, data=data, evaluation=data, divergence="jeffreys", learning_rate=0.0,
        per_device_train_batch_size=4, max_steps=1,
    )  # fmt: skip
    ours.train()
    assert ours.evaluate()["eval_loss"] == pytest.approx(logged(ours, "loss")[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_virtual_tokens_of_prompt_tuning_are_left_out(tmp_path):
    from peft import PromptTuningConfig

    import tiny
    from preferences import tokenizer

    losses = []
    for trainer, config, settings in (
        (DPOTrainer, DPOConfig, {"f_divergence_type": "js_divergence"}),
        (FDPOTrainer, FDPOConfig, {"divergence": "js"}),
    ):
        tuned = trainer(
            model=tiny.llama(0),
            args=arguments(config, tmp_path, **settings),
            train_dataset=pairs(),
            processing_class=tokenizer(),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )
        tuned.train()
        losses.append(logged(tuned, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
