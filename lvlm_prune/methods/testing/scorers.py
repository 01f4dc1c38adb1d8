"""Checks of scorers, statistics and patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.contract import (
    PluginFault,
    checked,
    checked_score,
    checked_sums,
    name_of,
    refuse_misdeclared,
    said,
    sums_of,
)
from lvlm_prune.methods.patterns import Pattern, SemiStructured, ZeroCount
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.statistics import ChannelNorm, Statistic
from lvlm_prune.methods.testing.promises import (
    check_notes,
    check_numbers,
    check_refusal,
    check_zeros,
    unchanged,
)
from lvlm_prune.methods.testing.samples import CHANNELS, DTYPES, PATTERNS, make_weight

_SHAPES = ((8, CHANNELS), (40, CHANNELS))


def check_scorer(make: Callable[[], Scorer]) -> None:
    """See `check_plugin`."""
    refuse_misdeclared(make(), Scorer)
    if (kind := make().statistic) is not None:
        check_statistic(kind)
    for dtype in DTYPES:
        for shape in _SHAPES:
            _check_score(make, make_weight(*shape, dtype))
    _check_rows(make)
    for pattern, sparsity in taken_patterns(make):
        for dtype in DTYPES:
            for shape in _SHAPES:
                _check_prune(make(), make_weight(*shape, dtype), pattern, sparsity)
    check_numbers(make(), {"working_bytes": make().working_bytes((64, CHANNELS), 2), "cost": make().cost(64, CHANNELS)})


def taken_patterns(make: Callable[[], Any]) -> Iterator[tuple[Pattern, float]]:
    """Patterns that a scorer or a solver does not refuse, each with a sparsity.

    Raises:
        PluginFault: There is none, or a refusal names no argument.
    """
    taken = 0
    for pattern, sparsity in PATTERNS:
        plugin = make()
        try:
            plugin.check(pattern)
        except ValueError as error:
            check_refusal(plugin, error)
            continue
        taken += 1
        yield pattern, sparsity
    if not taken:
        refused = ", ".join(dict.fromkeys(str(pattern) for pattern, _ in PATTERNS))
        raise PluginFault(f"{name_of(make())}.check: refuses all patterns ({refused}), so that nothing can be pruned")


def filled(kind: type[Statistic] | None) -> Statistic | None:
    """The statistic of two small samples; None where the scorer needs none."""
    if kind is None:
        return None
    statistic = kind(CHANNELS)
    for seed in (0, 1):
        statistic.add(_inputs(seed), torch.ones(30, dtype=torch.bool), **_also(kind, seed))
    return statistic


@contextmanager
def left_alone(where: str, weight: Tensor, statistic: Statistic | None) -> Iterator[None]:
    """Within, a plugin looks at a weight of the model, and at sums that other Linears of the site share."""
    with unchanged(where, weight=weight, statistic=sums_of(statistic)):
        yield


def _also(kind: type[Statistic], seed: int) -> dict[str, Tensor]:
    """What a statistic takes of 30 tokens besides inputs and weights."""
    also = {"dense": _inputs(seed) + 0.1 * _inputs(seed + 10)} if kind.takes_dense else {}
    return also | ({"visual": torch.arange(30) % 3 == seed} if kind.takes_visual else {})


def _inputs(seed: int, count: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_score(make: Callable[[], Scorer], weight: Tensor) -> None:
    scorer, statistic = make(), filled(make().statistic)
    where = f"{name_of(scorer)}.score"
    with left_alone(where, weight, statistic):
        score = checked_score(scorer, scorer.score(weight, statistic), weight, (torch.float32,))
    if not torch.isfinite(score).all():
        raise PluginFault(f"{where}: NaN or infinity for a finite weight in {weight.dtype}")
    if not torch.equal(score, scorer.score(weight, statistic)) or not torch.equal(
        score, make().score(weight, statistic)
    ):
        raise PluginFault(f"{where}: another answer to the same question")


def _check_rows(make: Callable[[], Scorer]) -> None:
    scorer = make()
    if not scorer.by_row:
        return
    weight, statistic = make_weight(12, CHANNELS), filled(scorer.statistic)
    score = scorer.score(weight, statistic)
    for rows in (slice(0, 6), slice(6, 12), slice(3, 4)):
        others = 3 * weight.flip(0)
        others[rows] = weight[rows]
        alone, among = scorer.score(weight[rows], statistic), scorer.score(others, statistic)[rows]
        if not all(torch.allclose(score[rows], changed, rtol=1e-4) for changed in (alone, among)):
            problem = (
                "the score of a row depends on other rows, but `by_row` is True: parts of a weight are scored alone"
            )
            raise PluginFault(f"{name_of(scorer)}.score: {problem}")


def _check_prune(scorer: Scorer, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
    statistic, where = filled(scorer.statistic), f"{name_of(scorer)}.prune"
    with left_alone(where, weight, statistic):
        pruned, mask = scorer.prune(weight, statistic, sparsity, pattern)
    check_pruned(scorer, where, weight, pruned, mask)
    expected = scorer.expected_zeros((weight.shape[0], weight.shape[1]), sparsity, pattern)
    if isinstance(pattern, SemiStructured):
        expected = [*expected, ZeroCount(pattern.group_size, pattern.group_size - pattern.keep)]
    check_zeros(where, pruned, expected, f"under {pattern} at {sparsity:g}")
    check_notes(scorer, f"{name_of(scorer)}.notes", scorer.notes(statistic, mask, sparsity))


def check_pruned(plugin: Any, where: str, weight: Tensor, pruned: Tensor, mask: Tensor) -> None:
    """A pruned weight and its mask fit the dense one.

    Raises:
        PluginFault: By shape, dtype, what stands under the mask, or what changed beside it.
    """
    checked(mask, weight, f"{where}, mask", (torch.bool,))
    checked(pruned, weight, f"{where}, weight", (weight.dtype,))
    if not torch.isfinite(pruned).all():
        raise PluginFault(f"{where}: NaN or infinity in the weight")
    gone = pruned[mask]
    if gone.any() or gone.signbit().any():
        raise PluginFault(f"{where}: not +0.0 everywhere where the mask is True")
    if not plugin.updates_weights and not torch.equal(pruned[~mask], weight[~mask]):
        raise PluginFault(f"{where}: changes weights that stay, but `updates_weights` is False")


# ---- statistics ------------------------------------------------------------------------------------------------------
def check_statistic(kind: type[Statistic]) -> None:
    """See `check_plugin`."""
    statistic = kind(CHANNELS)
    placed = {part.device.type for part in kind(CHANNELS, device="meta").tensors()}
    if placed != {"meta"}:
        raise PluginFault(f"{kind.__name__}.tensors: on {', '.join(placed)}, whatever `device` says")
    fresh = [part.clone() for part in checked_sums(statistic, CHANNELS)]
    if any(part.any() for part in fresh):
        raise PluginFault(
            f"{kind.__name__}.tensors: not zero before the first token; sums over processes would count it"
        )
    held = sum(part.nbytes for part in fresh)
    if kind.nbytes(CHANNELS) < held:
        raise PluginFault(
            f"{kind.__name__}.nbytes: {kind.nbytes(CHANNELS)} for the plan, but its sums hold {held} bytes"
        )
    if not kind.adding_bytes(30, CHANNELS, 2) >= 0:
        raise PluginFault(f"{kind.__name__}.adding_bytes: expected a number, 0 or larger")
    for dtype in DTYPES:
        statistic.add(_inputs(0, dtype=dtype), torch.ones(30, dtype=torch.bool))
    statistic.add(_inputs(0, count=0), torch.ones(0))
    checked_sums(statistic, CHANNELS)
    _check_weights(kind)
    _check_sums(kind)
    _check_more(kind)
    _check_inputs_stay(kind)
    _check_energy(kind)


def _sums(kind: type[Statistic], *samples: tuple[Any, ...]) -> list[Tensor]:
    statistic = kind(CHANNELS)
    for inputs, weights, *also in samples:
        statistic.add(inputs, weights, **(also[0] if also else {}))
    return [part.clone() for part in statistic.tensors()]


def _close(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(some, others)
    )


def _check_weights(kind: type[Statistic]) -> None:
    inputs, counts = _inputs(3), torch.arange(30) % 3 > 0
    chosen = _sums(kind, (inputs, counts))
    if not _close(chosen, _sums(kind, (inputs, counts.float()))):
        raise PluginFault(f"{kind.__name__}.add: weights of 1.0 and 0.0 count otherwise than True and False")
    if not _close(chosen, _sums(kind, (inputs[counts], torch.ones(int(counts.sum()))))):
        raise PluginFault(f"{kind.__name__}.add: tokens of weight 0 count")


def _check_sums(kind: type[Statistic]) -> None:
    """Two processes of a sample each end with the same sums as one process of both."""
    samples = [(_inputs(seed), torch.ones(30)) for seed in (0, 1)]
    both = _sums(kind, *samples)
    parts = [_sums(kind, sample) for sample in samples]
    if not _close(both, [a + b for a, b in zip(*parts)]):
        problem = "the sums of two processes do not add up to those of one; keep sums, and divide where they are read"
        raise PluginFault(f"{kind.__name__}: {problem}")
    if not all(map(torch.equal, both, _sums(kind, *samples))):
        raise PluginFault(f"{kind.__name__}.add: other sums of the same tokens")
    statistic = kind(CHANNELS)
    for part, total in zip(statistic.tensors(), both):
        part += total
    if not all(map(torch.equal, statistic.tensors(), both)):
        found = ", ".join(map(said, statistic.tensors()))
        raise PluginFault(
            f"{kind.__name__}.tensors: copies ({found}); return the sums themselves, they are summed in place"
        )


def _check_more(kind: type[Statistic]) -> None:
    """What is taken besides inputs and weights: nothing said is the same as nothing special, and weights hold too."""
    inputs, counts = _inputs(3), torch.arange(30) % 3 > 0
    plain = {"dense": inputs} if kind.takes_dense else {}
    plain |= {"visual": torch.zeros(30, dtype=torch.bool)} if kind.takes_visual else {}
    if plain and not _close(_sums(kind, (inputs, counts)), _sums(kind, (inputs, counts, plain))):
        problem = "leaving it out has to be the dense model's inputs as they are, and no visual token"
        raise PluginFault(f"{kind.__name__}.add, {' and '.join(plain)}: {problem}")
    also = _also(kind, 1)
    some = {name: value[counts] for name, value in also.items()}
    if also and not _close(_sums(kind, (inputs, counts, also)), _sums(kind, (inputs[counts], torch.ones(20), some))):
        raise PluginFault(f"{kind.__name__}.add, {' and '.join(also)}: tokens of weight 0 count")


def _check_inputs_stay(kind: type[Statistic]) -> None:
    """What is added is the model's own: blocks without a norm in front hand their Linears the samples themselves."""
    inputs, weights, also = _inputs(3), torch.ones(30, dtype=torch.bool), _also(kind, 1)
    counted: dict[str, Any] = {"counted": slice(None)} if kind.takes_counted else {}
    with unchanged(f"{kind.__name__}.add", inputs=inputs, weights=weights, **also):
        kind(CHANNELS).add(inputs, weights, **also, **counted)


def _check_energy(kind: type[Statistic]) -> None:
    """What the sums are said to tell of the tokens, from which the report's errors are computed."""
    inputs, counts, weight = _inputs(3), torch.arange(30) / 30, make_weight(8, CHANNELS)
    statistic, known = kind(CHANNELS), ChannelNorm(CHANNELS)
    statistic.add(inputs, counts, **_also(kind, 1))
    known.add(inputs, counts)
    norms, energy = statistic.squared_norms(), statistic.output_energy(weight)
    if norms is not None:
        checked(norms, known.value, f"{kind.__name__}.squared_norms", (torch.float64,))
        if not torch.allclose(norms, known.value, rtol=1e-3):
            problem = "expected the sum of the squared weighted inputs of each channel, or None"
            raise PluginFault(f"{kind.__name__}.squared_norms: {norms[0]:g} for {known.value[0]:g}; {problem}")
    outputs = (inputs * counts[:, None]) @ weight.T
    diagonal = weight.square().sum(dim=0).double() @ known.value
    if kind.energy not in ("exact", "diagonal"):
        raise PluginFault(f"{kind.__name__}.energy: {kind.energy!r}, expected exact or diagonal")
    expected = outputs.double().square().sum() if kind.energy == "exact" else diagonal
    if energy is not None and not torch.allclose(energy.double(), expected, rtol=1e-3):
        problem = f"{float(energy):g}, expected {float(expected):g} (`energy` is {kind.energy})"
        raise PluginFault(f"{kind.__name__}.output_energy: {problem}")


# ---- patterns --------------------------------------------------------------------------------------------------------
def check_pattern(make: Callable[[], Pattern]) -> None:
    """See `check_plugin`."""
    pattern, score = make(), make_weight(8, CHANNELS).abs()
    where = f"{name_of(pattern)}.mask"
    for sparsity in pattern.levels or (0.5,):
        with unchanged(where, score=score):
            mask = checked(pattern.mask(score, sparsity), score, where, (torch.bool,))
        expected = pattern.expected_zeros((8, CHANNELS), sparsity)
        check_zeros(where, score.masked_fill(mask, 0.0), [expected], f"at {sparsity:g}")
        if not torch.equal(mask, make().mask(score, sparsity)):
            raise PluginFault(f"{where}: another answer to the same question")
        at = pattern.at(sparsity)
        highest_gone = at.groups(score.masked_fill(~mask, 0.0)).amax(1)
        if (highest_gone > at.groups(score.masked_fill(mask, torch.inf)).amin(1)).any():
            raise PluginFault(f"{where}: a score goes that is higher than one that stays beside it; low scores go")
