from hf_logits.metrics.dialogue_coherence import DialogueCoherence  # noqa: F401
