"""f-DPO: praise over complaint, with a divergence of your choice between the model and its reference.

    accelerate launch examples/alignment/f_dpo.py --config examples/alignment/f_dpo.yaml

Any preference data will do: --dataset_name trl-lib/ultrafeedback_binarized
"""

from common import opinions, train

from hf_logits.trainers import FDPOConfig, FDPOTrainer


if __name__ == "__main__":
    train(FDPOTrainer, FDPOConfig, opinions)
