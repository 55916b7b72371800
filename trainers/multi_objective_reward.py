"""A reward model that rates named objectives and lets the prompt decide how much each of them counts (ArmoRM)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from hf_logits.correlation import spearman
from hf_logits.reply import pattern_position
from hf_logits.ridge import RidgeFit


logger = logging.get_logger(__name__)

SHARES = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(step / 20 for step in range(3, 20)))
"""How much of the verbosity rating may be taken off another one, up to 0.95: those of the released code."""


# --- The arithmetic ------------------------------------------------------------------------------------------------------


def gated_score(
    rewards: Float[Tensor, "B K"], gate: Float[Tensor, "B K"], transform: Float[Tensor, "K K"]
) -> Float[Tensor, " B"]:
    """`sum_k gate_k r'_k` with the debiased rewards `r' = r T`. As `r` it is linear: the coefficients of `r` are `T gate`."""
    return (gate * (rewards @ transform)).sum(-1)


def debias_transform(shares: Float[Tensor, " K"], verbosity: int) -> Float[Tensor, "K K"]:
    """The matrix T of `r' = r T` with `r'_i = r_i - shares_i r_v`: v is the verbosity, whose own share is 1."""
    transform = torch.eye(len(shares), dtype=shares.dtype, device=shares.device)
    transform[verbosity] -= shares
    return transform


def fit_shares(
    rewards: Float[Tensor, "N K"], verbosity: int, *, threshold: float = 0.028, grid: Sequence[float] = SHARES
) -> Float[Tensor, " K"]:
    """For each objective the smallest share of the verbosity that, taken off, leaves a rank correlation of at most `threshold`.

    Where none does it stays 1, with a warning. The verbosity's own is 1, which turns it off.
    """
    long = rewards[:, verbosity]
    if long.min() == long.max():
        raise ValueError(
            "The verbosity is rated the same in every row: there is nothing that correlates with it. Give other rows, or "
            "leave the transform as it is."
        )
    shares = torch.ones(rewards.shape[1], dtype=rewards.dtype)
    for objective in range(rewards.shape[1]):
        if objective == verbosity:
            continue
        for share in sorted(grid):
            # Constant: independent of everything.
            debiased = rewards[:, objective] - share * long
            ranked = (values.double().cpu().numpy() for values in (debiased, long))
            if debiased.min() == debiased.max() or spearman(*ranked) <= threshold:
                shares[objective] = share
                break
        else:
            logger.warning(
                f"No share of the verbosity brings objective {objective} down to a rank correlation of {threshold}: all of it is "
                "taken off."
            )
    return shares


# --- The model -----------------------------------------------------------------------------------------------------------


@no_type_check  # transformers makes its __init__ take more than the signature says
class MultiObjectiveRewardConfig(PreTrainedConfig):
    """Of a [`MultiObjectiveRewardModel`].

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            Of the backbone.
        objectives (`list[str]`):
            Names of the ratings.
        prompt_pattern (`list[int]`, *optional*):
            The tokens that stand between prompt and reply, see [`~hf_logits.reply.reply_pattern`]. The gate reads the state at the first token of
            their last occurrence. Without them, `prompt_lengths` must be passed to the model.
        gate_temperature (`float`, *optional*, defaults to `10.0`):
            Divides the gate's logits.
        gate_hidden_size (`int`, *optional*, defaults to `1024`):
            Width of the gate.
        gate_hidden_layers (`int`, *optional*, defaults to `3`):
            Hidden layers of the gate.
        gate_dropout (`float`, *optional*, defaults to `0.2`):
            Behind each hidden layer of the gate.
    """

    model_type = "multi_objective_reward"
    sub_configs = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    objectives: list[str] | None = None
    prompt_pattern: list[int] | None = None
    gate_temperature: float = 10.0
    gate_hidden_size: int = 1024
    gate_hidden_layers: int = 3
    gate_dropout: float = 0.2

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)


@no_type_check  # a ModelOutput may also be made from one dict
@dataclass
class MultiObjectiveRewardOutput(ModelOutput):
    """What the model returns.

    Args:
        logits ([B, 1]): the score, where a sequence classification model has it.
        score ([B]): the same.
        rewards ([B, K]): what each objective is rated.
        gating_output ([B, K]): what each debiased rating counts; they sum to the gate's scale.
    """

    logits: Tensor | None = None
    score: Tensor | None = None
    rewards: Tensor | None = None
    gating_output: Tensor | None = None


class RewardGate(nn.Module):
    """Weights of the objectives, from the state of the prompt: a softmax over the OBJECTIVES, times a learnt scale."""

    def __init__(self, config: MultiObjectiveRewardConfig, inputs: int, outputs: int):
        super().__init__()
        sizes = [inputs] + [config.gate_hidden_size] * config.gate_hidden_layers
        self.hidden = nn.ModuleList(nn.Linear(*size) for size in zip(sizes, sizes[1:], strict=False))
        self.output = nn.Linear(sizes[-1], outputs)
        self.dropout = nn.Dropout(config.gate_dropout)
        self.scale = nn.Parameter(torch.ones(1))
        self.temperature = config.gate_temperature

    def forward(self, prompt: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        state = prompt.to(self.output.weight.dtype)
        for layer in self.hidden:
            state = self.dropout(layer(state).relu())
        return self.scale.float() * (self.output(state).float() / self.temperature).softmax(-1)


class MultiObjectiveRewardModel(PreTrainedModel):
    """Rates each objective with a linear head on the last token's state, and mixes the ratings by what the prompt asks for.

    From [Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts](https://huggingface.co/papers/2406.12845)
    (ArmoRM). It has one logit, so TRL takes it wherever it takes a reward model. The heads come from [`~hf_logits.ridge.fit_ridge`], the
    transform from [`fit_shares`] and [`debias_transform`], the gate from [`~hf_logits.trainers.MultiObjectiveGateTrainer`].

    Two slips of the released stage-2 script are not repeated: its gate normalises over the pair, where both entries are equal,
    instead of over the objectives; and it computes debiased rewards but trains and evaluates on the others.

    Padding may be on either side. Texts need their closing token: the last attended one is read.
    """

    config_class = MultiObjectiveRewardConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiObjectiveRewardConfig):
        super().__init__(config)
        names = config.objectives or []
        if not isinstance(config.text_config, PreTrainedConfig) or not names or len(set(names)) < len(names):
            raise ValueError(f"The config needs the backbone's text_config and distinct objectives; got {names}.")
        if config.gate_temperature <= 0 or not 0 <= config.gate_dropout < 1:
            raise ValueError(
                f"gate_temperature must be above 0 and gate_dropout in [0, 1); got {config.gate_temperature}, {config.gate_dropout}."
            )
        width = config.text_config.get_text_config().hidden_size
        self.model = AutoModel.from_config(config.text_config)
        self.regression_layer = nn.Linear(width, len(names), bias=False)
        self.gating = RewardGate(config, width, len(names))
        self.register_buffer("reward_transform_matrix", torch.eye(len(names)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The backbone has its own. nn.Linear starts as PyTorch's, as in the released code.
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, RewardGate):
            nn.init.ones_(module.scale)
        elif module is self:
            nn.init.eye_(self.get_buffer("reward_transform_matrix"))

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel | str, *, objectives: Sequence[str], **config: Any
    ) -> "MultiObjectiveRewardModel":
        """New heads on a pretrained model, best one that was trained for preferences.

        Args:
            backbone ([`~transformers.PreTrainedModel`] or `str`): any text model, whose own head is not used, or its name.
            objectives (`Sequence[str]`): names of the ratings.
            config: further settings of [`MultiObjectiveRewardConfig`].
        """
        body: Any = AutoModel.from_pretrained(backbone) if isinstance(backbone, str) else backbone.base_model
        settings = MultiObjectiveRewardConfig(text_config=body.config, objectives=list(objectives), **config)
        settings.dtype = body.dtype
        with torch.device("meta"):  # no second set of the backbone's weights
            model = cls(settings)
        model.model = body
        for head in (model.regression_layer, model.gating):
            head.to(body.dtype).to_empty(device=body.device)
            head.apply(model._init_weights)
        model.reward_transform_matrix = torch.eye(len(objectives), device=body.device)
        return model.eval()

    def embed(
        self,
        input_ids: Integer[Tensor, "B L"],
        attention_mask: Integer[Tensor, "B L"] | None = None,
        prompt_lengths: Integer[Tensor, " B"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """The states of the last token and of the prompt, from one forward of the backbone.

        Args:
            prompt_lengths: how many tokens of each row are its prompt. `None`: found by the config's `prompt_pattern`.
            kwargs: of the backbone.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # To the left with the tokens: absolute positions count from there.
        order = mask.argsort(dim=1, descending=True, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        kwargs = {
            key: value.gather(1, order) if isinstance(value, Tensor) and value.shape == order.shape else value
            for key, value in kwargs.items()
        }
        last = mask.sum(1) - 1
        if (last < 0).any():
            raise ValueError("A row of the batch has no attended token.")
        if prompt_lengths is not None:
            prompt = prompt_lengths - 1
            if ((prompt < 0) | (prompt > last)).any():
                raise ValueError("prompt_lengths must be at least 1 and at most the number of attended tokens.")
        elif self.config.prompt_pattern:
            prompt = pattern_position(input_ids, mask.bool(), self.config.prompt_pattern)
        else:
            raise ValueError("Where does the prompt end? Set config.prompt_pattern, or pass prompt_lengths.")
        hidden = self.model(input_ids=input_ids, attention_mask=mask, **kwargs).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, last], hidden[rows, prompt]

    def forward(
        self,
        input_ids: Integer[Tensor, "B L"] | None = None,
        attention_mask: Integer[Tensor, "B L"] | None = None,
        prompt_lengths: Integer[Tensor, " B"] | None = None,
        *,
        embeddings: Float[Tensor, "R D"] | None = None,
        prompt_embeddings: Float[Tensor, "P D"] | None = None,
        **kwargs: Any,
    ) -> MultiObjectiveRewardOutput:
        """Rate texts, or what [`embed`] returned for them.

        Args:
            embeddings: instead of texts. They may be several times as many as `prompt_embeddings`: then these repeat.
        """
        if input_ids is not None:
            embeddings, prompt_embeddings = self.embed(input_ids, attention_mask, prompt_lengths, **kwargs)
        if embeddings is None or prompt_embeddings is None:
            raise ValueError("Pass input_ids, or both embeddings and prompt_embeddings.")
        # In float32, as the fit was.
        rewards = embeddings.float() @ self.regression_layer.weight.float().T
        gate = self.gating(prompt_embeddings)
        gate = gate.repeat(len(rewards) // len(gate), 1)
        score = gated_score(rewards, gate, self.get_buffer("reward_transform_matrix").float())
        return MultiObjectiveRewardOutput(logits=score.unsqueeze(-1), score=score, rewards=rewards, gating_output=gate)

    @torch.no_grad()
    def set_heads(self, heads: RidgeFit) -> None:
        """Take over the fit of stage 1, a ridge regression of the ratings on the embeddings."""
        self.regression_layer.weight.copy_(heads.weights)

    @torch.no_grad()
    def debias(
        self, embeddings: Float[Tensor, "N D"], verbosity: str, *, threshold: float = 0.028
    ) -> dict[str, float]:
        """Take the verbosity off the other ratings, as far as they correlate with it on reference texts.

        Returns:
            `dict[str, float]`: the share that is taken off each objective.
        """
        names = list(self.config.objectives or [])
        if verbosity not in names:
            raise ValueError(f"verbosity must be one of {names}; got {verbosity!r}.")
        index = names.index(verbosity)
        rewards = embeddings.float() @ self.regression_layer.weight.float().T
        shares = fit_shares(rewards.cpu(), index, threshold=threshold)
        self.get_buffer("reward_transform_matrix").copy_(debias_transform(shares, index))
        return dict(zip(names, shares.tolist(), strict=True))


AutoConfig.register(MultiObjectiveRewardConfig.model_type, MultiObjectiveRewardConfig)
AutoModelForSequenceClassification.register(MultiObjectiveRewardConfig, MultiObjectiveRewardModel)
