from hf_logits.metrics.position_bias import PositionBias  # noqa: F401
