"""Recipes: what was saved, pushed and loaded decodes as what was built by hand, and a bad recipe does nothing but complain."""

import copy
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

import hf_logits
import tiny
from hf_logits import RecipeError, load_recipe, push_recipe, save_recipe
from hf_logits.fewer_layers import keep_layers
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    GeDiLogitsProcessor,
    GeDiRepetitionPenaltyLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    MixtureTerm,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
)
from hf_logits.recipe_format import METHODS, RECIPE_FILE, TENSOR_FILE


pytestmark = [
    # huggingface_hub uploads LFS files in a way that its HTTP client wants spelled otherwise.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
    # PEFT asks models under a name that transformers has replaced.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ROOT = Path(__file__).parents[1]
NEW_TOKENS = 6
TEXT = "w12 w13 w14 w15 w16"


@functools.cache
def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "</s>": tiny.EOS} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def adapted(base: PreTrainedModel, *names: str) -> peft.PeftModel:
    """`base` with adapters that do something."""
    config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**config))
    return model.eval()


RECIPES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "steer": lambda main: SteerLogitsProcessor(model=main, base_model=tiny.gpt2(1), negatives=[[5, 6, 7, 8]]),
    "steer_rows": lambda main: SteerLogitsProcessor(
        model=main, base_model=tiny.llama(1), negatives=[5, 6, 7], contrast=torch.tensor([0.3]), protect_ids=[2]
    ),
    "gedi": lambda main: GeDiLogitsProcessor(
        tiny.gpt2(2), desired="w10", undesired=["w11"], strength=5.0, scale=1.3, bias={"w10": 0.3}, tokenizer=words()
    ),
    "gedi_penalty": lambda main: GeDiRepetitionPenaltyLogitsProcessor(1.4),
    "refusal": lambda main: RefusalTokenLogitsProcessor(
        refuse={"a": 5, "b": 7}, respond=6, threshold={"a": 0.0, "b": 0.0}, mode="category"
    ),
    "refusal_text": lambda main: RefusalTokenLogitsProcessor(
        refuse="w5", respond="w6", mode="bias", bias=9.0, tokenizer=words()
    ),
    "adaptive": lambda main: EntropyAdaptiveLogitsProcessor(
        tiny.llama(1), threshold=2.0, min_stay=1, window=2, timing="next", eos_token_id=[2, 3]
    ),
    "adaptive_never": lambda main: EntropyAdaptiveLogitsProcessor(tiny.llama(1), threshold=float("inf")),
    "lqcd": lambda main: LQCDLogitsProcessor(main, "w30 w31 w32", contrast=2.0, tokenizer=words()),
    "lqcd_table": lambda main: LQCDLogitsProcessor(main, {TEXT: "w30 w31 w32"}, tokenizer=words()),
    "fusion": lambda main: DynamicFusionLogitsProcessor(tiny.gpt2(1), [tiny.gpt2(2), tiny.gpt2(3)], combine="joint"),
    "fusion_adapters": lambda main: DynamicFusionLogitsProcessor(
        adapted(tiny.llama(3), "default", "other"), ["default", "other"], solver="exact"
    ),
    "mixture_adapter": lambda main: MixtureLogitsProcessor(
        [MixtureTerm(adapted(tiny.llama(3), "special"), 0.8), MixtureTerm(tiny.llama(4), -0.2, [9, 8], None, 2.0)]
    ),
    "cfg": lambda main: MixtureLogitsProcessor.cfg(main, scale=1.8),
    "cfg_negative": lambda main: MixtureLogitsProcessor.cfg(main, "w9 w8", scale=1.8, tokenizer=words()),
    "context_aware": lambda main: MixtureLogitsProcessor.context_aware(main, [9, 8], contrast=0.7),
    "proxy": lambda main: MixtureLogitsProcessor.proxy(tiny.llama(1), tiny.llama(2)),
    "dexperts": lambda main: MixtureLogitsProcessor.dexperts(tiny.llama(1), tiny.llama(2), weight=1.5),
    "contrastive": lambda main: MixtureLogitsProcessor.contrastive(tiny.gpt2(1)),
}


def generate(model: PreTrainedModel, processors: Any) -> list[int]:
    ids = words()(TEXT, return_tensors="pt")["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS}
    return model.generate(**given, do_sample=False, logits_processor=list(processors))[0, ids.shape[1] :].tolist()


def digests(folder: Path) -> dict[str, str]:
    """Checksum by path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the recipe in `folder`, with right checksums."""
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    change(recipe)
    (folder / RECIPE_FILE).write_text(json.dumps(recipe))


def resign(folder: Path) -> None:
    """Make the checksums of a recipe right again, as its author can."""
    names = [name for name in digests(folder) if name != RECIPE_FILE]
    edit(folder, lambda recipe: recipe.update(files={name: digests(folder)[name] for name in names}))


def shares(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models are the same memory."""
    places = {parameter.data_ptr() for parameter in one.parameters()}
    return all(parameter.data_ptr() in places for name, parameter in other.named_parameters() if "lora_" not in name)


# --- folders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_processor_decodes_as_the_saved_one_and_saves_the_same_bytes(name, tmp_path):
    main = tiny.llama(0)
    processor = RECIPES[name](main)
    processor.save_pretrained(tmp_path / "one", main_model=main)
    loaded = type(processor).from_pretrained(tmp_path / "one", main_model=main)
    loaded.save_pretrained(tmp_path / "two", main_model=main)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert generate(main, [loaded]) == generate(main, [processor])
    if name != "adaptive_never":
        assert generate(main, [loaded]) != generate(main, [])


def test_every_method_has_a_recipe_here():
    main = tiny.llama(0)
    assert {type(build(main)).__name__ for build in RECIPES.values()} == set(METHODS.values())
    everything = {name for name in hf_logits.processors.__all__ if name.endswith("LogitsProcessor")}
    assert everything == set(METHODS.values())


def test_the_main_model_is_shared(tmp_path):
    main = tiny.llama(0)
    LQCDLogitsProcessor(main, [9, 8]).save_pretrained(tmp_path, main_model=main)
    assert not list(tmp_path.glob("auxiliary_*"))
    assert LQCDLogitsProcessor.from_pretrained(tmp_path, main_model=main).model is main
    with pytest.raises(RecipeError, match=r"models\[0\] is the generating model: pass main_model="):
        LQCDLogitsProcessor.from_pretrained(tmp_path)


def test_a_peft_model_that_generates_is_shared(tmp_path):
    tuned = adapted(tiny.llama(3), "default")
    processor = SteerLogitsProcessor(model=tuned, contrast=1.0)
    processor.save_pretrained(tmp_path, main_model=tuned)
    loaded = SteerLogitsProcessor.from_pretrained(tmp_path, main_model=tuned)
    assert loaded.model is tuned
    assert generate(tuned, [loaded]) == generate(tuned, [processor])


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_of_the_main_model_shares_its_weights_and_leaves_it_alone(wrapped, tmp_path):
    """The adapter is written, the base is not; loading puts no adapter into the model that generates."""
    by_hand = adapted(tiny.llama(0), "default", "other")
    by_hand.set_adapter("other")
    save_recipe([MixtureLogitsProcessor([MixtureTerm(by_hand, -3.0)])], tmp_path, main_model=by_hand.get_base_model())
    names = {name.split("/")[-1] for name in digests(tmp_path)}
    assert names == {RECIPE_FILE, "adapter_config.json", "adapter_model.safetensors"}
    main = adapted(tiny.llama(0), "mine") if wrapped else tiny.llama(0)
    before = generate(main, [])
    (loaded,) = load_recipe(tmp_path, main_model=main)
    expert = loaded.terms[0].model
    assert expert.active_adapter == "other"
    assert shares(main, expert.get_base_model())
    assert generate(main, []) == before
    apart = MixtureLogitsProcessor([MixtureTerm(by_hand, -3.0)])
    assert generate(main, [loaded]) == generate(main, [apart]) != before


def fused_with_its_own_layers(main: PreTrainedModel) -> DynamicFusionLogitsProcessor:
    small = get_peft_model(keep_layers(main, [0, 2]), LoraConfig(target_modules=["q_proj", "v_proj"]), "healed")
    small.add_adapter("expert", LoraConfig(target_modules=["q_proj", "v_proj"]))
    for number, (name, weight) in enumerate(small.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))
    return DynamicFusionLogitsProcessor(small.eval(), "expert", small_adapter="healed")


def test_some_layers_of_the_main_model_are_stored_as_a_list(tmp_path):
    main = tiny.llama(num_hidden_layers=4)
    main.save_pretrained(tmp_path / "main")
    processor = fused_with_its_own_layers(main)
    processor.save_pretrained(tmp_path / "recipe", main_model=main)
    stored = json.loads((tmp_path / "recipe" / RECIPE_FILE).read_text())["models"]
    assert {"kind": "layers", "of": 2, "layers": [0, 2]} in stored and {"kind": "main"} in stored
    assert not list((tmp_path / "recipe").rglob("model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "main").eval()
    loaded = DynamicFusionLogitsProcessor.from_pretrained(tmp_path / "recipe", main_model=again)
    ids = tiny.prompts()[0]
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    first, second = (
        model.generate(ids, logits_processor=[one], **options) for model, one in ((main, processor), (again, loaded))
    )
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(torch.stack(first.scores), torch.stack(second.scores))
    assert again.model.layers[2].mlp.up_proj.weight.data_ptr() == (
        loaded.small_model.get_base_model().model.layers[1].mlp.up_proj.weight.data_ptr()
    )
    assert again.config.num_hidden_layers == 4 and not hasattr(again.model.layers[0].self_attn.q_proj, "lora_A")
    # the same again, without PEFT's default base: reads that each adapter gives alone
    healed, expert = (single(loaded.small_model, name) for name in ("healed", "expert"))
    apart = DynamicFusionLogitsProcessor(healed, expert)
    third = again.generate(ids, logits_processor=[apart], **options)
    torch.testing.assert_close(torch.stack(second.scores), torch.stack(third.scores), atol=1e-5, rtol=0)


def single(model: PeftModel, name: str) -> PreTrainedModel:
    """One adapter of several, merged."""
    twin = copy.deepcopy(model)
    twin.set_adapter(name)
    return twin.merge_and_unload(adapter_names=[name]).eval()


def test_layers_that_were_trained_since_are_stored_themselves(tmp_path):
    main = tiny.llama(num_hidden_layers=3)
    part = keep_layers(main, [0, 1], share=False)
    with torch.no_grad():
        part.model.layers[0].mlp.up_proj.weight.add_(1.0)
    DynamicFusionLogitsProcessor(part, keep_layers(main, [0])).save_pretrained(tmp_path, main_model=main)
    kinds = [model["kind"] for model in json.loads((tmp_path / RECIPE_FILE).read_text())["models"]]
    assert sorted(kinds) == ["folder", "layers", "main"]


def test_layers_of_another_model_or_in_another_dtype_are_stored_themselves(tmp_path):
    main = tiny.llama(num_hidden_layers=2)
    other = keep_layers(tiny.llama(seed=3, num_hidden_layers=4), [0, 3])
    rounded = keep_layers(main, [0], share=False).bfloat16()
    for name, part in (("other", other), ("rounded", rounded)):
        DynamicFusionLogitsProcessor(part, part).save_pretrained(tmp_path / name, main_model=main)
        kinds = [model["kind"] for model in json.loads((tmp_path / name / RECIPE_FILE).read_text())["models"]]
        assert kinds == ["folder"]
    loaded = DynamicFusionLogitsProcessor.from_pretrained(tmp_path / "rounded", main_model=main)
    assert loaded.small_model.dtype == torch.bfloat16


def test_a_model_that_two_processors_read_is_saved_and_loaded_once(tmp_path):
    main, amateur = tiny.llama(0), tiny.gpt2(1)
    processors = [
        MixtureLogitsProcessor.contrastive(amateur),
        GeDiRepetitionPenaltyLogitsProcessor(),
        MixtureLogitsProcessor.proxy(tiny.gpt2(2), amateur),
    ]
    save_recipe(processors, tmp_path, main_model=main)
    loaded = load_recipe(tmp_path, main_model=main)
    assert isinstance(loaded, LogitsProcessorList)
    assert [type(processor) for processor in loaded] == [type(processor) for processor in processors]
    assert loaded[0].terms[0].model is loaded[2].terms[1].model
    assert len(list(tmp_path.glob("auxiliary_*"))) == 2
    assert generate(main, loaded) == generate(main, processors) != generate(main, processors[::-1])
    with pytest.raises(RecipeError, match="use load_recipe"):
        MixtureLogitsProcessor.from_pretrained(tmp_path)


def test_overrides_device_and_dtype(tmp_path):
    main = tiny.llama(0)
    MixtureLogitsProcessor.contrastive(tiny.gpt2(1)).save_pretrained(tmp_path)
    loaded = MixtureLogitsProcessor.from_pretrained(tmp_path, plausibility=0.5, dtype="bfloat16", device="meta")
    assert (loaded.plausibility, loaded.terms[0].model.dtype) == (0.5, torch.bfloat16)
    assert loaded.terms[0].model.device.type == "meta"
    with pytest.raises(TypeError, match="has no \\['plausable'\\]"):
        MixtureLogitsProcessor.from_pretrained(tmp_path, plausable=0.5)
    with pytest.raises(RecipeError, match="is a folder and has no revisions"):
        load_recipe(tmp_path, revision="main")
    save_recipe([MixtureLogitsProcessor.contrastive(tiny.gpt2(1).bfloat16())], tmp_path)
    assert load_recipe(tmp_path, main_model=main)[0].terms[0].model.dtype == torch.bfloat16


def test_a_recipe_in_a_subfolder_replaces_an_older_one_and_keeps_the_rest(tmp_path):
    place = tmp_path / "recipes" / "a"
    RECIPES["fusion"](None).save_pretrained(place)
    (place / "notes.txt").write_text("mine")
    RECIPES["steer_rows"](tiny.llama(0)).save_pretrained(place)
    assert {name.split("/")[0] for name in digests(place)} == {
        "auxiliary_0",
        "auxiliary_1",
        RECIPE_FILE,
        TENSOR_FILE,
        "notes.txt",
    }
    GeDiRepetitionPenaltyLogitsProcessor(1.7).save_pretrained(place)
    assert {*digests(place)} == {RECIPE_FILE, "notes.txt"}
    assert load_recipe(tmp_path, subfolder="recipes/a")[0].penalty == 1.7
    with pytest.raises(RecipeError, match="leaves"):
        load_recipe(place, subfolder="../a")


def test_what_is_no_data_is_refused(tmp_path):
    main = tiny.llama(0)
    with pytest.raises(RecipeError, match="cannot be saved as data: use text"):
        LQCDLogitsProcessor(main, lambda prompt: prompt).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="TopKLogitsWarper is no method of hf_logits"):
        save_recipe([transformers.TopKLogitsWarper(3)], tmp_path)
    with pytest.raises(RecipeError, match="nothing to save"):
        save_recipe([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_vision_language_auxiliary(tmp_path):
    from transformers import AutoModelForImageTextToText

    guide = vision_language()
    processor = MixtureLogitsProcessor([MixtureTerm(guide, 0.9)])
    processor.save_pretrained(tmp_path)
    loaded = MixtureLogitsProcessor.from_pretrained(tmp_path)
    assert type(loaded.terms[0].model) is type(guide)
    assert type(guide) in AutoModelForImageTextToText._model_mapping.values()
    assert generate(tiny.llama(0), [loaded]) == generate(tiny.llama(0), [processor])


def vision_language() -> PreTrainedModel:
    text = {"vocab_size": tiny.VOCAB, "model_type": "llama"} | tiny._SMALL | tiny._IDS
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 4,
        "patch_size": 2,
        "projection_dim": 32,
    }
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=63, vision_feature_layer=-1, image_seq_length=4
    )
    return tiny.spread(transformers.LlavaForConditionalGeneration(config), 0)


def test_evaluating_with_a_trainer(tmp_path):
    """Seq2SeqTrainer hands what evaluate() and predict() get to generate()."""
    main = tiny.t5(0)
    processor = MixtureLogitsProcessor([MixtureTerm(tiny.llama(1), 0.9)])
    processor.save_pretrained(tmp_path)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [9, 10]}, {"input_ids": [11, 12, 13, 14], "labels": [9, 10]}]
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "out"), predict_with_generate=True, report_to="none", use_cpu=True, disable_tqdm=True
    )
    seen = []
    trainer = transformers.Seq2SeqTrainer(
        main, arguments, eval_dataset=rows, compute_metrics=lambda p: seen.append(p.predictions) or {}
    )
    trainer.evaluate(max_new_tokens=NEW_TOKENS, logits_processor=load_recipe(tmp_path, main_model=trainer.model))
    trainer.evaluate(max_new_tokens=NEW_TOKENS)
    ids = torch.tensor([row["input_ids"] for row in rows])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    for found, processors in zip(seen, ([processor], []), strict=True):
        assert (
            found[:, : NEW_TOKENS + 1].tolist() == main.generate(ids, logits_processor=processors, **options).tolist()
        )
    assert (seen[0] != seen[1]).any()


# --- the Hub ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Empties the cache: what follows comes from the Hub."""

    def empty(name: str = "another-cache") -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name))

    return empty


@pytest.fixture
def installed(monkeypatch):
    """transformers asks whether the requirements of remote code are installed; a checkout on the path is not."""
    import importlib.metadata

    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: hf_logits.__version__ if name == "hf_logits" else version(name)
    )


@pytest.fixture
def steered(hub, fresh, monkeypatch, tmp_path):
    """Pushes a model and then a recipe for it into the same repository: `(the model as it is loaded, processors) <- build`."""
    # Where transformers keeps remote code.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def push(build: Callable[[PreTrainedModel], Any], **options: Any) -> tuple[PreTrainedModel, Any]:
        plain = tiny.llama(0)
        plain.generation_config.pad_token_id = tiny.PAD
        plain.push_to_hub("tester/steered")
        words().push_to_hub("tester/steered")
        main = transformers.AutoModelForCausalLM.from_pretrained("tester/steered")
        processors = build(main)
        processors = processors if isinstance(processors, list) else [processors]
        push_recipe(processors, "tester/steered", main_model=main, **options)
        fresh()
        return main, processors

    return push


@pytest.mark.parametrize("name", RECIPES)
def test_three_doors(name, steered, hub, installed):
    """Each from the Hub: a stock pipeline, ours, and one with remote code. All decode as the processor built by hand."""
    main, (processor,) = steered(RECIPES[name], remote_code=True)
    expected = words().decode(generate(main, [processor]), skip_special_tokens=True).split()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}

    stock = transformers.pipeline("text-generation", model="tester/steered")
    loaded = type(processor).from_pretrained("tester/steered", main_model=stock.model)
    found = stock(TEXT, logits_processor=[loaded], **options)
    assert found[0]["generated_text"].split() == expected

    ours = hf_logits.pipeline("text-generation", model="tester/steered")
    assert type(ours) is type(stock)
    assert ours(TEXT, **options)[0]["generated_text"].split() == expected

    plain = stock(TEXT, **options)[0]["generated_text"].split()
    assert (plain == expected) is (name == "adaptive_never")

    remote = transformers.pipeline("text-generation", model="tester/steered", trust_remote_code=True)
    for _ in range(2):
        assert remote(TEXT, **options)[0]["generated_text"].split() == expected
    ids = words()(TEXT, return_tensors="pt")["input_ids"]
    positional = remote.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert positional[0, ids.shape[1] :].tolist() == generate(main, [processor])[:2]
    assert not [request for request in hub.unknown if "additional_chat_templates" not in request]


def test_remote_code_needs_to_be_trusted(steered, installed):
    main, _ = steered(RECIPES["proxy"], remote_code=True)
    pipe = transformers.pipeline("text-generation", model="tester/steered", trust_remote_code=False)
    assert "generate" not in vars(pipe.model)
    ids = words()(TEXT, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipe.model.generate(ids, custom_generate="tester/steered", trust_remote_code=False)


def test_our_pipeline_without_a_recipe_and_with_another(hub):
    tiny.llama(0).push_to_hub("tester/plain")
    words().push_to_hub("tester/plain")
    main = transformers.AutoModelForCausalLM.from_pretrained("tester/plain")
    processor = MixtureLogitsProcessor.cfg(main, [9, 8], scale=2.0)
    processor.push_to_hub("tester/recipe", main_model=main)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    for settings_, processors in (({}, []), ({"recipe": "tester/recipe"}, [processor])):
        pipe = hf_logits.pipeline("text-generation", model="tester/plain", **settings_)
        expected = words().decode(generate(main, processors), skip_special_tokens=True)
        assert pipe(TEXT, **options)[0]["generated_text"].split() == expected.split()
    pipe = hf_logits.pipeline("text-generation", model=main, tokenizer=words())
    assert pipe.model is main
    steered_pipe = hf_logits.pipeline("text-generation", model=main, tokenizer=words(), recipe="tester/recipe")
    assert generate(steered_pipe.model, []) == generate(main, [processor]) != generate(main, [])
    assert shares(main, steered_pipe.model)
    ban = transformers.SuppressTokensLogitsProcessor([generate(main, [processor])[0]])
    pipe = hf_logits.pipeline("text-generation", "tester/plain", recipe="tester/recipe", logits_processor=[ban])
    expected = words().decode(generate(main, [ban, processor]), skip_special_tokens=True)
    assert pipe(TEXT, **options)[0]["generated_text"].split() == expected.split()


def test_an_image_text_to_text_pipeline(tmp_path):
    guide = MixtureLogitsProcessor.cfg(model := vision_language(), [9, 8], scale=3.0)
    image_processor = transformers.CLIPImageProcessor(
        size={"height": 4, "width": 4}, crop_size={"height": 4, "width": 4}
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words().backend_tokenizer.to_str().replace('"w63"', '"<image>"')),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=2,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (4, 4), (200, 10, 90))
    given = {"images": [image], "text": "<image> w12 w13"}
    options = {"generate_kwargs": {"max_new_tokens": NEW_TOKENS, "do_sample": False}, "return_full_text": False}
    plain = hf_logits.pipeline("image-text-to-text", model=tmp_path)(**given, **options)
    guide.save_pretrained(tmp_path, main_model=model)
    found = hf_logits.pipeline("image-text-to-text", model=tmp_path)(**given, **options)
    inputs = processor(**given, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=[guide])
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0]["generated_text"].split() == expected.split() != plain[0]["generated_text"].split()


def test_auxiliary_models_from_the_hub_are_pinned(hub, fresh, tmp_path):
    tiny.gpt2(1).push_to_hub("tester/amateur")
    first = hub.repos["tester/amateur"].refs["main"]
    amateur = transformers.AutoModelForCausalLM.from_pretrained("tester/amateur", dtype="bfloat16")
    tiny.gpt2(2).push_to_hub("tester/amateur")
    processor = MixtureLogitsProcessor.contrastive(amateur)
    processor.save_pretrained(tmp_path / "one")
    assert [*digests(tmp_path / "one")] == [RECIPE_FILE]
    (reference,) = json.loads((tmp_path / "one" / RECIPE_FILE).read_text())["models"]
    assert reference == {
        "kind": "hub",
        "task": "causal-lm",
        "dtype": "bfloat16",
        "repo_id": "tester/amateur",
        "revision": first,
    }
    fresh()
    loaded = MixtureLogitsProcessor.from_pretrained(tmp_path / "one")
    main = tiny.llama(0)
    assert generate(main, [loaded]) == generate(main, [processor])
    loaded.save_pretrained(tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    edit(tmp_path / "one", lambda recipe: recipe["models"][0].update(revision="0" * 40))
    with pytest.raises(RecipeError, match=rf"{RECIPE_FILE}: models\[0\].revision 0+ is not in tester/amateur"):
        load_recipe(tmp_path / "one")
    edit(tmp_path / "one", lambda recipe: recipe["models"][0].update(repo_id="tester/nobody"))
    with pytest.raises(RecipeError, match=r"models\[0\].repo_id tester/nobody is not there, or private: pass token="):
        load_recipe(tmp_path / "one")


def test_a_model_that_was_trained_since_it_came_is_saved_itself(hub, tmp_path):
    tiny.gpt2(1).push_to_hub("tester/amateur")
    amateur = transformers.AutoModelForCausalLM.from_pretrained("tester/amateur")
    amateur.transformer.wte.weight.data[5] += 1.0
    processor = MixtureLogitsProcessor.contrastive(amateur)
    processor.save_pretrained(tmp_path)
    loaded = MixtureLogitsProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded.terms[0].model.transformer.wte.weight, amateur.transformer.wte.weight)


def test_revisions_private_repositories_and_working_offline(hub, fresh, monkeypatch):
    main = tiny.llama(0)
    for penalty in (1.1, 1.2):
        GeDiRepetitionPenaltyLogitsProcessor(penalty).push_to_hub("tester/recipe", private=True)
    old, new = [commit for commit, files in hub.repos["tester/recipe"].commits.items() if RECIPE_FILE in files]
    load = GeDiRepetitionPenaltyLogitsProcessor.from_pretrained
    assert [load("tester/recipe", revision=r).penalty for r in (old, new, None, "main")] == [1.1, 1.2, 1.2, 1.2]
    with pytest.raises(RevisionNotFoundError):
        load("tester/recipe", revision="0" * 40)
    asked = len(hub.requests)
    assert load("tester/recipe", local_files_only=True).penalty == 1.2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("tester/recipe", revision=old).penalty == 1.1
    fresh()
    with pytest.raises(LocalEntryNotFoundError):
        load("tester/recipe")
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RepositoryNotFoundError):
        load("tester/recipe", token=False)
    HfApi().create_repo("tester/empty")
    with pytest.raises(RecipeError, match=f"There is no {RECIPE_FILE} in"):
        load("tester/empty")
    with pytest.raises(RecipeError, match="neither a folder nor a repository id"):
        load("../elsewhere/a/b")
    assert main is not None


def test_pushing_again_removes_what_the_new_recipe_lacks(hub):
    RECIPES["fusion"](None).push_to_hub("tester/recipe")
    hub.repos["tester/recipe"].commit(hub.repos["tester/recipe"].files | {"model.safetensors": b"", "notes.txt": b""})
    GeDiRepetitionPenaltyLogitsProcessor().push_to_hub("tester/recipe")
    assert {*hub.repos["tester/recipe"].files} == {
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "notes.txt",
        RECIPE_FILE,
    }


@pytest.mark.parametrize("cut", ["PUT ", "POST .*/commit/", "POST .*/preupload/"])
def test_an_interrupted_upload(cut, hub, fresh, monkeypatch):
    """Either the whole recipe is there or none; another try completes it."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    main, processor = tiny.llama(0), MixtureLogitsProcessor.contrastive(tiny.gpt2(1))
    hub.drop(cut, times=100)
    with pytest.raises(Exception, match="(?i)disconnected|uploading|reset|broken"):
        processor.push_to_hub("tester/recipe")
    assert {*hub.repos["tester/recipe"].files} == {".gitattributes"}
    with pytest.raises(RecipeError, match="There is no"):
        load_recipe("tester/recipe")
    hub.drop(cut, times=0)
    processor.push_to_hub("tester/recipe")
    fresh()
    assert generate(main, load_recipe("tester/recipe")) == generate(main, [processor])


@pytest.mark.parametrize("cut", ["GET .*safetensors", f"GET .*{RECIPE_FILE}"])
def test_an_interrupted_download(cut, hub, fresh, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    main, processor = tiny.llama(0), MixtureLogitsProcessor.contrastive(tiny.gpt2(1))
    processor.push_to_hub("tester/recipe")
    fresh()
    hub.drop(cut, times=100)
    with pytest.raises(Exception, match="(?i)disconnected|closed|reset|incomplete|consistency"):
        load_recipe("tester/recipe")
    with pytest.raises((RecipeError, OSError)):
        load_recipe("tester/recipe", local_files_only=True)
    hub.drop(cut, times=0)
    assert generate(main, load_recipe("tester/recipe")) == generate(main, [processor])


def test_the_model_card(hub, fresh):
    tiny.llama(0).push_to_hub("tester/base")
    main = transformers.AutoModelForCausalLM.from_pretrained("tester/base")
    SteerLogitsProcessor(model=main, negatives=[5, 6], contrast=0.0, repulsion=0.25).push_to_hub(
        "tester/recipe", main_model=main
    )
    text = hub.repos["tester/recipe"].files["README.md"].decode()
    card = ModelCard(text)
    assert {"hf_logits", "steer"} <= set(card.data.tags)
    assert card.data.base_model == "tester/base"
    assert card.data.license is None
    for part in ("https://huggingface.co/papers/2308.07645", "repulsion=0.25", "tester/base", "SteerLogitsProcessor"):
        assert part in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    words().push_to_hub("tester/base")
    fresh()
    exec(compile(snippet.replace("print(", "result = ("), "card", "exec"), scope := {})
    assert scope["steering"].repulsion == 0.25
    assert scope["result"][0]["generated_text"].startswith("Once upon a time")


def test_an_existing_card_is_kept(hub):
    mine = "---\nlicense: mit\ntags:\n- poems\nbase_model: tester/other\n---\n\n# Poems\n\nBefore.\n"
    api = HfApi()
    api.create_repo("tester/recipe")
    api.upload_file(repo_id="tester/recipe", path_or_fileobj=mine.encode(), path_in_repo="README.md")
    GeDiRepetitionPenaltyLogitsProcessor(1.1).push_to_hub("tester/recipe")
    once = hub.repos["tester/recipe"].files["README.md"].decode()
    api.upload_file(repo_id="tester/recipe", path_or_fileobj=(once + "\nAfter.\n").encode(), path_in_repo="README.md")
    GeDiRepetitionPenaltyLogitsProcessor(1.9).push_to_hub("tester/recipe", base_model="tester/base")
    text = hub.repos["tester/recipe"].files["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model) == ("mit", "tester/other")
    assert card.data.tags == ["poems", "hf_logits", "gedi_repetition_penalty"]
    assert text.count("## Decoding recipe") == 1
    assert "penalty=1.9" in text
    assert "penalty=1.1" not in text
    assert text.index("Before.") < text.index("## Decoding recipe") < text.index("After.")


# --- a recipe is data from strangers -----------------------------------------------------------------------------------------


def innocent() -> list[Any]:
    """Processors without auxiliary models of their own, but with a tensor and the main model."""
    terms = [MixtureTerm(main_of_strangers(), torch.tensor([0.5]), [9, 8]), MixtureTerm(main_of_strangers(), -0.5)]
    return [
        MixtureLogitsProcessor(terms, plausibility=0.1, pad_token_id=0),
        RefusalTokenLogitsProcessor(refuse={"a": 5, "b": 7}, respond=6, threshold={"a": 0.01}, mode="category"),
        GeDiRepetitionPenaltyLogitsProcessor(),
    ]


@functools.cache
def main_of_strangers() -> PreTrainedModel:
    return tiny.llama(0)


def at(recipe: Any, *path: Any, value: Any) -> None:
    *way, last = path
    for step in way:
        recipe = recipe[step]
    recipe[last] = value


PENALTY = ("processors", 2, "arguments", "penalty")
TERMS = ("processors", 0, "arguments", "terms")
COMMIT = "0123456789" * 4
HUB_MODEL = {"kind": "hub", "task": "causal-lm", "dtype": "float32", "repo_id": "a/b", "revision": COMMIT}
FOLDER_MODEL = {"kind": "folder", "task": "causal-lm", "folder": "auxiliary_0"}
ADAPTERS = {"kind": "adapters", "base": 0, "folder": "auxiliary_0", "adapters": ["default"], "active": "default"}
BAD: dict[str, tuple[tuple, Any, str]] = {
    "version_newer": (("schema_version",), 2, "schema_version is 2, this version reads 1: update"),
    "version_boolean": (("schema_version",), True, "schema_version is True"),
    "key_unknown": (("command",), "ls", "the file lacks .* unknown keys: 'command'"),
    "key_unknown_in_processor": (("processors", 0, "code"), "ls", r"processors\[0\] .* unknown keys: 'code'"),
    "key_unknown_in_arguments": (("processors", 0, "arguments", "evil"), 1, r"processors\[0\].arguments .*'evil'"),
    "key_of_the_runtime": (("processors", 0, "arguments", "tokenizer"), "a/b", r"arguments .*'tokenizer'"),
    "processors_none": (("processors",), [], "processors is empty"),
    "processors_no_list": (("processors",), {}, "processors must be a list, not dict"),
    "models_no_list": (("models",), None, "models must be a list"),
    "method_unknown": (
        ("processors", 0, "method"),
        "eval",
        r"processors\[0\].method is 'eval', unknown to this version",
    ),
    "method_of_a_module": (("processors", 0, "method"), "os.system", "method is 'os.system'"),
    "method_class": (("processors", 0, "method"), "MixtureLogitsProcessor", "method is 'MixtureLogitsProcessor'"),
    "method_dunder": (("processors", 0, "method"), "__init__", "method is '__init__'"),
    "method_no_text": (("processors", 0, "method"), ["mixture"], "method is "),
    "number_out_of_range": (PENALTY, 0.0, r"processors\[2\].arguments do not make .* penalty must be in \(0"),
    "number_text": (PENALTY, "1.2", r"penalty is '1.2': it must be .*float"),
    "number_boolean": (PENALTY, True, "penalty is True"),
    "number_too_fine": (
        ("processors", 2),
        {
            "method": "dynamic_fusion",
            "arguments": {"small_model": {"$model": 0}, "experts": [{"$model": 0}], "step": 1e-300},
        },
        "max_weight / step must be in",
    ),
    "number_infinite": (PENALTY, {"$float": "inf"}, "penalty is inf|finite"),
    "number_nan": (PENALTY, {"$float": "nan"}, "is 'nan': only 'inf' and '-inf'"),
    "tag_unknown": (PENALTY, {"$eval": "1"}, "is an object with the keys"),
    "tag_dunder": (PENALTY, {"$_keys": "1"}, "is an object with the keys"),
    "tensor_missing": ((*TERMS, 0, "$term", "weight"), {"$tensor": "other"}, "names the tensor 'other'"),
    "prompt_unknown": ((*TERMS, 0, "$term", "prompt"), {"$prompt": "os.getcwd"}, "only 'last_token' has a name"),
    "model_out_of_range": ((*TERMS, 0, "$term", "model"), {"$model": 7}, "names the model 7"),
    "model_negative": ((*TERMS, 0, "$term", "model"), {"$model": -1}, "names the model -1"),
    "model_text": ((*TERMS, 0, "$term", "model"), "a/b", "do not make a MixtureLogitsProcessor"),
    "kind_unknown": (("models", 0), {"kind": "pickle"}, r"models\[0\].kind is 'pickle'"),
    "layers_no_list": (("models", 0), {"kind": "layers", "of": 1, "layers": "all"}, r"models\[0\].layers is 'all'"),
    "layers_of_itself": (
        ("models", 0),
        {"kind": "layers", "of": 0, "layers": [0]},
        "names the model 0, which is its own base",
    ),
    "layers_not_there": (
        ("models",),
        [{"kind": "layers", "of": 1, "layers": [0, 9]}, {"kind": "main"}],
        r"models\[0\].layers do not fit: .*0 to 1",
    ),
    "layers_many": (("models",), [{"kind": "layers", "of": 1, "layers": [0, 0]}, {"kind": "main"}], "each once"),
    "revision_missing": (
        ("models", 0),
        {k: v for k, v in HUB_MODEL.items() if k != "revision"},
        r"models\[0\] lacks \['revision'\]",
    ),
    "revision_branch": (
        ("models", 0),
        HUB_MODEL | {"revision": "main"},
        "revision is 'main': a recipe pins the full commit",
    ),
    "repository_path": (("models", 0), HUB_MODEL | {"repo_id": "../a"}, "repo_id is '../a', no repository id"),
    "repository_offline": (("models", 0), HUB_MODEL, "is not in the cache"),
    "dtype_unknown": (("models", 0), HUB_MODEL | {"dtype": "system"}, "dtype is 'system'"),
    "folder_parent": (("models", 0), FOLDER_MODEL | {"folder": ".."}, "folder is '..'"),
    "folder_absolute": (("models", 0), FOLDER_MODEL | {"folder": "/etc"}, "folder is '/etc'"),
    "folder_missing": (("models", 0), FOLDER_MODEL, "names 'auxiliary_0', which is not there"),
    "adapter_parent": (("models", 0), ADAPTERS | {"adapters": [".."]}, "it must list names of adapters"),
    "adapter_not_there": (("models", 0), ADAPTERS, "names 'auxiliary_0', which is not there"),
    "file_parent": (("files", "../x.json"), "0" * 64, "names '../x.json'"),
    "file_absolute": (("files", "/etc/passwd"), "0" * 64, "names '/etc/passwd'"),
    "file_nested_parent": (("files", "auxiliary_0/../../x.json"), "0" * 64, "names 'auxiliary_0/../../x.json'"),
    "file_pickle": (
        ("files", "auxiliary_0/pytorch_model.bin"),
        "0" * 64,
        "only .safetensors and .json files are read",
    ),
    "file_missing": (("files", "auxiliary_0/config.json"), "0" * 64, "which is not there: download or save"),
    "checksum_no_checksum": (("files", TENSOR_FILE), "abc", "which is no SHA-256"),
    "checksum_wrong": (("files", TENSOR_FILE), "0" * 64, "it was changed, or not saved to its end"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_with_file_key_and_fix(name, tmp_path):
    path, value, message = BAD[name]
    save_recipe(innocent(), tmp_path, main_model=main_of_strangers())
    edit(tmp_path, lambda recipe: at(recipe, *path, value=value))
    before = digests(tmp_path)
    with pytest.raises(RecipeError, match=f"{re.escape(str(tmp_path / RECIPE_FILE))}: .*({message})"):
        load_recipe(tmp_path, main_model=main_of_strangers())
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no valid JSON"),
        ('{"schema_version": 1', "is no valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"schema_version": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "is no valid JSON|is deeper than"),
        ("[" * 20 + "]" * 20, "is deeper than 12 levels"),
        (f"[{'1,' * 300_000}1]", "holds more than"),
        (" " * 2_000_001, "is larger than 2000000 bytes"),
        (b"\xff\xfe", "is no valid JSON"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    (tmp_path / RECIPE_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=f"{RECIPE_FILE}: the file .*({message})"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("linked", [RECIPE_FILE, TENSOR_FILE, "auxiliary_1", "auxiliary_1/model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused(linked, tmp_path):
    place, elsewhere = tmp_path / "recipe", tmp_path / "elsewhere"
    processors = [*innocent(), MixtureLogitsProcessor.contrastive(tiny.gpt2(1))]
    save_recipe(processors, place, main_model=main_of_strangers())
    (place / linked).rename(elsewhere)
    (place / linked).symlink_to(elsewhere)
    with pytest.raises(RecipeError, match="links to a place outside the recipe"):
        load_recipe(place, main_model=main_of_strangers())


def test_bad_tensors_are_refused(tmp_path):
    save_recipe(innocent(), tmp_path, main_model=main_of_strangers())
    for content, message in ((b"\xff" * 20, "cannot be read"), (None, "tensor_0 holds NaN")):
        if content is None:
            save_file({"tensor_0": torch.tensor([float("nan")])}, tmp_path / TENSOR_FILE)
        else:
            (tmp_path / TENSOR_FILE).write_bytes(content)
        resign(tmp_path)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path, main_model=main_of_strangers())


def auxiliary_edit(folder: Path, name: str, **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


STRANGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "code": (
        "contrastive",
        lambda f: auxiliary_edit(f, "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        "holds no model that can be loaded",
    ),
    "pickle": ("contrastive", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "does not list"),
    "weights_gone": ("contrastive", lambda f: (f / "model.safetensors").unlink(), "holds no model that can be loaded"),
    "kernel": (
        "contrastive",
        lambda f: auxiliary_edit(f, "config.json", attn_implementation="evil/kernel"),
        "names a kernel to download",
    ),
    "adapter_in_disguise": ("contrastive", lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
    "import": (
        "mixture_adapter",
        lambda f: auxiliary_edit(
            f / "special", "adapter_config.json", megatron_config={}, megatron_core="antigravity"
        ),
        "",
    ),
    "import_by_name": (
        "mixture_adapter",
        lambda f: auxiliary_edit(
            f / "special", "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity"
        ),
        "megatron_config",
    ),
    "base_changed": (
        "mixture_adapter",
        lambda f: auxiliary_edit(f / "special", "adapter_config.json", init_lora_weights="pissa"),
        "init_lora_weights that changes its base",
    ),
    "more_repositories": (
        "mixture_adapter",
        lambda f: auxiliary_edit(f / "special", "adapter_config.json", peft_type="XLORA"),
        "has a 'XLORA' adapter",
    ),
    "adapter_strange": (
        "mixture_adapter",
        lambda f: auxiliary_edit(f / "special", "adapter_config.json", target_modules=["nothing"]),
        "holds no adapter that can be loaded",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_auxiliary_is_refused_and_runs_nothing(name, tmp_path):
    """All files are signed: this author knows the format. Beside the weights lies code that would leave a trace."""
    recipe, change, message = STRANGE[name]
    main, trace = tiny.llama(0), tmp_path / "trace"
    place = tmp_path / "recipe"
    RECIPES[recipe](main).save_pretrained(place, main_model=main)
    change(place / "auxiliary_0")
    if name == "pickle":
        names = [n for n in digests(place) if n != RECIPE_FILE and not n.endswith(".bin")]
        edit(place, lambda r: r.update(files={n: digests(place)[n] for n in names}))
    else:
        resign(place)
    for folder in (place, tmp_path):
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    if message:
        with pytest.raises(RecipeError, match=f"{RECIPE_FILE}: .*{message}"):
            load_recipe(place, main_model=main)
    else:
        load_recipe(place, main_model=main)
    assert not trace.exists()
    assert not {"antigravity", "evil"} & set(sys.modules)


WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["..", "/etc/passwd", "os.system", "mixture", "steer", "auxiliary_0", "main", "hub", COMMIT]),
    st.sampled_from([HUB_MODEL, FOLDER_MODEL, ADAPTERS, {"$model": 0}, {"$map": [[1, 2]]}, {"$float": "inf"}, {}, []]),
    st.lists(st.integers(-2, 70), max_size=3),
    st.dictionaries(
        st.sampled_from(["$term", "$map", "$tensor", "$prompt", "$model", "kind", "a"]), st.integers(-2, 3)
    ),
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inside for found in [(*path, key), *places(item, (*path, key))]]


def test_no_mutated_recipe_does_anything_but_complain(tmp_path):
    """`HF_LOGITS_FUZZ` sets how many. Checksums stay right, so that the mutations reach what is behind them."""
    main = main_of_strangers()
    save_recipe(innocent(), tmp_path, main_model=main)
    original = json.loads((tmp_path / RECIPE_FILE).read_text())
    load_recipe(tmp_path, main_model=main)
    with pytest.raises(RecipeError):  # so that whatever an honest try imports is imported
        edit(tmp_path, lambda recipe: at(recipe, "models", 0, value=HUB_MODEL))
        load_recipe(tmp_path, main_model=main)
    outcomes = {"loaded": 0, "refused": 0}
    modules, files = set(sys.modules), {*digests(tmp_path)}

    @seed(3)
    @settings(
        max_examples=int(os.environ.get("HF_LOGITS_FUZZ", "2000")),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        recipe = json.loads(json.dumps(original))
        for _ in range(data.draw(st.integers(1, 3))):
            *way, last = data.draw(st.sampled_from(places(recipe) or [("a",)]))
            holder = functools.reduce(lambda value, step: value[step], way, recipe)
            action = data.draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "remove" and (last in holder if isinstance(holder, dict) else True):
                del holder[last]
            elif action == "add" and isinstance(holder, dict):
                holder[data.draw(st.one_of(st.text(max_size=8), st.sampled_from(["model", "prompt", "dtype"])))] = (
                    copy.deepcopy(data.draw(WEIRD))
                )
            else:
                holder[last] = copy.deepcopy(data.draw(WEIRD))
        (tmp_path / RECIPE_FILE).write_text(json.dumps(recipe))
        try:
            load_recipe(tmp_path, main_model=main)
            outcomes["loaded"] += 1
        except RecipeError as error:
            assert str(tmp_path / RECIPE_FILE) in str(error)
            outcomes["refused"] += 1

    fuzz()
    assert {*digests(tmp_path)} == files
    # Parts of packages may be loaded late, but no package that was not there, except the printer of the shape checker's errors.
    new = {name.split(".")[0] for name in sys.modules} - {name.split(".")[0] for name in modules}
    assert new <= {"wadler_lindig"}
    assert outcomes["refused"] > outcomes["loaded"] > 0


# --- what the documentation shows ----------------------------------------------------------------------------------------------


def test_the_readme_snippet_runs_as_written(hub, fresh):
    """Over our Hub, with a tiny model under the name of the real one."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Share a decoding method") :].split("\n## ")[0]
    assert len(section.splitlines()) <= 40
    (snippet,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (model_id,) = set(re.findall(r'model="(HuggingFaceTB/[^"]+)"', snippet))
    tiny.llama(0).push_to_hub(model_id)
    words().push_to_hub(model_id)
    fresh()
    exec(compile(snippet, "README.md", "exec"), scope := {})
    assert "me/less-flowery" in hub.repos
    assert scope["steered"] == scope["again"]


def test_the_example(tmp_path):
    """Offline, with a tiny model in a folder."""
    tiny.llama(0).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        ROOT / "examples" / "share_a_recipe.py",
        "--model",
        tmp_path / "model",
        "--folder",
        tmp_path / "recipe",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "the same tokens: True" in done.stdout
    assert (tmp_path / "recipe" / RECIPE_FILE).is_file()
