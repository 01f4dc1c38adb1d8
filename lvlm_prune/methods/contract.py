"""What a plugin answers is what its kind promises: looked at in every run, and in small by `methods.testing`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from lvlm_prune.methods.patterns import Group
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.tokens import NEEDS, Selection, Tokens


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
        PluginFault: They have another shape, which would be broadcast and prune other weights than were meant, or some
            are NaN (looked for on a CPU; a GPU would be waited for).
    """
    where = f"{name_of(scorer)}.score"
    checked(score, weight, where, dtypes)
    # A sum tells in a tenth of the time that there is none; infinities may make it NaN as well.
    if score.device.type == "cpu" and score.sum().isnan() and (broken := int(score.isnan().count_nonzero())):
        raise PluginFault(f"{where}: NaN for {broken:,} of {score.numel():,} weights")
    return score


def scored(scorer: Any, weight: Tensor, statistic: Statistic | None) -> Tensor:
    """A scorer's scores, as they are promised; it only looked at what it was given.

    Raises:
        PluginFault: See `checked_score` and `only_looks`.
    """
    with only_looks(f"{name_of(scorer)}.score", weight=weight, statistic=sums_of(statistic)):
        return checked_score(scorer, scorer.score(weight, statistic), weight)


def sums_of(statistic: Statistic | None) -> list[Tensor]:
    """The tensors of a statistic; none where there is none."""
    return [] if statistic is None else statistic.tensors()


def checked_solution(solver: Any, solution: Any, weight: Tensor) -> Any:
    """The same solution, with a weight and a mask of the shape of what was to be pruned.

    Raises:
        PluginFault: They have another shape, which would be broadcast, or the mask is not bool.
    """
    where = f"{name_of(solver)}.solve"
    checked(solution.mask, weight, f"{where}, mask", (torch.bool,))
    checked(solution.weight, weight, f"{where}, weight", FLOATS)
    refuse_no_plain_data(f"{where}, notes", solution.notes)
    return solution


def refuse_no_plain_data(where: str, value: Any) -> None:
    """Refuse what cannot stand in the manifest.

    Raises:
        PluginFault: It is no plain data, or has NaN or infinity in it, which JSON does not know.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginFault(f"{where}: {value!r} is no plain data for the manifest ({error})") from None


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


def tensors_of(tokens: Tokens) -> dict[str, Any]:
    """Name of each field of a sample's tokens that is filled -> its tensors."""
    filled = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    single = {name: value for name, value in filled.items() if isinstance(value, Tensor)}
    return single | {"outputs": tokens.outputs.values()}


@contextmanager
def only_looks(where: str, **given: Tensor | Iterable[Tensor]) -> Iterator[None]:
    """Within, a plugin looks at tensors that others look at after it.

    Told by their version counters, which costs nothing: what is written past them (`weight.data`, NumPy) is found by
    `check_plugin` alone.

    Args:
        where: The method that gets them.
        given: Name -> tensor, or some.

    Raises:
        PluginFault: One was written to.
    """
    held = [
        (name, tensor, tensor._version)
        for name, value in given.items()
        for tensor in ([value] if isinstance(value, Tensor) else value)
        if not tensor.is_inference()  # these have no counter
    ]
    yield
    for name, tensor, version in held:
        if tensor._version != version:
            raise PluginFault(f"{where}: changes `{name}`, which others still need")


def checked_cutoffs(pool: Any, found: Any, samples: int, is_held: bool) -> list[int]:
    """How many candidates count, as the pool said: a whole number for each sample of this process.

    Args:
        pool: The pool.
        found: What it answered.
        samples: Number of samples.
        is_held: Whether any of them has candidates; else the pool need not answer.

    Raises:
        PluginFault: A number is missing, or none.
    """
    if (len(found) == samples or not (found or is_held)) and all(isinstance(k, int) and k >= 0 for k in found):
        return found
    raise PluginFault(f"{name_of(pool)}.cutoffs: {found} for {samples} samples, expected a whole number for each")


def checked_targets(
    allocation: Any, dealt: Any, shapes: Mapping[str, tuple[int, int]], sparsity: float, levels: Sequence[float] = ()
) -> dict[str, float]:
    """The same target sparsities, one for each Linear.

    Args:
        allocation: The allocation.
        dealt: What it answered.
        shapes: Full name of each Linear -> (C_out, C_in).
        sparsity: What their mean over all weights is to be.
        levels: Of the pattern; empty where a Linear can have any sparsity.

    Raises:
        PluginFault: One is missing, is no number between 0 and 1 or none of the levels, or the mean is another one.
    """
    where = f"{name_of(allocation)}.allocate"
    if list(dealt) != list(shapes):
        odd = next((name for name in [*shapes, *dealt] if (name in shapes) != (name in dealt)), "another order")
        raise PluginFault(f"{where}: {odd}, expected a sparsity for each Linear, in their order")
    for name, value in dealt.items():
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise PluginFault(f"{where}: {value!r} for {name}, expected a number between 0 and 1")
        if levels and value not in (0.0, *levels):
            raise PluginFault(f"{where}: {value!r} for {name}, expected 0 or one of {', '.join(map(str, levels))}")
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    mean = sum(dealt[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if mean < sparsity - 1e-6 or (not levels and mean > sparsity + 1e-6):
        problem = f"{sparsity:g} or more" if levels else f"the target {sparsity:g}"
        raise PluginFault(f"{where}: a mean of {mean:.6g} over all weights, expected {problem}")
    return dealt


def refuse_misdeclared(plugin: Any, kind: type) -> None:
    """Refuse a class that says something of itself which its base class does not take.

    Any text is true, and what is needed under a name that there is not is never there.

    Args:
        plugin: The object.
        kind: Its base class, whose attributes are looked at.

    Raises:
        PluginFault: An attribute is of another type, or has a value that there is not.
    """
    declared = {name: default for base in kind.__mro__ for name, default in vars(base).items() if name[0] != "_"}
    for name, default in declared.items():
        value, expected = getattr(plugin, name), type(default).__name__  # one that cannot be read ends the run here
        if name not in ("statistic", "group") and not isinstance(default, (bool, str, frozenset)):
            continue
        if name == "statistic":
            fits = value is None or (isinstance(value, type) and issubclass(value, Statistic))
            expected = "the class of a Statistic, or None"
        elif name == "group":
            fits, expected = value in get_args(Group), " or ".join(get_args(Group))
        elif isinstance(default, frozenset):
            fits = isinstance(value, (set, frozenset)) and value <= NEEDS
            expected = f"a set of some of {', '.join(sorted(NEEDS))}"
        else:
            fits = isinstance(value, type(default))
        if not fits:
            raise PluginFault(f"{name_of(plugin)}.{name}: {value!r}, expected {expected}")


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
        scored(scorer, weight, statistic)
    except PluginFault:
        raise
    except Exception:
        return
