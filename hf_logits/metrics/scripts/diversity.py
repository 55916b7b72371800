from hf_logits.metrics.diversity import Diversity  # noqa: F401
