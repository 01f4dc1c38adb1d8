"""What a plugin answers is what its kind promises: looked at in every run, and in small by `methods.testing`."""

from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.tokens import Selection, Tokens


class PluginFault(TypeError):
    """A plugin breaks the contract of its kind; the message names the class, what it answered, and what is expected.

    Example:
        >>> raise PluginFault("ColumnScorer.score: float32 of shape (4,), expected float32 of shape (2, 4)")
        Traceback (most recent call last):
        ...
        lvlm_prune.methods.contract.PluginFault: ColumnScorer.score: float32 of shape (4,), expected ...
    """


# A multiple of the M of every N:M pattern in use, and of the columns that solvers take at once.
_CHANNELS = 128

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that a run takes where float32 is promised."""


def name_of(plugin: Any) -> str:
    """Short name of a plugin's class, as its author wrote it."""
    return next(
        base.__name__ for base in type(plugin).__mro__ if not base.__name__.startswith(("LazyInst", "_LazyInit"))
    )


def said(value: Any) -> str:
    """A tensor by dtype and shape, everything else by its type.

    Example:
        >>> said(torch.zeros(2, 3)), said(None)
        ('float32 of shape (2, 3)', 'NoneType')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def checked(value: Any, expected: Tensor, where: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Tensor:
    """The same tensor, which has the shape of `expected` and one of the dtypes.

    Raises:
        PluginFault: It has not; `where` is named.
    """
    if not isinstance(value, Tensor) or value.shape != expected.shape or value.dtype not in dtypes:
        # Half precision is taken, but not what is asked for.
        asked = dtypes if len(dtypes) == 1 else [dtype for dtype in dtypes if dtype in (torch.bool, torch.float32)]
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in asked)
        raise PluginFault(f"{where}: {said(value)}, expected {names} of shape {tuple(expected.shape)}")
    return value


def checked_score(scorer: Any, score: Any, weight: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """The same scores, one for each weight.

    Raises:
        PluginFault: They have another shape, which would be broadcast and prune other weights than were meant.
    """
    return checked(score, weight, f"{name_of(scorer)}.score", dtypes)


def checked_solution(solver: Any, solution: Any, weight: Tensor) -> Any:
    """The same solution, with a weight and a mask of the shape of what was to be pruned.

    Raises:
        PluginFault: They have another shape, which would be broadcast, or the mask is not bool.
    """
    where = f"{name_of(solver)}.solve"
    checked(solution.mask, weight, f"{where}, mask", (torch.bool,))
    checked(solution.weight, weight, f"{where}, weight", FLOATS)
    return solution


def checked_selection(pool: Any, selection: Any, tokens: Tokens) -> Selection:
    """The same selection, one weight for each token.

    Raises:
        PluginFault: It is none, or weights or candidates have another shape or dtype.
    """
    where = f"{name_of(pool)}.select"
    if not isinstance(selection, Selection):
        raise PluginFault(f"{where}: {said(selection)}, expected a Selection")
    checked(selection.weights, tokens.visual, f"{where}, weights", (torch.bool, *FLOATS))
    if selection.candidates is not None and selection.candidates.dtype != torch.int64:
        raise PluginFault(f"{where}, candidates: {said(selection.candidates)}, expected int64 indices of tokens")
    return selection


def checked_sums(statistic: Any, channels: int) -> list[Tensor]:
    """The sums of a statistic: float64, and the first of them has an entry for each channel.

    Its length tells a process that saw no token of a site how wide the site is.

    Raises:
        PluginFault: They are of another dtype, or the first one is a scalar or of another length.
    """
    where, sums = f"{name_of(statistic)}.tensors", statistic.tensors()
    if not sums or not all(isinstance(part, Tensor) and part.dtype == torch.float64 for part in sums):
        raise PluginFault(f"{where}: {', '.join(map(said, sums)) or 'nothing'}, expected float64 sums")
    if sums[0].ndim == 0 or len(sums[0]) != channels:
        problem = f"the first sum must have an entry for each of the {channels} channels"
        raise PluginFault(f"{where}: {said(sums[0])}; {problem}")
    return sums


def try_scorer(scorer: Any) -> None:
    """Let a scorer score a small weight, to see before a run begins what would spoil it.

    Other errors than faults are left to the run: a plugin may be right to refuse so small a weight.

    Raises:
        PluginFault: Scores, or the sums of the statistic, have the wrong shape.
    """
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, _CHANNELS, generator=generator), torch.randn(16, _CHANNELS, generator=generator)
    try:
        statistic = None if scorer.statistic is None else scorer.statistic(_CHANNELS)
        if statistic is not None:
            checked_sums(statistic, _CHANNELS)
            statistic.add(inputs, torch.ones(len(inputs), dtype=torch.bool))
        checked_score(scorer, scorer.score(weight, statistic), weight)
    except PluginFault:
        raise
    except Exception:
        return
