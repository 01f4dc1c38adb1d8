"""Checks of scorers, statistics and patterns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.contract import PluginFault, checked, checked_score, checked_sums, name_of, said
from lvlm_prune.methods.patterns import Pattern, SemiStructured, Unstructured, ZeroCount
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.testing.samples import CHANNELS, make_weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PATTERNS: tuple[tuple[Pattern, float], ...] = (
    (Unstructured(), 0.5),
    (Unstructured(), 0.3),
    (SemiStructured(2, 4), 0.5),
    (SemiStructured(4, 8), 0.5),
)
_SHAPES = ((8, CHANNELS), (40, CHANNELS))


def check_scorer(make: Callable[[], Scorer]) -> None:
    """See `check_plugin`."""
    kind = make().statistic
    if kind is not None:
        check_statistic(kind)
    for dtype in _DTYPES:
        for shape in _SHAPES:
            _check_score(make, make_weight(*shape, dtype))
    _check_rows(make)
    for pattern, sparsity in _PATTERNS:
        scorer = make()
        try:
            scorer.check(pattern)
        except ValueError as error:
            _refusal(scorer, "check", error)
            continue
        for dtype in _DTYPES:
            for shape in _SHAPES:
                _check_prune(scorer, make_weight(*shape, dtype), pattern, sparsity)
    _check_plan(make())


def filled(kind: type[Statistic] | None) -> Statistic | None:
    """The statistic of two small samples; None where the scorer needs none."""
    if kind is None:
        return None
    statistic = kind(CHANNELS)
    for seed in (0, 1):
        statistic.add(_inputs(seed), torch.ones(30, dtype=torch.bool), **_also(kind, seed))
    return statistic


def _also(kind: type[Statistic], seed: int) -> dict[str, Tensor]:
    """What a statistic takes of 30 tokens besides inputs and weights."""
    also = {"dense": _inputs(seed) + 0.1 * _inputs(seed + 10)} if kind.takes_dense else {}
    return also | ({"visual": torch.arange(30) % 3 == seed} if kind.takes_visual else {})


def _inputs(seed: int, count: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_score(make: Callable[[], Scorer], weight: Tensor) -> None:
    scorer, statistic, before = make(), filled(make().statistic), weight.clone()
    sums = [] if statistic is None else [part.clone() for part in statistic.tensors()]
    score = checked_score(scorer, scorer.score(weight, statistic), weight, (torch.float32,))
    where = f"{name_of(scorer)}.score"
    if not torch.isfinite(score).all():
        raise PluginFault(f"{where}: NaN or infinity for a finite weight in {weight.dtype}")
    if not torch.equal(weight, before):
        raise PluginFault(f"{where}: changes the weight that it looks at")
    if statistic is not None and not all(map(torch.equal, sums, statistic.tensors())):
        raise PluginFault(f"{where}: changes the statistic, which other Linears of the site share")
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
    statistic, before, where = filled(scorer.statistic), weight.clone(), f"{name_of(scorer)}.prune"
    pruned, mask = scorer.prune(weight, statistic, sparsity, pattern)
    checked(mask, weight, f"{where}, mask", (torch.bool,))
    checked(pruned, weight, f"{where}, weight", (weight.dtype,))
    under = f"under {pattern} at {sparsity:g}"
    if not torch.equal(weight, before):
        raise PluginFault(f"{where}: changes the weight that it is given; return a new one")
    gone = pruned[mask]
    if gone.any() or gone.signbit().any():
        raise PluginFault(f"{where}: not +0.0 everywhere where the mask is True {under}")
    if not scorer.updates_weights and not torch.equal(pruned[~mask], weight[~mask]):
        raise PluginFault(f"{where}: changes weights that stay, but `updates_weights` is False")
    expected = scorer.expected_zeros((weight.shape[0], weight.shape[1]), sparsity, pattern)
    if isinstance(pattern, SemiStructured):
        expected = [*expected, ZeroCount(pattern.group_size, pattern.group_size - pattern.keep)]
    for count in expected:
        zeros = count.of(pruned)
        if (zeros < count.least).any() or (count.most is not None and (zeros > count.most).any()):
            found, most = f"{int(zeros.min())} to {int(zeros.max())}", "" if count.most is None else f" to {count.most}"
            problem = f"{found} zeros among {count.size} weights, {count.least}{most} are promised"
            raise PluginFault(f"{where}: {problem} {under}")
    _check_notes(scorer, statistic, mask, sparsity)


def _check_notes(scorer: Scorer, statistic: Statistic | None, mask: Tensor, sparsity: float) -> None:
    notes = scorer.notes(statistic, mask, sparsity)
    try:
        json.dumps(notes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginFault(f"{name_of(scorer)}.notes: {notes!r} is no plain data for the manifest ({error})") from None
    if not isinstance(scorer.summary({"layers.0.q_proj": notes} if notes else {}), str):
        raise PluginFault(f"{name_of(scorer)}.summary: expected text")


def _check_plan(scorer: Scorer) -> None:
    for name, value in (
        ("working_bytes", scorer.working_bytes((64, CHANNELS), 2)),
        ("cost", scorer.cost(64, CHANNELS)),
    ):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise PluginFault(f"{name_of(scorer)}.{name}: {value!r}, expected a number, 0 or larger")


def _refusal(plugin: Any, where: str, error: ValueError) -> None:
    """What is refused names an argument, as `mounted` reads it."""
    if not re.match(r"`[^`]+` .*: ", str(error)):
        problem = "a refusal begins with the argument in backticks, its value and a colon"
        raise PluginFault(f"{name_of(plugin)}.{where}: {str(error)!r}; {problem}") from None


# ---- statistics ------------------------------------------------------------------------------------------------------
def check_statistic(kind: type[Statistic]) -> None:
    """See `check_plugin`."""
    statistic = kind(CHANNELS)
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
    for dtype in _DTYPES:
        statistic.add(_inputs(0, dtype=dtype), torch.ones(30, dtype=torch.bool))
    statistic.add(_inputs(0, count=0), torch.ones(0))
    checked_sums(statistic, CHANNELS)
    _check_weights(kind)
    _check_sums(kind)
    _check_more(kind)
    _check_inputs_stay(kind)
    norms = statistic.squared_norms()
    if norms is not None:
        checked(norms, torch.empty(CHANNELS), f"{kind.__name__}.squared_norms", (torch.float64,))


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
    given: dict[str, Any] = {"inputs": _inputs(3), "weights": torch.ones(30, dtype=torch.bool), **_also(kind, 1)}
    before = {name: value.clone() for name, value in given.items()}
    kind(CHANNELS).add(**given | ({"counted": slice(None)} if kind.takes_counted else {}))
    for name, value in before.items():
        if not torch.equal(given[name], value):
            raise PluginFault(f"{kind.__name__}.add: changes `{name}`, which the model still needs")


# ---- patterns --------------------------------------------------------------------------------------------------------
def check_pattern(make: Callable[[], Pattern]) -> None:
    """See `check_plugin`."""
    pattern, score = make(), make_weight(8, CHANNELS).abs()
    where = f"{name_of(pattern)}.mask"
    for sparsity in pattern.levels or (0.5,):
        mask = checked(pattern.mask(score, sparsity), score, where, (torch.bool,))
        expected = pattern.expected_zeros((8, CHANNELS), sparsity)
        zeros = expected.of(score.masked_fill(mask, 0.0))
        if (zeros < expected.least).any() or (expected.most is not None and (zeros > expected.most).any()):
            raise PluginFault(f"{where}: prunes {zeros.tolist()} per group, promised are {expected.least}")
        if not torch.equal(mask, make().mask(score, sparsity)):
            raise PluginFault(f"{where}: another answer to the same question")
