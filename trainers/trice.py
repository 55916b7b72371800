"""TRICE: learn from right answers alone, with the rationales in between as latent variables that a Markov chain remembers."""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import itemgetter
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from hf_logits.checks import check_choice, check_count, check_number
from hf_logits.completions import Prompt
from hf_logits.own_samples import WARPERS, check_draws_freely, check_prompts, check_window
from hf_logits.preferences import require_columns
from hf_logits.resumable import EpochOrderMixin, ResumableMixin


logger = logging.get_logger(__name__)


def acceptance_rates(right: Bool[Tensor, " M"], covered: Bool[Tensor, " M"]) -> Float[Tensor, " M"]:
    """How often the *other* examples' proposals were right, of each example that has a right rationale: the paper's beta.

    `(sum right - right_m) / (sum covered - 1)`. Leaving the example itself out makes the rate independent of its proposal. 0
    where there is no other example.
    """
    others = (covered.sum() - 1).clamp(min=1)
    return (right.sum() - right.float()) / others * (covered.sum() > 1)


def trice_weights(
    right: Bool[Tensor, " M"], remembered: Bool[Tensor, " M"], *, control_variate: bool
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """The weights of `grad log p` at the proposals and at the old memories, before they are divided by the number of examples.

    A right proposal replaces the memory, so that the old one has no weight. Where neither is right there is nothing to learn.

    Args:
        right: whether the proposal, a sample of the model, leads to the right answer.
        remembered: whether there is a rationale from before, and it does.
        control_variate: whether to subtract `beta_m grad log p(proposal)`, which has mean zero: see [`acceptance_rates`].

    Returns:
        The weights of the proposals and of the memories, float32.
    """
    covered = right | remembered
    proposal, memory = right.float(), (remembered & ~right).float()
    if control_variate:
        proposal = proposal - covered * acceptance_rates(right, covered)
    return proposal, memory


def systematic_sample(
    weights: Float[Tensor, " R"], size: int, *, offset: float
) -> tuple[Int[Tensor, " size"], Float[Tensor, " size"]]:
    """`size` rows, drawn in proportion to `|weights|`, and what each counts, so that sums over them are right on average.

    One random number serves all draws (systematic resampling): row `r` comes `size |w_r| / sum |w|` times, rounded up or down.

    Args:
        offset: in `[0, 1)`, the random number.

    Returns:
        The rows, and for each `sign(w_r) sum |w| / size`. A row may come twice.
    """
    sizes = weights.double().abs().cumsum(0)
    places = (torch.arange(size, device=weights.device) + offset) * (sizes[-1] / size)
    last = int(weights.nonzero()[-1])  # where rounding leads beyond the end
    rows = torch.searchsorted(sizes, places, right=True).clamp(max=last)
    return rows, (weights[rows].sign() * (sizes[-1] / size)).to(weights)


_FIXED = {
    "num_generations": 2,  # a proposal and a memory
    "num_iterations": 1,
    "loss_type": "luspo",  # the sum over the tokens of a row, and the mean over the rows
    "importance_sampling_level": "sequence",  # which luspo wants; proposals are fresh, so that the ratio is 1
    "beta": 0.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "mask_truncated_completions": False,
    "delta": None,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
}
"""Settings of GRPO that would make the gradient another one than TRICE's, and what they have to be."""


@dataclass
class TRICEConfig(GRPOConfig):
    """Configuration of [`TRICETrainer`]: that of [`~trl.GRPOConfig`], of which some settings are fixed (an error names them).

    A generation batch of `2 M` rows is `M` examples: a proposal and a memory each. All of an optimizer step's proposals come
    from the model that the step changes, so `steps_per_generation` must divide `gradient_accumulation_steps`.

    Args:
        control_variate (`bool`, *optional*, defaults to `True`):
            Whether to subtract the control variate. Without it, the gradient keeps its variance when the model is nearly always right.
            With it, a step whose examples all come the first time changes nothing (those with a right rationale have all just
            proposed it, so that beta is 1; a single one has nobody to compare with, its beta is 0): call `init_memory` before.
        subsample_size (`int`, *optional*):
            How many of a generation batch's rows are trained on at most, the paper's L: drawn in proportion to the size of their
            weights, on each process by itself. `None`: all that have a weight. Divisible by `steps_per_generation` times the
            number of processes.
        divide_by (`str`, *optional*, defaults to `"right"`):
            `"right"`: by the number of examples with a right rationale. `"all"`: by the number of examples, so that hard batches
            make small steps. Which one the paper used we could not check; an independent implementation has the former.
        verifier_threshold (`float`, *optional*, defaults to `0.5`): from which reward on an answer is right.
        id_column (`str`, *optional*, defaults to `"id"`):
            The column by which an example is remembered. Without such a column, the tokens of its prompt are.
    """

    num_generations: int | None = field(default=2, metadata={"help": "A proposal and a memory."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Plain samples of a prompt in evaluation."})
    loss_type: str = field(default="luspo", metadata={"help": "Not used.", "choices": ["luspo"]})
    importance_sampling_level: str = field(default="sequence", metadata={"help": "Not used.", "choices": ["sequence"]})
    control_variate: bool = field(default=True, metadata={"help": "Whether to subtract the control variate."})
    subsample_size: int | None = field(
        default=None, metadata={"help": "How many rows of a generation batch are trained on at most."}
    )
    divide_by: str = field(
        default="right",
        metadata={"help": "The examples that count: with a right rationale, or all.", "choices": ["right", "all"]},
    )
    verifier_threshold: float = field(default=0.5, metadata={"help": "From which reward on an answer is right."})
    id_column: str = field(default="id", metadata={"help": "The column by which an example is remembered."})

    def __post_init__(self) -> None:
        for name, value in _FIXED.items():
            given = getattr(self, name)
            if given != value:
                raise ValueError(f"TRICE needs {name}={value!r}, its default, got {given!r}: see TRICEConfig.")
        if self.generation_batch_size is None:
            micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
            self._check_even(self.per_device_train_batch_size * micro_batches)
        super().__post_init__()
        assert self.steps_per_generation is not None and self.generation_batch_size is not None
        steps, processes = self.steps_per_generation, self.world_size
        self._check_even(self.generation_batch_size // processes)
        if self.gradient_accumulation_steps % steps:
            raise ValueError(
                f"steps_per_generation ({steps}) must divide gradient_accumulation_steps ({self.gradient_accumulation_steps}): a "
                "proposal must come from the model that it changes. Leave steps_per_generation and generation_batch_size out."
            )
        sampling = {"do_sample", "num_beams", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
        sampling |= {"num_return_sequences", *WARPERS}
        if forbidden := sorted(sampling & set(self.generation_kwargs or {})):
            raise ValueError(
                f"generation_kwargs must leave {', '.join(forbidden)} alone: proposals are samples of the model. For another "
                "temperature, which training then has too, set `temperature`."
            )
        check_choice("divide_by", self.divide_by, "right", "all")
        check_number("verifier_threshold", self.verifier_threshold)
        if self.subsample_size is not None:
            check_count("subsample_size", self.subsample_size, minimum=1)
            if self.subsample_size % (steps * processes) or self.subsample_size > self.generation_batch_size:
                raise ValueError(
                    f"subsample_size must be a multiple of steps_per_generation times the number of processes ({steps * processes}) and "
                    f"at most the {self.generation_batch_size} rows of a generation batch; got {self.subsample_size}."
                )

    @staticmethod
    def _check_even(rows: int) -> None:
        if rows % 2:
            raise ValueError(
                f"Each process has {rows} rows of a generation batch (per_device_train_batch_size times steps_per_generation), but a "
                "proposal and its memory need two rows on one process: make that number even."
            )


class TRICETrainer(EpochOrderMixin, ResumableMixin, GRPOTrainer):
    """Chain-of-thought tuning by latent-variable inference: the probability of the right answer, summed over all rationales.

    Hoffman et al. 2023, "Training Chain-of-Thought via Latent-Variable Inference" (https://huggingface.co/papers/2312.02179).
    The gradient of `log sum_z p(z | x) [z leads to the right answer]` is that of `log p(z | x)` on average over the right rationales.
    A Markov chain for each example samples these: the model proposes a rationale, and a right proposal replaces the one remembered;
    else that one stays and is learned from again, however hard the example is. The control variate weighs a proposal by `-beta`,
    the others' share of right proposals, so that the gradient's variance vanishes as the model becomes always right.

    The verifier is an ordinary TRL reward function, and whatever data it needs are columns. An answer that it does not judge
    (`None` or NaN) counts as not right, and `trice/unjudged` logs the share of such. Rows without a weight are dropped before the
    forward, which with or without `subsample_size` saves what they would cost.

    Logged beside GRPO's metrics (whose rewards and lengths are those of both rows of each pair; `loss` says as little as in GRPO):
    `trice/accepted`, the share of right proposals; `trice/covered`, of examples with a right rationale; `trice/beta`, the mean weight
    of the control variate; `trice/rows`, the share of rows trained on. In evaluation there are plain samples, no pairs, no memory.

    Our choices: only right rationales are remembered (a wrong one would have no weight); rows are drawn (`subsample_size`) by
    each process among its own, and only where there are more with a weight; memories that are longer than `max_completion_length`
    are dropped when training resumes; the default settings are GRPO's, since we did not have those of the paper.

    Args:
        reward_funcs: the verifier, one reward function.
        args ([`TRICEConfig`], *optional*): settings.

    All other arguments are those of [`~trl.GRPOTrainer`], without tools, environments, rollout functions and images.

    Example:

    ```python
    def verifier(completions, answer, **columns):
        return [float(text.split()[-1:] == [right]) for text, right in zip(completions, answer, strict=True)]

    trainer = TRICETrainer("my/model", verifier, args=TRICEConfig("out"), train_dataset=rows_with_prompt_and_answer)
    trainer.init_memory(guide=lambda row: f"{row['prompt']} (The answer is {row['answer']}.) ")
    trainer.train()
    ```
    """

    _tag_names = ["hf_logits", "trice"]
    _name = "TRICE"
    _paper = {
        "title": "Training Chain-of-Thought via Latent-Variable Inference",
        "id": "2312.02179",
        "citation": (
            "@inproceedings{hoffman2023training,\n"
            "    title = {{Training Chain-of-Thought via Latent-Variable Inference}},\n"
            "    author = {Matthew D. Hoffman and Du Phan and David Dohan and Sholto Douglas and Tuan Anh Le and Aaron Parisi\n"
            "              and Pavel Sountsov and Charles Sutton and Sharad Vikram and Rif A. Saurous},\n"
            "    booktitle = {Advances in Neural Information Processing Systems},\n"
            "    year = 2023,\n"
            "    eprint = {arXiv:2312.02179},\n"
            "}"
        ),
    }
    args: TRICEConfig
    model: Any
    train_dataset: Any
    _signature_columns: Any
    _logs: Any
    _state_file = "rationales.safetensors"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: TRICEConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = TRICEConfig(f"{path.split('/')[-1]}-{self._name}")
        elif not isinstance(args, TRICEConfig):
            raise TypeError(f"TRICETrainer needs `args` of type TRICEConfig, got {type(args).__name__}.")
        verifiers = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if len(verifiers) != 1:
            raise ValueError(
                f"TRICE asks one verifier whether an answer is right, got {len(verifiers)} reward functions: make one of them."
            )
        if not (callable(verifiers[0]) or isinstance(verifiers[0], str)):
            raise TypeError(f"The verifier must be a function or a reward model, got {verifiers[0]!r}.")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name) is not None:
                raise ValueError(f"TRICETrainer draws its proposals itself, from plain prompts: leave {name} out.")
        if train_dataset is not None:
            _check_examples(train_dataset, args.id_column)
        check_prompts(args, train_dataset, eval_dataset)
        self.memory: dict[str, list[int]] = {}
        """The right rationale of each example, as token ids: the same on all processes."""
        self._counts = [0, 0]  # proposals so far, and right ones
        self._examples: list[dict[str, Any]] | None = None  # of the pairs that are being made
        self._proposals: list[tuple[str, list[int]]] = []
        self._judged: Any = None
        self._guiding = False
        super().__init__(model, verifiers, args, train_dataset, eval_dataset, processing_class, **kwargs)

    def init_memory(
        self, guide: Callable[[dict[str, Any]], Prompt] | None = None, *, batch_size: int | None = None
    ) -> float:
        """Fill the memory before training: one sample for each example of the training data, kept if it is right.

        Args:
            guide (`Callable[[dict], str | list[dict]]`, *optional*):
                From a row to a prompt that helps, by telling the answer, say. The rationale is judged and learned behind the plain
                prompt. `None`: the plain prompt.
            batch_size (`int`, *optional*): prompts at a time on each process; `None`: `per_device_train_batch_size`.

        Returns:
            `float`: the share of examples that now have a rationale from here.
        """
        size = self.args.per_device_train_batch_size if batch_size is None else batch_size
        check_count("batch_size", size, minimum=1)
        examples, rank = iter(self.train_dataset), self.accelerator.process_index
        kept = seen = 0
        self._guiding = True
        try:
            while block := list(itertools.islice(examples, size * self.accelerator.num_processes)):
                # a last block that is too short begins again: processes have to make equally many
                own = [dict(block[index % len(block)]) for index in range(rank * size, (rank + 1) * size)]
                plain = [row["prompt"] for row in own]
                asked = plain if guide is None else [_guided(guide, row) for row in own]
                ids, completions = itemgetter(1, 3)(self._generate(asked))
                right = self._is_right(super()._calculate_rewards(own, plain, completions, ids)[:, 0]).tolist()
                keys = self._keys(own, self._tokenize_prompts(plain)[0])
                found = gather_object(list(zip(keys, ids, strict=True)))[: len(block)]
                self._remember(found, right)
                kept, seen = kept + sum(right[: len(block)]), seen + len(block)
        finally:
            self._guiding = False
            # what generation and the verifier logged is of no step
            logged = self._metrics["train" if self.model.training else "eval"]
            for logs in (logged, self._pending_extra_logs, self._pending_metrics):
                logs.clear()
        return kept / max(seen, 1)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._counts = [0, 0]
        result = super().train(*args, **kwargs)
        proposed, right = self._counts
        if proposed and not right:
            logger.warning(
                f"None of the {proposed} proposals of this run was right (a rate of 0.0): "
                + ("only what `init_memory` found was learned from." if self.memory else "nothing was learned. ")
                + ("" if self.memory else "Fill the memory with `init_memory(guide)`, or look at the verifier.")
            )
        return result

    # --- pairs -----------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.id_column not in self._signature_columns:
            self._signature_columns.append(self.args.id_column)

    def _keys(self, rows: list[dict[str, Any]], prompt_ids: list[list[int]]) -> list[str]:
        """By what each example is remembered."""
        column = self.args.id_column
        return [
            str(row[column]) if column in row else blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()
            for row, ids in zip(rows, prompt_ids, strict=True)
        ]

    def _is_right(self, rewards: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        return rewards >= self.args.verifier_threshold  # NaN, a reward that is not there, is not

    def _remember(self, proposals: Iterable[tuple[str, list[int]]], right: Iterable[bool]) -> None:
        self.memory |= {key: ids for (key, ids), accepted in zip(proposals, right, strict=False) if accepted}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *args: Any
    ) -> tuple[list[list[int]], Any]:
        draw = super()._generate_single_turn
        check_draws_freely(self.model)
        check_window(self.model, prompt_ids, self.args.max_completion_length)
        if self._examples is None:
            return draw(prompt_ids, images, multimodal_fields, 1 if self._guiding else num_generations, *args)
        proposals, log_probs = draw(prompt_ids[::2], images, multimodal_fields, 1, *args)
        keys = self._keys(self._examples[::2], prompt_ids[::2])
        self._proposals = list(zip(keys, proposals, strict=True))
        # without a memory the proposal stands in for it, and has no weight there
        memories = [self.memory.get(key, ids) for key, ids in self._proposals]
        if log_probs is not None:  # of a server, which did not draw the memories
            log_probs = _in_turns(log_probs, [[None] * len(ids) for ids in memories])
        return _in_turns(proposals, memories), log_probs

    def _calculate_rewards(self, *args: Any) -> Float[Tensor, "N 1"]:
        self._judged = super()._calculate_rewards(*args)
        return self._judged

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._examples = inputs
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._examples = None
        judged = self._judged[:, 0].view(-1, 2)  # of all processes
        proposals = gather_object(self._proposals)
        known = torch.tensor([key in self.memory for key, _ in proposals], device=judged.device)
        right, remembered = self._is_right(judged).unbind(1)
        remembered = remembered & known
        self._remember(proposals, right.tolist())
        pairs = torch.stack(trice_weights(right, remembered, control_variate=self.args.control_variate), dim=1)
        covered = right | remembered
        examples = covered.sum().clamp(min=1) if self.args.divide_by == "right" else len(covered)
        rows, counts = self._rows_with_weight(pairs.flatten())
        # GRPO takes the mean over the rows that each process keeps, and over the processes
        scale = len(rows) * self.accelerator.num_processes / examples
        self._report(right, covered, known, judged, pairs, len(rows))
        kept = {key: value[rows] if value is not None and value.dim() else value for key, value in output.items()}
        return kept | {"advantages": counts * scale}

    def _rows_with_weight(self, weights: Float[Tensor, " N"]) -> tuple[Int[Tensor, " K"], Float[Tensor, " K"]]:
        """Which of this process's rows are trained on, and with what weights; equally many on every process and in every micro-batch."""
        processes, steps = self.accelerator.num_processes, self.args.steps_per_generation or 1
        by_process = weights.view(processes, -1)
        most = (self.args.subsample_size or len(weights)) // processes
        needed = int((by_process != 0).sum(1).clamp(max=most).max())
        needed = max(steps, -(-needed // steps) * steps)
        own = by_process[self.accelerator.process_index]
        rows = own.nonzero().flatten()
        counts = own[rows]
        if len(rows) > most:
            rows, counts = systematic_sample(own, most, offset=torch.rand(()).item())
        spare = (own == 0).nonzero().flatten()[: needed - len(rows)]
        return torch.cat([rows, spare]), torch.cat([counts, own[spare]])

    def _report(
        self,
        right: Bool[Tensor, " M"],
        covered: Bool[Tensor, " M"],
        known: Bool[Tensor, " M"],
        judged: Float[Tensor, "M 2"],
        weights: Float[Tensor, "M 2"],
        rows: int,
    ) -> None:
        """Metrics, the columns of the table of completions, and warnings."""
        metrics, unjudged = self._metrics["train"], judged.isnan()
        metrics["trice/accepted"].append(right.float().mean().item())
        metrics["trice/covered"].append(covered.float().mean().item())
        if self.args.control_variate:
            rates = acceptance_rates(right, covered)[covered]
            metrics["trice/beta"].append(rates.mean().item() if len(rates) else 0.0)
        metrics["trice/rows"].append(rows * self.accelerator.num_processes / weights.numel())
        metrics["trice/unjudged"].append(unjudged.float().mean().item())
        self._logs["advantages"].extend(weights.flatten().tolist())  # holds one generation batch: these replace GRPO's
        self._counts = [self._counts[0] + len(right), self._counts[1] + int(right.sum())]
        if unjudged.any():
            logger.warning_once(
                "The verifier returned None or NaN for some answers: they count as not right. trice/unjudged logs their share."
            )
        if self.args.control_variate and right.any() and not known.any():
            logger.warning_once(
                "No example of a step had a memory: with the control variate such a step changes nothing. This is so while examples "
                "come the first time; `init_memory(guide)` fills their memories before."
            )
        if not covered.any():
            logger.warning_once(
                "No example of a step had a right rationale, proposed or remembered: such a step changes nothing. "
                "trice/covered logs their share; `init_memory(guide)` raises it."
            )

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Tensor]:
        flat = list(itertools.chain.from_iterable(self.memory.values()))
        return {
            "keys": torch.tensor(list(json.dumps(list(self.memory)).encode()), dtype=torch.uint8),
            "tokens": torch.tensor(flat, dtype=torch.int64),
            "lengths": torch.tensor([len(ids) for ids in self.memory.values()], dtype=torch.int64),
            "counts": torch.tensor(self._counts),
        }

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        keys = json.loads(bytes(state["keys"].tolist()))
        rationales = [ids.tolist() for ids in state["tokens"].split(state["lengths"].tolist())]
        memory = dict(zip(keys, rationales, strict=True))
        self._counts = state["counts"].tolist()
        longest = self.args.max_completion_length or max(map(len, rationales), default=0)
        self.memory = {key: ids for key, ids in memory.items() if len(ids) <= longest}
        if dropped := len(memory) - len(self.memory):
            logger.warning(
                f"{dropped} of {len(memory)} remembered rationales are longer than max_completion_length ({longest}): forgotten."
            )


def _in_turns(proposals: Iterable[Any], memories: Iterable[Any]) -> list[Any]:
    """A proposal, its memory, the next proposal, ..."""
    return [one for pair in zip(proposals, memories, strict=True) for one in pair]


def _guided(guide: Callable[[dict[str, Any]], Prompt], row: dict[str, Any]) -> Prompt:
    prompt = guide(dict(row))
    if type(prompt) is not type(row["prompt"]):
        raise TypeError(
            f"The guide must return a prompt like the data's, a {type(row['prompt']).__name__}; got a {type(prompt).__name__}."
        )
    return prompt


def _check_examples(dataset: Any, id_column: str) -> None:
    """Refuse data without prompts, with images, or whose ids are no ids."""
    require_columns(dataset, "train", ("prompt",) if id_column == "id" else ("prompt", id_column))
    columns = list(next(iter(dataset)))
    if images := sorted({"image", "images"} & set(columns)):
        raise ValueError(f"TRICETrainer is for text, but the train dataset has the column {images[0]!r}.")
    if id_column in columns and isinstance(dataset, Dataset):
        distinct = len(set(map(str, dataset[id_column])))
        if distinct != len(dataset):
            raise ValueError(
                f"The column {id_column!r} has {distinct} different values in {len(dataset)} rows, but an example is remembered by "
                "it. Make its values unique, or remove it: then the prompt's tokens serve."
            )
