"""RPO: DPO that also keeps the likelihood of the chosen completions up.

    accelerate launch examples/alignment/rpo.py --config examples/alignment/rpo.yaml

Any preference data will do: --dataset_name trl-lib/ultrafeedback_binarized
"""

from common import near_duplicates, train

from hf_logits.trainers import RPOConfig, RPOTrainer


if __name__ == "__main__":
    train(RPOTrainer, RPOConfig, near_duplicates)
