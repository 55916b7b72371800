"""Personality alignment: probes and displacements by hand, what is read off a model, and steering on a head whose logit is linear."""

import math

import jaxtyping
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sklearn import linear_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import tiny
from hf_logits.head_vectors import HeadVectors
from hf_logits.processors import answer_probabilities, collect_head_activations, fit_personality, search_strength
from hf_logits.processors.personality_alignment import QUESTION, expected_error, head_displacements, probe_scores
from preferences import tokenizer


PROMPTS = ["w10 w20 w30", "w11", "w12 w40 w41 w42 w43 w44", "w13 w50"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
OPTIONS = ("w6", "w7", "w8", "w9", "w10")
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "mistral": tiny.mistral,
    "wide_heads": lambda seed=0: tiny.llama(seed, head_dim=16),  # heads times their size is not the hidden size
}


def people(items: int = 10, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Activations of 2 layers of 3 heads, of which one, (1, 2), tells what the person agrees with."""
    generator = torch.Generator().manual_seed(seed)
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 5.0, 2.0, 1.0, 4.0][:items]
    activations = torch.randn(items, 2, 2, 3, 4, generator=generator)
    for item, value in enumerate(values):
        sign = 0 if value in (0.0, 3.0) else 1 if value > 3 else -1
        activations[item, 0, 1, 2, 0] += 8 * sign
        activations[item, 1, 1, 2, 0] -= 8 * sign
    return activations, values


# --- the arithmetic --------------------------------------------------------------------------------------------------------


def test_displacements_by_hand():
    """One head: means (3, 0) and (-1, 0), projections 4, 2, -1, -1."""
    rows = torch.tensor([[4.0, 1], [2, -1], [-1, 5], [-1, -5]])[:, None, None]
    found = head_displacements(rows, torch.tensor([True, True, False, False]))
    assert found.shape == (1, 1, 2)
    assert found.flatten().tolist() == pytest.approx([math.sqrt(4.5), 0.0])  # mean 1, squares 9, 1, 4, 4


def test_what_does_not_vary_is_left_alone():
    labels = torch.tensor([True, False, True])
    assert not head_displacements(torch.full((3, 1, 1, 2), 7.0), labels).any()
    opposite = torch.tensor([[1.0, 0], [0, 0], [-1, 0]])[:, None, None]
    assert not head_displacements(opposite, labels).any()  # the means agree


def test_accuracies_are_those_of_a_library():
    activations, _ = people()
    rows = activations.flatten(0, 1)
    labels = torch.arange(20) % 3 == 0
    train = torch.arange(20) % 5 < 3
    accuracy, loss = probe_scores(rows, labels, train, penalty=1.0)
    for layer in range(2):
        for head in range(3):
            features = rows[:, layer, head].double()
            judge = linear_model.LogisticRegression(tol=1e-10, max_iter=10_000).fit(features[train], labels[train])
            shares = [judge.score(features[part], labels[part]) for part in (train, ~train)]
            assert accuracy[layer, head].item() == pytest.approx(sum(shares) / 2)
            log_probs = torch.tensor(judge.predict_log_proba(features[~train]))
            expected = -log_probs.gather(1, labels[~train].long()[:, None]).mean()
            assert loss[layer, head].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_head_that_knows_is_found_and_neutral_items_do_not_count():
    activations, values = people()
    vectors = fit_personality(activations, values, num_heads=1)
    assert vectors.heads == [(1, 2)] and vectors.strength == 1.0
    direction = vectors.displacement[1, 2]
    assert direction[0] > 0.9 * direction.norm()
    changed = activations.clone()
    changed[[4, 5]] = 1e3
    assert torch.equal(fit_personality(changed, values, num_heads=1).displacement, vectors.displacement)


def test_the_opposite_person_has_the_opposite_vectors():
    activations, values = people()
    opposite = [6 - value if value else math.nan for value in values]
    plain, found = (fit_personality(activations, given, num_heads=6) for given in (values, opposite))
    assert len(plain.heads) == 6
    torch.testing.assert_close(found.displacement, -plain.displacement)


def test_the_split_is_seeded():
    activations, values = people(seed=3)
    kept = [fit_personality(activations, values, num_heads=3, seed=seed).heads for seed in (0, 0, 1, 2, 3, 4)]
    assert kept[0] == kept[1] and len({tuple(heads) for heads in kept}) > 1


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([3.0] * 10, {}, "10 of 10 answers are neutral \\(3\\) or unknown"),
        ([0.0] * 10, {}, "10 of 10 answers are neutral"),
        ([3.0] * 9 + [5.0], {}, "9 of 10 answers are neutral .* two others are needed at least"),
        ([5.0] * 9, {}, "There are 9 answers to 10 items"),
        ([6.0] * 10, {}, "Answers must be from 1 to 5, or 0 where unknown"),
        ([5.0] * 10, {"num_heads": 7}, "at most 6 heads are needed; got 2, num_heads=7"),
        ([5.0] * 10, {"num_heads": 0}, "num_heads must be a whole number"),
        ([5.0] * 10, {"penalty": 0.0}, "penalty must be in"),
        ([5.0] * 10, {"train_fraction": 2.0}, "train_fraction must be in"),
    ],
)
def test_a_subject_that_cannot_be_fitted(values, options, message):
    with pytest.raises(ValueError, match=message):
        fit_personality(people()[0], values, **({"num_heads": 2} | options))


def test_what_is_no_subject_says_so():
    activations, values = people()
    # these checks come before our own errors, and users do not have them
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(
            TypeError, match=r"Answers must be numbers from 1 to 5, 0 or NaN where unknown; got \[5.0, None"
        ):
            fit_personality(activations, [5.0, None, *values[2:]], num_heads=2)
        with pytest.raises(ValueError, match=r"activations must be \[items, 2, layers.*; got \[2, 2, 3, 4\]"):
            fit_personality(activations[0], values[:2], num_heads=2)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_two_answers_are_enough(fraction):
    activations, _ = people()
    values = [5.0, 1.0] + [3.0] * 8
    assert fit_personality(activations, values, num_heads=2, train_fraction=fraction).heads


def test_the_error_by_hand():
    probs = torch.tensor([[0.5, 0, 0, 0, 0.5], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    values = torch.tensor([5.0, 1.0, math.nan, 1.0])
    scores = (5.0, 4.0, 3.0, 2.0, 1.0)
    # items: 2, 2, unknown, 3
    assert expected_error(probs, values, scores=scores, traits=["E", "E", "E", "N"]) == pytest.approx(2 + 3)
    assert expected_error(probs, values, scores=scores, traits=["E", "E", "O", "E"]) == pytest.approx(7 / 3)


# --- reading a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_at_a_time(model, rows: list[list[int]]) -> Tensor:
    """The slow obvious path: every row alone, the input of each projection at the last token."""
    found = []
    names = {"llama": "self_attn.o_proj", "mistral": "self_attn.o_proj", "gpt2": "attn.c_proj"}
    ending = names[model.config.model_type]
    for row in rows:
        seen: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1]))
            for name, module in model.named_modules()
            if name.endswith(ending) and "mlp" not in name
        ]
        model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        found.append(torch.stack(seen).unflatten(-1, (4, -1)))
    return torch.stack(found)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_read_as_one_at_a_time(build, batch_size):
    model, words = build(), tokenizer()
    found = collect_head_activations(model, words, PROMPTS, answers=("w6", "w7 w8"), batch_size=batch_size)
    rows = [[*words(prompt)["input_ids"], *answer] for prompt in PROMPTS for answer in ([6], [7, 8])]
    torch.testing.assert_close(found.flatten(0, 1), one_at_a_time(model, rows), rtol=1e-5, atol=1e-5)
    assert found.shape[:4] == (4, 2, 2, 4)


def test_messages_are_read_through_the_template():
    model, words = tiny.llama(), tokenizer()
    found = collect_head_activations(model, words, CHATS, answers=("w6",))
    texts = [f"user {prompt} <eos> assistant " for prompt in PROMPTS]
    assert torch.equal(found, collect_head_activations(model, words, texts, answers=("w6",)))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_probabilities_of_the_options_are_those_of_one_at_a_time(build, batch_size):
    model, words = build(), tokenizer()
    found = answer_probabilities(model, words, PROMPTS, options=OPTIONS, batch_size=batch_size)
    expected = tiny.recomputed(model, [words(prompt)["input_ids"] for prompt in PROMPTS])[:, 6:11].softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [32, 16])
def test_probabilities_of_a_model_whose_head_does_not_run_alone(width, monkeypatch):
    """OPT calls what is inside of its backbone, and the small width is that of a projection behind the layers."""
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.processors.personality_alignment.logger.warning_once", seen.append)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **tiny._IDS}
    model = tiny.spread(OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCAB, word_embed_proj_dim=width, **sizes)), 0)
    words = tokenizer()
    found = answer_probabilities(model, words, PROMPTS, options=OPTIONS, batch_size=3)
    expected = tiny.recomputed(model, [words(prompt)["input_ids"] for prompt in PROMPTS])[:, 6:11].softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (
        len(seen) == 1
        and "All logits of a batch are formed at once: OPTForCausalLM does not call its OPTModel" in seen[0]
    )


def test_a_whole_forward_and_the_head_alone_agree(monkeypatch):
    model, words = tiny.llama(), tokenizer()
    expected = answer_probabilities(model, words, PROMPTS, options=OPTIONS)
    monkeypatch.setattr("hf_logits.fused_head.Head.fails", lambda *_: "for a test")
    torch.testing.assert_close(answer_probabilities(model, words, PROMPTS, options=OPTIONS), expected)


def test_an_end_token_of_the_tokenizer_does_not_stand_in_front_of_the_answer():
    """Some tokenizers close a text, and an answer stands behind it."""
    model, plain, closing = tiny.llama(), tokenizer(), tokenizer()
    special = [("<bos>", 1), ("<eos>", 2)]
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=special[:1])
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    assert closing("w6")["input_ids"] == [1, 6, 2]
    prompts = [*PROMPTS, "w9 <eos>"]  # an end token of the text's own stays
    for read in (
        lambda words: collect_head_activations(model, words, prompts, answers=("w6",)),
        lambda words: answer_probabilities(model, words, prompts, options=OPTIONS),
    ):
        assert torch.equal(read(closing), read(plain))


@pytest.mark.parametrize("build", [tiny.mamba, tiny.bamba])
def test_models_without_attention_in_every_layer_are_refused(build):
    with pytest.raises(ValueError, match="output projections of attention heads were found"):
        collect_head_activations(build(), tokenizer(), PROMPTS)


def test_what_cannot_be_read(monkeypatch):
    monkeypatch.delattr("hf_logits.fused_head.Head.fails")  # nothing is tried out, nor warned of, before
    model, words = tiny.llama(max_position_embeddings=5), tokenizer()
    with pytest.raises(ValueError, match="A prompt has 6 tokens, but LlamaForCausalLM reads 5: shorten it"):
        answer_probabilities(model, words, PROMPTS, options=OPTIONS)
    with pytest.raises(ValueError, match="Every answer must have at least one token"):
        collect_head_activations(model, words, PROMPTS, answers=("w6", ""))
    with pytest.raises(ValueError, match="A prompt must have at least one token"):
        collect_head_activations(model, words, [""], answers=("w6",))
    with pytest.raises(ValueError, match="An option='w6 w7' is 2 tokens"):
        answer_probabilities(model, words, PROMPTS, options=("w6 w7", "w8"))
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        answer_probabilities(model, words, PROMPTS[:1], options=OPTIONS, batch_size=0)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder: give a causal"):
        answer_probabilities(tiny.t5(), words, PROMPTS, options=OPTIONS)
    virtual = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens of prompt learning"):
        answer_probabilities(virtual, words, PROMPTS, options=OPTIONS)


def test_the_mode_is_kept_and_adapters_count():
    words = tokenizer()
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "o_proj"], lora_dropout=0.5)
    tuned = get_peft_model(tiny.llama(), config).train()
    first, second = (collect_head_activations(tuned, words, PROMPTS, answers=("w6",)) for _ in range(2))
    assert torch.equal(first, second) and tuned.training
    with tuned.disable_adapter():
        plain = collect_head_activations(tuned, words, PROMPTS, answers=("w6",))
    assert not torch.allclose(first, plain)
    assert torch.equal(plain, collect_head_activations(tiny.llama(), words, PROMPTS, answers=("w6",)))


# --- a whole subject --------------------------------------------------------------------------------------------------------


def linear_head(model, layer: int, head: int, agree: int, disagree: int) -> HeadVectors:
    """Make a head's output speak for one option: its first entry raises one logit and lowers another, through the last layer."""
    size = model.config.head_dim
    with torch.no_grad():
        towards = model.lm_head.weight[agree] - model.lm_head.weight[disagree]
        model.model.layers[layer].self_attn.o_proj.weight[:, head * size] = towards / towards.norm()
    displacement = torch.zeros(2, 4, size)
    displacement[layer, head, 0] = 1.0
    return HeadVectors(displacement)


def test_the_probability_of_agreeing_rises_with_the_strength():
    model, words = tiny.llama(), tokenizer()
    vectors = linear_head(model, 1, 2, agree=6, disagree=10)
    found = []
    for strength in (-8.0, -2.0, 0.0, 2.0, 8.0):
        with vectors.applied(model, strength=strength):
            found.append(answer_probabilities(model, words, PROMPTS, options=OPTIONS)[:, 0])
    assert (torch.stack(found).diff(dim=0) > 0).all()


@pytest.mark.parametrize("value, expected", [(5.0, 8.0), (1.0, 0.0)])
def test_the_search_finds_what_the_person_needs(value, expected):
    model, words = tiny.llama(), tokenizer()
    vectors = linear_head(model, 1, 2, agree=6, disagree=10)
    best, errors = search_strength(
        model, words, vectors, PROMPTS, [value] * 3 + [0.0], options=OPTIONS, strengths=(0.0, 2.0, 8.0)
    )
    assert best.strength == expected and errors[expected] == min(errors.values())
    assert torch.equal(best.displacement, vectors.displacement)
    with vectors.applied(model, strength=2.0):
        probs = answer_probabilities(model, words, PROMPTS[:3], options=OPTIONS)
    by_hand = sum((probs[:, place] * abs(score - value)).mean().item() for place, score in enumerate((5, 4, 3, 2, 1)))
    assert errors[2.0] == pytest.approx(by_hand, rel=1e-5)


def test_errors_of_traits_add_up():
    model, words = tiny.llama(), tokenizer()
    vectors = HeadVectors(torch.zeros(2, 4, 8))
    values, common = [5.0, 4.0, 2.0, 1.0], {"options": OPTIONS, "strengths": (0.0,)}
    both = search_strength(model, words, vectors, PROMPTS, values, traits=["E", "E", "N", "N"], **common)[1]
    parts = [
        search_strength(model, words, vectors, PROMPTS[part], values[part], **common)[1][0.0]
        for part in (slice(2), slice(2, 4))
    ]
    assert both[0.0] == pytest.approx(sum(parts))


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([0.0] * 4, {}, "All of the 4 answers are unknown"),
        ([5.0] * 4, {"scores": (1.0, 2.0)}, "Give a score for each option"),
        ([5.0] * 4, {"strengths": ()}, "Give a score for each option, and a strength"),
        ([5.0] * 4, {"traits": ["E"]}, "There are 1 traits for 4 items"),
        ([5.0] * 3, {}, "There are 3 answers to 4 items"),
    ],
)
def test_a_search_that_cannot_be_made(values, options, message):
    vectors = HeadVectors(torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=message):
        search_strength(tiny.llama(), tokenizer(), vectors, PROMPTS, values, **({"options": OPTIONS} | options))


def test_a_subject_from_the_answers_to_the_vectors():
    """Who agrees with everything is moved towards the agreeing answer, as far as a head of a random model goes."""
    model, words = tiny.llama(), tokenizer()
    activations = collect_head_activations(model, words, PROMPTS, answers=("w6", "w10"))
    vectors = fit_personality(activations, [5.0, 4.0, 5.0, 4.0], num_heads=3)
    assert len(vectors.heads) == 3
    gap = activations[:, 0] - activations[:, 1]
    for layer, head in vectors.heads:
        assert gap[:, layer, head].mean(0) @ vectors.displacement[layer, head] > 0


def test_the_question_takes_a_statement():
    assert '"I love parties."' in QUESTION.format(statement="love parties")
