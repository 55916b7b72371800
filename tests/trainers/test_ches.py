"""CHES: its numbers by hand, the batched pass against one sample at a time, and what is logged while training."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import tiny
from hf_logits.trainers.ches import CHESCallback, ches_from_hidden, ches_scores, filter_by_ches
from preferences import LORA, equal, forwards, logged, make, pairs, tokenizer, unpaired, weights


CHOSEN = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]], dtype=torch.float64)  # S (1.5, 1)
REJECTED = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]], dtype=torch.float64)  # S (2, 3)


def everything(hidden: Tensor) -> Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.long)


def ches(chosen: Tensor, rejected: Tensor, **kwargs: bool) -> Tensor:
    return ches_from_hidden(chosen, everything(chosen), rejected, everything(rejected), **kwargs)


@torch.no_grad()
def one_at_a_time(model: torch.nn.Module, dataset: Dataset, *, length_normalize: bool) -> Tensor:
    """The slow obvious path: every completion alone, all logits, the hidden states of all layers."""
    found = []
    for row in dataset:
        pooled = []
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            output = model(input_ids=torch.tensor([row["prompt_ids"] + ids]), output_hidden_states=True)
            predicting = output.hidden_states[-1][0, len(row["prompt_ids"]) - 1 : -1]
            assert len(predicting) == len(ids)
            pooled.append(predicting.mean(0) if length_normalize else predicting.sum(0))
        found.append(pooled[0] @ pooled[1] - pooled[0] @ pooled[0])
    return torch.stack(found)


# --- the numbers ---------------------------------------------------------------------------------------------------------


def test_the_numbers_by_hand():
    assert ches(CHOSEN, REJECTED).tolist() == [2.75]
    assert math.isclose(ches(CHOSEN, REJECTED, length_normalize=True).item(), 0.1875)


def test_the_normalized_form_is_that_of_means():
    chosen, rejected = CHOSEN.mean(1, keepdim=True), REJECTED.mean(1, keepdim=True)
    assert torch.allclose(ches(chosen, rejected), ches(CHOSEN, REJECTED, length_normalize=True))


def test_equal_completions_have_the_score_zero_to_the_last_bit():
    hidden = torch.randn(3, 5, 7)
    assert ches(hidden, hidden).tolist() == [0.0, 0.0, 0.0]
    assert ches(hidden, hidden, length_normalize=True).tolist() == [0.0, 0.0, 0.0]


def test_the_score_is_not_symmetric():
    assert ches(CHOSEN, REJECTED).item() != ches(REJECTED, CHOSEN).item()


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("fill", [7.0, math.nan, math.inf])
def test_padding_does_not_enter(length_normalize, fill):
    padding = torch.full((1, 2, 2), fill, dtype=torch.float64)
    padded, mask = torch.cat([padding, CHOSEN, padding], 1), torch.tensor([[0, 0, 1, 1, 0, 0]])
    found = ches_from_hidden(padded, mask, REJECTED, everything(REJECTED), length_normalize=length_normalize)
    assert found.tolist() == ches(CHOSEN, REJECTED, length_normalize=length_normalize).tolist()


@pytest.mark.parametrize("length_normalize", [False, True])
def test_an_empty_completion_has_no_score(length_normalize):
    chosen = CHOSEN.repeat(2, 1, 1)
    found = ches_from_hidden(
        chosen, torch.tensor([[0, 0], [1, 1]]), chosen, everything(chosen), length_normalize=length_normalize
    )
    assert found.isnan().tolist() == [True, False]


def test_half_precision_is_summed_in_single():
    hidden = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    assert ches(hidden, 2 * hidden).item() == 1_000_000.0


def test_the_score_can_be_differentiated():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (
        torch.randn(2, n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 4)
    )
    assert torch.autograd.gradcheck(lambda a, b: ches(a, b, length_normalize=True), (chosen, rejected))


# --- the batched pass ----------------------------------------------------------------------------------------------------


def trained_on(data: Dataset, tmp_path) -> Dataset:
    """As `DPOTrainer` sees it."""
    return make(DPOTrainer, DPOConfig, tmp_path, data=data).train_dataset


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.mistral, tiny.mamba])
def test_batches_score_as_one_at_a_time(build, length_normalize, conversational, tmp_path):
    model, data = build(), pairs(9, conversational=conversational)
    expected = one_at_a_time(model, trained_on(data, tmp_path), length_normalize=length_normalize)
    for budget in (1, 64, 4096):
        found = ches_scores(
            model, data, tokenizer(), length_normalize=length_normalize, max_length=None, tokens_per_batch=budget
        )
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_tokenized_data_scores_as_text_does(tmp_path):
    data = pairs(6)
    found = ches_scores(tiny.llama(), trained_on(data, tmp_path), tokenizer())
    assert torch.equal(found, ches_scores(tiny.llama(), data, tokenizer()))


def test_the_head_is_not_run_and_the_mode_is_kept():
    model = tiny.llama().train()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head was run"))
    with forwards(model) as count:
        ches_scores(model, pairs(6), tokenizer(), tokens_per_batch=4096)
    assert len(count) == 3 + 1  # whether prompts can be read once is tried out on a pair
    assert model.training


def test_adapters_count():
    data, plain = pairs(4), ches_scores(tiny.llama(), pairs(4), tokenizer())
    fresh = get_peft_model(tiny.llama(), LoraConfig(**LORA))
    assert torch.equal(ches_scores(fresh, data, tokenizer()), plain)
    torch.manual_seed(0)
    other = get_peft_model(tiny.llama(), LoraConfig(init_lora_weights=False, **LORA))
    assert not torch.allclose(ches_scores(other, data, tokenizer()), plain)


def test_virtual_tokens_are_refused():
    model = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens of prompt learning"):
        ches_scores(model, pairs(2), tokenizer())


def test_what_is_cut_away_has_no_score():
    data = Dataset.from_list(
        [
            {"prompt": "w6 w7 w8 w9 ", "chosen": "w10", "rejected": "w11 w12"},
            {"prompt": "w6 ", "chosen": "w10", "rejected": "w11"},
        ]
    )
    assert ches_scores(tiny.llama(), data, tokenizer(), max_length=4).isnan().tolist() == [True, False]
    ends = ches_scores(tiny.llama(), data, tokenizer(), max_length=4, truncation_mode="keep_end")
    assert not ends.isnan().any()


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'rejected'"):
        ches_scores(tiny.llama(), pairs(2).remove_columns("rejected"), tokenizer())


def test_near_duplicates_are_the_riskier_pairs():
    """The paper's claim, on a model that learnt the chosen completions a little."""
    torch.manual_seed(0)
    model, data = tiny.llama(), pairs(8)
    near = data.map(lambda row: {"rejected": row["chosen"].rsplit(" ", 1)[0] + " w7"})
    far = data.map(lambda row: {"rejected": "w60 w61 w62 w63"})
    assert ches_scores(model, near, tokenizer()).mean() > ches_scores(model, far, tokenizer()).mean()


# --- the filter ----------------------------------------------------------------------------------------------------------


def test_the_highest_scores_are_dropped_and_the_order_is_kept():
    data = pairs(5)
    kept = filter_by_ches(data, torch.tensor([3.0, -1.0, 5.0, 0.0, 3.0]), keep_fraction=0.6)
    assert kept["ches"] == [3.0, -1.0, 0.0]
    assert kept["prompt"] == [data[index]["prompt"] for index in (0, 1, 3)]


def test_pairs_without_a_score_are_dropped_with_a_count(caplog):
    kept = filter_by_ches(pairs(3), [math.nan, 1.0, 0.0], keep_fraction=1.0)
    assert kept["ches"] == [1.0, 0.0]
    assert "1 of 3 pairs have no CHES score" in caplog.text


@pytest.mark.parametrize(
    ("scores", "keep_fraction", "message"),
    [
        ([1.0, 2.0], 0.5, "2 scores for 3 pairs"),
        ([1.0, 2.0, 3.0], 0.0, "keep_fraction must be in"),
        ([1.0, 2.0, 3.0], 1.5, "keep_fraction must be in"),
        ([1.0, 2.0, 3.0], 0.1, "is none"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(scores, keep_fraction, message):
    with pytest.raises(ValueError, match=message):
        filter_by_ches(pairs(3), scores, keep_fraction=keep_fraction)


# --- the callback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL calls them by their old names
def test_training_batches_are_logged_at_no_forward_and_without_a_trace(lora, checkpointing, tmp_path):
    settings = {"lora": lora, "gradient_checkpointing": checkpointing, "max_steps": 2}
    plain = make(DPOTrainer, DPOConfig, tmp_path / "plain", **settings)
    with forwards(plain.model.get_base_model() if lora else plain.model) as expected:
        plain.train()
    watched = make(DPOTrainer, DPOConfig, tmp_path / "watched", **settings)
    before = ches_scores(watched.model, watched.train_dataset, tokenizer())
    watched.add_callback(CHESCallback(watched))
    with forwards(watched.model.get_base_model() if lora else watched.model) as count:
        watched.train()
    assert len(count) == len(expected)
    assert equal(weights(watched), weights(plain))
    assert len(logged(watched, "ches")) == len(logged(watched, "ches/length_normalized")) == 2
    first = logged(watched, "ches/length_normalized")[0]
    means = [(before[i] + before[j]) / 2 for i in range(8) for j in range(i)]
    assert min(abs(first - mean) for mean in means) < 1e-3
    assert not watched.model._forward_pre_hooks


def test_evaluation_is_not_logged_as_training(tmp_path):
    trainer = make(
        DPOTrainer, DPOConfig, tmp_path, evaluation=pairs(4, seed=1), eval_strategy="steps", eval_steps=1, max_steps=2
    )
    trainer.add_callback(CHESCallback(trainer))
    trainer.train()
    assert len(logged(trainer, "ches")) == 2
    assert not logged(trainer, "eval_ches")


def test_the_callback_needs_pairs(tmp_path):
    trainer = make(KTOTrainer, KTOConfig, tmp_path, data=unpaired())
    with pytest.raises(TypeError, match="needs a DPOTrainer"):
        CHESCallback(trainer)
