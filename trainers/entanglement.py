"""Two ways out of gradient entanglement: normalise the gradients of each pair, or mask the tokens that it shares."""

import re
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from hf_logits.checks import check_number
from hf_logits.gradients import gradients, inner_product, scale_gradient
from hf_logits.hidden import watch_hidden
from hf_logits.replay import ReplayMixin
from hf_logits.resumable import ResumableMixin
from hf_logits.sequences import sequence_log_probs


def gradient_factors(
    chosen_norm: Float[Tensor, " B"], rejected_norm: Float[Tensor, " B"], *, scale: str
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """What to multiply both gradients of a pair with, so that they point along `G_w / |G_w| - G_l / |G_l|`.

    `scale` is the length of both then: `"unit"`: 1; `"geometric"`: `sqrt(|G_w| |G_l|)`, near that of DPO. A gradient of
    zero stays zero.
    """
    if scale == "unit":
        target = torch.ones_like(chosen_norm)
    elif scale == "geometric":
        target = (chosen_norm * rejected_norm).sqrt()
    else:
        raise ValueError(f'scale must be "unit" or "geometric", got {scale!r}.')
    chosen, rejected = ((target / norm).masked_fill(norm == 0, 0.0) for norm in (chosen_norm, rejected_norm))
    return chosen, rejected


def contrast_mask(input_ids: Integer[Tensor, "R L"], completion_mask: Integer[Tensor, "R L"]) -> Float[Tensor, "R L"]:
    """1 on the tokens of a completion that an alignment of the pair does not find in the other one, 0 elsewhere.

    The first half of the rows are the chosen, the second half the rejected completions.
    """
    mask = completion_mask.cpu().bool()
    found = mask.clone()
    ids = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), mask, strict=True)]
    places = [kept.nonzero().flatten() for kept in mask]
    pairs = len(ids) // 2
    for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
        for first, second, size in SequenceMatcher(
            None, ids[chosen], ids[rejected], autojunk=False
        ).get_matching_blocks():
            found[chosen, places[chosen][first : first + size]] = False
            found[rejected, places[rejected][second : second + size]] = False
    return found.to(input_ids.device, torch.float32)


@dataclass
class EntanglementConfig(DPOConfig):
    """Configuration of [`EntanglementTrainer`]: that of [`~trl.DPOConfig`], and which gradients and tokens count how much.

    Args:
        gradient_norm (`str`, *optional*, defaults to `"hidden"`):
            Which norms the gradients of a pair are divided by. `"full"`: over all trained parameters, one more backward pass
            for every row (tiny models, LoRA). `"parameters"`: the same over the parameters that `norm_parameters` finds.
            `"hidden"`: over the last hidden states, one more backward pass through the head alone; a proxy. `"none"`: off.
        norm_parameters (`str`, *optional*): a regular expression, searched for in the names of parameters.
        gradient_scale (`str`, *optional*, defaults to `"geometric"`): see [`gradient_factors`].
        token_mask (`str`, *optional*, defaults to `"none"`):
            Which tokens enter the margin. `"contrast"`: those that chosen and rejected do not share. `"learned"`: each to
            the extent that a linear function of its hidden state says, trained along. `"none"`: all.
        mask_penalty (`float`, *optional*, defaults to `0.01`): lambda, of the sum of a pair's learned masks.
        mask_bias (`float`, *optional*, defaults to `2.0`): of the learned masks at first, before the sigmoid.
        mask_learning_rate (`float`, *optional*, defaults to `0.001`): of the learned masks.
    """

    gradient_norm: str = field(
        default="hidden",
        metadata={
            "help": "Norms that the gradients of a pair are divided by: over all trained parameters, over those of "
            "norm_parameters, over the last hidden states, or none.",
            "choices": ["none", "full", "parameters", "hidden"],
        },
    )
    norm_parameters: str | None = field(default=None, metadata={"help": "Regular expression for names of parameters."})
    gradient_scale: str = field(
        default="geometric",
        metadata={"help": "Length of both gradients after normalisation.", "choices": ["unit", "geometric"]},
    )
    token_mask: str = field(
        default="none",
        metadata={
            "help": "Tokens that enter the margin: all, those that the pair does not share, or to a learned extent.",
            "choices": ["none", "contrast", "learned"],
        },
    )
    mask_penalty: float = field(default=0.01, metadata={"help": "Weight of the sum of the learned masks."})
    mask_bias: float = field(default=2.0, metadata={"help": "Learned masks at first, before the sigmoid."})
    mask_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the learned masks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("gradient_norm", ("none", "full", "parameters", "hidden")),
            ("gradient_scale", ("unit", "geometric")),
            ("token_mask", ("none", "contrast", "learned")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if (self.gradient_norm == "parameters") != (self.norm_parameters is not None):
            raise ValueError('norm_parameters, a regular expression, belongs to gradient_norm="parameters".')
        if self.token_mask != "none" and (self.precompute_ref_log_probs or self.use_weighting):
            raise ValueError(
                "token_mask needs the reference's log-prob of every token, unweighted: switch off precompute_ref_log_probs "
                "(which keeps sums) and use_weighting."
            )
        check_number("mask_penalty", self.mask_penalty, minimum=0.0)
        check_number("mask_bias", self.mask_bias)
        check_number("mask_learning_rate", self.mask_learning_rate, minimum=0.0)


class EntanglementTrainer(ResumableMixin, ReplayMixin, DPOTrainer):
    """DPO whose pairs cannot pull their own chosen completion down.

    Yuan et al. 2024, "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement"
    (https://huggingface.co/papers/2410.13828). Its two designs are named Normalized and Sparse Preference Optimization there;
    no code of them is published, so what follows is our reading. *Pairwise normalised gradients* replace a pair's direction
    by `G_w / |G_w| - G_l / |G_l|`: to first order the chosen log-prob never falls and the rejected one never rises. The loss
    and all metrics stay DPO's; only gradients change. `"geometric"`, which keeps about DPO's scale, is ours. *Token masks*
    `m` in `[0, 1]` make the margin one of sums of `m_t (log p_t - log p_ref_t)`; how they are parametrised and their
    penalty of 0.01 are ours. `logps/*` and `rewards/*` are of these sums then, `logps/*_unmasked` of all tokens.

    The guarantee is of a pair alone, with norms over all trained parameters, in a small step of plain gradient descent.
    Other pairs of the batch and Adam's preconditioner can break it. DDP works; sharded parameters have no norms here. The
    head of learned masks is saved in checkpoints (`token_mask.safetensors`), not with the model, which does not need it.
    """

    _tag_names = ["hf_logits", "gradient-entanglement"]
    _name = "Normalized Preference Optimization"
    _paper = {
        "title": "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement",
        "id": "2410.13828",
        "citation": (
            "@inproceedings{yuan2025common,\n"
            "    title = {{A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement}},\n"
            "    author = {Hui Yuan and Yifan Zeng and Yue Wu and Huazheng Wang and Mengdi Wang and Liu Leqi},\n"
            "    booktitle = {International Conference on Learning Representations},\n"
            "    year = 2025,\n"
            "    eprint = {arXiv:2410.13828},\n"
            "}"
        ),
    }
    args: EntanglementConfig
    model: Any
    _config = EntanglementConfig
    _state_file = "token_mask.safetensors"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mask_head: nn.Module | None = None
        self._stepped = False
        if self.args.token_mask == "learned":
            size = self.model.config.get_text_config().hidden_size
            head = nn.utils.skip_init(nn.Linear, size, 1)  # draws no random numbers: data stays in stock order
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, self.args.mask_bias)
            self.mask_head = self.accelerator.prepare_model(head)
        self._norm_parameters: list[Tensor] = []
        if self.args.gradient_norm in ("full", "parameters"):
            pattern = self.args.norm_parameters or ""
            named = self.model.named_parameters()
            self._norm_parameters = [p for name, p in named if p.requires_grad and re.search(pattern, name)]
            if not self._norm_parameters:
                raise ValueError(f"No trained parameter has a name with {pattern!r} in it.")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with watch_hidden(self.accelerator.unwrap_model(model)) as seen:
            outputs = self.run_once(model, inputs)
        mask, length = inputs["completion_mask"][:, 1:], inputs["completion_mask"].size(1)
        reference, penalty = None, 0.0
        log_probs = outputs.log_probs[:, -(length - 1) :]
        if self.args.token_mask != "none":
            weights = self._token_weights(inputs, seen[0][:, -length:-1]) * mask
            reference = self._masked_reference(inputs, weights)
            chosen, rejected = weights.sum(1).chunk(2)
            if self.args.token_mask == "learned":
                penalty = self.args.mask_penalty * (chosen + rejected).mean()
            self._log_pair("logps/{}_unmasked", log_probs.detach().sum(1))
            self._log_pair("mask/{}", (weights.sum(1) / mask.sum(1).clamp(min=1)).detach())
            log_probs = weights * log_probs
        if self.args.gradient_norm != "none" and torch.is_grad_enabled():
            sums = sequence_log_probs(log_probs, inputs["completion_mask"], tail_weight=self.ld_alpha)
            norms = self._gradient_norms(sums, seen[0])
            self._log_pair("gradients/{}", norms)
            factors = gradient_factors(*norms.chunk(2), scale=self.args.gradient_scale)
            log_probs = scale_gradient(log_probs, torch.cat(factors))
        outputs = replace(outputs, log_probs=log_probs)
        stock = self.replay(model, inputs, outputs, reference=reference, return_outputs=return_outputs)
        return (stock[0] + penalty, stock[1]) if return_outputs else stock + penalty

    def _log_pair(self, key: str, rows: Float[Tensor, " R"]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, half in zip(("chosen", "rejected"), rows.chunk(2), strict=True):
            metrics[key.format(name)].append(self.accelerator.gather(half).mean().item())

    # --- gradients -------------------------------------------------------------------------------------------------------

    def _gradient_norms(self, sums: Float[Tensor, " R"], hidden: Float[Tensor, "R L D"]) -> Float[Tensor, " R"]:
        """Of each row's log-prob."""
        if self.args.gradient_norm == "hidden":
            # rows do not see each other, so the gradient of their sum holds that of each
            (gradient,) = torch.autograd.grad(sums.sum(), hidden, retain_graph=True)
            return gradient.float().flatten(1).norm(dim=1)
        each = (gradients(one, self._norm_parameters) for one in sums)
        return torch.stack([inner_product(found, found).sqrt() for found in each])

    # --- tokens ----------------------------------------------------------------------------------------------------------

    def _token_weights(self, inputs: dict[str, Any], hidden: Float[Tensor, "R T D"]) -> Float[Tensor, "R T"]:
        if self.mask_head is None:
            return contrast_mask(inputs["input_ids"], inputs["completion_mask"])[:, 1:]
        return torch.sigmoid(self.mask_head(hidden.detach().float()).squeeze(-1))

    def _masked_reference(self, inputs: dict[str, Any], weights: Float[Tensor, "R T"]) -> dict[str, Tensor]:
        """The reference's masked sums. TRL's own method runs it, under whichever adapter, and is listened to."""
        heard = []

        def listening(**kwargs: Any) -> Any:
            heard.append(policy(**kwargs))
            return heard[-1]

        policy = self.ref_model or self.model
        self.compute_ref_log_probs(listening, inputs)
        token_log_probs = heard[0].log_probs[:, -weights.size(1) :]
        sums = sequence_log_probs(weights * token_log_probs, inputs["completion_mask"], tail_weight=self.ld_alpha)
        return dict(zip(self.reference_columns, sums.chunk(2), strict=True))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        new = [] if self.mask_head is None else [one for one in self.mask_head.parameters() if one not in known]
        if new:
            optimizer.add_param_group({"params": new, "lr": self.args.mask_learning_rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.mask_head is not None and self._stepped:
            self.mask_head.zero_grad()  # the trainer clears what belongs to its model, after each optimizer step
        self._stepped = self.accelerator.sync_gradients
        return super().training_step(*args, **kwargs)

    def extra_state(self) -> dict[str, Tensor]:
        if self.mask_head is None:
            return {}
        head = self.accelerator.unwrap_model(self.mask_head)
        return {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.mask_head is not None:
            self.accelerator.unwrap_model(self.mask_head).load_state_dict(state)
