"""What is refused before trainers on own samples start."""

import pytest
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig

import rollouts
import tiny
from hf_logits.own_samples import WARPERS, check_draws_freely, check_prompts, check_window
from preferences import arguments


def config(folder, **settings):
    return arguments(GRPOConfig, folder, **({"per_device_train_batch_size": 8, "num_generations": 2} | settings))


def test_a_generation_batch_needs_as_many_prompts(tmp_path):
    args = config(tmp_path)
    check_prompts(args, rollouts.questions(4), None)
    check_prompts(args, rollouts.questions(1).to_iterable_dataset(), None)  # nobody knows how long it is
    with pytest.raises(ValueError, match="has 3 prompts, but a generation batch takes 4"):
        check_prompts(args, rollouts.questions(3), None)
    with pytest.raises(ValueError, match="The train dataset has no column 'prompt'"):
        check_prompts(args, Dataset.from_dict({"text": ["a"]}), None)
    with pytest.raises(ValueError, match="The train dataset has no rows"):
        check_prompts(args, Dataset.from_dict({"prompt": []}), None)


def test_evaluation_batches_keep_groups_whole(tmp_path):
    train, few = rollouts.questions(4), rollouts.questions(1)
    check_prompts(config(tmp_path, per_device_eval_batch_size=4), train, few)
    check_prompts(config(tmp_path, per_device_eval_batch_size=3), train, None)
    check_prompts(config(tmp_path, per_device_eval_batch_size=3, num_generations_eval=3), train, {"one": few})
    with pytest.raises(ValueError, match=r"has 3 rows .* no multiple of the 2 answers"):
        check_prompts(config(tmp_path, per_device_eval_batch_size=3), train, few)
    with pytest.raises(ValueError, match="The two dataset has no column 'prompt'"):
        check_prompts(config(tmp_path), train, {"one": few, "two": Dataset.from_dict({"text": ["a"]})})


def test_answers_have_a_place_behind_the_prompt():
    model = tiny.llama(0, max_position_embeddings=16)
    check_window(model, [[6] * 12, [6]], 4)
    check_window(model, [], 4)
    with pytest.raises(ValueError, match=r"has 13 tokens, and an answer to it can have 4 .* holds 16"):
        check_window(model, [[6], [6] * 13], 4)


@pytest.mark.parametrize(("name", "value"), [("no_repeat_ngram_size", 2), ("min_new_tokens", 3), ("typical_p", 0.5)])
def test_a_model_with_habits_of_generation_is_refused(name, value):
    model = tiny.llama(0)
    check_draws_freely(model)
    for setting, neutral in WARPERS.items():
        setattr(model.generation_config, setting, neutral)
    check_draws_freely(model)
    assert set(WARPERS) <= set(GenerationConfig().to_dict())
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"generation_config has {name}={value}"):
        check_draws_freely(model)
