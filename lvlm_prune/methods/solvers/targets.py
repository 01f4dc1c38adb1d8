"""Solvers that hand a Linear on to another solver as another problem: another target, or other weights of tokens."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lvlm_prune.methods.paired_statistics import ByModality, CrossGram
from lvlm_prune.methods.patterns import Pattern, ZeroCount
from lvlm_prune.methods.solvers.base import (
    ContinuingSolver,
    LinearProblem,
    Solution,
    Solver,
    at_least,
    dense,
    sparse_weight,
)
from lvlm_prune.methods.solvers.scaling import checked_damping
from lvlm_prune.methods.statistics import Gram, Statistic


class HandingOnSolver(ContinuingSolver):
    """A solver that lets another one do the work, on a problem that it changes.

    Args:
        start: That other one. Default: what prunes where no solver is named.
    """

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        changed = self.changed(problem)
        found = self.first.solve(changed)
        weight = sparse_weight(found.weight, found.mask, problem.weight)
        return Solution(weight, found.mask, {**found.notes, **self.own_notes(problem)})

    @abstractmethod
    def changed(self, problem: LinearProblem) -> LinearProblem:
        """The problem that the other solver gets."""

    def own_notes(self, problem: LinearProblem) -> dict[str, Any]:
        """Not required: what the manifest is to say besides the other one's notes."""
        return {}

    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before stay zero with the solver that is handed the Linear."""
        return self.first.keeps_zeros()

    def quick(self) -> Solver:
        """See `Solver.quick`: the other one's, on the problem as it is."""
        return self.first.quick()

    def cost(self, rows: int, columns: int) -> float:
        """How long the solver that is handed the Linears takes for them, in any unit."""
        return self.first.cost(rows, columns)

    def check(self, pattern: Pattern) -> None:
        """See `Solver.check`: what the other one refuses."""
        self.first.check(pattern)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """What the other one promises; values that vanish in the model's dtype add to it."""
        return [at_least(count) for count in self.first.expected_zeros(shape, sparsity, pattern)]

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """What the solver that is handed the Linears has to say at the end; empty for nothing."""
        return self.first.summary(notes)


class DenseTargetSolver(HandingOnSolver):
    r"""Another solver, asked for what the dense model puts out and not for what the dense weight makes of the pruned.

    .. math:: \min_{W'} \lVert W Y - W' X \rVert_F^2 \quad\text{is}\quad
              \min_{W'} \lVert (\tilde W - W') X \rVert_F^2 \quad\text{with}\quad
              \tilde W = W + W D (H + \lambda \, \overline{\mathrm{diag}(H)} \, I)^{-1}

    for the site's inputs Y in the dense model and X in the pruned one, H the products of X and D those of Y - X with X
    (`CrossGram`): so the Linear makes up for what the pruning of earlier ones did to its input, as far as it can. GPTAQ
    (arXiv 2504.02692) calls it asymmetric calibration. The samples go through the dense model beside the pruned one,
    and the sites of a block come one after the other (`--pruning.sequential`): at once each of them would make up for
    the same change, and together they would overshoot. Routed experts, whose tokens differ in the two models, get
    their own target.

    Args:
        start: The solver that gets this target. Default: that of `pruning.scorer`. The weights that it keeps become
            those of the new target, also where it updates none.
        share: How much of the way from the pruned model's target (0) to the dense one's (1) is gone.
        damping: Lambda, share of the mean diagonal of H: the larger it is, the less is made up for.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.scorers import MagnitudeScorer
        >>> sums = CrossGram(2)
        >>> inputs = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> sums.add(inputs, torch.ones(2), dense=2 * inputs)
        >>> problem = LinearProblem(torch.tensor([[1.0, 3.0]]), sums, 0.5, Unstructured())
        >>> DenseTargetSolver(MagnitudeScorer().solver(), damping=0.0).solve(problem).weight
        tensor([[0.0000, 6.0000]])
    """

    def __init__(self, start: Solver | None = None, share: float = 1.0, damping: float = 0.01) -> None:
        super().__init__(start)
        if not 0 <= share <= 1:
            raise ValueError(f"`share` {share}: must lie between 0 and 1")
        self.share, self.damping = share, checked_damping(damping)

    statistic = CrossGram
    wants_sequential = True

    def changed(self, problem: LinearProblem) -> LinearProblem:
        """The same Linear, whose weight is the one that is nearest to the dense model's outputs."""
        sums = problem.statistic
        assert isinstance(sums, CrossGram)
        weight = problem.weight.float()
        upper = sums.inverse_factor(self.damping).upper
        change = weight @ sums.drift.to(weight.dtype)
        target = weight.addmm(change @ upper.T, upper, alpha=self.share)
        return replace(problem, weight=target, dense_zeros=problem.zeros)

    def keeps_zeros(self) -> bool:
        """As the other one, unless it only leaves weights as they are: the target's are others."""
        return self.first.updates_weights and self.first.keeps_zeros()

    def own_notes(self, problem: LinearProblem) -> dict[str, Any]:
        """The larger damping, where the given one did not suffice."""
        sums = problem.statistic
        assert isinstance(sums, CrossGram)
        factor = sums.inverse_factor(self.damping)
        return {} if factor.damping == self.damping else {"target_damping": factor.damping}

    def check(self, pattern: Pattern) -> None:
        """See `Solver.check`: what the other one refuses, and another one whose sums are not in a Gram matrix."""
        if isinstance(self.first, VisualWeightSolver):
            problem = "weighs tokens itself; give DenseTargetSolver as the `start` of VisualWeightSolver"
            raise ValueError(f"`start` {type(self.first).__name__}: {problem}")
        super().check(pattern)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """What the other one takes on a weight in float32, beside the target; or what finding the target takes.

        That is a factor in float64, and then D in float32 with four matrices of the weight's size.
        """
        weights, square = shape[0] * shape[1], shape[1] ** 2
        finding = max(8 * square, 16 * weights + 4 * square)
        return max(self.first.working_bytes(shape, 4, on_gpu) + 4 * weights, finding)

    def statistic_bytes(self, channels: int) -> int:
        """Both sums in float64, and the factor in float32."""
        return CrossGram.nbytes(channels)

    def cost(self, rows: int, columns: int) -> float:
        """A factorisation and three products, beside what the other one takes."""
        return self.first.cost(rows, columns) + columns**2 * (columns + 3.0 * rows)


class VisualWeightSolver(HandingOnSolver):
    """Another solver, for which a visual token counts more or less than any other.

    What ATV-Pruning does by choosing tokens, done inside the solver's sums: those over visual tokens and those over the
    others are gathered apart (`ByModality`), which takes twice their memory, and put together here.

    Args:
        start: The solver that gets the sums. Default: that of `pruning.scorer`.
        visual_weight: What the square of a visual token counts, where that of another one counts 1; 0 leaves visual
            tokens out.

    Raises:
        ValueError: The weight is negative or not finite.
    """

    def __init__(self, start: Solver | None = None, visual_weight: float = 0.3) -> None:
        super().__init__(start)
        if not (math.isfinite(visual_weight) and visual_weight >= 0):
            raise ValueError(f"`visual_weight` {visual_weight}: must be a finite number, 0 or larger")
        self.visual_weight = visual_weight

    @property
    def statistic(self) -> type[Statistic] | None:  # type: ignore[override]
        """That of the other solver, for each modality."""
        kind = Gram if self.start is None else self.start.statistic
        return None if kind is None else ByModality.of(kind)

    @property
    def wants_sequential(self) -> bool:  # type: ignore[override]
        """Whether the solver that is handed the Linear wants the sites of a block one after the other."""
        return self.start is not None and self.start.wants_sequential

    @property
    def updates_weights(self) -> bool:  # type: ignore[override]
        """Whether the solver that is handed the Linear gives weights that stay new values."""
        return self.start is None or self.start.updates_weights

    def changed(self, problem: LinearProblem) -> LinearProblem:
        """The same Linear, with sums in which visual tokens count as asked for."""
        sums = problem.statistic
        assert isinstance(sums, ByModality)
        return replace(problem, statistic=sums.weighted(self.visual_weight))

    def quick(self) -> Solver:
        """The other one's, on sums that are put together as here."""
        return VisualWeightSolver(self.first.quick(), self.visual_weight)

    def check(self, pattern: Pattern) -> None:
        """See `Solver.check`: what the other one refuses, and another one that looks at no token."""
        if self.first.statistic is None:
            raise ValueError(f"`start` {type(self.first).__name__}: looks at no calibration token, visual or other")
        super().check(pattern)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """Bytes that the solver which is handed the Linear takes beside weight, mask and statistic."""
        return self.first.working_bytes(shape, itemsize, on_gpu)

    def statistic_bytes(self, channels: int) -> int:
        """The sums of both modalities, and what they are put together to."""
        kind = self.first.statistic
        return 0 if kind is None else 2 * kind.nbytes(channels) + self.first.statistic_bytes(channels)
