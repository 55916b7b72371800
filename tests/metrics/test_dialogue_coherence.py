import math

import numpy as np
import pytest
import torch
from scipy import stats

import distilling
from hf_logits.metrics import DialogueCoherence
from hf_logits.metrics.dialogue_coherence import dialogue_coherence, pair_scorer
from hf_logits.trainers import MultiLevelRankingConfig, MultiLevelRankingTrainer
from preferences import arguments, tokenizer


CONTEXTS = ["How are you?", "Is it raining?", "Where do you live?", "What is this?", "Who was it?"]
RESPONSES = ["Fine, thanks.", "No.", "In a small town by the sea.", "A pen.", "Me.."]


def by_length(contexts: list, responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def test_scores_and_mean_of_a_scorer():
    found = dialogue_coherence(CONTEXTS, RESPONSES, scorer=by_length)
    assert found == {"mean": pytest.approx(1.06), "scores": [1.3, 0.3, 2.7, 0.6, 0.4], "notes": {}}


def test_correlations_with_humans_by_hand():
    # of the ten pairs, nine are in the same order and one is tied by the humans
    found = dialogue_coherence(CONTEXTS, RESPONSES, scorer=by_length, ratings=[4.0, 1.0, 5.0, 2.0, 1.0])
    assert found["kendall"] == pytest.approx(9 / math.sqrt(10 * 9))
    # ranks 4 1 5 3 2 and 4 1.5 5 3 1.5
    assert found["spearman"] == pytest.approx(9.5 / math.sqrt(10 * 9.5))
    scores = [1.3, 0.3, 2.7, 0.6, 0.4]
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, [4, 1, 5, 2, 1]).statistic)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_scipy_under_ties(seed):
    rng = np.random.default_rng(seed)
    ratings = rng.integers(1, 6, 60).astype(float)
    scores = np.round(ratings / 5 + rng.normal(size=60) / 4, 1)
    texts = [str(score) for score in scores]
    found = dialogue_coherence(texts, texts, scorer=lambda _, said: [float(s) for s in said], ratings=ratings.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, ratings).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, ratings).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(scores, ratings).statistic)


def test_the_ranking_model_says_what_its_trainer_says(tmp_path):
    model, words, data = distilling.scorer(), tokenizer(), distilling.rated(7)
    # one by one: this tokenizer pads on the left, which a model with absolute positions notices
    args = arguments(MultiLevelRankingConfig, tmp_path, stage="rating", per_device_eval_batch_size=1)
    predicted = MultiLevelRankingTrainer(model, args, processing_class=words, eval_dataset=data).predict(data)
    model.train()
    scorer = pair_scorer(model, words, batch_size=2)
    assert model.training
    found = dialogue_coherence(data["context"][:], data["response"][:], scorer=scorer, ratings=data["rating"][:])
    assert 1 + 4 * np.array(found["scores"]) == pytest.approx(predicted.predictions, abs=1e-5)
    assert found["pearson"] == pytest.approx(
        stats.pearsonr(predicted.predictions, predicted.label_ids).statistic, abs=1e-5
    )
    raw = dialogue_coherence(["a b"], ["c"], scorer=pair_scorer(model, words, sigmoid=False))["scores"]
    shown = dialogue_coherence([["a", "b"]], ["c"], scorer=scorer)["scores"]
    assert torch.tensor(raw).sigmoid().tolist() == pytest.approx(shown, abs=1e-6)
    with pytest.raises(ValueError, match="got num_labels=2"):
        pair_scorer(distilling.scorer(num_labels=2), words)
    for name in ("max_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
            pair_scorer(model, words, **{name: 0})
    with pytest.raises(TypeError):
        scorer(["a"], [3])
    assert model.training


def test_each_configuration():
    turns = [["Hello.", context] for context in CONTEXTS]
    seen = []

    def scorer(contexts: list, responses: list[str]) -> torch.Tensor:
        seen.append(contexts)
        return torch.tensor(by_length(contexts, responses))

    ratings = {"ratings": [4.0, 1.0, 5.0, 2.0, 1.0]}
    for name, contexts, humans in (
        ("pairs", CONTEXTS, {}),
        ("rated", CONTEXTS, ratings),
        ("turns", turns, {}),
        ("rated_turns", turns, ratings),
    ):
        metric = DialogueCoherence(name, keep_in_memory=True)
        found = metric.compute(predictions=RESPONSES, references=contexts, scorer=scorer, **humans)
        assert seen.pop() == contexts
        assert ("kendall" in found) == bool(humans)
        assert found["mean"] == pytest.approx(1.06)


# --- what is undefined, and what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "ratings", "note"),
    [
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], "the scores are all the same"),
        ([0.1, 0.2, 0.3], [2.0, 2.0, 2.0], "the ratings are all the same"),
        ([0.1], [2.0], "there are fewer than two responses"),
        ([], [], "there are fewer than two responses"),
    ],
)
def test_what_never_differs_has_no_correlation(scores, ratings, note):
    texts = ["a"] * len(scores)
    found = dialogue_coherence(texts, texts, scorer=lambda *_: scores, ratings=ratings)
    for name in ("pearson", "spearman", "kendall"):
        assert math.isnan(found[name]) and found["notes"][name] == note
    assert math.isnan(found["mean"]) == (found["notes"].get("mean") == "there are no responses") == (not scores)


def test_no_rows():
    found = DialogueCoherence("rated", keep_in_memory=True).compute(
        predictions=[], references=[], ratings=[], scorer=by_length
    )
    assert found["scores"] == [] and found["notes"]["mean"] == "there are no responses"


@pytest.mark.parametrize(
    ("contexts", "scores", "ratings", "message"),
    [
        (["a"], [1.0, 2.0], None, "1 contexts and 2 responses"),
        (["a", "b"], [1.0], None, "scores are of shape"),
        (["a", "b"], [[1.0], [2.0]], None, "one number for each"),
        (["a", "b"], [1.0, math.nan], None, r"scores must be finite; those of the responses \[1\]"),
        (["a", "b"], [1.0, 2.0], [1.0], "ratings are of shape"),
        (["a", "b"], [1.0, 2.0], [math.inf, 1.0], r"ratings must be finite; those of the responses \[0\]"),
    ],
)
def test_bad_input(contexts, scores, ratings, message):
    with pytest.raises(ValueError, match=message):
        dialogue_coherence(contexts, ["x", "y"], scorer=lambda *_: scores, ratings=ratings)
