"""f-DPO: direct preference optimisation under other divergences than the reverse KL."""

import dataclasses
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from hf_logits.checks import check_number
from hf_logits.replay import ReplayMixin
from hf_logits.sequences import sequence_log_probs


DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha", "hellinger", "neyman_chi2", "jeffreys", "chi2_kl")
REFUSED = {
    "pearson_chi2": "f'(u) = 2 (u - 1) stays above -2 as u goes to 0; chi2_kl adds the reverse KL, which repairs that",
    "le_cam": "f'(u) = (u - 1)(u + 3) / (u + 1)^2 stays above -3 as u goes to 0",
    "total_variation": "f' takes only the values -1/2 and 1/2 and has no inverse",
}
LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""TRL's losses that see only differences of rewards, in which the unknown constant of the prompt cancels."""

LINEAR_FROM = 30.0
"""Where exponentials go on as straight lines. Their gradients, 1e13 there, then still have a norm in float32."""


def check_divergence(divergence: str, alpha: float | None) -> str:
    """The divergence's name as in `DIVERGENCES`. The paper's conditions are f' increasing and f'(u) -> -inf as u -> 0."""
    name = str(divergence).lower().replace("+", "_").removesuffix("_divergence")
    name = "pearson_chi2" if name == "chi2" else name
    if name in REFUSED:
        raise ValueError(
            f"divergence={divergence!r} breaks the conditions under which a preference loss follows from it: "
            f"{REFUSED[name]}. Take one of {', '.join(DIVERGENCES)}."
        )
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}.")
    if name != "alpha":
        if alpha is not None:
            raise ValueError(f'alpha belongs to divergence="alpha"; got {alpha!r} with {divergence!r}.')
        return name
    limits = 'It is the paper\'s: towards 0 the reverse KL (divergence="reverse_kl"), towards 1 the forward KL. '
    limits += "TRL's f_alpha_divergence_coef is 1 - alpha."
    if alpha is None:
        raise ValueError(f'divergence="alpha" needs alpha between 0 and 1. {limits}')
    if not 0 < check_number("alpha", alpha) < 1:
        raise ValueError(f"alpha must lie between 0 and 1, both excluded; got {alpha!r}. {limits}")
    return name


def _expm1(x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """e^x - 1, beyond `LINEAR_FROM` its tangent there: still increasing, so still a valid f', and never infinite."""
    near = x.clamp(max=LINEAR_FROM)
    # torch takes expm1(x) + 1 for the slope of expm1, which rounds to 0 where the slope is small
    curved = torch.where(near < -1, near.exp() - 1, near.expm1())
    return curved + (x - LINEAR_FROM).relu() * math.exp(LINEAR_FROM)


def divergence_score(
    logratios: Float[Tensor, " B"], *, divergence: str, alpha: float | None = None
) -> Float[Tensor, " B"]:
    """f'(u) for z = log u, the log-ratio of policy to reference, less the constant f'(1): the reference scores 0."""
    name = check_divergence(divergence, alpha)
    z = logratios if logratios.dtype == torch.float64 else logratios.float()
    match name:
        case "reverse_kl":  # log u
            return z
        case "forward_kl":  # 1 - 1/u
            return -_expm1(-z)
        case "js":  # log(2 u / (1 + u))
            return math.log(2) + logsigmoid(z)
        case "alpha":  # (1 - u^-alpha) / alpha
            assert alpha is not None
            return -_expm1(-alpha * z) / alpha
        case "hellinger":  # 1 - u^(-1/2)
            return -_expm1(-z / 2)
        case "neyman_chi2":  # 1 - u^-2
            return -_expm1(-2 * z)
        case "jeffreys":  # log u + 1 - 1/u
            return z - _expm1(-z)
        case _:  # chi2_kl: u - 1 + log u
            return z + _expm1(z)


def f_dpo_loss(
    chosen_logratios: Float[Tensor, " B"],
    rejected_logratios: Float[Tensor, " B"],
    *,
    beta: float,
    divergence: str,
    alpha: float | None = None,
) -> Float[Tensor, ""]:
    """-log sigmoid(beta f'(u_chosen) - beta f'(u_rejected)), averaged over the batch.

    Args:
        chosen_logratios, rejected_logratios: log-probs of the completions under the policy less those under the reference.
        beta: strength of the divergence.
        divergence: one of `DIVERGENCES`. `"reverse_kl"` is DPO.
        alpha: of `divergence="alpha"`, in the paper's convention; TRL's coefficient is `1 - alpha`.
    """
    chosen = divergence_score(chosen_logratios, divergence=divergence, alpha=alpha)
    rejected = divergence_score(rejected_logratios, divergence=divergence, alpha=alpha)
    return -logsigmoid(beta * (chosen - rejected)).mean()


@dataclass
class FDPOConfig(DPOConfig):
    """What [`FDPOTrainer`] needs beside the settings of [`~trl.DPOConfig`].

    Args:
        divergence (`str`, *optional*, defaults to `"js"`):
            `"reverse_kl"` (DPO), `"forward_kl"`, `"js"`, `"alpha"`, `"hellinger"`, `"neyman_chi2"`, `"jeffreys"` or
            `"chi2_kl"`.
        divergence_alpha (`float`, *optional*):
            The alpha of `divergence="alpha"`, between 0 (reverse KL) and 1 (forward KL) as in the paper. TRL's
            `f_alpha_divergence_coef` runs the other way: it is `1 - divergence_alpha`.
    """

    divergence: str = field(
        default="js", metadata={"help": f"Divergence from the reference: {', '.join(DIVERGENCES)}."}
    )
    divergence_alpha: float | None = field(
        default=None,
        metadata={
            "help": "alpha of divergence='alpha' in the paper's convention: 0 reverse KL, 1 forward KL. It is 1 minus "
            "TRL's f_alpha_divergence_coef."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.divergence = check_divergence(self.divergence, self.divergence_alpha)
        if self.f_divergence_type != "reverse_kl" or self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                "FDPOConfig takes `divergence` and `divergence_alpha` instead of TRL's `f_divergence_type` and "
                "`f_alpha_divergence_coef`; divergence_alpha is 1 - f_alpha_divergence_coef."
            )
        if self.divergence != "reverse_kl" and not set(self.loss_type) <= LOSSES:
            raise ValueError(
                f"divergence={self.divergence!r} leaves a constant in the rewards that cancels only in their differences: "
                f"loss_type must be among {sorted(LOSSES)}, got {self.loss_type}."
            )


class FDPOTrainer(ReplayMixin, DPOTrainer):
    """DPO under a divergence that the reverse KL is one of, from [Beyond Reverse KL](https://huggingface.co/papers/2309.16240).

    Everything that [`~trl.DPOTrainer`] can do stays; the rewards that it logs are `beta * f'(u)`, shifted so that the
    reference's are 0. With `divergence="reverse_kl"` it is [`~trl.DPOTrainer`].
    """

    args: FDPOConfig
    _config = FDPOConfig
    _name = "f-DPO"
    _tag_names = ["trl", "hf_logits", "f-dpo"]
    _paper = {
        "title": "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "id": "2309.16240",
        "citation": textwrap.dedent("""\
            @inproceedings{wang2024beyond,
                title     = {{Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints}},
                author    = {Chaoqi Wang and Yibo Jiang and Chenghao Yang and Han Liu and Yuxin Chen},
                year      = 2024,
                booktitle = {The Twelfth International Conference on Learning Representations},
            }"""),
    }

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.divergence == "reverse_kl":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = self.run_once(model, inputs)
        log_probs = sequence_log_probs(outputs.log_probs, inputs["completion_mask"], tail_weight=self.ld_alpha)
        ratios = log_probs - torch.cat([*self.reference(inputs).values()])
        scores = divergence_score(ratios, divergence=self.args.divergence, alpha=self.args.divergence_alpha)
        # The gradient flows through the scores alone, or rounding in `1 - (1 - f'')` would drown small ones; only the
        # `sft` loss needs it through the log-probs as well.
        if "sft" not in self.loss_types:
            outputs = dataclasses.replace(outputs, log_probs=outputs.log_probs.detach())
            log_probs = log_probs.detach()
        # DPO under a reference of log-prob `log_probs - scores` has these scores for log-ratios.
        reference = dict(zip(self.reference_columns, (log_probs - scores).chunk(2), strict=True))
        return self.replay(model, inputs, outputs, reference=reference, return_outputs=return_outputs)
