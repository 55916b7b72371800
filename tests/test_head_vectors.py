"""Vectors behind attention heads: applied, baked, with adapters, processors and padding, and shared as data."""

import json

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import tiny
from hf_logits.attention_heads import head_shape
from hf_logits.head_vectors import VECTOR_FILE, VECTOR_TENSORS, HeadVectors
from hf_logits.processors import MixtureLogitsProcessor
from hf_logits.recipe_format import RecipeError


MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "mistral": tiny.mistral,
    "wide_heads": lambda seed=0: tiny.llama(seed, head_dim=16),
}
BIAS_ELSEWHERE = {
    "glm": (GlmForCausalLM, GlmConfig),
    "glm4": (Glm4ForCausalLM, Glm4Config),
    "helium": (HeliumForCausalLM, HeliumConfig),
}
"""Models whose `attention_bias` is one of the queries, keys and values, and not of the projection behind the heads."""
LORA = {"init_lora_weights": False, "target_modules": ["q_proj", "o_proj"], "lora_dropout": 0.3}


def vectors(model, seed: int = 0, strength: float = 1.0) -> HeadVectors:
    """Some heads of each layer are moved."""
    displacement = torch.randn(*head_shape(model), generator=torch.Generator().manual_seed(seed))
    displacement[0, 1] = displacement[1, 3] = 0.0
    return HeadVectors(displacement, strength=strength)


def tuned(seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", **LORA)).eval()


@torch.no_grad()
def logits(model, ids: Tensor | None = None) -> Tensor:
    return model(tiny.prompts(padded=False)[0] if ids is None else ids).logits


@torch.no_grad()
def by_hand(given: HeadVectors, strength: float) -> Tensor:
    """The slow obvious path, for Llama: what a layer adds to the stream is larger by `W_o` times the displacement."""
    model = tiny.llama()
    for layer, row in zip(model.model.layers, given.displacement, strict=True):
        move = layer.self_attn.o_proj.weight @ (strength * row.flatten())
        layer.self_attn.register_forward_hook(lambda _, args, output, move=move: (output[0] + move, *output[1:]))
    return logits(model)


# --- applied ---------------------------------------------------------------------------------------------------------------


def test_every_position_of_every_row_is_moved():
    model = tiny.llama()
    given = vectors(model)
    with given.applied(model, strength=1.5):
        found = logits(model)
    torch.testing.assert_close(found, by_hand(given, 1.5), rtol=1e-5, atol=1e-5)
    assert (found - logits(model)).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_zero_is_the_plain_model_and_the_block_leaves_nothing(build):
    model = build()
    plain = logits(model)
    with vectors(model).applied(model, strength=0.0):
        assert torch.equal(logits(model), plain)
    with pytest.raises(ZeroDivisionError), vectors(model).applied(model):
        assert not torch.allclose(logits(model), plain)
        raise ZeroDivisionError
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_two_vectors_add_up(build):
    model = build()
    first, second = vectors(model), vectors(model, seed=1)
    with first.applied(model, strength=0.5), second.applied(model, strength=2.0):
        nested = logits(model)
    both = HeadVectors(0.5 * first.displacement + 2.0 * second.displacement)
    with both.applied(model):
        torch.testing.assert_close(nested, logits(model), rtol=1e-4, atol=1e-5)


def test_the_own_strength_is_the_default():
    model = tiny.llama()
    given = vectors(model)
    with given.applied(model, strength=3.0):
        expected = logits(model)
    with given.with_strength(3.0).applied(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_batch_generates_as_its_rows_alone(build, beams):
    model = build()
    ids, mask = tiny.prompts(batch=3)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": tiny.PAD}
    with vectors(model).applied(model):
        together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        for row, real, answer in zip(ids, mask.bool(), together, strict=True):
            alone = model.generate(row[real][None], attention_mask=mask.new_ones(1, int(real.sum())), **options)
            assert torch.equal(alone[0, int(real.sum()) :], answer)
    plain = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert not torch.equal(plain, together)


def test_half_precision_stays_half_precision():
    model = tiny.llama().bfloat16()
    with vectors(model).applied(model):
        assert logits(model).dtype == torch.bfloat16


# --- with others ------------------------------------------------------------------------------------------------------------


def test_adapters_on_the_projections_see_the_moved_heads():
    model = tuned()
    given = vectors(model)
    with given.applied(model):
        moved = logits(model)
        with model.disable_adapter():
            base = logits(model)
    torch.testing.assert_close(base, by_hand(given, 1.0), rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    with given.applied(merged):
        torch.testing.assert_close(logits(merged), moved, rtol=1e-4, atol=1e-4)


def test_adapters_can_be_trained_meanwhile():
    model = tuned().train()
    with vectors(model).applied(model):
        model(tiny.prompts(padded=False)[0]).logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("loop", [False, True])
def test_processors_steer_the_moved_model(loop):
    """Guidance whose other branch is the model itself, moved too: as computed from scratch."""
    import hf_logits

    model, given = tiny.llama(), vectors(tiny.llama())
    ids, mask = tiny.prompts(padded=False)
    negative = [7, 9, 11]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
    options |= {"custom_generate": hf_logits.generate} if loop else {}
    guide = MixtureLogitsProcessor.cfg(model, negative, scale=2.0)
    with given.applied(model):
        found = model.generate(ids, attention_mask=mask, logits_processor=[guide], **options)
        rows = ids.tolist()
        for _ in range(5):
            for row, prompt in zip(rows, ids.tolist(), strict=True):
                main = tiny.recomputed(model, [row])[0]
                other = tiny.recomputed(model, [negative + row[len(prompt) :]])[0]
                row.append(int((other + 2.0 * (main - other)).argmax()))
    assert found.tolist() == rows
    guide.reset()
    plain = model.generate(ids, attention_mask=mask, logits_processor=[guide], **options)
    assert plain.tolist() != rows


# --- baked -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore")
def test_baked_is_applied(build):
    model = build()
    given = vectors(model)
    with given.applied(model, strength=1.5):
        expected = logits(model)
    given.bake(model, strength=1.5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    given.bake(model, strength=-1.5)
    torch.testing.assert_close(logits(model), logits(build()), rtol=1e-4, atol=1e-4)


def test_heads_that_look_at_chosen_tokens_alone_are_heads():
    sizes = {name: tiny._SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": tiny.VOCAB, "first_k_dense_replace": 2}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = DeepseekV32Config(index_n_heads=2, index_head_dim=8, index_topk=4, **sizes, **tiny._IDS)
    assert set(config.layer_types) == {"indexed_attention"}
    model = tiny.spread(DeepseekV32ForCausalLM(config), 0)
    plain, given = logits(model), vectors(model)
    with given.applied(model):
        expected = logits(model)
    given.bake(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=0.1)


def test_what_an_adapter_adds_is_baked_too():
    model = tuned().train()
    given = vectors(model)
    with given.applied(model):
        expected = logits(model.eval())
    given.bake(model.train())
    assert model.training
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)


def test_a_baked_model_is_saved_and_loaded(tmp_path):
    model = tiny.llama()
    vectors(model).bake(model)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(back), logits(model))
    assert back.config.attention_bias


def test_models_that_would_lose_the_bias_say_so(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.head_vectors.logger.warning_once", seen.append)
    for build in (tiny.llama, tiny.gpt2, tiny.mistral):
        model = build()
        vectors(model).bake(model)
    assert len(set(seen)) == 1 and "MistralForCausalLM has no setting for a bias behind its heads" in seen[0]


@pytest.mark.parametrize("model, config", BIAS_ELSEWHERE.values(), ids=BIAS_ELSEWHERE)
@pytest.mark.parametrize("flag", [False, True])
def test_a_bias_of_the_queries_alone_is_not_taken_for_one_behind_the_heads(monkeypatch, model, config, flag):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.head_vectors.logger.warning_once", seen.append)
    sizes = tiny._SMALL | tiny._IDS | {"vocab_size": tiny.VOCAB, "head_dim": 8}
    built = tiny.spread(model(config(attention_bias=flag, **sizes)), 0)
    given = vectors(built)
    with given.applied(built):
        expected = logits(built)
    given.bake(built)
    torch.testing.assert_close(logits(built), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1 and f"{model.__name__} has no setting for a bias behind its heads" in seen[0]
    assert built.config.attention_bias is flag
    assert (built.model.layers[0].self_attn.q_proj.bias is not None) is flag


def test_what_is_baked_under_an_adapter_is_kept_when_it_is_merged_and_a_warning_says_so(monkeypatch, tmp_path):
    seen: list[str] = []
    monkeypatch.setattr("hf_logits.head_vectors.logger.warning_once", seen.append)
    model = tuned()
    given = vectors(model)
    with given.applied(model):
        expected = logits(model)
    given.bake(model, strength=0.0)
    assert not seen
    given.bake(model)
    assert len(seen) == 1 and "merge_and_unload() before you save it, or share the vectors instead" in seen[0]
    model.save_pretrained(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(alone), logits(tuned()))  # lost, as the warning says
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    back = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)


def test_projections_that_are_trained_as_a_whole_are_baked(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["o_proj"])
    model = get_peft_model(tiny.llama(), config).eval()
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.o_proj.modules_to_save["default"].weight.mul_(1.5)  # as training would
    given = vectors(model)
    with given.applied(model):
        expected = logits(model)
    given.bake(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny.llama()))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_projections_whose_trained_copy_is_switched_off_are_baked_in_the_original():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["o_proj"])
    model = get_peft_model(tiny.llama(), config).eval()
    given = vectors(model)
    with model.disable_adapter():
        given.bake(model)
        torch.testing.assert_close(logits(model), by_hand(given, 1.0), rtol=1e-5, atol=1e-5)


def test_strength_zero_bakes_nothing():
    model = tiny.llama()
    vectors(model).bake(model, strength=0.0)
    assert model.model.layers[0].self_attn.o_proj.bias is None and not model.config.attention_bias


# --- bad input ---------------------------------------------------------------------------------------------------------------


def test_another_shape_is_refused():
    model = tiny.llama(num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"for \[2, 4, 8\] layers, heads and head size; LlamaForCausalLM has \[3, 4, 8\]"
    ):
        with vectors(tiny.llama()).applied(model):
            pass


def linear_attention(kind: str):
    """Models with layers of linear attention, which one calls `linear_attn` and the other `self_attn`."""
    sizes = tiny._SMALL | tiny._IDS | {"vocab_size": tiny.VOCAB, "num_hidden_layers": 4, "head_dim": 16}
    if kind == "minimax":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4}
        return MiniMaxForCausalLM(MiniMaxConfig(**sizes)).eval()
    sizes |= {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 8}
    sizes |= {"linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(shared_expert_intermediate_size=16, **sizes)).eval()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("qwen3_next", "Qwen3NextForCausalLM has 4 layers, but 1 output projections of attention heads were found"),
        (
            "minimax",
            "MiniMaxForCausalLM has layers of linear_attention: only causal language models with chunked_attention",
        ),
    ],
)
def test_linear_attention_is_not_read_as_heads(kind, message):
    with pytest.raises(ValueError, match=message):
        head_shape(linear_attention(kind))


@pytest.mark.parametrize(
    "displacement, strength, message",
    [
        (torch.zeros(2, 3), 1.0, "displacement must be finite and"),
        (torch.full((1, 1, 2), torch.nan), 1.0, "displacement must be finite and"),
        (torch.full((1, 1, 2), 1e300, dtype=torch.float64), 1.0, "displacement must be finite and"),
        (torch.zeros(1, 1, 2), torch.inf, "strength must be in"),
    ],
)
def test_vectors_that_are_none(displacement, strength, message):
    with pytest.raises(ValueError, match=message):
        HeadVectors(displacement, strength=strength)


def test_they_say_what_they_are():
    assert repr(vectors(tiny.llama(), strength=2.0)) == "HeadVectors(6 of 8 heads, strength=2.0)"
    assert vectors(tiny.llama()).heads == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]


# --- shared ----------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_them_back(tmp_path):
    given = vectors(tiny.llama(), strength=2.5)
    given.save_pretrained(tmp_path / "new")
    back = HeadVectors.from_pretrained(tmp_path / "new")
    assert torch.equal(back.displacement, given.displacement) and back.strength == 2.5
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [VECTOR_FILE, VECTOR_TENSORS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_vectors_of_any_dtype_are_kept_in_float32_and_come_back(tmp_path, dtype):
    displacement = (4 * vectors(tiny.llama()).displacement).to(dtype)
    given = HeadVectors(displacement)
    assert torch.equal(given.displacement, displacement.float()) and given.displacement.dtype == torch.float32
    given.with_strength(2.0).save_pretrained(tmp_path)
    assert torch.equal(HeadVectors.from_pretrained(tmp_path).displacement, given.displacement)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_the_hub_gives_them_back(hub, monkeypatch):
    model = tiny.llama()
    model.push_to_hub("tester/base")
    loaded = type(model).from_pretrained("tester/base")
    first, second = vectors(model, strength=2.5), vectors(model, seed=1)
    first.push_to_hub("tester/shy", base_model=loaded, private=True)
    files = hub.repos["tester/shy"].files
    assert set(files) >= {VECTOR_FILE, VECTOR_TENSORS, "README.md"}
    assert json.loads(files[VECTOR_FILE])["base_model"]["repo_id"] == "tester/base"
    card = files["README.md"].decode()
    assert "base_model: tester/base" in card and 'from_pretrained("tester/shy")' in card
    old = hub.repos["tester/shy"].refs["main"]
    second.push_to_hub("tester/shy")
    assert hub.repos["tester/shy"].files["README.md"] == files["README.md"]  # a card that is there stays
    assert torch.equal(HeadVectors.from_pretrained("tester/shy").displacement, second.displacement)
    back = HeadVectors.from_pretrained("tester/shy", revision=old)
    assert torch.equal(back.displacement, first.displacement) and back.strength == 2.5
    with back.applied(loaded):
        moved = logits(loaded)
    torch.testing.assert_close(moved, by_hand(first, 2.5), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(HeadVectors.from_pretrained("tester/shy").displacement, second.displacement)
    assert not hub.unknown


def damage(folder, **changes) -> None:
    noted = json.loads((folder / VECTOR_FILE).read_text())
    (folder / VECTOR_FILE).write_text(json.dumps({k: v for k, v in (noted | changes).items() if v != "gone"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schema_version": 2}, "schema_version is 2, this version reads 1: update hf_logits"),
        ({"strength": "4"}, "strength is '4': it must be a finite number"),
        ({"strength": True}, "strength is True: it must be a finite number"),
        ({"strength": float("inf")}, "strength is inf: it must be a finite number"),
        ({"strength": "gone"}, "must be an object with the keys"),
        ({"code": "import os"}, "must be an object with the keys"),
        ({"files": []}, "files must map names to checksums"),
        ({"files": {VECTOR_TENSORS: "0" * 64}}, "has another checksum than head_vectors.json says"),
        ({"files": {}}, "has another checksum than head_vectors.json says"),
    ],
)
def test_what_is_no_vector_is_refused(tmp_path, changes, message):
    vectors(tiny.llama()).save_pretrained(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(RecipeError, match=message):
        HeadVectors.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"other": torch.zeros(1, 1, 1)}, "must hold a finite float32 tensor 'displacement'"),
        ({"displacement": torch.zeros(1, 1, 1, dtype=torch.float64)}, "must hold a finite float32 tensor"),
        ({"displacement": torch.zeros(3)}, "must hold a finite float32 tensor"),
        ({"displacement": torch.full((1, 1, 1), torch.nan)}, "must hold a finite float32 tensor"),
        (b"no tensors", "cannot be read"),
    ],
)
def test_tensors_that_are_none(tmp_path, tensors, message):
    from safetensors.torch import save

    from hf_logits.recipe_format import checksum

    vectors(tiny.llama()).save_pretrained(tmp_path)
    (tmp_path / VECTOR_TENSORS).write_bytes(tensors if isinstance(tensors, bytes) else save(tensors))
    damage(tmp_path, files={VECTOR_TENSORS: checksum(tmp_path / VECTOR_TENSORS)})
    with pytest.raises(RecipeError, match=message):
        HeadVectors.from_pretrained(tmp_path)


def test_files_that_are_not_there_or_no_json(tmp_path):
    with pytest.raises(RecipeError, match="There is no head_vectors.json"):
        HeadVectors.from_pretrained(tmp_path)
    (tmp_path / VECTOR_FILE).write_text("{")
    with pytest.raises(RecipeError, match="is no valid JSON"):
        HeadVectors.from_pretrained(tmp_path)
    vectors(tiny.llama()).save_pretrained(tmp_path)
    (tmp_path / VECTOR_TENSORS).unlink()
    with pytest.raises(RecipeError, match="is not there, or larger than"):
        HeadVectors.from_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is a folder and has no revisions"):
        HeadVectors.from_pretrained(tmp_path, revision="main")
    with pytest.raises(RecipeError, match="neither a folder nor a repository id"):
        HeadVectors.from_pretrained("no/such/folder")
