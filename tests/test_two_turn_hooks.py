"""What SCoRe relies on in TRL's GRPO beyond its documentation: one test a hook, which says what moved."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import trl
from trl import GRPOConfig, GRPOTrainer

import rollouts


@contextmanager
def hook(where: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is reported as the hook that moved."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"{where} of TRL {trl.__version__} is no longer as SCoRe needs it: {what} ({type(error).__name__}: {error})",
            pytrace=False,
        )


@pytest.fixture
def trainer(tmp_path):
    luspo = {"beta": 0.1, "loss_type": "luspo", "use_bias_correction_kl": True}
    made = rollouts.make(GRPOTrainer, GRPOConfig, tmp_path, **rollouts.GROUPS, **luspo)
    made.model.train()
    made.current_gradient_accumulation_steps = 2
    return made


ROWS = [[6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
MASKS = [[1, 0, 0, 1], [1, 1], [1, 0, 1], [1, 0, 0, 1]]


def scored(trainer):
    rows = next(iter(trainer.get_train_dataloader()))
    ids, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
    trainer.rollout_func = lambda prompts, host: {
        "prompt_ids": ids,
        "completion_ids": ROWS,
        "logprobs": None,
        "env_mask": MASKS,
    }
    return trainer._generate_and_score_completions(rows)


def test_a_rollout_function_can_be_set_afterwards_and_mask_the_environment(trainer):
    with hook("GRPOTrainer.rollout_func", "an attribute that is read for each batch; env_mask becomes tool_mask"):
        output = scored(trainer)
        for row, (ids, mask) in enumerate(zip(ROWS, MASKS, strict=True)):
            assert output["completion_ids"][row, : len(ids)].tolist() == ids
            assert (output["completion_mask"] * output["tool_mask"])[row].tolist() == mask + [0] * (4 - len(mask))
        assert "ref_per_token_logps" in output


def test_advantages_may_be_given_token_by_token(trainer):
    output = scored(trainer)
    output["advantages"] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    trainer.beta = 0.0
    with hook(
        "GRPOTrainer.compute_loss", "advantages of every token, summed over the model's own, divided by the steps"
    ):
        loss = trainer.compute_loss(trainer.model, output)
        mask = output["completion_mask"] * output["tool_mask"]
        expected = -(output["advantages"] * mask).sum(1).mean() / 2  # on policy every ratio is 1
        torch.testing.assert_close(loss, expected)


def test_the_policys_log_probs_are_the_last_ones_that_are_asked_for(trainer):
    output, seen = scored(trainer), []
    stock = trainer._get_per_token_logps_and_entropies

    def watched(*args, **kwargs):
        found = stock(*args, **kwargs)
        seen.append(found[0])
        return found

    trainer._get_per_token_logps_and_entropies = watched
    with hook("GRPOTrainer._get_per_token_logps_and_entropies", "log-probs of the completion's tokens come first"):
        trainer.compute_loss(trainer.model, output)
        assert seen[-1].requires_grad and seen[-1].shape == output["completion_ids"].shape


def test_what_reward_functions_log_waits_in_two_dictionaries(trainer):
    with hook("GRPOTrainer._pending_extra_logs", "columns and metrics by name, until the rewards are there"):
        trainer._log_completion_extra("column", [1, 2])
        trainer._log_metric("number", 3.0)
        assert trainer._pending_extra_logs["column"] == [1, 2] and trainer._pending_metrics["number"] == [3.0]
        trainer._pending_extra_logs.clear()
        trainer._pending_metrics.clear()
    with hook("GRPOTrainer._logs", "the advantages of one generation batch, the last ones at the end"):
        scored(trainer)
        assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) == 4


def test_the_attributes_that_we_read(trainer):
    names = {
        "eos_token_ids",
        "num_generations",
        "num_generations_eval",
        "chat_template_kwargs",
        "reward_weights",
        "beta",
    }
    for name in sorted(names | {"_tokenizer", "_metrics", "environments"}):
        with hook(f"GRPOTrainer.{name}", "the attribute exists after __init__"):
            getattr(trainer, name)
    with hook(
        "GRPOTrainer.loss_is_scaled_for_ga", "True: what is added must be divided by the number of micro-batches"
    ):
        assert trainer.loss_is_scaled_for_ga is True
