"""BCO: learn from sentences with a thumb up or down.

    accelerate launch examples/alignment/bco.py --config examples/alignment/bco.yaml

Any unpaired or paired preference data will do: --dataset_name trl-lib/kto-mix-14k
"""

from common import thumbs, train

from hf_logits.trainers import BCOConfig, BCOTrainer


if __name__ == "__main__":
    train(BCOTrainer, BCOConfig, thumbs)
