from hf_logits.metrics.mcq_chain import McqChain  # noqa: F401
