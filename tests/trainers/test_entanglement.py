"""Gradient entanglement: the arithmetic by hand, its guarantee on a model, and what stays TRL's bit for bit."""

import math
import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import tiny
from hf_logits.gradients import gradients, inner_product
from hf_logits.trainers import entanglement
from hf_logits.trainers.entanglement import EntanglementConfig, EntanglementTrainer, contrast_mask, gradient_factors
from hf_logits.trainers.entanglement_callback import EntanglementCallback, log_prob_changes
from preferences import distance, equal, logged, make, pairs, unpaired, weights


G_W, G_L = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 0.2], [2.0, 0.5]))
OFF: dict[str, Any] = {"gradient_norm": "none"}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def apart(rows: int = 8) -> Dataset:
    """Pairs that share no token but the last, which ends both."""
    found = pairs(rows).map(
        lambda row: {
            "chosen": " ".join(f"w{6 + int(word[1:]) % 20}" for word in row["chosen"].split()),
            "rejected": " ".join(f"w{30 + int(word[1:]) % 20}" for word in row["rejected"].split()),
        }
    )
    return found


def near_duplicates(rows: int = 12) -> Dataset:
    return pairs(rows).map(
        lambda row: {"rejected": re.sub(r"w(\d+)$", lambda word: f"w{6 + int(word[1]) % 57 + 1}", row["chosen"])}
    )


def both(config: dict[str, Any], tmp_path: Any, **settings: Any) -> tuple[EntanglementTrainer, DPOTrainer]:
    """Ours and the stock one, trained alike."""
    ours = make(EntanglementTrainer, EntanglementConfig, tmp_path / "ours", **settings, **config)
    stock = make(DPOTrainer, DPOConfig, tmp_path / "stock", **settings)
    ours.train()
    stock.train()
    return ours, stock


# --- the numbers ---------------------------------------------------------------------------------------------------------


def test_both_log_probs_fall_by_hand():
    inner, square_w, square_l = (one.sum().reshape(1) for one in (G_W * G_L, G_W**2, G_L**2))
    assert [round(one.item(), 6) for one in (inner, square_w, square_l)] == [2.1, 1.04, 4.25]
    assert math.isclose((inner / (square_w * square_l).sqrt()).item(), 0.998868, abs_tol=1e-6)
    up, down = log_prob_changes(square_w, square_l, inner, chosen_weight=1.0, rejected_weight=1.0)
    assert (up.item(), down.item(), (up - down).item()) == pytest.approx((-1.06, -2.15, 1.09))
    # the ratio of weights at which the chosen one begins to rise
    for ratio, rises in ((2.0192, False), (2.0193, True)):
        w, _ = log_prob_changes(square_w, square_l, inner, chosen_weight=ratio, rejected_weight=1.0)
        assert (w > 0).item() == rises
    for ratio, falls in ((0.4941, False), (0.4942, True)):
        _, down = log_prob_changes(square_w, square_l, inner, chosen_weight=1.0, rejected_weight=ratio)
        assert (down < 0).item() == falls


def test_the_changes_are_those_of_a_small_step():
    step = 2.0 * G_W - 3.0 * G_L
    squares = (G_W @ G_W)[None], (G_L @ G_L)[None], (G_W @ G_L)[None]
    up, down = log_prob_changes(*squares, chosen_weight=2.0, rejected_weight=3.0)
    assert (up.item(), down.item()) == pytest.approx(((G_W @ step).item(), (G_L @ step).item()))


def test_normalised_they_part_by_hand():
    norms = G_W.norm()[None], G_L.norm()[None]
    up, down = gradient_factors(*norms, scale="unit")
    step = up * G_W - down * G_L
    assert ((G_W @ step).item(), (G_L @ step).item()) == pytest.approx((0.00115428, -0.00233339), abs=1e-8)


def test_the_geometric_scale_keeps_the_product_of_the_norms():
    up, down = gradient_factors(numbers(4.0, 2.0), numbers(1.0, 2.0), scale="geometric")
    assert up.tolist() == [0.5, 1.0] and down.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("scale", ["unit", "geometric"])
def test_a_gradient_of_zero_stays_zero(scale):
    for factor in gradient_factors(numbers(0.0, 3.0), numbers(0.0, 0.0), scale=scale):
        assert factor.isfinite().all() and factor[0] == 0.0


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match='scale must be "unit" or "geometric"'):
        gradient_factors(numbers(1.0), numbers(1.0), scale="mean")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 9, 8], [[0, 0, 1, 0], [0, 0, 1, 0]]),  # one word differs
        ([5, 6], [7, 8], [[1, 1, 0, 0], [1, 1, 0, 0]]),  # nothing shared
        ([5, 6], [5, 6], [[0, 0, 0, 0], [0, 0, 0, 0]]),  # everything shared
        ([5], [9, 5, 7], [[0, 0, 0, 0], [1, 0, 1, 0]]),  # contained
    ],
)
def test_the_contrast_by_hand(chosen, rejected, expected):
    ids, mask = torch.zeros(2, 2, 6, dtype=torch.long)
    for place, completion in enumerate((chosen, rejected)):
        ids[place, :2] = torch.tensor([5, 7])  # of the prompt: neither aligned nor counted
        ids[place, 2 : 2 + len(completion)] = torch.tensor(completion)
        mask[place, 2 : 2 + len(completion)] = 1
    found = contrast_mask(ids, mask)
    assert found[:, :2].tolist() == [[0, 0], [0, 0]]
    assert found[:, 2:].tolist() == expected


# --- the same as DPO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["off", "factors of one", "contrast of all", "masks of one", "precomputed"])
def test_what_changes_nothing_is_stock_dpo_bit_for_bit(mode, accumulate, lora, tmp_path, monkeypatch):
    settings: dict[str, Any] = {"lora": lora, "gradient_accumulation_steps": accumulate, "data": apart()}
    config = OFF
    if mode in ("factors of one", "precomputed"):
        config = {"gradient_norm": "hidden"}
        settings["precompute_ref_log_probs"] = mode == "precomputed"
        monkeypatch.setattr(
            entanglement, "gradient_factors", lambda up, down, scale: (torch.ones_like(up), torch.ones_like(down))
        )
    elif mode == "contrast of all":
        config = OFF | {"token_mask": "contrast"}
        monkeypatch.setattr(entanglement, "contrast_mask", lambda ids, mask: mask.float())
    elif mode == "masks of one":
        config = OFF | {"token_mask": "learned", "mask_bias": 100.0, "mask_penalty": 0.0}
    ours, stock = both(config, tmp_path, **settings)
    assert equal(weights(ours), weights(stock))
    for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        assert logged(ours, key) == logged(stock, key)
    assert distance(weights(ours), weights(make(DPOTrainer, DPOConfig, tmp_path / "fresh", **settings))) > 0


@pytest.mark.parametrize("gradient_norm", ["hidden", "full"])
def test_normalising_changes_gradients_and_not_the_loss(gradient_norm, tmp_path):
    ours, stock = both({"gradient_norm": gradient_norm}, tmp_path, max_steps=1)
    assert logged(ours, "loss") == logged(stock, "loss")
    assert logged(ours, "logps/chosen") == logged(stock, "logps/chosen")
    assert not equal(weights(ours), weights(stock))


# --- the gradients -------------------------------------------------------------------------------------------------------


def batch_of(trainer: DPOTrainer, rows: int) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])


def sums(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    kwargs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return trainer.model(**kwargs, labels=labels, fused_lm_head=True).log_probs.sum(1)


@pytest.mark.parametrize("scale", ["unit", "geometric"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL calls them by their old names
def test_the_direction_of_a_batch_is_the_sum_of_normalised_pairs(lora, scale, checkpointing, tmp_path):
    trainer = make(
        EntanglementTrainer,
        EntanglementConfig,
        tmp_path,
        lora=lora,
        gradient_norm="full",
        gradient_scale=scale,
        gradient_checkpointing=checkpointing,
    )
    if lora:  # at first the second factor of an adapter is zero, and so is half of the gradient
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch_of(trainer, 2)
    named = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    rows = sums(trainer, inputs)
    each = [gradients(one, list(named.values())) for one in rows]
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs))
    margin = (rows - reference).detach()
    expected = [torch.zeros_like(one) for one in named.values()]
    for up, down in ((0, 2), (1, 3)):
        strength = 0.1 * torch.sigmoid(-0.1 * (margin[up] - margin[down])) / 2
        norm_w, norm_l = (inner_product(each[row], each[row]).sqrt() for row in (up, down))
        length = 1.0 if scale == "unit" else (norm_w * norm_l).sqrt()
        for place, (grad_w, grad_l) in enumerate(zip(each[up], each[down], strict=True)):
            expected[place] -= strength * length * (grad_w / norm_w - grad_l / norm_l)
    trainer.compute_loss(trainer.model, inputs).backward()
    for one, wanted in zip(named.values(), expected, strict=True):
        assert torch.allclose(one.grad, wanted, rtol=1e-4, atol=1e-6)


def test_norms_over_hidden_states_are_those_of_each_row_alone(tmp_path):
    trainer = make(EntanglementTrainer, EntanglementConfig, tmp_path)
    trainer.model.train()
    inputs = batch_of(trainer, 3)
    trainer.compute_loss(trainer.model, inputs)
    logged_norms = [trainer._metrics["train"][f"gradients/{name}"][0] for name in ("chosen", "rejected")]
    head, alone = trainer.model.lm_head, []
    for ids, attention, mask in zip(
        *(inputs[key] for key in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        length = int(attention.sum())
        hidden = trainer.model.base_model(input_ids=ids[None, :length]).last_hidden_state.detach().requires_grad_()
        log_probs = head(hidden)[0, :-1].log_softmax(-1).gather(1, ids[1:length, None])[:, 0]
        (gradient,) = torch.autograd.grad((log_probs * mask[1:length]).sum(), hidden)
        alone.append(gradient.norm().item())
    assert logged_norms == pytest.approx([sum(alone[:3]) / 3, sum(alone[3:]) / 3], rel=1e-4)


def test_a_filter_of_all_parameters_is_the_full_norm(tmp_path):
    settings = {"max_steps": 2}
    full = make(EntanglementTrainer, EntanglementConfig, tmp_path / "full", gradient_norm="full", **settings)
    some = make(
        EntanglementTrainer,
        EntanglementConfig,
        tmp_path / "some",
        gradient_norm="parameters",
        norm_parameters=".",
        **settings,
    )
    last = make(
        EntanglementTrainer,
        EntanglementConfig,
        tmp_path / "last",
        gradient_norm="parameters",
        norm_parameters=r"layers\.1\.",
        **settings,
    )
    for trainer in (full, some, last):
        trainer.train()
    assert equal(weights(full), weights(some))
    assert logged(last, "gradients/chosen")[0] < logged(full, "gradients/chosen")[0]


def changes(trainer_class: type, config: type, row: Dataset, tmp_path: Any, model: Any, **settings: Any) -> Tensor:
    """Of both log-probs, in one small step on one pair."""
    trainer = make(
        trainer_class,
        config,
        tmp_path,
        data=row,
        model=model,
        max_steps=1,
        per_device_train_batch_size=1,
        optim="sgd",
        max_grad_norm=0.0,
        **settings,
    )
    inputs = batch_of(trainer, 1)
    with torch.no_grad():
        before = sums(trainer, inputs)
    trainer.train()
    with torch.no_grad():
        return sums(trainer, inputs) - before


def test_pairs_that_dpo_drags_down_are_parted(tmp_path):
    """On a model that learnt the chosen completions a little, as before DPO."""
    data, learnt = near_duplicates(8), tiny.llama(0)
    tuned = make(
        DPOTrainer,
        DPOConfig,
        tmp_path / "sft",
        data=data,
        model=learnt,
        loss_type=["sft"],
        max_steps=10,
        learning_rate=1e-2,
    )
    tuned.train()
    state = {name: value.clone() for name, value in learnt.state_dict().items()}
    wrong = {"dpo": 0, "normalised": 0}
    for index in range(len(data)):
        for name, trainer_class, config, settings in (
            ("dpo", DPOTrainer, DPOConfig, {"learning_rate": 1e-4}),
            (
                "normalised",
                EntanglementTrainer,
                EntanglementConfig,
                {"learning_rate": 1e-2, "gradient_norm": "full", "gradient_scale": "unit"},
            ),
        ):
            model = tiny.llama(0)
            model.load_state_dict(state)
            up, down = changes(
                trainer_class, config, data.select([index]), tmp_path / name, model, **settings
            ).tolist()
            wrong[name] += up < 0 or down > 0
    assert wrong["dpo"] > 0
    assert wrong["normalised"] == 0


# --- the masks -----------------------------------------------------------------------------------------------------------


def test_the_margin_is_one_of_the_tokens_that_are_not_shared(tmp_path):
    trainer = make(
        EntanglementTrainer, EntanglementConfig, tmp_path, data=near_duplicates(2), token_mask="contrast", **OFF
    )
    inputs = batch_of(trainer, 2)
    mask = contrast_mask(inputs["input_ids"], inputs["completion_mask"])
    assert 0 < mask.sum() < inputs["completion_mask"].sum()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        reduced = {**inputs, "completion_mask": mask.long()}
        ratios = sums(trainer, reduced) - torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, reduced))
        whole = sums(trainer, inputs)
    up, down = ratios.chunk(2)
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.1 * (up - down)).mean().item(), abs=1e-6)
    metrics = trainer._metrics["eval"]
    assert metrics["logps/chosen_unmasked"] == pytest.approx([whole[:2].mean().item()], rel=1e-5)
    assert metrics["mask/chosen"][0] < 1.0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_masks_are_learned(lora, tmp_path):
    trainer = make(
        EntanglementTrainer,
        EntanglementConfig,
        tmp_path,
        lora=lora,
        token_mask="learned",
        mask_penalty=1.0,
        mask_learning_rate=0.1,
        max_steps=8,
        **OFF,
    )
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "mask/chosen")[0] == pytest.approx(1 / (1 + math.exp(-2.0)), abs=1e-5)
    assert logged(trainer, "mask/chosen")[-1] < 0.6  # the penalty presses on all
    assert trainer.mask_head.weight.abs().max() > 0
    assert distance(weights(trainer), before) > 0
    assert not any("mask" in name for name in weights(trainer))


def test_the_penalty_is_of_the_sum_of_a_pairs_masks(tmp_path):
    losses = []
    for penalty in (0.0, 0.5):
        trainer = make(
            EntanglementTrainer,
            EntanglementConfig,
            tmp_path,
            token_mask="learned",
            mask_penalty=penalty,
            mask_bias=0.0,
            **OFF,
        )
        inputs = batch_of(trainer, 2)
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, inputs).item())
    tokens = inputs["completion_mask"].sum().item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * 0.5 * tokens / 2, rel=1e-5)


def test_learned_masks_pass_their_gradient_through_the_reference_too(tmp_path):
    trainer = make(EntanglementTrainer, EntanglementConfig, tmp_path, token_mask="learned", mask_penalty=0.0, **OFF)
    trainer.model.train()
    inputs = batch_of(trainer, 2)

    def loss(bias: float) -> float:
        with torch.no_grad():
            trainer.mask_head.bias.fill_(bias)
            return trainer.compute_loss(trainer.model, inputs).double().item()

    slope = (loss(1.0 + 1e-2) - loss(1.0 - 1e-2)) / 2e-2
    trainer.mask_head.bias.data.fill_(1.0)
    trainer.compute_loss(trainer.model, inputs).backward()
    assert trainer.mask_head.bias.grad.item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(
    "config", [OFF | {"token_mask": "learned"}, {"gradient_norm": "hidden"}, {"gradient_norm": "full"}]
)
def test_resumed_training_is_unbroken_training(config, tmp_path):
    settings = config | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2.0}
    whole = make(EntanglementTrainer, EntanglementConfig, tmp_path / "whole", **settings)
    whole.train()
    resumed = make(EntanglementTrainer, EntanglementConfig, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(weights(resumed), weights(whole))
    if resumed.mask_head is not None:
        assert equal(dict(resumed.mask_head.state_dict()), dict(whole.mask_head.state_dict()))


def test_evaluation_knows_the_masks_and_no_gradients(tmp_path):
    trainer = make(
        EntanglementTrainer, EntanglementConfig, tmp_path, evaluation=pairs(4, seed=1), token_mask="contrast"
    )
    metrics = trainer.evaluate()
    assert "eval_mask/chosen" in metrics and "eval_gradients/chosen" not in metrics


# --- what cannot be meant ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_norm": "lora"}, "gradient_norm must be one of"),
        ({"gradient_scale": "mean"}, "gradient_scale must be one of"),
        ({"token_mask": "difflib"}, "token_mask must be one of"),
        ({"gradient_norm": "parameters"}, "norm_parameters, a regular expression"),
        ({"norm_parameters": "lora"}, "norm_parameters, a regular expression"),
        ({"token_mask": "contrast", "precompute_ref_log_probs": True}, "switch off precompute_ref_log_probs"),
        ({"token_mask": "learned", "use_weighting": True}, "use_weighting"),
        ({"mask_penalty": -1.0}, "mask_penalty must be in"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EntanglementConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_filter_without_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No trained parameter has a name with 'vision' in it"):
        make(EntanglementTrainer, EntanglementConfig, tmp_path, gradient_norm="parameters", norm_parameters="vision")


# --- the callback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_watched_run_ends_with_the_same_weights(lora, tmp_path):
    settings = {"lora": lora, "max_steps": 4, "learning_rate": 1e-2}
    plain = make(DPOTrainer, DPOConfig, tmp_path / "plain", **settings)
    plain.train()
    watched = make(DPOTrainer, DPOConfig, tmp_path / "watched", **settings)
    watched.add_callback(EntanglementCallback(watched, pairs=3, every=2))
    inputs = [watched.data_collator([watched.train_dataset[index]]) for index in range(3)]
    with torch.no_grad():
        before = torch.stack([sums(watched, one) for one in inputs])
    watched.train()
    with torch.no_grad():
        after = torch.stack([sums(watched, one) for one in inputs])
    assert equal(weights(watched), weights(plain))
    change = (after - before).mean(0).tolist()
    for name, expected in zip(("chosen", "rejected"), change, strict=True):
        found = logged(watched, f"entanglement/{name}_change")
        assert len(found) == 2
        assert found[-1] == pytest.approx(expected, abs=1e-4)
    for value in logged(watched, "entanglement/cosine"):
        assert -1 <= value <= 1
    assert 0 <= logged(watched, "entanglement/violated")[0] <= 1


def test_what_is_measured_is_what_autograd_says(tmp_path):
    trainer = make(DPOTrainer, DPOConfig, tmp_path)
    callback = EntanglementCallback(trainer, pairs=2)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    cosines, ratios = [], []
    for index in range(2):
        trainer.model.zero_grad()
        flat = []
        for place in range(2):
            sums(trainer, trainer.data_collator([trainer.train_dataset[index]]))[place].backward()
            flat.append(torch.cat([one.grad.flatten() for one in trainer.model.parameters()]))
            trainer.model.zero_grad()
        cosines.append(torch.nn.functional.cosine_similarity(*flat, dim=0).item())
        ratios.append((flat[0] @ flat[1] / (flat[0] @ flat[0])).item())
    found = callback.measure()
    assert found["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert found["inner_over_chosen"] == pytest.approx(sum(ratios) / 2, abs=1e-5)
    assert found["chosen_change"] == found["rejected_change"] == 0.0


def test_the_callback_watches_our_own_trainers_and_filters_parameters(tmp_path):
    trainer = make(EntanglementTrainer, EntanglementConfig, tmp_path, max_steps=2)
    trainer.add_callback(EntanglementCallback(trainer, every=1, parameters="lm_head"))
    trainer.train()
    assert len(logged(trainer, "entanglement/cosine")) == 2


def test_the_callback_needs_pairs(tmp_path):
    trainer = make(KTOTrainer, KTOConfig, tmp_path / "kto", data=unpaired())
    with pytest.raises(TypeError, match="needs a DPOTrainer"):
        EntanglementCallback(trainer)
    with pytest.raises(ValueError, match="must be at least 1"):
        EntanglementCallback(make(DPOTrainer, DPOConfig, tmp_path / "dpo"), every=0)
