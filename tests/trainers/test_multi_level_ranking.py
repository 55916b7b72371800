"""Multi-level ranking: numbers worked out by hand, both stages, and the teacher that the student was."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, MixtralForSequenceClassification

import distilling
import tiny
from distilling import ranked, rated, scorer
from hf_logits.trainers.multi_level_ranking import (
    MultiLevelRankingCollator,
    MultiLevelRankingConfig,
    MultiLevelRankingTrainer,
    mlr_loss,
    mlr_terms,
    self_distillation,
)
from preferences import arguments, distance, equal, logged, tokenizer, weights
from two_rows import gradient, has_right_gradient


def scores(*levels):
    return torch.tensor([levels], dtype=torch.float64)


GRADED = scores([0.9, 0.7], [0.65, 0.45], [0.5, 0.3])


# --- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "weighted", "expected"),
    [
        (GRADED, True, (0.4, 0.0, 0.0)),
        (GRADED, False, (0.2, 0.0, 0.0)),
        (GRADED.flip(1), True, (0.4, 0.0, 0.8)),
        (scores([1.0, 1.0], [0.6, 0.6], [0.2, 0.2]), True, (0.0, 0.0, 0.0)),
        (scores([1.0, 0.4], [0.1, 0.1]), True, (0.0, 0.2, 0.0)),
    ],
)
def test_numbers(given, weighted, expected):
    found = mlr_terms(given, torch.ones_like(given).bool(), margin=0.3, upper=0.1, weighted=weighted)
    assert [term.item() for term in found.values()] == pytest.approx(expected)
    assert mlr_loss(given, margin=0.3, upper=0.1, weighted=weighted).item() == pytest.approx(sum(expected))


def test_contexts_are_averaged():
    both = torch.cat([GRADED, GRADED.flip(1)])
    assert mlr_loss(both, margin=0.3, upper=0.1).item() == pytest.approx((0.4 + 1.2) / 2)


def test_levels_of_unequal_size():
    given = scores([0.9, 0.6], [0.6, -7.0], [0.2, 9.0])
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    expected = mlr_loss(scores([0.9, 0.6], [0.6, 0.6]), margin=0.4, upper=0.05)
    torch.testing.assert_close(mlr_loss(given, margin=0.4, upper=0.05, mask=mask), expected)
    slope = gradient(lambda s: mlr_loss(s, margin=0.4, upper=0.05, mask=mask), given)
    assert slope[~mask].abs().max() == 0.0 and slope[mask].abs().max() > 0.0


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_gradients_are_those_of_finite_differences(levels):
    given = torch.rand(2, levels, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert has_right_gradient(lambda s: mlr_loss(s, margin=0.3, upper=0.1), given)


def test_one_response_a_level_ties_and_large_scores():
    assert mlr_loss(scores([0.5], [0.5]), margin=0.3, upper=0.1).item() == pytest.approx(0.3)
    assert gradient(lambda s: mlr_loss(s, margin=0.3, upper=0.1), scores([0.5], [0.5])).isfinite().all()
    assert mlr_loss(1e30 * GRADED.float(), margin=0.3, upper=0.1).isfinite()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"margin": -0.1}, "margin"),
        ({"upper": float("nan")}, "upper"),
        ({"scores": GRADED[:, :1]}, "levels"),
        ({"scores": GRADED[0]}, "shape"),
        ({"scores": GRADED[:0]}, "shape"),
    ],
)
def test_bad_input_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        mlr_loss.__wrapped__(**{"scores": GRADED, "margin": 0.3, "upper": 0.1} | change)


def test_self_distillation_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        {"hidden_states": [torch.randn(2, 3, 4, generator=generator)], "attentions": [torch.rand(2, 5, 3, 3, generator=generator)]}
        for _ in range(2)
    )  # fmt: skip
    mask = torch.tensor([[True, True, True], [False, True, True]])
    found = self_distillation(ours, theirs, mask)
    hidden = (ours["hidden_states"][0] - theirs["hidden_states"][0]).square()
    attention = (ours["attentions"][0] - theirs["attentions"][0]).square()
    torch.testing.assert_close(found["hidden_states"], torch.stack([hidden[0].mean(), hidden[1, 1:].mean()]))
    torch.testing.assert_close(found["attentions"], torch.stack([attention[0].mean(), attention[1, :, 1:, 1:].mean()]))
    whole = self_distillation(ours, theirs, torch.ones_like(mask))
    torch.testing.assert_close(whole["hidden_states"].mean(), hidden.mean())


# --- the trainer ---------------------------------------------------------------------------------------------------------


def llama(seed=0, **config: Any):
    made = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=64, num_labels=1, attn_implementation="eager", **tiny._SMALL, **tiny._IDS, **config)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return made


def make(folder, stage="ranking", model=None, data=None, evaluation=None, **settings):
    return distilling.make(
        MultiLevelRankingTrainer,
        MultiLevelRankingConfig,
        folder,
        kind=stage,
        model=model,
        data=data,
        evaluation=evaluation,
        **settings,
    )


def test_the_collator_gives_one_forward():
    rows = [
        {"context": "w6", "responses": [["w7", "w8"], ["w9"]]},
        {"context": "w10 w11", "responses": [["w12"], ["w13"], ["w14", "w15", "w16"]]},
    ]
    batch = MultiLevelRankingCollator(tokenizer(), max_length=8)(rows)
    assert batch["response_mask"].sum().item() == len(batch["input_ids"]) == 8
    assert batch["response_mask"].shape == (2, 3, 3)
    texts = tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["w6 w7", "w6 w8", "w6 w9", *(f"w10 w11 w{i}" for i in range(12, 17))]


@pytest.mark.parametrize("build", [scorer, llama], ids=["bert", "llama"])
def test_the_loss_is_that_of_the_formula(build, tmp_path):
    trainer = make(tmp_path, model=build(), learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    found = []
    for row in ranked():
        width = max(map(len, row["responses"]))
        grid, mask = torch.zeros(1, 3, width), torch.zeros(1, 3, width, dtype=torch.bool)
        for i, level in enumerate(row["responses"]):
            for j, response in enumerate(level):
                inputs = tokenizer()(row["context"], response, return_tensors="pt")
                inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
                grid[0, i, j], mask[0, i, j] = trainer.model.eval()(**inputs).logits[0, 0].sigmoid(), True
        found.append(mlr_loss(grid, margin=0.3, upper=0.1, mask=mask))
    if build is llama:  # its rotary positions do not mind padding on the left
        assert logged(trainer, "loss")[0] == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)
    parts = sum(logged(trainer, f"mlr/{name}")[0] for name in ("separation", "compactness", "ordering"))
    assert logged(trainer, "loss")[0] == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("stage", ["ranking", "rating"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_learns_and_evaluates(stage, lora, tmp_path):
    model = scorer()
    if lora:
        config = LoraConfig(r=8, lora_alpha=64, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(model, config)
    data = ranked() if stage == "ranking" else rated()
    trainer = make(
        tmp_path,
        stage,
        model,
        data,
        data,
        max_steps=30,
        learning_rate=3e-3,
        distillation_weight=0.1,
        per_device_train_batch_size=8,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < before
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == predicted.label_ids.shape == ((8, 3) if stage == "ranking" else (8,))


def test_self_distillation_starts_at_zero_and_holds_back(tmp_path):
    moved = []
    for weight in (0.1, 100.0):
        trainer = make(tmp_path, "rating", max_steps=10, distillation_weight=weight, learning_rate=1e-3)
        before = weights(trainer)
        trainer.train()
        parts = [logged(trainer, f"mlr/{name}") for name in ("hidden_states", "attentions", "scores")]
        moved.append(sum(part[-1] for part in parts))
        assert distance(before, weights(trainer)) > 0
        assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
        assert equal(before, dict(trainer.teacher.named_parameters()))
    assert moved[1] < moved[0]
    still = make(
        tmp_path, "rating", scorer(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), learning_rate=0.0
    )
    still.train()
    assert (
        logged(still, "mlr/hidden_states")
        == logged(still, "mlr/attentions")
        == logged(still, "mlr/scores")
        == [0.0] * 3
    )


def test_the_disabled_adapter_is_the_teacher(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    trainer = make(tmp_path, "rating", get_peft_model(llama(), config), learning_rate=0.0, max_steps=1)
    assert trainer.teacher is None
    trainer.train()
    assert logged(trainer, "mlr/hidden_states")[0] > 1e-3
    with trainer._teaching() as teacher:
        batch = MultiLevelRankingCollator(tokenizer(), 16)(list(rated(2)))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(teacher(**inputs).logits, llama().eval()(**inputs).logits)


def test_a_weight_of_zero_is_a_squared_error(tmp_path):
    trainer = make(
        tmp_path, "rating", llama(), distillation_weight=0.0, learning_rate=0.0, per_device_train_batch_size=8
    )
    assert trainer.teacher is None
    trainer.train()
    batch = MultiLevelRankingCollator(tokenizer(), 16)(list(rated()))
    logits = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = (1 + 4 * logits.sigmoid() - batch["ratings"]).square().mean()
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_that_is_saved_under_other_names_is_resumed(tmp_path):
    """Mixtral's experts are saved one by one."""
    config = MixtralConfig(vocab_size=64, num_labels=1, num_local_experts=2, **tiny._SMALL, **tiny._IDS)
    settings = {"save_steps": 2, "save_strategy": "steps"}

    def build():
        return distilling._spread(MixtralForSequenceClassification(config), 0)

    unbroken = make(tmp_path / "unbroken", model=build(), max_steps=4, **settings)
    unbroken.train()
    make(tmp_path / "broken", model=build(), max_steps=2, **settings).train()
    resumed = make(tmp_path / "broken", model=build(), max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(unbroken), weights(resumed))


@pytest.mark.parametrize("stage", ["ranking", "rating"])
def test_a_stream_is_the_same_as_its_table(stage, tmp_path):
    losses = []
    for streamed in (False, True):
        data = distilling.SCORES[stage][1](4)
        trainer = distilling.make(
            MultiLevelRankingTrainer,
            MultiLevelRankingConfig,
            tmp_path,
            kind=stage,
            data=data.to_iterable_dataset() if streamed else data,
            evaluation=data.to_iterable_dataset() if streamed else data,
            max_steps=1,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_another_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'ranking' or 'rating'"):
        arguments(MultiLevelRankingConfig, tmp_path, stage="both")


def test_resuming_from_another_model_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    make(tmp_path, "rating", **settings).train()
    with pytest.raises(ValueError, match="another model"):
        make(tmp_path, "rating", scorer(7), **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": scorer(num_labels=3)}, "num_labels=1"),
        ({"stage": "rating", "model": scorer(attn_implementation="sdpa")}, "eager"),
        ({"data": rated()}, "responses"),
        ({"stage": "rating", "data": ranked()}, "rating"),
        ({"data": Dataset.from_list([{"context": "w6", "responses": [["w7"]]}])}, "two levels"),
        ({"data": Dataset.from_list([{"context": "w6", "responses": [["w7"], []]}])}, "no responses"),
        ({"margin": -1.0}, "margin"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"rating_range": (5.0, 1.0)}, "rating_range"),
        ({"distillation_weight": -5.0}, "distillation_weight"),
    ],
)
def test_bad_settings_are_refused(given, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        make(tmp_path, **given)
