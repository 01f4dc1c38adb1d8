"""Pattern and sparsity as a user gives them, refused where they are out of range or contradict each other."""

import math

from lvlm_prune.errors import InputError
from lvlm_prune.methods.patterns import Pattern, SemiStructured, parse_pattern

DEFAULT_SPARSITY = 0.5


def checked_pattern(pattern: str | int) -> Pattern:
    """The pattern that a text names.

    Raises:
        InputError: There is no such pattern; an integer is what YAML makes of an unquoted one.
    """
    if not isinstance(pattern, str):
        minutes, seconds = divmod(int(pattern), 60)
        hint = f'YAML reads an unquoted {minutes}:{seconds} as this number; write pattern: "{minutes}:{seconds}"'
        raise InputError("pruning.pattern", pattern, hint)
    try:
        return parse_pattern(pattern)
    except ValueError as error:
        raise InputError("pruning.pattern", pattern, str(error)) from None


def checked_sparsity(sparsity: float | None, pattern: Pattern, option: str, leaves_dense: bool = False) -> float:
    """The sparsity that is meant: that of an N:M pattern, what is given, or the default.

    Args:
        sparsity: What is given; None for nothing.
        pattern: Which weights may go together.
        option: Its option, for the error.
        leaves_dense: Whether the mean may be lower than the sparsity of an N:M pattern.

    Raises:
        InputError: It contradicts the pattern, or does not lie strictly between 0 and 1; names the option.
    """
    if isinstance(pattern, SemiStructured):
        if sparsity is None or math.isclose(sparsity, pattern.sparsity):
            return pattern.sparsity
        lower = 0 < sparsity < pattern.sparsity
        if lower and leaves_dense:
            return sparsity
        problem = f"contradicts pattern {pattern}, whose sparsity is {pattern.sparsity:g}"
        if lower:
            problem += "; --pruning.allocation KLAllocation reaches a lower mean, by leaving Linears dense"
        raise InputError(option, sparsity, problem)
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not 0 < sparsity < 1:
        raise InputError(option, sparsity, "must lie strictly between 0 and 1")
    return sparsity
