from hf_logits.metrics.judge_position import JudgePosition  # noqa: F401
