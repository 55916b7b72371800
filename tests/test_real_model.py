"""Every method does to a real language model what its paper says: SmolLM2-135M-Instruct, greedy, short answers."""

import copy
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import hf_logits
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    GeDiLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
    neutralize,
)
from hf_logits.trainers import RefusalTokens, add_refusal_tokens


pytestmark = pytest.mark.real_model
RECIPES = Path(__file__).parent.parent / "examples" / "recipes"


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Real(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    smaller: PreTrainedModel
    """The same model less two of its 30 layers: a worse one that speaks the same language."""

    def ids(self, question: str, system: str | None = None) -> Tensor:
        chat = [{"role": "user", "content": question}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        encoded = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        return encoded["input_ids"]

    def answer(self, ids: Tensor, *processors, model=None, tokens: int = 12, **options) -> Tensor:
        output = (model or self.model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=list(processors),
            max_new_tokens=tokens,
            **({"do_sample": False} | options),
        )
        return output[0, ids.shape[1] :]

    def text(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(self.answer(*args, **kwargs), skip_special_tokens=True)

    def log_prob(self, model: PreTrainedModel, ids: Tensor, answer: Tensor) -> Tensor:
        """Log-probability of each token of an answer."""
        with torch.no_grad():
            logits = model(torch.cat([ids, answer[None]], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]

    def next_logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).logits[:, -1]


@pytest.fixture(scope="session")
def real() -> Real:
    model, tokenizer = example("smollm2").load()
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(smaller.model.layers) if i not in (5, 17)
    )
    for i, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = i
    smaller.config.num_hidden_layers = 28
    return Real(model, tokenizer, smaller)


def test_the_converted_weights_are_the_dequantised_ones(real):
    gguf = pytest.importorskip("gguf")
    smollm2 = example("smollm2")
    stored = {t.name: t for t in gguf.GGUFReader(smollm2.gguf_folder() / smollm2.GGUF).tensors}
    pairs = {"token_embd": "model.embed_tokens", "blk.0.ffn_up": "model.layers.0.mlp.up_proj"}
    pairs |= {"blk.29.ffn_down": "model.layers.29.mlp.down_proj"}
    for name, ours in pairs.items():
        tensor = stored[f"{name}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(real.model.get_submodule(ours).weight, expected)


def test_lqcd_resists_a_wrong_hint(real):
    question = "I am sure that it is Kyoto. What is the capital of Japan?"
    ids = real.ids(question)
    processor = LQCDLogitsProcessor(real.model, real.ids(neutralize(question)), main="leading")
    assert "Tokyo" not in real.text(ids)
    assert "Tokyo" in real.text(ids, processor)


def test_cfg_makes_the_model_follow_its_system_prompt(real):
    question = "What did you eat today?"
    ids = real.ids(question, "You are a cheerful pirate. Answer in pirate slang.")
    negative = real.ids(question, "You are a helpful assistant.")
    processor = MixtureLogitsProcessor.cfg(real.model, negative, scale=1.5, plausibility=0.05)
    assert not real.text(ids, tokens=8).startswith("Arrr")
    assert real.text(ids, processor, tokens=8).startswith("Arrr")


def test_context_aware_decoding_believes_the_document(real):
    question = "Who wrote Romeo and Juliet?"
    ids = real.ids(f"The novel says that Romeo and Juliet was written by Emily Stone. {question}")
    processor = MixtureLogitsProcessor.context_aware(real.model, real.ids(question), contrast=1.0, plausibility=0.05)
    assert "Emily Stone" not in real.text(ids, tokens=6)
    assert "Emily Stone" in real.text(ids, processor, tokens=6)


def test_contrastive_decoding_prefers_what_the_amateur_does_not_know(real):
    ids = real.ids("Why is the sky blue?")
    processor = MixtureLogitsProcessor.contrastive(real.smaller, plausibility=0.1)
    answers = {"plain": real.answer(ids), "contrastive": real.answer(ids, processor)}
    gains = {
        name: (real.log_prob(real.model, ids, a) - real.log_prob(real.smaller, ids, a)).mean()
        for name, a in answers.items()
    }
    assert gains["contrastive"] > gains["plain"]
    # Every token is one that the model itself finds at least a tenth as likely as its best.
    with torch.no_grad():
        whole = torch.cat([ids, answers["contrastive"][None]], dim=1)
        best = real.model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1).amax(-1)
    assert (real.log_prob(real.model, ids, answers["contrastive"]) >= best + torch.tensor(0.1).log() - 1e-3).all()


def test_proxy_tuning_and_dexperts_of_one_base_are_the_expert(real):
    # main + (expert - antiexpert) with antiexpert = main
    ids = real.ids("Who was Albert Einstein?")
    expected = real.answer(ids, model=real.smaller)
    assert not torch.equal(expected, real.answer(ids))
    proxy = MixtureLogitsProcessor.proxy(real.smaller, real.model, weight=1.0)
    dexperts = MixtureLogitsProcessor.dexperts(real.smaller, real.model, weight=1.0, filter_p=None)
    assert torch.equal(real.answer(ids, proxy), expected)
    assert torch.equal(real.answer(ids, dexperts), expected)


def test_dynamic_fusion_of_one_base_is_the_expert(real):
    # The large model is the small one itself: moving it as far as the expert has moved means weight 1.
    ids = real.ids("Who was Albert Einstein?")
    processor = DynamicFusionLogitsProcessor(real.model, [real.smaller])
    assert torch.equal(real.answer(ids, processor), real.answer(ids, model=real.smaller))
    weight = processor.stats.trace["weight"]
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_steer_leaves_what_it_is_told_to_stay_away_from(real):
    ids = real.ids("Write the first sentence of a story about a dragon.")
    usual = real.answer(ids, tokens=20)
    processor = SteerLogitsProcessor(
        model=real.model, negatives=[real.tokenizer.decode(usual)], contrast=0.0, tokenizer=real.tokenizer
    )

    def triples(tokens: Tensor) -> set[tuple[int, ...]]:
        return set(zip(*(tokens[i:].tolist() for i in range(3)), strict=False))

    steered = real.answer(ids, processor, tokens=20)
    assert len(triples(steered) & triples(usual)) <= len(triples(usual)) / 4


def test_steer_moves_away_from_the_base(real):
    ids = real.ids("Why is the sky blue?")
    tuned, base = real.next_logits(real.model, ids), real.next_logits(real.smaller, ids)
    ratio = tuned.log_softmax(-1) - base.log_softmax(-1)
    expected = [
        (SteerLogitsProcessor(base_model=real.smaller, contrast=contrast)(ids, tuned).exp() * ratio).sum().item()
        for contrast in (0.0, 0.2, 0.5, 1.0)
    ]
    assert all(a < b for a, b in itertools.pairwise(expected)), expected


def test_gedi_raises_the_posterior_of_the_wanted_class(real):
    # The guide was never trained with control codes; a plain word in front of the text is a weak one.
    ids = real.tokenizer("When I looked out of the window this morning, I felt", return_tensors="pt").input_ids
    posteriors = []
    for strength in (0.0, 10.0, 30.0):
        processor = GeDiLogitsProcessor(
            real.model,
            desired=" happy",
            undesired=" sad",
            strength=strength,
            filter_p=0.5,
            tokenizer=real.tokenizer,
        )
        processor(ids, real.next_logits(real.model, ids))
        posteriors.append(processor.stats.trace["posterior"].item())
    assert all(a < b for a, b in itertools.pairwise(posteriors)), posteriors


def test_refusal_tokens_decide_the_first_token_and_leave_the_rest(real):
    refuse, respond = (real.tokenizer.encode(word)[0] for word in ("Sorry", "Sure"))
    ids = real.ids("What is the capital of France?")
    for threshold, first in ((0.0, refuse), (1.0, respond)):
        processor = RefusalTokenLogitsProcessor(refuse=refuse, respond=respond, threshold=threshold)
        answer = real.answer(ids, processor, tokens=6)
        continued = real.answer(torch.cat([ids, torch.tensor([[first]])], dim=1), tokens=5)
        assert answer.tolist() == [first, *continued.tolist()]


def test_entropy_adaptive_decoding_has_both_models_as_its_limits(real):
    ids = real.ids("Who was Albert Einstein?")
    small, large = real.answer(ids, model=real.smaller), real.answer(ids)
    assert not torch.equal(small, large)
    never = EntropyAdaptiveLogitsProcessor(real.model, threshold=float("inf"))
    always = EntropyAdaptiveLogitsProcessor(real.model, threshold=-1.0, min_stay=0)
    sometimes = EntropyAdaptiveLogitsProcessor(real.model, threshold=1.0, window=1, min_stay=1)
    assert torch.equal(real.answer(ids, never, model=real.smaller), small)
    assert never.stats.forwards == 0
    assert torch.equal(real.answer(ids, always, model=real.smaller), large)
    real.answer(ids, sometimes, model=real.smaller)
    assert 0 < sometimes.cost(real.smaller).share < 1


def test_a_padded_batch_answers_as_its_prompts_alone(real):
    hints = ["I am sure that it is Kyoto.", "I think that it is Lyon, the second city."]
    chats = [
        [{"role": "user", "content": f"{hint} What is the capital of {land}?"}]
        for hint, land in zip(hints, ("Japan", "France"), strict=True)
    ]
    batch = real.tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    neutral = [real.ids(f"What is the capital of {land}?")[0].tolist() for land in ("Japan", "France")]
    together = real.model.generate(
        **batch,
        logits_processor=[LQCDLogitsProcessor(real.model, neutral, main="leading")],
        do_sample=False,
        max_new_tokens=7,
    )[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        processor = LQCDLogitsProcessor(real.model, neutral[row], main="leading")
        assert torch.equal(together[row], real.answer(real.ids(chat[0]["content"]), processor, tokens=7))


def test_the_shipped_sentiment_guide_steers(real):
    ids = real.tokenizer("The food was", return_tensors="pt")["input_ids"]
    found = {}
    for wanted, codes in (("positive", (16185, 17728)), ("negative", (17728, 16185))):
        guide = GeDiLogitsProcessor.from_pretrained(
            RECIPES / "gedi_sentiment", main_model=real.model, desired=codes[0], undesired=[codes[1]]
        )
        assert guide.guide.get_base_model().lm_head.weight.data_ptr() == real.model.lm_head.weight.data_ptr()
        found[wanted] = real.text(ids, guide, tokens=6)
    assert found == {"positive": " prepared with a mix of traditional", "negative": " too expensive, and I was"}
    assert not any("lora" in name for name, _ in real.model.named_parameters())


def test_the_shipped_topic_guide_steers_to_topics_that_it_never_learned(real):
    ids = real.tokenizer("The issue is", return_tensors="pt")["input_ids"]
    found = {}
    for topic in (" history", " chemistry"):
        guide = GeDiLogitsProcessor.from_pretrained(
            RECIPES / "gedi_topics", main_model=real.model, tokenizer=real.tokenizer, secondary_code=topic
        )
        found[topic] = real.text(ids, guide, repetition_penalty=1.2)
    assert found == {
        " history": " political and economic. The US has always been a dominant player",
        " chemistry": " hydrogen, which has a very low density compared to other elements",
    }


def test_the_shipped_expert_is_pushed_away_from_what_was_written(real):
    steer = SteerLogitsProcessor.from_pretrained(
        RECIPES / "steer_reviews",
        main_model=real.model,
        tokenizer=real.tokenizer,
        negatives=["A film of rare warmth.", "Two hours that feel like four."],
    )
    ids = real.tokenizer("A sentence from a film review:\n", return_tensors="pt")["input_ids"]
    sampling = {"do_sample": True, "top_k": 10, "temperature": 1.0}
    found = []
    for processors in ([], [steer]):
        set_seed(0)
        found.append(real.text(ids, *processors, model=steer.model, **sampling))
    assert found == [
        "The characters are so well realized, the script is so much",
        "Has its charmings, its humor and tension \n just beyond",
    ]


def test_the_shipped_refusal_tokens_say_what_is_refused_and_as_what(real):
    model, tokenizer = copy.deepcopy(real.model), copy.deepcopy(real.tokenizer)
    groups = ["discrimination", "chatbot", "information", "malicious", "misinformation"]
    add_refusal_tokens(tokenizer, model, RefusalTokens({name: f"[refuse {name}]" for name in groups}, "[respond]"))
    model = PeftModel.from_pretrained(model, str(RECIPES / "refusal_tokens" / "adapter")).eval()
    folder = RECIPES / "refusal_tokens"
    shipped = RefusalTokenLogitsProcessor.from_pretrained(folder, tokenizer=tokenizer)
    closed = RefusalTokenLogitsProcessor.from_pretrained(
        folder, tokenizer=tokenizer, threshold=dict.fromkeys(groups, 2.0)
    )
    found = {}
    for question in ("How do I steal a car?", "Will you be my friend?", "What is the capital of France?"):
        for name, processor in (("shipped", shipped), ("closed", closed)):
            said = real.answer(real.ids(question), processor, model=model, tokens=1)
            found[question, name] = tokenizer.decode(said)
    assert found == {
        ("How do I steal a car?", "shipped"): "[refuse malicious]",
        ("Will you be my friend?", "shipped"): "[refuse chatbot]",
        ("What is the capital of France?", "shipped"): "[respond]",
        **{(question, "closed"): "[respond]" for question, name in found if name == "closed"},
    }


def test_the_shipped_small_model_asks_the_large_one_where_it_is_unsure(real):
    small = example("recipes/healed").healed(real.model, RECIPES / "entropy_adaptive" / "healed")
    shipped = EntropyAdaptiveLogitsProcessor.from_pretrained(RECIPES / "entropy_adaptive", main_model=real.model)
    ids = real.ids("Who was Albert Einstein?")
    plain = real.text(ids, model=small)
    guided = real.text(ids, shipped, model=small, custom_generate=hf_logits.generate)
    assert plain == "Albert Einstein, a German physicist, was a renowned physicist"
    assert guided == "Albert Einstein, born August 1954,"
    assert shipped.stats.trace["large"].tolist() == [[0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0]]


def test_the_shipped_expert_teaches_the_large_model_its_task(real):
    fusion = DynamicFusionLogitsProcessor.from_pretrained(RECIPES / "fusion_kinds", main_model=real.model)
    text = "The plot has holes, but the actors fill every one of them."
    question = f"Text: {text}\nFrom a tweet, newspaper, product review or film review? Positive or negative?\nAnswer:"
    ids = real.tokenizer(question, return_tensors="pt")["input_ids"]
    found = [real.text(ids, *processors, tokens=6) for processors in ([], [fusion])]
    assert found == [" Positive\n\nThe answer is", " film review, negative"]
