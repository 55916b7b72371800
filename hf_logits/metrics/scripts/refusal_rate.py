from hf_logits.metrics.refusal_rate import RefusalRate  # noqa: F401
