from hf_logits.metrics.sycophancy import Sycophancy  # noqa: F401
