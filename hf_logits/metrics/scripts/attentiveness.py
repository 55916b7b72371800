from hf_logits.metrics.attentiveness import Attentiveness  # noqa: F401
