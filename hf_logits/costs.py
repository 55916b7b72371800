"""What a generation costs that two models share."""


def relative_cost(share: float, *, small: float, large: float) -> float:
    """The cost in the paper of entropy-adaptive decoding: active parameters a token, relative to the large model alone.

    What a model has to read of the tokens that the other one chose is not charged.

    Args:
        share: of the tokens, those that the large model chose (f).
        small, large: the models' parameters.
    """
    return (share * large + (1.0 - share) * small) / large
