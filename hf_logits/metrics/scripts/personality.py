from hf_logits.metrics.personality import Personality  # noqa: F401
