"""SCoRe: reinforcement learning of a second attempt that mends the first one, in two stages."""

import json
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import ProcessorMixin
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from hf_logits.checks import check_choice, check_number
from hf_logits.completions import Prompt
from hf_logits.own_samples import check_prompts, check_window
from hf_logits.resumable import EpochOrderMixin
from hf_logits.rewards import checked_reward
from hf_logits.second_turn import SecondTurn, second_turn


logger = transformers_logging.get_logger(__name__)

CREDITS = ("none", "own", "to_go")
DEFAULT_CREDIT = {1: "none", 2: "own"}


# --- the method ----------------------------------------------------------------------------------------------------------


def shaped_reward(first: Float[Tensor, " N"], second: Float[Tensor, " N"], *, alpha: float) -> Float[Tensor, " N"]:
    """What stage II pays for the second attempt: r2 + alpha (r2 - r1)."""
    return second + alpha * (second - first)


def leave_one_out(rewards: Float[Tensor, " N"], group: int) -> Float[Tensor, " N"]:
    """Each reward minus the mean of the others in its group of `group` neighbours.

    NaN is a reward that does not exist: it counts for nobody, and its own advantage is 0, as is that of a reward without others.
    """
    grouped = rewards.view(-1, group)
    there = ~grouped.isnan()
    known = grouped.nan_to_num(nan=0.0)
    others = there.sum(1, keepdim=True) - 1
    baseline = (known.sum(1, keepdim=True) - known) / others.clamp(min=1)
    return torch.where(there & (others > 0), known - baseline, 0.0).view(-1)


def turn_advantages(
    first: Float[Tensor, " N"],
    second: Float[Tensor, " N"],
    *,
    stage: int,
    alpha: float,
    credit: str,
    group: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The advantages of the tokens of the first and of the second attempt.

    Args:
        first, second: rewards of the attempts, those of a prompt in a row; NaN where there is none.
        stage: 1: the second attempt earns r2. 2: it earns r2 + alpha (r2 - r1).
        alpha: weight of the progress in stage 2.
        credit: what the first attempt earns. `"none"`: nothing. `"own"`: r1. `"to_go"`: also what the second attempt earns,
            without the bonus for progress, which would pay for failing first: r2 in stage 1, r1 + r2 in stage 2.
        group: how many attempts a prompt has.
    """
    # An attempt without a reward leaves both turns of its row out: progress needs the two.
    first, second = (torch.where(first.isnan() | second.isnan(), torch.nan, each) for each in (first, second))
    earned = second if stage == 1 else shaped_reward(first, second, alpha=alpha)
    if credit == "none":
        return torch.zeros_like(first), leave_one_out(earned, group)
    if credit == "to_go":
        own = second if stage == 1 else first + second
    else:
        own = first
    return leave_one_out(own, group), leave_one_out(earned, group)


def turn_masks(lengths: Int[Tensor, "B 3"], width: int) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """1 on the tokens of the first and of the second attempt. `lengths`: first attempt, what stands between, second attempt."""
    ends = lengths.cumsum(1)
    place = torch.arange(width, device=lengths.device)
    first = place < ends[:, :1]
    second = (place >= ends[:, 1:2]) & (place < ends[:, 2:])
    return first.float(), second.float()


def self_correction_rates(
    first: Float[Tensor, " N"], second: Float[Tensor, " N"], *, threshold: float
) -> dict[str, float]:
    """How often the attempts are right, and what the second one makes of the first.

    Args:
        first, second: rewards of the attempts; rows with NaN are left out. NaN everywhere if none is left.
        threshold: an attempt is correct if its reward is above it.

    Returns:
        `accuracy_1`, `accuracy_2`, their difference `delta`, and the shares of all rows that were mended
        (`incorrect_to_correct`) and spoilt (`correct_to_incorrect`): `delta` is the former minus the latter.
    """
    known = ~(first.isnan() | second.isnan())
    right_1, right_2 = first[known] > threshold, second[known] > threshold
    found = {
        "accuracy_1": right_1,
        "accuracy_2": right_2,
        "delta": right_2.int() - right_1.int(),
        "incorrect_to_correct": ~right_1 & right_2,
        "correct_to_incorrect": right_1 & ~right_2,
    }
    return {name: value.double().mean().item() for name, value in found.items()}


def edit_ratio(first: list[list[int]], second: list[list[int]]) -> Float[Tensor, " B"]:
    """Edit distance over the longer length, row by row: 0 for the same tokens, 1 if nothing is in common.

    Insertions, deletions and replacements cost 1. Two empty rows are the same.
    """
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (first, second)]
    width = max(1, int(lengths[1].max()))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in second])
    column = torch.arange(width + 1)
    distance = column.expand(len(first), -1)
    for place in range(int(lengths[0].max())):
        token = torch.tensor([row[place] if place < len(row) else -2 for row in first])
        kept = torch.minimum(distance[:, 1:] + 1, distance[:, :-1] + (ids != token[:, None]))
        # Insertions run along the row: d[j] = min over i <= j of d[i] + (j - i)
        start = torch.cat([distance[:, :1] + 1, kept], 1) - column
        grown = start.cummin(1).values + column
        distance = torch.where((place < lengths[0])[:, None], grown, distance)
    found = distance.gather(1, lengths[1][:, None])[:, 0]
    return found / torch.maximum(*lengths).clamp(min=1)


# --- the trainer ---------------------------------------------------------------------------------------------------------


@dataclass
class SCoReConfig(GRPOConfig):
    """What [`SCoReTrainer`] needs beside the settings of [`~trl.GRPOConfig`].

    Args:
        score_stage (`int`, *optional*, defaults to `1`):
            1: the second attempt is trained, while a strong KL keeps the first one as it is. 2: both are, and progress pays.
        score_correction_prompt (`str`, *optional*):
            What the user says between the attempts. It is the same for right and wrong answers.
        score_alpha (`float`, *optional*, defaults to `10.0`):
            Weight of the progress r2 - r1 in the reward of the second attempt, in stage 2. The paper's alpha.
        beta (`float`, *optional*, defaults to `0.01`):
            KL to the reference on both attempts, the paper's beta_1. With 0 there is no reference.
        score_beta2 (`float`, *optional*, defaults to `0.1`):
            KL on the first attempt, in stage 1, on top of `beta`. The paper's beta_2.
        score_turn1_credit (`str`, *optional*):
            What the first attempt earns: `"none"`, `"own"` (its own reward) or `"to_go"` (also that of the second one, without the
            bonus for progress). By default `"none"` in stage 1 and `"own"` in stage 2; we do not know what the authors take in stage 1, so
            that is our choice.
        score_threshold (`float`, *optional*, defaults to `0.5`):
            An attempt counts as correct in the metrics if its reward is above this. Training does not look at it.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Of each attempt.

    The loss is the plain sum over tokens, averaged over rows (`loss_type="luspo"` with ratios per token), and advantages are
    not scaled: other values of `loss_type`, `importance_sampling_level`, `scale_rewards` and `multi_objective_aggregation` are
    refused. The published runs took alpha 10, beta 0.01 and beta_2 0.1 (mathematics) or 0.25 (programs), at temperature 1.
    """

    beta: float = field(default=0.01, metadata={"help": "KL to the reference on both attempts (beta_1)."})
    loss_type: str = field(default="luspo", metadata={"help": "The sum over tokens, averaged over rows."})
    scale_rewards: str = field(default="none", metadata={"help": "Advantages are not scaled."})
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={"help": "Weight the KL estimate by the ratio, which gives it the gradient of the reverse KL."},
    )
    score_stage: int = field(
        default=1,
        metadata={"help": "1 trains the second attempt, 2 trains both and pays progress.", "choices": [1, 2]},
    )
    score_correction_prompt: str = field(
        default="There may be a mistake in the answer above. Check it, correct it if need be, and give the whole answer again.",
        metadata={"help": "What the user says between the attempts."},
    )
    score_alpha: float = field(default=10.0, metadata={"help": "Weight of the progress in stage 2 (alpha)."})
    score_beta2: float = field(default=0.1, metadata={"help": "KL on the first attempt in stage 1 (beta_2)."})
    score_turn1_credit: str | None = field(
        default=None,
        metadata={
            "help": "What the first attempt earns: 'none' (default in stage 1), 'own' (default in stage 2), 'to_go'.",
            "choices": list(CREDITS),
        },
    )
    score_threshold: float = field(
        default=0.5, metadata={"help": "Rewards above this count as correct in the metrics."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_stage not in (1, 2) or isinstance(self.score_stage, bool):
            raise ValueError(f"score_stage must be 1 or 2, got {self.score_stage!r}.")
        if self.score_turn1_credit is not None:
            check_choice("score_turn1_credit", self.score_turn1_credit, *CREDITS)
        if not isinstance(self.score_correction_prompt, str) or not self.score_correction_prompt.strip():
            raise ValueError(f"score_correction_prompt must be a text, got {self.score_correction_prompt!r}.")
        check_number("score_threshold", self.score_threshold)
        for name in ("score_alpha", "score_beta2", "beta"):
            check_number(name, getattr(self, name), minimum=0.0)
        if self.score_stage == 1 and self.score_beta2 > 0 and self.beta == 0:
            raise ValueError(
                f"score_beta2={self.score_beta2} is a KL to the reference, which is made only for beta > 0: give beta a value, "
                "however small, or set score_beta2=0."
            )
        fixed = {"loss_type": "luspo", "importance_sampling_level": "token", "scale_rewards": "none"}
        for name, value in (fixed | {"multi_objective_aggregation": "sum_then_normalize"}).items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r} for SCoRe, got {getattr(self, name)!r}: its attempts have advantages of their own, "
                    "which are summed over their tokens as they are."
                )


class SCoReTrainer(EpochOrderMixin, GRPOTrainer):
    """Learning to correct oneself, from [Training Language Models to Self-Correct via Reinforcement
    Learning](https://huggingface.co/papers/2409.12917).

    Each prompt is answered, the user says `score_correction_prompt`, and it is answered again; the reward functions, ordinary ones of
    TRL, rate both attempts, and never see the other one. Run it twice: with `score_stage=1`, then with `score_stage=2` from the
    weights of stage 1. The reference is the model at the start as TRL understands it: what `model` is loaded from, or the model without its new
    adapter, or a copy of the adapter that it came with. Whether the authors keep the base model as the reference of stage 2, we do not know.

    Prompts are messages, and the chat template writes the second turn; or strings, then the correction prompt follows the first
    attempt as it stands. The first attempt stays as it was sampled, with the token that ended it, if there was one. Rewards of `None`
    from all functions leave a row out; `score/unscored` is their share. The KL is taken token by token: how a token changes the KL of later ones does not count.

    Logged under `score/`, for training and evaluation: `accuracy_1`, `accuracy_2`, `delta`, `incorrect_to_correct`,
    `correct_to_incorrect`; `edit_ratio`, how much the second attempt changes (near 0, the policy has given up correcting);
    `truncated_1`, `truncated_2`, `unscored`, and `kl_1` in nats a first attempt. In evaluation they are means over batches, as all that GRPO logs. `reward` and `rewards/...` are those of the second attempt.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config:
            As in [`~trl.GRPOTrainer`]. Without tools, environments and images.
        reward_funcs (`Callable`, `PreTrainedModel`, `str` or a list of them):
            The verifier. Several are added up with `reward_weights`.
    """

    args: SCoReConfig
    _name = "SCoRe"
    _tag_names = ["trl", "hf_logits", "score"]
    _paper = {
        "title": "Training Language Models to Self-Correct via Reinforcement Learning",
        "id": "2409.12917",
        "citation": textwrap.dedent("""\
            @inproceedings{kumar2025training,
                title     = {{Training Language Models to Self-Correct via Reinforcement Learning}},
                author    = {Aviral Kumar and Vincent Zhuang and Rishabh Agarwal and Yi Su and others},
                year      = 2025,
                booktitle = {International Conference on Learning Representations},
                eprint    = {arXiv:2409.12917},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: SCoReConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = SCoReConfig(f"{path.split('/')[-1]}-{self._name}")
        elif not isinstance(args, SCoReConfig):
            raise TypeError(f"SCoReTrainer needs `args` of type SCoReConfig, got {type(args).__name__}.")
        check_prompts(args, train_dataset, eval_dataset)
        rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        with _without_advice_on_luspo():
            super().__init__(
                model,
                [checked_reward(reward) for reward in rewards],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"SCoReTrainer is for text: give a tokenizer as `processing_class`, not a {type(self.processing_class).__name__}."
            )
        self._second_turn(next(iter(train_dataset))["prompt"])  # a template that cannot do it is said at once
        # Given to the host's `__init__`, it would warn that rollout functions are experimental.
        self.rollout_func = cast(Any, self._attempt_twice)
        self._attempts: list[tuple[list[int], list[int], list[int]]] = []
        self._rewards: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._log_probs: Tensor | None = None
        self._correct = self._seen = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._correct = self._seen = 0
        found = super().train(*args, **kwargs)
        if self._seen and not self._correct:
            logger.warning(
                f"Not one of {self._seen} attempts was correct, a rate of 0, until step {self.state.global_step}: no reward was above "
                f"{self.args.score_threshold}. From equal rewards nothing is learned: start from a model that is right now and "
                "then, or take easier prompts."
            )
        return found

    # --- rollouts --------------------------------------------------------------------------------------------------------

    def _second_turn(self, prompt: Prompt) -> SecondTurn:
        return second_turn(
            prompt,
            self.args.score_correction_prompt,
            cast(Any, self.processing_class),
            **cast(Any, self.chat_template_kwargs),
        )

    def _attempt_twice(self, prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
        """Both attempts as one completion, in which the environment's tokens, between the two, are masked."""
        generations = self.num_generations if cast(Any, self.model).training else self.num_generations_eval
        turns: dict[str, SecondTurn] = {}
        for prompt in prompts:
            key = json.dumps(prompt)
            turns[key] = turns.get(key) or self._second_turn(prompt)
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        check_window(self.model, prompt_ids, self.args.max_completion_length)
        first, first_log_probs = self._generate_single_turn(prompt_ids, None, {}, generations)
        between = [
            turns[json.dumps(prompt)].after(answer, self.eos_token_ids)
            for prompt, answer in zip(prompts, first, strict=True)
        ]
        again: list[list[int]] = [sum(parts, []) for parts in zip(prompt_ids, first, between, strict=True)]
        check_window(self.model, again, self.args.max_completion_length)
        # No two of these prompts are alike: one answer each.
        second, second_log_probs = self._generate_single_turn(again, None, {}, 1)
        self._attempts = list(zip(first, between, second, strict=True))
        log_probs = None
        if first_log_probs is not None:
            parts = zip(first_log_probs, between, second_log_probs, strict=True)
            log_probs = [[*one, *[0.0] * len(middle), *two] for one, middle, two in parts]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [sum(attempt, []) for attempt in self._attempts],
            "logprobs": log_probs,
            "env_mask": [[1] * len(one) + [0] * len(middle) + [1] * len(two) for one, middle, two in self._attempts],
        }

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Rate either attempt by itself. Returns the rewards of the second one, for the host's metrics."""
        found = []
        for attempt in (0, 2):
            ids = [row[attempt] for row in self._attempts]
            texts = cast(Any, self.processing_class).batch_decode(ids, skip_special_tokens=True)
            answers = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            found.append(super()._calculate_rewards(inputs, prompts, answers, ids))
            if attempt == 0:  # what the functions log themselves must not be taken for the second attempt's
                for pending in (self._pending_extra_logs, self._pending_metrics):
                    for name in list(pending):
                        pending[f"first_attempt/{name}"] = pending.pop(name)
        unknown = [per_function.isnan().all(1) for per_function in found]
        weighted = [(per_function * self.reward_weights.to(per_function.device)).nansum(1) for per_function in found]
        first, second = (total.masked_fill(gone, torch.nan) for total, gone in zip(weighted, unknown, strict=True))
        self._rewards = first, second
        self._log_completion_extra("first_attempt/reward", self._mine(first, len(prompts)).tolist())
        return found[1]

    def _mine(self, values: Tensor, rows: int) -> Tensor:
        """The rows of this process among those of all."""
        start = self.accelerator.process_index * rows
        return values[start : start + rows]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        training, rows = cast(Any, self.model).training, len(inputs)
        first, second = turn_advantages(
            *self._rewards,
            stage=self.args.score_stage,
            alpha=self.args.score_alpha,
            credit=self.args.score_turn1_credit or DEFAULT_CREDIT[self.args.score_stage],
            group=cast(int, self.num_generations if training else self.num_generations_eval),
        )
        lengths = torch.tensor([[len(part) for part in attempt] for attempt in self._attempts], device=first.device)
        turn_1, turn_2 = turn_masks(lengths, output["completion_ids"].size(1))
        output["advantages"] = self._mine(first, rows)[:, None] * turn_1 + self._mine(second, rows)[:, None] * turn_2
        output["first_attempt"] = turn_1
        ended = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        cut = [[not attempt[part] or attempt[part][-1] not in ended for part in (0, 2)] for attempt in self._attempts]
        truncated = torch.tensor(cut, device=first.device)
        if self.args.mask_truncated_completions:  # the host sees the last token only, which is the second attempt's
            output["completion_mask"] = output["completion_mask"] * (~truncated.any(1))[:, None].int()
        logged: Any = self._logs["advantages"]  # the host's own are not used
        for _ in range(min(len(second), len(logged))):  # it holds no more than a generation batch of training
            logged.pop()
        logged.extend(second.tolist())
        self._record_attempts(truncated.float(), training)
        return output

    def _record_attempts(self, truncated: Float[Tensor, "B 2"], training: bool) -> None:
        first, second = self._rewards
        values = self_correction_rates(first, second, threshold=self.args.score_threshold)
        values["unscored"] = (first.isnan() | second.isnan()).float().mean().item()
        changed = edit_ratio(*([attempt[part] for attempt in self._attempts] for part in (0, 2)))
        mine = torch.cat([truncated, changed.to(truncated)[:, None]], 1)
        means = self.accelerator.gather(mine).mean(0).tolist()
        values |= zip(("truncated_1", "truncated_2", "edit_ratio"), means, strict=True)
        metrics = self._metrics["train" if training else "eval"]
        for name, value in values.items():
            metrics[f"score/{name}"].append(value)
        if training:
            rewards = torch.cat(self._rewards)
            self._seen += int((~rewards.isnan()).sum())
            self._correct += int((rewards > self.args.score_threshold).sum())

    # --- loss ------------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0]  # in `compute_loss` the policy's are the last ones
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        log_probs, self._log_probs = self._log_probs, None
        if self.beta == 0:
            return loss
        assert log_probs is not None
        mask = inputs["first_attempt"] * inputs["completion_mask"]
        away = inputs["ref_per_token_logps"] - log_probs
        kl = away.exp() - away - 1
        kept = (kl.detach() * mask).sum(-1).mean()
        training = cast(Any, self.model).training
        metrics = self._metrics["train" if training else "eval"]
        metrics["score/kl_1"].append(self.accelerator.gather(kept).mean().item())
        if self.args.score_stage == 2 or self.args.score_beta2 == 0:
            return loss
        if self.args.use_bias_correction_kl:
            old = inputs.get("old_per_token_logps")
            kl = kl * (log_probs - (log_probs.detach() if old is None else old)).exp()
        penalty = self.args.score_beta2 * (kl * mask).sum(-1).mean()
        # The host divides its own loss, and nobody divides afterwards.
        return loss + penalty / (self.current_gradient_accumulation_steps if training else 1)


@contextmanager
def _without_advice_on_luspo() -> Iterator[None]:
    """TRL advises one ratio a sequence with this loss. Two attempts with advantages of their own need one a token."""

    def other(record: logging.LogRecord) -> bool:
        return "When using `'luspo'` loss" not in record.getMessage()

    host = logging.getLogger("trl.trainer.grpo_trainer")
    host.addFilter(other)
    try:
        yield
    finally:
        host.removeFilter(other)
