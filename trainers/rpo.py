"""RPO: DPO plus the likelihood of the chosen completion, which guards against over-optimisation."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from hf_logits.checks import check_number
from hf_logits.replay import ReplayMixin
from hf_logits.sequences import completion_lengths, mean_log_prob, sequence_log_probs


REDUCTIONS = ("sum", "mean", "token_mean")


def rpo_penalty(
    chosen_logps: Float[Tensor, " B"],
    chosen_lengths: Integer[Tensor, " B"],
    *,
    beta: float,
    reduction: str,
    items: float | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """How unlikely the chosen completions are, before eta: what RPO adds to DPO. Arguments as in [`rpo_loss`].

    `items` is the number of chosen tokens in a micro-batch on average, for `"token_mean"` over several of them.
    """
    penalty = -mean_log_prob(chosen_logps, chosen_lengths, reduction=reduction, items=items)
    return beta * penalty if reduction == "sum" else penalty


def rpo_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    reference_chosen_logps: Float[Tensor, " B"],
    reference_rejected_logps: Float[Tensor, " B"],
    chosen_lengths: Integer[Tensor, " B"],
    *,
    beta: float,
    eta: float,
    reduction: str,
) -> Float[Tensor, ""]:
    """-log sigmoid(beta (lr_chosen - lr_rejected)) - eta (beta) log pi(chosen), averaged over the batch.

    Args:
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps: sums over the completion's tokens.
        chosen_lengths: how many tokens the chosen completions have.
        beta: strength of the reverse KL of DPO.
        eta: weight of the likelihood term. At 0 this is DPO.
        reduction: `"sum"`: a completion's log-prob times beta, the form of the paper's main part. `"mean"`: its mean
            per token, not times beta, the form of the paper's appendix. `"token_mean"`: the mean over all tokens of the
            batch, not times beta.
    """
    # beta (lr_chosen - lr_rejected)
    margin = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    loss = -logsigmoid(margin).mean()
    return loss + eta * rpo_penalty(chosen_logps, chosen_lengths, beta=beta, reduction=reduction)


@dataclass
class RPOConfig(DPOConfig):
    """What [`RPOTrainer`] needs beside the settings of [`~trl.DPOConfig`].

    Args:
        rpo_eta (`float`, *optional*, defaults to `0.005`):
            Weight of the likelihood of the chosen completions, the paper's eta. `0` is DPO. The authors take 0.005 with
            `"sum"` (beta 0.01 to 0.05) and 0.2 with `"mean"` (beta 0.5).
        rpo_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: log-prob of the completion, times beta. `"mean"`: its mean per token, not times beta. `"token_mean"`:
            mean over all tokens of the step, not times beta.
    """

    rpo_eta: float = field(
        default=0.005,
        metadata={"help": "Weight of the likelihood of the chosen completions. 0 is DPO."},
    )
    rpo_reduction: str = field(
        default="sum",
        metadata={
            "help": "'sum': log-prob of the completion times beta. 'mean': its mean per token. 'token_mean': mean over "
            "all tokens of the step.",
            "choices": list(REDUCTIONS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rpo_eta", self.rpo_eta, minimum=0.0)
        if self.rpo_reduction not in REDUCTIONS:
            raise ValueError(f"rpo_reduction must be one of {', '.join(REDUCTIONS)}; got {self.rpo_reduction!r}.")


class RPOTrainer(ReplayMixin, DPOTrainer):
    """DPO with the chosen completions' likelihood beside it, from [Provably Mitigating Overoptimization in
    RLHF](https://huggingface.co/papers/2405.16436).

    It costs no forward. `rpo/nll` logs the likelihood term before its weight. With `rpo_eta=0` it is [`~trl.DPOTrainer`].
    The term sees plain log-probs whatever `ld_alpha` and `use_weighting` do to the preference loss.
    """

    args: RPOConfig
    _config = RPOConfig
    _name = "RPO"
    _tag_names = ["trl", "hf_logits", "rpo"]
    _paper = {
        "title": "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
        "id": "2405.16436",
        "citation": textwrap.dedent("""\
            @inproceedings{liu2024provably,
                title     = {{Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer}},
                author    = {Zhihan Liu and Miao Lu and Shenao Zhang and Boyi Liu and Hongyi Guo and Yingxiang Yang and Jose Blanchet and Zhaoran Wang},
                year      = 2024,
                booktitle = {Advances in Neural Information Processing Systems 37},
            }"""),
    }

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Count the chosen tokens of a step over its micro-batches and processes: what `"token_mean"` divides by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.rpo_reduction == "token_mean" and batches:
            chosen = [completion_lengths(batch["completion_mask"]).chunk(2)[0].sum() for batch in batches]
            mine = torch.stack(chosen).sum().to(device)
            # accelerate averages gradients over the processes and Trainer losses over the micro-batches
            items = self.accelerator.gather(mine).sum() / (self.accelerator.num_processes * len(batches))
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.rpo_eta == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = self.run_once(model, inputs)
        mask = inputs["completion_mask"]
        chosen_logps, _ = sequence_log_probs(outputs.log_probs, mask, tail_weight=None).chunk(2)
        chosen_lengths, _ = completion_lengths(mask).chunk(2)
        penalty = rpo_penalty(
            chosen_logps,
            chosen_lengths,
            beta=self.beta,
            reduction=self.args.rpo_reduction,
            items=num_items_in_batch,
        )
        self.record(**{"rpo/nll": penalty})
        stock = self.replay(model, inputs, outputs, return_outputs=return_outputs)
        if return_outputs:
            return stock[0] + self.args.rpo_eta * penalty, stock[1]
        return stock + self.args.rpo_eta * penalty
