"""KL allocation: each part of the model is pruned alone; how far its answers move says how much of the part may go.

for each group of Linears  prune it alone, to a few sparsities ─► KL(dense || changed) of the model's answers
for all of them together   the sparsities whose divergences add up to the least, at the mean that is wanted

log KL │        ╱ down_proj        a curve through a few points for each group; at one price per weight each group
       │    ╱  ╱                   stands where its own curve is as steep as all others'
       └───────── sparsity
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lvlm_prune.methods.allocation.base import Allocation, block_of
from lvlm_prune.methods.allocation.ecoflap import in_attention
from lvlm_prune.methods.allocation.uniform import UniformAllocation
from lvlm_prune.methods.patterns import Pattern, Unstructured
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers import LinearProblem, Solver
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.survey import Change, RemainingBlocks, SumOverProcesses, SurveyCost

Groups = Literal["linear", "kind", "block"]

# Where the levels lie around the target unless they are given.
_OFFSETS = (-0.15, 0.0, 0.1)

# Sparsities that a group may take between its lowest and its highest one.
_STEPS = 400

# Divergences smaller than float32 tells from none.
_SMALLEST = 1e-9


class KLAllocation(Allocation):
    r"""Sparsities whose divergences, measured one group at a time, add up to the least.

    .. math:: \min_s \sum_g \mathrm{KL}_g(s_g) \quad\text{with}\quad \sum_g n_g s_g = s \sum_g n_g, \quad
              |s_g - s| \le \text{width}

    :math:`\mathrm{KL}_g(s)` is the divergence :math:`\sum_v p(v) \log p(v) / q(v)` of the pruned model's answers q from
    the dense model's p, mean over the text positions of the survey's samples, where group g alone is pruned to s on
    statistics of the same samples, by the method's solver or a cheaper one (`Solver.quick`: for ALPS, SparseGPT). It is
    measured at a few levels, log KL runs straight between them, and the constraint is met by one price per weight at
    which each group takes what costs it least (Lagrange multiplier, found by bisection). The sum stands for the
    divergence of all changes together.

    For B blocks with g groups each and l levels it costs about g l B (B + 1) / 2 block forwards and g l B losses per
    sample, which is printed before it starts. A checkpoint that streams from disk is read about B / 2 times more.
    Under N:M a Linear is pruned to the pattern or not at all. With a target below the pattern's sparsity those go whose
    divergence for each weight is least, until the mean reaches the target; without, nothing is measured. Under several
    patterns (`3:4,2:4,1:4`) each group gets one of them or stays dense, by what the step from one to the next sparser
    costs for each weight; what is measured are their sparsities.

    Args:
        samples: How many of the calibration samples to take, drawn from them; all if there are fewer.
        levels: Sparsities that are tried. Default: 0.15 below the target, the target, 0.1 above it.
        groups: What is pruned alone, and gets one sparsity: each `linear`, each `kind` (the attention of a block, and
            its MLP: B / 2 times cheaper with large models), or each `block`.
        width: How far the sparsity of a group may be from the target.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> allocation = KLAllocation()
        >>> findings = {"levels": [0.4, 0.6], "kl": {"0.attn.q_proj": [0.1, 0.2], "0.mlp.up_proj": [0.4, 0.8]}}
        >>> allocation.use_survey(findings)
        >>> shapes = {"0.attn.q_proj": (10, 10), "0.mlp.up_proj": (10, 10)}
        >>> {name: round(value, 3) for name, value in allocation.allocate(shapes, 0.5).items()}
        {'0.attn.q_proj': 0.65, '0.mlp.up_proj': 0.35}
    """

    wants_survey = True
    wants_survey_losses = True
    wants_survey_statistics = True
    survey_depends_on_method = True
    chooses_levels = True

    def __init__(
        self, samples: int = 4, levels: list[float] | None = None, groups: Groups = "linear", width: float = 0.15
    ) -> None:
        if samples < 1:
            raise ValueError(f"`samples` {samples}: must be at least 1")
        if levels is not None and (len(set(levels)) < 2 or not all(0 < level < 1 for level in levels)):
            raise ValueError(f"`levels` {levels}: must be two or more different sparsities strictly between 0 and 1")
        if groups not in ("linear", "kind", "block"):
            raise ValueError(f"`groups` {groups}: must be linear, kind or block")
        if not 0 < width <= 1:
            raise ValueError(f"`width` {width}: must be larger than 0, and at most 1")
        self.samples = self.survey_samples = samples
        self.levels, self.groups, self.width = levels, groups, width
        self._solver: Solver = WandaScorer().solver()
        self._pattern: Pattern = Unstructured()
        self._tried: list[float] = []
        self._sums: dict[str, list[float]] = {}
        self._dense: dict[int, Tensor] = {}
        self._divergences: dict[str, list[float]] = {}
        self.use_method(self._solver, self._pattern, 0.5)

    def under(self, pattern: Pattern) -> Allocation:
        """See `Allocation.under`: uniform with N:M, where the target is the pattern's sparsity."""
        return UniformAllocation() if pattern.levels else self

    def use_method(self, solver: Solver, pattern: Pattern, sparsity: float) -> None:
        """See `Allocation.use_method`: the survey prunes as the method will, around its target."""
        self._solver, self._pattern = solver.quick(), pattern
        if pattern.levels:
            self._tried = list(pattern.levels)
            return
        around = [min(max(sparsity + offset, 0.05), 0.98) for offset in _OFFSETS]
        self._tried = sorted(set(self.levels or around))

    # ---- survey ------------------------------------------------------------------------------------------------------
    def survey_cost(self, linears: Mapping[str, list[str]], samples: int) -> SurveyCost:
        """Each group at each level, through its block and those after it."""
        changes = [len(self._tried) * len(self._groups_of(block, names)) for block, names in linears.items()]
        # The dense model's answers, and the statistics of each block, take one forward more per block; its logits are
        # made once for all changes of a block.
        forwards = 2 * len(changes) + sum(count * (len(changes) - at) for at, count in enumerate(changes))
        return SurveyCost(samples * forwards, samples * (sum(changes) + len(changes)))

    def survey_bytes(self, shapes: Mapping[str, tuple[int, int]], itemsize: int, on_gpu: bool = False) -> int:
        """See `Surveyor.survey_bytes`: the new weights of one group, and what the solver takes for one of them."""
        weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
        groups = self._groups_of("layers.0", list(shapes)).values()
        held = max((sum(weights[name] for name in names) for names in groups), default=0)
        working = (self._solver.working_bytes(shape, itemsize, on_gpu) for shape in shapes.values())
        return held * itemsize + max(working, default=0)

    def survey_block_changes(
        self,
        block: str,
        linears: Mapping[str, nn.Linear],
        statistics: Mapping[str, Statistic | None],
        remaining: RemainingBlocks,
    ) -> None:
        """Divergence of each sample with each group of the block pruned alone to each level."""
        if not self._dense:
            self._dense = remaining.answers()
        trial = _Trial(block, linears, statistics, self._solver, self._pattern)
        groups = self._groups_of(block, list(linears))
        changes: list[Change] = [
            partial(trial.pruned, tuple(names), level) for names in groups.values() for level in self._tried
        ]
        found = remaining.divergences(changes, self._dense)
        levels = len(self._tried)
        for at, group in enumerate(groups):
            of_group = [values[at * levels : (at + 1) * levels] for values in found.values()]
            self._sums[group] = [sum(values[level] for values in of_group) for level in range(levels)]

    def _groups_of(self, block: str, names: Sequence[str]) -> dict[str, list[str]]:
        """Name of each group of a block -> its Linears, relative to the block."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._group_of(f"{block}.{name}"), []).append(name)
        return groups

    def _group_of(self, name: str) -> str:
        if self.groups == "linear":
            return name
        block = block_of(name)
        return block if self.groups == "block" else f"{block}/{'attention' if in_attention(name) else 'MLP'}"

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """Mean over the samples of all processes."""
        groups = self._groups_of(block, list(linears))
        own = [self._sums.pop(group, [0.0] * len(self._tried)) for group in groups]
        sums = sum_over_processes(torch.tensor([[float(len(self._dense))] * len(self._tried), *own]).double())
        for group, values in zip(groups, sums[1:] / sums[0, 0]):
            self._divergences[group] = values.tolist()

    def survey_so_far(self) -> dict[str, Any]:
        """Levels, and the divergence of each group of the finished blocks."""
        return {"levels": self._tried, "kl": self._divergences}

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """Levels, and the divergence of each group at each of them."""
        self._dense = {}
        return self.survey_so_far()

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Take from what the survey found how far answers move with each Linear at each sparsity."""
        self._tried, self._divergences = list(findings["levels"]), dict(findings["kl"])

    # ---- allocation --------------------------------------------------------------------------------------------------
    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """See `Allocation.allocate`."""
        sizes: dict[str, int] = {}
        for name, (rows, columns) in shapes.items():
            group = self._group_of(name)
            sizes[group] = sizes.get(group, 0) + rows * columns
        if self._pattern.levels:
            divergences = [self._divergences[group] for group in sizes]
            chosen = dict(zip(sizes, cheapest_levels(self._tried, divergences, list(sizes.values()), sparsity)))
            return {name: chosen[self._group_of(name)] for name in shapes}
        curves = [LogCurve(self._tried, self._divergences[group]) for group in sizes]
        low, high = max(sparsity - self.width, 0.0), min(sparsity + self.width, 0.98)
        dealt = dict(zip(sizes, least_sum(curves, list(sizes.values()), sparsity, low, max(high, sparsity))))
        return {name: dealt[self._group_of(name)] for name in shapes}


class _Trial:
    """Prunes groups of a block's Linears, one after the other; holds the weights of the last one only."""

    def __init__(
        self,
        block: str,
        linears: Mapping[str, nn.Linear],
        statistics: Mapping[str, Statistic | None],
        solver: Solver,
        pattern: Pattern,
    ) -> None:
        self._block, self._linears, self._statistics = block, linears, statistics
        self._solver, self._pattern = solver, pattern
        self._held: tuple[Any, dict[str, Tensor]] = (None, {})

    @contextmanager
    def pruned(self, names: tuple[str, ...], level: float, sample: int) -> Iterator[None]:
        """These Linears pruned to this level; afterwards their very own weights again."""
        if self._held[0] != (names, level):
            self._held = (None, {})  # the weights of the last group make room
            self._held = ((names, level), {name: self._solved(name, level) for name in names})
        dense = {name: self._linears[name].weight.data for name in names}
        for name, weight in self._held[1].items():
            self._linears[name].weight.data = weight
        try:
            yield
        finally:
            for name, weight in dense.items():
                self._linears[name].weight.data = weight

    def _solved(self, name: str, level: float) -> Tensor:
        weight, statistic = self._linears[name].weight.detach(), self._statistics.get(name)
        norms = None if statistic is None else statistic.squared_norms()
        if self._solver.statistic is not None and (norms is None or not bool(norms.any())):
            return weight  # saw no token: it will stay dense
        problem = LinearProblem(weight, statistic, level, self._pattern.at(level), name=f"{self._block}.{name}")
        return self._solver.solve(problem).weight


class LogCurve:
    """A divergence by sparsity: its logarithm runs straight between the levels and beyond them.

    Args:
        levels: Ascending sparsities, two or more.
        divergences: The divergence at each.

    Example:
        >>> curve = LogCurve([0.4, 0.6], [0.01, 0.04])
        >>> [round(value, 3) for value in curve(torch.tensor([0.4, 0.5, 0.7])).tolist()]
        [0.01, 0.02, 0.08]
    """

    def __init__(self, levels: Sequence[float], divergences: Sequence[float]) -> None:
        self._levels = torch.tensor(levels, dtype=torch.float64)
        self._logs = torch.tensor([math.log(max(value, _SMALLEST)) for value in divergences], dtype=torch.float64)

    def __call__(self, sparsity: Tensor) -> Tensor:
        """The divergence at each sparsity, float64."""
        sparsity = sparsity.double()
        left = (torch.searchsorted(self._levels, sparsity, right=True) - 1).clamp(0, len(self._levels) - 2)
        start, end = self._levels[left], self._levels[left + 1]
        share = (sparsity - start) / (end - start)
        return torch.lerp(self._logs[left], self._logs[left + 1], share).exp()


def cheapest_levels(
    levels: Sequence[float], divergences: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float
) -> list[float]:
    """The level of each group, or 0, so that the mean reaches a sparsity and the divergences add up to little.

    Each group climbs the lower convex hull of its divergences, from 0 at dense; of all steps those go first that cost
    least for each weight that they prune. Then groups that go beyond what is needed go back a step, the dearest first.

    Args:
        levels: Sparsities that a Linear may get, ascending.
        divergences: Of each group, pruned alone to each level.
        sizes: Number of weights of each group.
        sparsity: Of all weights, at most the highest level.

    Example:
        >>> cheapest_levels([0.5], [[0.1], [0.9], [0.3]], [100, 100, 200], 0.25)
        [0.0, 0.0, 0.5]
        >>> cheapest_levels([0.5], [[0.1], [0.9], [0.3]], [100, 100, 200], 0.3)
        [0.5, 0.0, 0.5]
        >>> cheapest_levels([0.5, 0.75], [[0.1, 0.2], [0.2, 0.9]], [100, 100], 0.6)
        [0.75, 0.5]
    """
    hulls = [_lower_hull([0.0, *levels], [0.0, *values]) for values in divergences]
    steps = [
        _Step(at, place, value - last, size * (level - before))
        for at, (hull, size) in enumerate(zip(hulls, sizes))
        for place, ((before, last), (level, value)) in enumerate(pairwise(hull), start=1)
    ]
    places, pruned, wanted = [0] * len(hulls), 0.0, sparsity * sum(sizes) * (1 - 1e-9)
    for step in sorted(steps, key=lambda step: step.cost / step.weights):
        if pruned >= wanted:
            break
        places[step.group], pruned = step.place, pruned + step.weights
    for step in sorted(steps, key=lambda step: -step.cost):
        if places[step.group] == step.place and pruned - step.weights >= wanted:
            places[step.group], pruned = step.place - 1, pruned - step.weights
    return [hull[place][0] for hull, place in zip(hulls, places)]


class _Step(NamedTuple):
    """From one level of a group to the next: its place on the hull, what it costs, and how many weights it prunes."""

    group: int
    place: int
    cost: float
    weights: float


def _lower_hull(levels: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """The points of a curve that no line between two others runs below."""
    hull: list[tuple[float, float]] = []
    for level, value in zip(levels, values):
        while len(hull) > 1:
            (first, low), (second, middle) = hull[-2:]
            if (middle - low) * (level - first) < (value - low) * (second - first):
                break
            hull.pop()
        hull.append((level, value))
    return hull


def least_sum(
    curves: Sequence[LogCurve], sizes: Sequence[int], sparsity: float, low: float, high: float
) -> list[float]:
    """Sparsity of each group, between `low` and `high`, whose divergences add up to the least at a given mean.

    Args:
        curves: Divergence of each group by its sparsity.
        sizes: Number of weights of each group.
        sparsity: Mean over all weights.
        low: The least that a group may get, at most `sparsity`.
        high: The most that a group may get, at least `sparsity`.

    Returns:
        Their mean is `sparsity` within 1e-9.

    Example:
        >>> steep, flat = LogCurve([0.4, 0.6], [0.1, 0.4]), LogCurve([0.4, 0.6], [0.1, 0.11])
        >>> [round(value, 2) for value in least_sum([steep, flat], [100, 100], 0.5, low=0.3, high=0.7)]
        [0.3, 0.7]
    """
    grid = torch.linspace(low, high, _STEPS + 1, dtype=torch.float64)
    values = torch.stack([curve(grid) for curve in curves])
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)

    def chosen(price: float) -> Tensor:
        return grid[(values - price * shares[:, None] * grid).argmin(dim=1)]

    cheap, dear = 0.0, 1e-6
    while (chosen(dear) * shares).sum() < sparsity and dear < 1e30:
        cheap, dear = dear, 2 * dear
    for _ in range(60):
        middle = (cheap + dear) / 2
        cheap, dear = (cheap, middle) if (chosen(middle) * shares).sum() > sparsity else (middle, dear)
    found = chosen(cheap)
    # What steps of the grid and straight pieces leave over goes evenly to those that have room.
    for _ in range(len(curves) + 1):
        missing = sparsity - (found * shares).sum()
        room = (found < high) if missing > 0 else (found > low)
        if missing.abs() < 1e-10 or not room.any():
            break
        found = torch.where(room, found + missing / shares[room].sum(), found).clamp(low, high)
    return found.tolist()
