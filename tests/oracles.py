"""Numbers worked out for tiny vocabularies, as data: what goes into a formula, and what must come out.

All tensors are float64. Logits stand for one row; probabilities are given to six digits, so compare with `ATOL`. At the end
are the two ways in which the tests of several methods feed such tables, and a tokenizer for tiny models.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_logits.processing import AuxiliaryLogitsProcessor


ATOL = 1e-6
"""Half a unit of the last printed digit, and room for rounding."""


def row(*values: float) -> Tensor:
    """One row over a vocabulary: `[1, V]`."""
    return torch.tensor([values], dtype=torch.float64)


# --- STEER ---------------------------------------------------------------------------------------------------------------

STEER_TUNED = row(2, 1, 0, -1, 0.5)  # logits of the fine-tuned model
STEER_BASE = row(1, 1.5, 0, 0, -0.5)  # logits of the model before fine-tuning
STEER_NEGATIVE = row(2.5, 0, 0, -1, 1)  # logits of the fine-tuned model behind the negative examples
STEER = {  # (contrast, repulsion) -> probabilities
    (0.0, 0.0): row(0.563021, 0.207124, 0.076197, 0.028031, 0.125627),  # the tuned model itself
    (0.2, 0.0): row(0.609816, 0.166194, 0.067570, 0.020352, 0.136068),  # away from the base only
    (0.0, 0.6): row(0.237494, 0.391561, 0.144047, 0.096558, 0.130339),  # away from the negatives only
    (0.2, 0.6): row(
        0.282539, 0.345094, 0.140305, 0.077001, 0.155061
    ),  # the defaults: the best token moves from 0 to 1
    (0.2, 1.0): row(0.128615, 0.427017, 0.173612, 0.142141, 0.128615),  # a pure ratio: the weights sum to 0
}
STEER_ENTROPY = (1.740596, 2.144234)  # bits, of the tuned model and of (0.2, 0.6)
STEER_NORMALISED = row(0.478912, 0.321024, 0.071630, 0.021575, 0.106860)  # (0.2, 0.6) with weights that sum to 1
STEER_PLAUSIBLE = {  # plausibility -> probabilities at (0.2, 0.6)
    0.1: row(0.306110, 0.373884, 0.152010, 0, 0.167997),  # token 3 is cut
    0.2: row(0.360983, 0.440905, 0, 0, 0.198112),  # tokens 2 and 3 are cut
}

# --- GeDi ----------------------------------------------------------------------------------------------------------------

GEDI_MAIN = row(1.5, 1.2, 0.8, 0, -1)  # logits of the large model
GEDI_DESIRED = row(1, 0, 1, -1, 0.5)  # logits of the guide behind the desired code
GEDI_UNDESIRED = row(0, 1, 1, 0.5, -1)  # logits of the guide behind the undesired code
GEDI_RUNNING = (-6.0, -6.3)  # log-likelihood of the tokens so far, desired and undesired
GEDI_LENGTH = 3  # how many tokens that are
GEDI_SCALE = 2.0  # learned scale of the class logits
GEDI_BIAS = (0.1, -0.1)  # learned bias, desired and undesired
GEDI_POSTERIOR = row(0.700567, 0.462570, 0.586618, 0.401312, 0.750260)  # of the desired class, for each candidate
GEDI_POSTERIOR_CLASS_BIAS = row(0.945319, 0.864127, 0.912934, 0.832018, 0.956893)  # with a class bias of 2
GEDI_WEIGHTED = {  # strength -> weighted probabilities before the filter
    5.0: row(0.700877, 0.065162, 0.143272, 0.009646, 0.081043),
    1.0: row(0.471545, 0.230655, 0.196075, 0.060272, 0.041452),
}
GEDI_ORDER = (3, 1, 2, 0, 4)  # tokens by ascending posterior
GEDI_CUMULATIVE = row(0.009646, 0.074808, 0.218080, 0.918957, 1)  # of the weighted probabilities at 5, in that order
GEDI_FILTERED = {  # (strength, filter_p, target_p) -> probabilities
    (5.0, 0.8, 0.8): row(0.896354, 0, 0, 0, 0.103646),  # tokens 3, 1, 2 are banned
    (1.0, 0.8, 0.8): row(0.919196, 0, 0, 0, 0.080804),  # the same three
    (1.0, 0.8, 0.5): row(0.665017, 0, 0.276523, 0, 0.058460),  # token 2 reaches the target
}
GEDI_TARGET_MOVED = (0.8, 2.0, 0.967273)  # target, class bias, and the target that means the same with that bias

# --- refusal tokens ------------------------------------------------------------------------------------------------------

REFUSAL_LOGITS = row(1.2, 1.5, 0.3, -0.5, 0, -1)  # token 0 refuses, token 1 responds
REFUSAL_PROBS = row(0.298409, 0.402810, 0.121324, 0.054514, 0.089879, 0.033065)  # at softmax temperature 1
REFUSAL_SINGLE = {None: 1, 0.2: 0, 0.28: 0, 0.3: 1}  # threshold -> the token that is forced
REFUSAL_PROBS_T2 = (0.243394, 0.282784)  # p(refuse), p(respond) at softmax temperature 2
REFUSAL_ODDS = 0.425557  # p(refuse) among the two tokens alone
REFUSAL_GREEDY_BIAS = 0.3  # the bias at which refusal becomes the most probable token
REFUSAL_HALF_BIAS = 0.854888  # the bias at which p(refuse) = 1/2
CATEGORY_LOGITS = row(0.9, 0.7, 0.2, 1.4, 0)  # tokens 0 to 2 refuse, token 3 responds
CATEGORY_PROBS = row(0.228801, 0.187327, 0.113619, 0.377229, 0.093024)
CATEGORY_SUM = 0.529747  # of the three categories
CATEGORY_BEST = 0.228801  # the largest of them
CATEGORY_FORCED = {("category", 0.3): 3, ("sum", 0.5): 0}  # (mode, threshold) -> the token that is forced
CATEGORY_GREEDY = 3  # what the plain model says

# --- entropy-adaptive decoding ---------------------------------------------------------------------------------------------

ENTROPY_LOGITS = row(2, 1, 0, -1, 0.5)
ENTROPY_BITS = 1.740596  # of these logits
ENTROPY_NATS = 1.206489  # the same
ENTROPY_SHARE = 0.749634  # of the largest that five tokens can have
ENTROPY_BITS_BANNED = 1.463474  # with token 2 banned
SWITCH_ENTROPIES = (0.2, 3, 0.2, 0.2, 2.6, 2.4, 0.1, 0.1, 0.1, 0.1, 3, 0.1)  # bits, token by token
SWITCH_MEANS_2 = (0.2, 1.6, 1.6, 0.2, 1.4, 2.5, 1.25, 0.1, 0.1, 0.1, 1.55, 1.55)  # their means over a window of 2
SWITCHES = {  # (window, threshold, minimum stay, timing) -> the model that chooses each token
    (2, 1.0, 0, "now"): "SLLSLLLSSSLL",
    (2, 1.0, 1, "now"): "SLLSLLLSSSLL",
    (2, 1.0, 3, "now"): "SSSSLLLSSSLL",
    (2, 1.6, 3, "now"): "SSSSSLLLSSSS",  # a mean of exactly 1.6 does not switch
    (5, 1.0, 3, "now"): "SSSSLLLLLSSS",
    (1, 1.0, 1, "now"): "SLSSLLSSSSLS",
    (2, 1.0, 3, "next"): "SSSLLLLLSSSL",
}
COSTS = {  # (small parameters, large ones, share of the large model) -> published saving, saving if the small always runs
    (3.0, 11.0, 0.43): (0.4145, 0.297),
    (1.5, 14.0, 0.25): (0.6696, 0.643),
}

# --- leading query contrastive decoding ------------------------------------------------------------------------------------

LQCD_NEUTRAL = row(2, 1.8, 0, -1, 0.5)  # logits behind the neutral question
LQCD_LEADING = row(1, 2.6, 0.2, -1, 0.5)  # logits behind the leading question
LQCD_NEUTRAL_PROBS = row(0.449038, 0.367641, 0.060771, 0.022356, 0.100194)
LQCD_LEADING_PROBS = row(0.139973, 0.693292, 0.062894, 0.018943, 0.084898)
LQCD = {  # (contrast, plausibility) -> probabilities
    (0.0, 0.1): row(0.459306, 0.376048, 0.062160, 0, 0.102485),  # token 3 is cut
    (0.5, 0.1): row(0.648307, 0.215803, 0.048152, 0, 0.087739),
    (1.0, 0.1): row(0.794797, 0.107564, 0.032398, 0, 0.065241),
    (1.0, 0.25): row(0.880797, 0.119203, 0, 0, 0),
}

# --- dynamic logit fusion ----------------------------------------------------------------------------------------------------

FUSION_BIG = row(2, 1.5, 0.5, 0, -1)  # logits of the large base
FUSION_SMALL = row(1, 1, 0.8, 0, -0.5)  # logits of the small base
FUSION_EXPERT = row(0.5, 2.5, 0.6, 0, -1.5)  # logits of the small fine-tuned model
FUSION_DIRECTION = row(-0.5, 1.5, -0.2, 0, -1)  # expert minus small base
FUSION_TARGETS = (0.399849, 0.419468)  # KL(expert || small), KL(small || expert)
FUSION_CURVE = {  # weight -> KL(moved || big), KL(big || moved), loss
    0.0: (0.0, 0.0, 0.335833),
    0.5: (0.114142, 0.109218, 0.177884),
    1.0: (0.418620, 0.440731, 0.000804),
    1.5: (0.738642, 0.942427, 0.388267),
    2.0: (0.959365, 1.539142, 1.566727),
}
FUSION_GRID_BEST = 1.0  # of 0, 0.1, ..., 2
FUSION_ROOTS = (0.972652, 0.975006)  # the weights at which each KL meets its target
FUSION_OPTIMUM = (0.974067, 1.566e-6)  # the best weight, and its loss
FUSION_MOVED = row(0.165667, 0.742467, 0.049898, 0.036965, 0.005003)  # probabilities at weight 1: also proxy-tuning
FUSION_BASE = row(0.496331, 0.301040, 0.110746, 0.067171, 0.024711)  # probabilities at weight 0
FUSION_SECOND = row(1.2, 1, 0.8, 0.9, -0.5)  # logits of a second expert
FUSION_ALONE = (
    (0.7, 0.130725),
    (2.0, 0.149920),
)  # best weight of each expert alone, and the loss summed over both targets
FUSION_JOINT = ((0.8, 1.0), 0.130193)  # the best point of the grid squared, and its loss

# --- relatives -----------------------------------------------------------------------------------------------------------------

DEXPERTS = row(0.028967, 0.959256, 0.011777, 0, 0)  # the models of fusion, weight 2, nucleus 0.9 (which cuts 3 and 4)
CONTRASTIVE_EXPERT = row(2, 1.5, 0.5, 0, -3)  # logits
CONTRASTIVE_AMATEUR = row(1.8, 0.2, 0.5, 0.6, -3.5)  # logits
CONTRASTIVE = {  # amateur temperature -> probabilities, plausibility 0.1 (which cuts token 4)
    1.0: row(0.189673, 0.569810, 0.155291, 0.085226, 0),
    0.5: row(0.049078, 0.730268, 0.147439, 0.073216, 0),
}
CONTRASTIVE_STRENGTH = row(0.426642, 0.448516, 0.086138, 0.038704, 0)  # the second form, strength 0.5
GUIDANCE_CONDITIONAL = row(2, 1.5, 0.5, 0, -1)  # logits behind the prompt
GUIDANCE_UNCONDITIONAL = row(2.2, 0.5, 0.5, 0, -1)  # logits behind the negative prompt, or without the context
GUIDANCE = {  # scale -> probabilities; context-aware decoding at scale - 1
    1.5: row(0.391181, 0.432322, 0.096464, 0.058508, 0.021524),
    2.0: row(0.284706, 0.573328, 0.077591, 0.047062, 0.017313),
}


def answer(processor: AuxiliaryLogitsProcessor, main: Tensor, *auxiliary: Tensor) -> Tensor:
    """Probabilities after one call of a processor whose main and auxiliary models say these logits."""
    processor.auxiliary_log_probs = lambda step, vocab_size: [logits.log_softmax(-1) for logits in auxiliary]
    return processor(torch.full((main.shape[0], 1), 5), main).exp()


def normalised(*logits: Tensor) -> list[Tensor]:
    """Log-probabilities of each."""
    return [values.log_softmax(-1) for values in logits]


def word_tokenizer(words: Sequence[str] = (), *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of 64 whole words for the tiny models: three special ones, an unknown one, `words`, then "w4", "w5", ..."""
    given = ["<pad>", "<bos>", "<eos>", "<unk>", *words]
    vocabulary = {word: i for i, word in enumerate([*given, *(f"w{i}" for i in range(len(given), 64))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
