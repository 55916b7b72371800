from hf_logits.metrics.open_set import OpenSet  # noqa: F401
