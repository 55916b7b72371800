"""Multiple choice while a model trains: in the log, and in the metrics that the best checkpoint is chosen by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from accelerate.utils import gather_object
from transformers import LogitsProcessor, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_logits.metrics.attentiveness import attentiveness
from hf_logits.metrics.mcq_chain import mcq_chain
from hf_logits.metrics.module import merged, numbers
from hf_logits.metrics.position_bias import bias_of_table
from hf_logits.metrics.scoring import ChoiceTable, Prompt, choice_logprobs, per_prompt, prior_per_prompt
from hf_logits.metrics.tables import read_labels


Measure = Callable[[ChoiceTable, Sequence[int]], Mapping[str, Any]]


def measure_table(table: ChoiceTable, references: Sequence[int]) -> dict[str, Any]:
    """Attentiveness, the chain of scores and the bias towards places, in one result.

    Args:
        table ([`~hf_logits.metrics.ChoiceTable`]): of [`~hf_logits.metrics.choice_logprobs`].
        references (`Sequence[int]`): the places of the right choices.
    """
    probable = attentiveness(
        table.logprobs,
        references,
        prior_logprobs=table.prior_logprobs,
        lengths=table.lengths,
        distinct=table.distinct,
    )
    chain = mcq_chain(table.logprobs, references, distinct=table.distinct)
    return merged([bias_of_table(table.logprobs, references), chain, probable])


class MCQEvalCallback(TrainerCallback):
    """Scores a set of questions of its own at every evaluation of a [`~transformers.Trainer`], TRL's among them.

    Nothing is asked of the trainer's evaluation set, and no logits are kept: `compute_metrics` of TRL's trainers would make every
    batch go through the model a second time, and is deprecated there. The values are put where both who looks for them finds them:
    in what `evaluate()` returns, so that `metric_for_best_model="eval_mcq_accuracy"` works, and, by a `log` of their own, in the
    log history and everything that reports it. They are named `eval_mcq_accuracy`, `eval_mcq_attentiveness`, ...

    Callbacks run in the order in which they were added: add this one before an [`~transformers.EarlyStoppingCallback`] that waits for
    its values. Several processes share the questions. An evaluation of several datasets scores them once for each.

    Example:

    ```python
    >>> trainer = SFTTrainer(...)
    >>> trainer.add_callback(MCQEvalCallback(trainer, prompts, choices, answers))
    ```

    Args:
        trainer ([`~transformers.Trainer`]): of a decoder-only language model whose weights are whole on each process.
        prompts, choices, prior, separator, template_kwargs: of [`~hf_logits.metrics.choice_logprobs`].
        references (`Sequence[int]`): the place of the right choice of each question.
        name (`str`, *optional*, defaults to `"mcq"`): in the names of the values; two callbacks need two.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): by default the trainer's `processing_class`.
        logits_processor (`Sequence[LogitsProcessor]`, *optional*): what steers the model.
        measure (`Callable`, *optional*): from a [`~hf_logits.metrics.ChoiceTable`] and the references to values by name. By default
            those of `attentiveness`, `mcq_chain` and `position_bias`. What is no number, or NaN, is left out, and the log says once
            why.
        batch_size (`int`, *optional*): prompts read at once; by default the trainer's `per_device_eval_batch_size`.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        references: Sequence[int],
        *,
        name: str = "mcq",
        prior: Prompt | Sequence[Prompt] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        separator: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        measure: Measure = measure_table,
        batch_size: int | None = None,
    ):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"MCQEvalCallback needs the trainer itself, to log; got {type(trainer).__name__}.")
        if not len(prompts) or len(prompts) != len(references):
            raise ValueError(f"{len(prompts)} prompts and {len(references)} references; give one of each a question.")
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "The model's weights are spread over several processes, which score unequal numbers of questions: evaluate a gathered "
                "copy with choice_logprobs instead."
            )
        asked = per_prompt(prompts, choices)
        priors: Sequence[Any] = [None] * len(prompts) if prior is None else prior_per_prompt(prompts, prior)
        self.trainer: Any = trainer
        self.name, self.measure_of, self.batch_size = name, measure, batch_size
        # what is wrong with the questions shows now, and not at the first evaluation
        self.references = read_labels(references, np.array([len(own) for own in asked]), "references").tolist()
        self.tokenizer = trainer.processing_class if tokenizer is None else tokenizer
        self._questions: list[Any] = list(zip(prompts, asked, priors, strict=True))
        self._options: dict[str, Any] = {
            "separator": separator,
            "template_kwargs": template_kwargs,
            "logits_processor": logits_processor,
        }

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # what is evaluated on shows in the names alone
        prefix = next((key.removesuffix("_runtime") for key in metrics or {} if key.endswith("_runtime")), "eval")
        named = {f"{prefix}_{self.name}_{key}": value for key, value in self.measure().items()}
        if metrics is not None:
            metrics |= named
        # the evaluation has been logged before callbacks hear of it
        self.trainer.log(dict(named))

    def measure(self) -> dict[str, float]:
        """The values of the model as it is now, the same on all processes."""
        accelerator, trainer = self.trainer.accelerator, self.trainer
        mine = self._questions[accelerator.process_index :: accelerator.num_processes]
        prompts, choices, priors = ([one[part] for one in mine] for part in range(3))
        # rounded as the trainer's own evaluation is
        with trainer.compute_loss_context_manager():
            table = choice_logprobs(
                accelerator.unwrap_model(trainer.model),
                cast(Any, self.tokenizer),
                prompts,
                choices,
                prior=None if self._questions[0][2] is None else priors,
                batch_size=self.batch_size or trainer.args.per_device_eval_batch_size,
                **self._options,
            )
        if accelerator.num_processes > 1:
            table = _together(gather_object([table]), len(self._questions))
        return numbers(self.measure_of(table, self.references), f"{type(self).__name__} {self.name!r}")


def _together(tables: Sequence[ChoiceTable], count: int) -> ChoiceTable:
    """The whole table of what each process scored: every so many rows, from its own number on."""

    def rows(parts: Sequence[Any]) -> list[Any]:
        return [parts[row % len(parts)][row // len(parts)] for row in range(count)]

    return ChoiceTable(
        logprobs=rows([one.logprobs for one in tables]),
        lengths={unit: rows([one.lengths[unit] for one in tables]) for unit in tables[0].lengths},
        distinct=rows([one.distinct for one in tables]),
        prior_logprobs=None if tables[0].prior_logprobs is None else rows([one.prior_logprobs for one in tables]),
    )
