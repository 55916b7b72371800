"""Pairwise normalised gradients, on pairs whose completions differ in one word.

    accelerate launch examples/alignment/entanglement.py --config examples/alignment/entanglement.yaml

Any preference data will do: --dataset_name trl-lib/ultrafeedback_binarized
"""

from common import near_duplicates, train

from hf_logits.trainers import EntanglementConfig, EntanglementTrainer


if __name__ == "__main__":
    train(EntanglementTrainer, EntanglementConfig, near_duplicates)
