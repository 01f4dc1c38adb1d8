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


def checked_sparsity(sparsity: float | None, pattern: Pattern, option: str) -> float:
    """The sparsity that is meant: that of an N:M pattern, what is given, or the default.

    Raises:
        InputError: It contradicts the pattern, or does not lie strictly between 0 and 1; names the option.
    """
    if isinstance(pattern, SemiStructured):
        if sparsity is not None and not math.isclose(sparsity, pattern.sparsity):
            problem = f"contradicts pattern {pattern}, whose sparsity is {pattern.sparsity:g}"
            raise InputError(option, sparsity, problem)
        return pattern.sparsity
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not 0 < sparsity < 1:
        raise InputError(option, sparsity, "must lie strictly between 0 and 1")
    return sparsity
