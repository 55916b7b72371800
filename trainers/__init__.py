"""Training objectives on logits, one a file. Installed as `hf_logits.trainers`, with the extra `hf_logits[train]`."""
