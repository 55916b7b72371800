from hf_logits.metrics.verbalizer_gap import VerbalizerGap  # noqa: F401
