"""Exact refit: the weights that stay become the best ones for their mask, by least squares on the Gram matrix.

row of W   ▓▓▓▓▓▓▓▓        of the row's quadratic in all weights, the minimum over those that stay:
mask       ░▓░▓▓░▓░        a system of its own for each row, all of them by conjugate gradients at once
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvlm_prune.methods.masking import zero_, zeroed
from lvlm_prune.methods.solvers.base import (
    ContinuingSolver,
    LinearProblem,
    Solution,
    Solver,
    at_least,
    dense,
    sparse_weight,
)
from lvlm_prune.methods.solvers.scaling import UnitDiagonal, checked_damping, singular_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lvlm_prune.methods.patterns import Pattern, ZeroCount


def conjugate_gradients(
    target: Tensor, gram: Tensor, mask: Tensor, start: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, float]:
    r"""Least squares over the weights that stay, all rows at once.

    .. math:: \min_{V} \operatorname{tr} V H V^\top - 2 \operatorname{tr} V T^\top \quad\text{with}\quad
              V_{ij} = 0 \;\text{where pruned}

    which for :math:`T = W H` is the least squared distance :math:`\lVert (V - W) X \rVert_F` to the dense output. The
    rows are systems of their own that share the product with H.

    Args:
        target: T, float of shape (C_out, C_in).
        gram: H, symmetric, of shape (C_in, C_in), with a diagonal of ones or nearly so: nothing else preconditions.
        mask: True where pruned, bool of shape (C_out, C_in).
        start: Where to start; what lies under the mask does not matter.
        iterations: At most so many products with H.
        tolerance: Residual of each row, relative to its target, that is small enough.

    Returns:
        The weights, zero where the mask is True, and the largest relative residual of a row.
    """
    found = zeroed(start, mask)
    scale = zeroed(target, mask).square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    residual = target - found @ gram
    energy = least_squares_(found, residual, gram, mask, iterations, scale * tolerance**2)
    return found, (energy / scale).max().sqrt().item()


def least_squares_(
    found: Tensor, residual: Tensor, gram: Tensor, mask: Tensor, iterations: int, enough: Tensor | float = 0.0
) -> Tensor:
    """The iteration of `conjugate_gradients`, in place.

    Args:
        found: Where to start, zero where the mask is True; overwritten with the weights.
        residual: The target less `found` times H, of the same shape; overwritten.
        gram: H, the products of input channels, float32 of shape (C_in, C_in).
        mask: True where pruned, bool of shape (C_out, C_in).
        iterations: At most so many products with H.
        enough: Squared norm of the residual of each row that is small enough, shape (C_out, 1).

    Returns:
        Squared norm of the residual of each row, shape (C_out, 1).
    """
    direction = zero_(residual, mask).clone()
    energy = residual.square().sum(dim=1, keepdim=True)
    moved = torch.empty_like(residual)
    for _ in range(iterations):
        if (energy <= enough).all():
            break
        zero_(torch.mm(direction, gram, out=moved), mask)
        curvature = (direction * moved).sum(dim=1, keepdim=True)
        # A row that is solved, or whose channels are all dead, has no direction left.
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(before > 0, energy / before, 0.0)).add_(residual)
    return energy


class RefitSolver(ContinuingSolver):
    r"""The mask of another solver, and for it the best values that there are.

    .. math:: \min_{W'} \lVert (W' - W) X \rVert_F^2 + \lambda \, \overline{\mathrm{diag}(H)} \,
              \lVert W' - W \rVert_F^2 \quad\text{with}\quad W'_{ij} = 0 \;\text{where pruned}

    over the pool's tokens X, solved by conjugate gradients to a given residual: for each row the solution of its
    normal equations :math:`H_{SS} w'_S = (w H)_S`. On the mask of Wanda or of ATV it is the best that a correction of
    errors can make of that mask; on SparseGPT's it undoes the order of columns that SparseGPT has to follow.

    Args:
        start: Whose mask, and whose values to start from. Default: that of `pruning.scorer`.
        damping: Lambda, share of the mean diagonal of H that is added to its diagonal.
        iterations: At most so many products with H.
        tolerance: Residual of each row, relative to its target, that is small enough; a Linear where it is not reached
            is named in the manifest (`residual`): its Gram matrix is nearly singular.
        keep_zeros: Weights that are zero already stay zero: what was pruned before is not brought back.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.scorers import MagnitudeScorer
        >>> from lvlm_prune.methods.statistics import Gram
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[1.0, 1.0], [1.0, 1.1]]), torch.ones(2))
        >>> problem = LinearProblem(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), gram, 0.5, Unstructured())
        >>> RefitSolver(MagnitudeScorer().solver(), damping=0.0).solve(problem).weight
        tensor([[0.0000, 2.9502],
                [0.0000, 6.8507]])
    """

    def __init__(
        self,
        start: Solver | None = None,
        damping: float = 0.01,
        iterations: int = 200,
        tolerance: float = 1e-5,
        keep_zeros: bool = False,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"`iterations` {iterations}: must be at least 1")
        if not 0 < tolerance < 1:
            raise ValueError(f"`tolerance` {tolerance}: must lie between 0 and 1")
        super().__init__(start)
        self.damping = checked_damping(damping)
        self.iterations, self.tolerance = iterations, tolerance
        self.keep_zeros = keep_zeros

    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before stay zero: as the option `keep_zeros` says."""
        return self.keep_zeros

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        begun = self.first.solve(problem)
        mask = begun.mask | problem.zeros if self.keep_zeros else begun.mask
        scaled = UnitDiagonal(problem.gram, self.damping)
        weight = scaled.weight(problem.weight)
        values, residual = conjugate_gradients(
            weight @ scaled.gram, scaled.gram, mask, scaled.weight(begun.weight), self.iterations, self.tolerance
        )
        notes: dict[str, Any] = {**begun.notes, **scaled.notes()}
        if residual > self.tolerance:
            notes["residual"] = residual
        return Solution(sparse_weight(scaled.unscaled(values), mask, problem.weight), mask, notes)

    def quick(self) -> Solver:
        """The same solver with a tenth of its iterations, one at least; see `Solver.quick`."""
        fewer = max(self.iterations // 10, 1)
        return RefitSolver(self.start, self.damping, fewer, self.tolerance, self.keep_zeros)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """Seven matrices of the weight's size in float32, and H; or what the first solver takes."""
        return max(self.first.working_bytes(shape, itemsize, on_gpu), 4 * (7 * shape[0] * shape[1] + shape[1] ** 2))

    def statistic_bytes(self, channels: int) -> int:
        """The products alone, in float64; or what the first solver keeps."""
        return max(self.first.statistic_bytes(channels), 8 * channels**2)

    def cost(self, rows: int, columns: int) -> float:
        """Products with H, beside what the first solver takes."""
        return self.first.cost(rows, columns) + 30.0 * rows * columns**2

    def check(self, pattern: Pattern) -> None:
        """See `Solver.check`: what the first solver refuses."""
        self.first.check(pattern)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """At least as many zeros as the first solver promises of each part: refitted values may vanish in the dtype."""
        return [at_least(count) for count in self.first.expected_zeros(shape, sparsity, pattern)]

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """How many Linears were not solved to the tolerance, and the worst of them."""
        missed = {name: note["residual"] for name, note in notes.items() if "residual" in note}
        lines = [self.first.summary(notes) or singular_line(notes)]
        if missed:
            worst = max(missed, key=lambda name: missed[name])
            lines.append(
                f"refit not exact at {len(missed)} Linears: residual up to {missed[worst]:.1e} ({worst}) "
                f"where {self.tolerance:g} was asked"
            )
        return "; ".join(line for line in lines if line)
