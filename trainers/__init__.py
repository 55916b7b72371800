"""Training objectives on logits, one a file. Installed as `hf_logits.trainers`, with the extra `hf_logits[train]`.

The names below are imported when they are first asked for, so that one objective does not load what another one needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_logits.trainers.bco import BCOConfig, BCOTrainer, bco_loss
    from hf_logits.trainers.ches import CHESCallback, ches_from_hidden, ches_scores, filter_by_ches
    from hf_logits.trainers.dual_head_distillation import (
        DualHeadDistillationConfig,
        DualHeadDistillationTrainer,
        binary_kl_norm_loss,
        project_gradient,
    )
    from hf_logits.trainers.entanglement import EntanglementConfig, EntanglementTrainer
    from hf_logits.trainers.entanglement_callback import EntanglementCallback
    from hf_logits.trainers.f_dpo import FDPOConfig, FDPOTrainer, f_dpo_loss
    from hf_logits.trainers.gateau import cam_scores, hmg_scores, response_nll, select_top
    from hf_logits.trainers.gedi import ControlCodeCollator, GeDiConfig, GeDiTrainer, gedi_loss, gedi_topics
    from hf_logits.trainers.logit_distillation import LogitDistillationConfig, LogitDistillationTrainer, kd_loss
    from hf_logits.trainers.multi_level_ranking import (
        MultiLevelRankingCollator,
        MultiLevelRankingConfig,
        MultiLevelRankingTrainer,
        mlr_loss,
    )
    from hf_logits.trainers.multi_objective_gate import (
        MultiObjectiveGateConfig,
        MultiObjectiveGateTrainer,
        cache_embeddings,
        embed_ratings,
    )
    from hf_logits.trainers.multi_objective_reward import MultiObjectiveRewardConfig, MultiObjectiveRewardModel
    from hf_logits.trainers.nkd import NKDConfig, NKDTrainer, nkd_loss
    from hf_logits.trainers.on_policy import build_pairs, mix_datasets, without_negative_gradient
    from hf_logits.trainers.refusal_calibration import (
        RefusalCalibration,
        calibrate_refusal,
        refusal_probabilities,
    )
    from hf_logits.trainers.refusal_tokens import (
        RefusalTokenConfig,
        RefusalTokens,
        RefusalTokenTrainer,
        add_refusal_tokens,
        prepend_refusal_token,
        refusal_lora_config,
    )
    from hf_logits.trainers.reward_transform import (
        ConjunctionReward,
        LogSigmoidCenteredReward,
        add_reference_rewards,
        log_sigmoid_centered,
        reward_model_as_function,
    )
    from hf_logits.trainers.rpo import RPOConfig, RPOTrainer, rpo_loss
    from hf_logits.trainers.score import SCoReConfig, SCoReTrainer, self_correction_rates
    from hf_logits.trainers.sinkhorn_distillation import (
        SinkhornDistillationConfig,
        SinkhornDistillationTrainer,
        sinkhorn_distance,
        sinkhorn_kd_loss,
    )
    from hf_logits.trainers.teacher_logits import TeacherLogitsCollator, load_teacher_logits, store_teacher_logits
    from hf_logits.trainers.trice import TRICEConfig, TRICETrainer, trice_weights
    from hf_logits.trainers.uskd import USKDConfig, USKDTrainer, uskd_loss


__all__ = [
    "BCOConfig",
    "BCOTrainer",
    "CHESCallback",
    "ConjunctionReward",
    "ControlCodeCollator",
    "DualHeadDistillationConfig",
    "DualHeadDistillationTrainer",
    "EntanglementCallback",
    "EntanglementConfig",
    "EntanglementTrainer",
    "FDPOConfig",
    "FDPOTrainer",
    "GeDiConfig",
    "GeDiTrainer",
    "LogSigmoidCenteredReward",
    "LogitDistillationConfig",
    "LogitDistillationTrainer",
    "MultiLevelRankingCollator",
    "MultiLevelRankingConfig",
    "MultiLevelRankingTrainer",
    "MultiObjectiveGateConfig",
    "MultiObjectiveGateTrainer",
    "MultiObjectiveRewardConfig",
    "MultiObjectiveRewardModel",
    "NKDConfig",
    "NKDTrainer",
    "RPOConfig",
    "RPOTrainer",
    "RefusalCalibration",
    "RefusalTokenConfig",
    "RefusalTokenTrainer",
    "RefusalTokens",
    "SCoReConfig",
    "SCoReTrainer",
    "SinkhornDistillationConfig",
    "SinkhornDistillationTrainer",
    "TRICEConfig",
    "TRICETrainer",
    "TeacherLogitsCollator",
    "USKDConfig",
    "USKDTrainer",
    "add_reference_rewards",
    "add_refusal_tokens",
    "bco_loss",
    "binary_kl_norm_loss",
    "build_pairs",
    "cache_embeddings",
    "calibrate_refusal",
    "cam_scores",
    "ches_from_hidden",
    "ches_scores",
    "embed_ratings",
    "f_dpo_loss",
    "filter_by_ches",
    "gedi_loss",
    "gedi_topics",
    "hmg_scores",
    "kd_loss",
    "load_teacher_logits",
    "log_sigmoid_centered",
    "mix_datasets",
    "mlr_loss",
    "nkd_loss",
    "prepend_refusal_token",
    "project_gradient",
    "refusal_lora_config",
    "refusal_probabilities",
    "response_nll",
    "reward_model_as_function",
    "rpo_loss",
    "select_top",
    "self_correction_rates",
    "sinkhorn_distance",
    "sinkhorn_kd_loss",
    "store_teacher_logits",
    "trice_weights",
    "uskd_loss",
    "without_negative_gradient",
]

_HOMES = {
    "BCOConfig": "bco",
    "BCOTrainer": "bco",
    "CHESCallback": "ches",
    "ConjunctionReward": "reward_transform",
    "ControlCodeCollator": "gedi",
    "DualHeadDistillationConfig": "dual_head_distillation",
    "DualHeadDistillationTrainer": "dual_head_distillation",
    "EntanglementCallback": "entanglement_callback",
    "EntanglementConfig": "entanglement",
    "EntanglementTrainer": "entanglement",
    "FDPOConfig": "f_dpo",
    "FDPOTrainer": "f_dpo",
    "GeDiConfig": "gedi",
    "GeDiTrainer": "gedi",
    "LogSigmoidCenteredReward": "reward_transform",
    "LogitDistillationConfig": "logit_distillation",
    "LogitDistillationTrainer": "logit_distillation",
    "MultiLevelRankingCollator": "multi_level_ranking",
    "MultiLevelRankingConfig": "multi_level_ranking",
    "MultiLevelRankingTrainer": "multi_level_ranking",
    "MultiObjectiveGateConfig": "multi_objective_gate",
    "MultiObjectiveGateTrainer": "multi_objective_gate",
    "MultiObjectiveRewardConfig": "multi_objective_reward",
    "MultiObjectiveRewardModel": "multi_objective_reward",
    "NKDConfig": "nkd",
    "NKDTrainer": "nkd",
    "RPOConfig": "rpo",
    "RPOTrainer": "rpo",
    "RefusalCalibration": "refusal_calibration",
    "RefusalTokenConfig": "refusal_tokens",
    "RefusalTokenTrainer": "refusal_tokens",
    "RefusalTokens": "refusal_tokens",
    "SCoReConfig": "score",
    "SCoReTrainer": "score",
    "SinkhornDistillationConfig": "sinkhorn_distillation",
    "SinkhornDistillationTrainer": "sinkhorn_distillation",
    "TRICEConfig": "trice",
    "TRICETrainer": "trice",
    "TeacherLogitsCollator": "teacher_logits",
    "USKDConfig": "uskd",
    "USKDTrainer": "uskd",
    "add_reference_rewards": "reward_transform",
    "add_refusal_tokens": "refusal_tokens",
    "bco_loss": "bco",
    "binary_kl_norm_loss": "dual_head_distillation",
    "build_pairs": "on_policy",
    "cache_embeddings": "multi_objective_gate",
    "calibrate_refusal": "refusal_calibration",
    "cam_scores": "gateau",
    "ches_from_hidden": "ches",
    "ches_scores": "ches",
    "embed_ratings": "multi_objective_gate",
    "f_dpo_loss": "f_dpo",
    "filter_by_ches": "ches",
    "gedi_loss": "gedi",
    "gedi_topics": "gedi",
    "hmg_scores": "gateau",
    "kd_loss": "logit_distillation",
    "load_teacher_logits": "teacher_logits",
    "log_sigmoid_centered": "reward_transform",
    "mix_datasets": "on_policy",
    "mlr_loss": "multi_level_ranking",
    "nkd_loss": "nkd",
    "prepend_refusal_token": "refusal_tokens",
    "project_gradient": "dual_head_distillation",
    "refusal_lora_config": "refusal_tokens",
    "refusal_probabilities": "refusal_calibration",
    "response_nll": "gateau",
    "reward_model_as_function": "reward_transform",
    "rpo_loss": "rpo",
    "select_top": "gateau",
    "self_correction_rates": "score",
    "sinkhorn_distance": "sinkhorn_distillation",
    "sinkhorn_kd_loss": "sinkhorn_distillation",
    "store_teacher_logits": "teacher_logits",
    "trice_weights": "trice",
    "uskd_loss": "uskd",
    "without_negative_gradient": "on_policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
