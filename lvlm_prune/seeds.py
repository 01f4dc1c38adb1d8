"""Seeds that are a function of several numbers: of a user's seed and, say, a block and a sample.

What is drawn with them does not depend on what was drawn before, nor on the number of processes.
"""

_FACTOR = 1_000_003


def combined_seed(seed: int, *numbers: int, modulus: int = 2**63) -> int:
    """One seed out of a seed and numbers, whose order counts.

    Args:
        seed: The seed that a user gave.
        numbers: What is drawn for.
        modulus: One more than the largest seed.

    Example:
        >>> combined_seed(0, 1, 2), combined_seed(0, 2, 1)
        (1000005, 2000007)
    """
    for number in numbers:
        seed = (seed * _FACTOR + number) % modulus
    return seed


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """What torch's generator is seeded with before a step of training, so that a resumed run drops the same.

    Args:
        seed: The seed that a user gave.
        step: Number of the step.
        rank: Number of the process, below 4099.

    Example:
        >>> dropout_seed(0, 7, rank=1), dropout_seed(2**62, 7) < 2**63
        (28694, True)
    """
    return (combined_seed(seed, step) * 4099 + rank) % 2**63
