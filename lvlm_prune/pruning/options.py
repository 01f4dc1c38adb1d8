"""Pattern and sparsity as a user gives them, refused where they are out of range or contradict each other."""

import math
from collections.abc import Iterable

from lvlm_prune.errors import InputError
from lvlm_prune.methods.patterns import Pattern, parse_pattern

DEFAULT_SPARSITY = 0.5


def checked_pattern(pattern: str | int) -> Pattern:
    """The pattern that a text names.

    Raises:
        InputError: There is no such pattern.
    """
    if not isinstance(pattern, str):
        raise InputError("pruning.pattern", pattern, 'expected `unstructured` or N:M, for example "2:4"')
    try:
        return parse_pattern(pattern)
    except ValueError as error:
        raise InputError("pruning.pattern", pattern, str(error)) from None


def checked_sparsity(sparsity: float | None, pattern: Pattern, option: str, chooses_levels: bool = False) -> float:
    """The sparsity that is meant: that of an N:M pattern, what is given, or the default.

    Args:
        sparsity: What is given; None for nothing.
        pattern: Which weights may go together.
        option: Its option, for the error.
        chooses_levels: Whether Linears may get different levels of the pattern.

    Raises:
        InputError: It contradicts the pattern, or does not lie strictly between 0 and 1; names the option.
    """
    if not pattern.levels:
        sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
        if not 0 < sparsity < 1:
            raise InputError(option, sparsity, outside_of_shares(sparsity))
        return sparsity
    if len(pattern.levels) > 1 and not chooses_levels:
        problem = "several patterns need --pruning.allocation KLAllocation, which says which Linear gets which"
        raise InputError("pruning.pattern", pattern, problem)
    highest = pattern.levels[-1]
    if sparsity is None:
        sparsity = highest if len(pattern.levels) == 1 else min(DEFAULT_SPARSITY, highest)
    if math.isclose(sparsity, highest):
        return highest
    lower = 0 < sparsity < highest
    if lower and chooses_levels:
        return sparsity
    problem = f"contradicts pattern {pattern}, whose {'highest ' * (len(pattern.levels) > 1)}sparsity is {highest:g}"
    if lower:
        problem += "; --pruning.allocation KLAllocation reaches a lower mean, by leaving Linears dense"
    raise InputError(option, sparsity, problem)


def outside_of_shares(sparsity: float) -> str:
    """What is said of a sparsity that is no share of zeros.

    Args:
        sparsity: 0 or less, or 1 or more.

    Example:
        >>> print(outside_of_shares(50)), print(outside_of_shares(1.5))
        must lie strictly between 0 and 1; is 0.5 meant?
        must lie strictly between 0 and 1
        (None, None)
    """
    problem = "must lie strictly between 0 and 1"
    return f"{problem}; is {sparsity / 100:g} meant?" if 2 <= sparsity < 100 else problem


def refuse_modalities(visual: Iterable[str], option: str) -> None:
    """Refuse what no token is.

    Args:
        visual: Modalities that are to count as visual.
        option: Their option, for the error.

    Raises:
        InputError: One is none.
    """
    for modality in visual:
        if modality not in ("image", "video", "audio"):
            raise InputError(option, modality, "must be one of `image`, `video`, `audio`")
