"""USKD: numbers worked out by hand, both rankings, mixup, and extreme logits."""

import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import distilling
import tiny
from hf_logits.class_logits import label_mask
from hf_logits.tasks import valid_rows
from hf_logits.trainers.logit_distillation import LogitDistillationConfig, LogitDistillationTrainer
from hf_logits.trainers.uskd import (
    USKDConfig,
    USKDTrainer,
    rank_scores,
    soft_targets,
    uskd_loss,
    uskd_terms,
    zipf_weights,
)
from preferences import arguments, equal, logged, weights
from two_rows import gradient, has_right_gradient, labels, random, student, teacher


def weak():
    return torch.tensor([[0.5, 0.1, -0.2, 0], [0, 0.3, 0.4, -0.1]], dtype=torch.float64)


def terms(ranking="paper", zipf="official", limit=None, s=None, w=None, y=None):
    given = [standard if mine is None else mine for mine, standard in ((s, student()), (w, weak()), (y, labels()))]
    return uskd_terms(*given, ranking=ranking, zipf=zipf, limit=limit)


def scores(ranking):
    return rank_scores(student().log_softmax(-1), weak().log_softmax(-1), label_mask(labels(), 4), ranking=ranking)


def test_soft_targets():
    onehot = label_mask(labels(), 4).double()
    found = soft_targets(student().log_softmax(-1), onehot)
    torch.testing.assert_close(found.sum(-1), found.new_tensor([0.862656, 1.137344]), atol=1e-6, rtol=0)
    assert found.sum().item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("ranking", "order", "loss"),
    [("official", [[0, 1, 3, 2], [1, 3, 0, 2]], 1.085556), ("paper", [[0, 1, 3, 2], [1, 2, 0, 3]], 1.100941)],
)
def test_rankings(ranking, order, loss):
    ranks = scores(ranking).argsort(-1, descending=True).argsort(-1)
    assert ranks.tolist() == order
    assert terms(ranking)["non_target"].mean().item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("zipf", "expected"),
    [("official", [0, 0.461538, 0.230769, 0.307692]), ("compact", [0, 0.545455, 0.181818, 0.272727])],
)
def test_zipf(zipf, expected):
    found = zipf_weights(scores("paper"), label_mask(labels(), 4), zipf=zipf, limit=None)
    torch.testing.assert_close(found[0], found.new_tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[:, 0]))


def test_the_loss_is_the_weighted_sum():
    parts = terms()
    expected = 0.3 * parts["target"] + 0.2 * parts["non_target"] + 0.1 * parts["weak"]
    found = uskd_loss(student(), weak(), labels(), alpha=0.3, beta=0.2, mu=0.1)
    torch.testing.assert_close(found, expected.mean())
    assert uskd_loss(student(), weak(), labels(), alpha=0.0, beta=0.0, mu=0.0).item() == 0.0


def test_the_weak_part_is_a_smoothed_cross_entropy():
    expected = torch.nn.functional.cross_entropy(weak(), labels(), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(terms()["weak"], expected)


def test_the_target_part_by_hand():
    log_p = student().log_softmax(-1).gather(-1, labels()[:, None])[:, 0]
    expected = -log_p * log_p.new_tensor([0.862656, 1.137344])
    torch.testing.assert_close(terms()["target"], expected, atol=1e-5, rtol=0)


def test_a_limit_keeps_the_best_ranks():
    is_label = label_mask(labels(), 4)
    whole = zipf_weights(scores("paper"), is_label, zipf="official", limit=None)
    torch.testing.assert_close(zipf_weights(scores("paper"), is_label, zipf="official", limit=9), whole)
    # ranks 1 and 2 of the first row are the label and class 1
    found = zipf_weights(scores("paper"), is_label, zipf="official", limit=2)
    assert found[0].tolist() == [0, 1, 0, 0] and (found > 0).sum(-1).max() <= 2
    assert terms(limit=1)["non_target"][0].item() == 0.0  # the label alone


def test_gradients_are_those_of_finite_differences_of_fixed_targets():
    """Targets and ranks are detached: held still, the loss is a sum of cross-entropies."""
    onehot = label_mask(labels(), 4)
    target = soft_targets(student().log_softmax(-1), onehot.double())
    zipf = zipf_weights(scores("paper"), onehot, zipf="official", limit=None)

    def held(s, w):
        others = s.masked_fill(onehot, -math.inf).log_softmax(-1).masked_fill(onehot, 0.0)
        smooth = 0.9 * onehot + 0.025
        return -(target * s.log_softmax(-1) + 0.2 * zipf * others + 0.3 * smooth * w.log_softmax(-1)).sum(-1).mean()

    def loss(s, w):
        return uskd_loss(s, w, labels(), alpha=1.0, beta=0.2, mu=0.3)

    assert has_right_gradient(held, student(), weak())
    torch.testing.assert_close(loss(student(), weak()), held(student(), weak()))
    torch.testing.assert_close(
        gradient(lambda s: loss(s, weak()), student()), gradient(lambda s: held(s, weak()), student())
    )
    torch.testing.assert_close(
        gradient(lambda w: loss(student(), w), weak()), gradient(lambda w: held(student(), w), weak())
    )


# --- soft labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["paper", "official"])
@pytest.mark.parametrize("zipf", ["official", "compact"])
def test_one_hot_labels_are_class_ids(ranking, zipf):
    hard, soft = terms(ranking, zipf), terms(ranking, zipf, y=label_mask(labels(), 4).double())
    for name, value in hard.items():
        torch.testing.assert_close(soft[name], value)


@pytest.mark.parametrize("ranking", ["paper", "official"])
def test_mixup_by_hand(ranking):
    """Both labels are in the denominators of the ranks, and neither is among the other classes."""
    s, w = random(3, 5), random(3, 5, seed=1)
    first, second, share = [0, 3, 4], [2, 1, 0], [0.7, 0.6, 0.9]
    y = torch.zeros(3, 5, dtype=torch.float64)
    for row in range(3):
        y[row, first[row]], y[row, second[row]] = share[row], 1 - share[row]
    p_s, p_w = s.softmax(-1), w.softmax(-1)
    squares = [[p_s[row, column].item() ** 2 for row, column in enumerate(side)] for side in (first, second)]
    found = terms(ranking, s=s, w=w, y=y)
    for row in range(3):
        pair = [first[row], second[row]]
        target = 0.0
        for side, value in enumerate((share[row], 1 - share[row])):
            soft = value + squares[side][row] - sum(squares[side]) / 3
            target -= soft * p_s[row, pair[side]].log().item()
        assert found["target"][row].item() == pytest.approx(target)
        a = p_s[row] if ranking == "paper" else p_s[row].log()
        score = p_w[row] / (1 - p_w[row, pair].sum() + 1e-6) + a / (1 - a[pair].sum() + 1e-6)
        rank = {column: place + 1 for place, column in enumerate(score.argsort(descending=True).tolist())}
        others = [column for column in range(5) if column not in pair]
        z = torch.tensor([1 / rank[column] for column in others], dtype=torch.float64)
        expected = -(z / z.sum() * s[row, others].log_softmax(-1)).sum().item()
        assert found["non_target"][row].item() == pytest.approx(expected)
        smooth = 0.9 * y[row] + 0.02
        assert found["weak"][row].item() == pytest.approx(-(smooth * w[row].log_softmax(-1)).sum().item())


def test_rows_with_one_and_with_two_labels_can_be_mixed():
    y = torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 1.0, 0]], dtype=torch.float64)
    p = student().softmax(-1)
    found = soft_targets(student().log_softmax(-1), y)
    mean = (p[0, 0] ** 2 + p[1, 2] ** 2) / 2
    assert found[0, 1].item() == pytest.approx(0.4)  # alone in its batch
    assert found[1, 2].item() == pytest.approx((1 + p[1, 2] ** 2 - mean).item())


# --- extremes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["paper", "official"])
@pytest.mark.parametrize("zipf", ["official", "compact"])
def test_no_logit_is_too_large(ranking, zipf):
    grid = torch.tensor([-1e4, 0.0, 1e4])
    s = torch.cartesian_prod(grid, grid, grid)
    y = torch.arange(27) % 3

    def loss(s, w):
        return uskd_loss(s, w, y, alpha=1.0, beta=1.0, mu=1.0, ranking=ranking, zipf=zipf)

    assert loss(s, s.flip(0)).isfinite()
    assert gradient(lambda x: loss(x, s.flip(0)), s).isfinite().all()
    assert gradient(lambda x: loss(s, x), s.flip(0)).isfinite().all()


@pytest.mark.parametrize("ranking", ["paper", "official"])
def test_banned_classes_have_no_rank(ranking):
    banned = torch.tensor([[False, False, False, True]])
    s, w = student().masked_fill(banned, -math.inf), weak().masked_fill(banned, -math.inf)
    found = terms(ranking, s=s, w=w)
    kept = terms(ranking, s=s[:, :3], w=w[:, :3])
    torch.testing.assert_close(found["non_target"], kept["non_target"])
    assert all(value.isfinite().all() for value in found.values())
    assert gradient(lambda x: uskd_loss(x, w, labels(), alpha=1.0, beta=1.0, mu=1.0), s).isfinite().all()


def test_two_classes_and_a_batch_of_one():
    found = terms(s=student()[:1, :2], w=weak()[:1, :2], y=labels()[:1])
    assert found["non_target"].item() == 0.0
    assert found["target"].item() == pytest.approx(-student()[0, :2].log_softmax(-1)[0].item())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"beta": math.inf}, "beta"),
        ({"mu": -1e-3}, "mu"),
        ({"ranking": "zipf"}, "'paper' or 'official'"),
        ({"zipf": "dense"}, "compact"),
        ({"limit": 0}, "limit"),
        ({"labels": torch.tensor([0, -100])}, "-100"),
        ({"labels": torch.full((2, 4), 0.25)}, "mixup"),
        ({"labels": torch.zeros(2, 4)}, "mixup"),
        ({"weak_logits": teacher()[:, :3]}, "weak"),
        ({"student_logits": student()[:, :1], "weak_logits": weak()[:, :1]}, "2 classes"),
    ],
)
def test_bad_input_is_refused(change, match):
    given = {"student_logits": student(), "weak_logits": weak(), "labels": labels(), "alpha": 1.0, "beta": 0.1}
    with pytest.raises(ValueError, match=match):
        uskd_loss.__wrapped__(**given | {"mu": 0.1} | change)


# --- the trainer ---------------------------------------------------------------------------------------------------------


def make(folder, kind="sequence_classification", **settings):
    settings = {"per_device_train_batch_size": 8, "fused_head": False} | settings
    return distilling.make(USKDTrainer, USKDConfig, folder, kind=kind, **settings)


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "image_classification"])
def test_the_loss_is_cross_entropy_and_the_formula(kind, tmp_path):
    trainer = make(tmp_path, kind, mu=0.1, ranking="official", zipf="compact")
    (batch,) = list(trainer.get_train_dataloader())
    inputs, wanted, _ = trainer._split(dict(batch))
    outputs = trainer.model.eval()(**inputs, output_hidden_states=True)
    hidden = outputs.hidden_states[1]
    if kind == "sequence_classification":
        mask = inputs["attention_mask"][..., None]
        hidden = (hidden * mask).sum(1) / mask.sum(1)
    elif kind == "image_classification":
        hidden = hidden.mean(1)
    w, y = valid_rows(trainer.model.distillation_head(hidden), wanted)
    s, _ = valid_rows(outputs.logits, wanted)
    settings = {"alpha": 1.0, "beta": 0.1, "mu": 0.1, "ranking": "official", "zipf": "compact"}
    expected = torch.nn.functional.cross_entropy(s, y) + uskd_loss(s, w, y, **settings)
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq", "bart"])
def test_language_models_read_their_own_head_from_a_middle_layer(kind, tmp_path):
    trainer = make(tmp_path, kind, rank_limit=5)
    (batch,) = list(trainer.get_train_dataloader())
    inputs, wanted, _ = trainer._split(dict(batch))
    outputs = trainer.model.eval()(**inputs, output_hidden_states=True)
    states = outputs.hidden_states if kind == "causal_lm" else outputs.decoder_hidden_states
    hidden = states[(len(states) - 1) // 2]
    if kind == "causal_lm":
        weak = trainer.model.lm_head(hidden)
    elif kind == "seq2seq":
        weak = trainer.model.lm_head(hidden * 32**-0.5 if trainer.model.config.scale_decoder_outputs else hidden)
    else:
        weak = trainer.model.lm_head(hidden) + trainer.model.final_logits_bias
    (s, y), (w, _) = (valid_rows(logits, wanted) for logits in (outputs.logits, weak))
    expected = torch.nn.functional.cross_entropy(s, y) + uskd_loss(s, w, y, alpha=1.0, beta=0.1, mu=0.005, limit=5)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_weights_of_zero_are_the_cross_entropy_bit_for_bit(kind, tmp_path):
    ours = make(tmp_path, kind, alpha=0.0, beta=0.0, mu=0.0)
    ours.train()
    stock = distilling.make(
        LogitDistillationTrainer, LogitDistillationConfig, tmp_path, kind=kind, kd_weight=0.0, ce_weight=1.0,
        fused_head=False, per_device_train_batch_size=8,
    )  # fmt: skip
    stock.train()
    assert equal(weights(ours), weights(stock))


def test_a_convolutional_model_has_its_last_stage_but_one(tmp_path):
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], layer_type="basic", num_labels=4
    )
    trainer = make(tmp_path, "image_classification", model=ResNetForImageClassification(config))
    assert trainer._extra.in_features == 12
    start = trainer._extra.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer._extra.weight, start)
    assert logged(trainer, "distillation/weak")[0] > 0


def test_an_encoder_decoder_that_classifies_has_its_decoders_states(tmp_path):
    settings = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    settings |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": tiny.VOCAB, "num_labels": 4}
    data = distilling.sorted_texts().map(lambda row: {"input_ids": [*row["input_ids"][:-1], 2]})
    trainer = make(
        tmp_path, model=BartForSequenceClassification(BartConfig(**settings, **tiny._IDS)), data=data, max_steps=1
    )
    trainer.train()
    assert logged(trainer, "distillation/weak")[0] > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"ranking": "rank"}, "official"),
        ({"zipf": "z"}, "compact"),
        ({"rank_limit": 0}, "rank_limit"),
    ],
)
def test_bad_settings_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(USKDConfig, tmp_path, **settings)


def test_a_teacher_and_a_layer_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without a teacher"):
        make(tmp_path, teacher=distilling.sequence_classification(1))
    with pytest.raises(ValueError, match="3 hidden states"):
        make(tmp_path, weak_layer=9).train()
    with pytest.raises(ValueError, match="MobileNetV2Config does not say how wide"):
        model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=4, depth_multiplier=0.2))
        make(tmp_path, "image_classification", model=model)
