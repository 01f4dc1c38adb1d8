"""ALPS: mask and values found together by operator splitting (NeurIPS 2024, arXiv 2406.07831).

free     best weights for the tokens, pulled towards the sparse ones     one solve with H + rho I
sparse   the largest of the free ones, over the whole Linear             one threshold
dual     what the two disagree about, summed up                          then rho grows, and they have to agree
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lvlm_prune.methods.masking import zero_
from lvlm_prune.methods.patterns import Pattern, ZeroCount
from lvlm_prune.methods.products import invert_positive_
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver, at_least, dense, sparse_weight
from lvlm_prune.methods.solvers.refit import least_squares_
from lvlm_prune.methods.solvers.scaling import UnitDiagonal, checked_damping, singular_line
from lvlm_prune.methods.solvers.sparsegpt import SparseGPTSolver

Schedule = Literal["fast", "paper"]

# More of them than this no schedule takes to its end.
_MOST_ITERATIONS = 10**5

# The published schedule: iterations with one rho, and the rho of the first of them.
_EVERY, _FIRST_RHO = 3, 0.1

# The fast schedule: iterations with one rho, the last rho, and by how much a step overshoots (over-relaxation).
_FAST_EVERY, _LAST_RHO, _RELAXATION = 2, 1.5, 1.5

# Weights that a step works on at once: what caches hold beside the rows of H that come by.
_AT_ONCE = 2**19

# Products with H that bring the values on the found mask near their optimum: at most and at least so many, and fewer
# where fewer iterations made the mask, as they leave more undone than the values do.
_MOST_REFIT, _LEAST_REFIT = 6, 2


class ALPSSolver(Solver):
    r"""Least squares under a sparsity constraint, by ADMM with growing penalty (ALPS, NeurIPS 2024, Algorithm 1).

    .. math::
        B &\leftarrow (H + \rho I)^{-1} (H W - V + \rho D) \\
        D &\leftarrow \text{the largest entries of } B + V / \rho \\
        V &\leftarrow V + \rho (B - D)

    on H with a diagonal of ones (see `UnitDiagonal`), and in the end conjugate gradients for the weights on the mask of
    D. Unstructured, the weights of the whole Linear are compared; with N:M those of every M columns. The loss is
    :math:`\lVert (W' - W) X \rVert_F^2` over the pool's tokens X.

    The schedule `paper` is the published one: D starts as W, rho at 0.1, and every three iterations rho grows by 1.3,
    1.2 or 1.1, where the mask changed at more than 10%, at more than 0.5%, or at any of its weights; it ends where
    nothing changed. `fast` lets rho grow from 0.1 to 1.5 in equal steps of two iterations, and takes over-relaxed
    steps (B is replaced by 1.5 B - 0.5 D). On four Linears of the embedded model and three made ones its loss is 11%
    larger than with the published schedule (geometric mean), 20% with 6 iterations, and 7% with 10.

    (H / rho + I)^-1 is made anew for each rho, about n^3 operations, half of a step for a square weight; a step is one
    product with it. So a Linear takes no more than H and an inverse beside its
    statistic, in float32, which is exact enough as rho is never below 0.1. On a Linear of 640 x 2048, 60% sparse, 8
    iterations took about 3 to 4 times SparseGPT's processor time (one thread of an AMD EPYC, AVX2, two runs); a
    square one takes more, as factorising counts for less there. The largest Linear of a 72B model,
    8192 x 29568, takes 7.0 GB for its statistic, 7.9 GB for H and inverse and 5.5 GB for weights; with its block and
    masks that is 22.9 GB by the plan; nothing of that size was run.

    Args:
        iterations: At most so many. Default: 8 with the fast schedule, 300 with the published one.
        schedule: `fast` or `paper`.
        damping: Share of the mean diagonal of H that is added to its diagonal.
        keep_zeros: Weights that are zero already stay zero: what was pruned before is not brought back.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.statistics import Gram
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[1.0, 1.0], [1.0, 1.1]]), torch.ones(2))
        >>> problem = LinearProblem(torch.tensor([[0.1, 2.0], [0.2, 4.0]]), gram, 0.5, Unstructured())
        >>> ALPSSolver().solve(problem).weight
        tensor([[0.0000, 2.0941],
                [0.0000, 4.1883]])
    """

    def __init__(
        self,
        iterations: int | None = None,
        schedule: Schedule = "fast",
        damping: float = 0.01,
        keep_zeros: bool = False,
    ) -> None:
        if iterations is not None and not 1 <= iterations <= _MOST_ITERATIONS:
            raise ValueError(f"`iterations` {iterations}: must lie between 1 and {_MOST_ITERATIONS}")
        if schedule not in ("fast", "paper"):
            raise ValueError(f"`schedule` {schedule}: must be `fast` or `paper`")
        self.iterations, self.schedule = iterations, schedule
        self.damping = checked_damping(damping)
        self.keep_zeros = keep_zeros

    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before stay zero: as the option `keep_zeros` says."""
        return self.keep_zeros

    @property
    def _most(self) -> int:
        if self.iterations is not None:
            return self.iterations
        return 8 if self.schedule == "fast" else 300

    @property
    def _refit(self) -> int:
        return min(max(self._most // 2, _LEAST_REFIT), _MOST_REFIT)

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        scaled = UnitDiagonal(problem.gram, self.damping)
        zeros = problem.zeros if self.keep_zeros else None
        splitting = _Splitting(scaled.weight(problem.weight), scaled.gram, problem, zeros)
        count = splitting.run_fast(self._most) if self.schedule == "fast" else splitting.run(self._most)
        values, mask = splitting.refit(self._refit), splitting.mask
        notes = scaled.notes() | ({"iterations": count} if self.schedule == "paper" else {})
        return Solution(sparse_weight(scaled.unscaled(values), mask, problem.weight), mask, notes)

    def quick(self) -> Solver:
        """SparseGPT: it shares one factorisation among the sparsities that are tried."""
        return SparseGPTSolver(damping=self.damping, keep_zeros=self.keep_zeros)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """H and an inverse in float32, five and a half matrices of the weight's size, two for some rows only."""
        weights, square = shape[0] * shape[1], shape[1] ** 2
        some = min(weights, shape[1] * _rows_at_once(shape[1]))
        return 4 * (5 * weights + weights // 2 + 2 * some + 2 * square + square // 4)

    def statistic_bytes(self, channels: int) -> int:
        """The products alone, in float64."""
        return 8 * channels**2

    def cost(self, rows: int, columns: int) -> float:
        """An inverse for each rho, a product with it per iteration, products with H of the refit."""
        most = min(self._most, 60)
        return columns**2 * (columns * most / _FAST_EVERY + rows * (most + self._refit))

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """`floor(n * sparsity)` of the whole Linear, or N:M; values that vanish in the model's dtype add to it."""
        return [at_least(count) for count in super().expected_zeros(shape, sparsity, pattern)]

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """How many Gram matrices are nearly singular."""
        return singular_line(notes)


class _Splitting:
    """State of the iteration.

    D is zero where the mask is True, V where it is False: one matrix Z holds D and V / rho. With K = (H / rho + I)^-1
    the best weights are B = W + (D - V / rho - W) K, and a step moves Z by alpha (B - D), where alpha is how far it
    overshoots (1: not at all). With Y = D - V / rho - W both come out of one product:

        Z <- (1 - alpha / 2) Z + Y (alpha K - alpha / 2 I) + alpha / 2 W

    Args:
        weight: W in scaled units, float32 of shape (C_out, C_in).
        gram: H, float32 of shape (C_in, C_in).
        problem: Pattern and sparsity.
        zeros: What is in every mask, bool of the weight's shape; None for nothing.
    """

    def __init__(self, weight: Tensor, gram: Tensor, problem: LinearProblem, zeros: Tensor | None) -> None:
        self._weight, self._gram, self._problem, self._zeros = weight, gram, problem, zeros
        count = _rows_at_once(weight.shape[1])
        self._rows = [slice(start, start + count) for start in range(0, len(weight), count)]
        self._pulled = torch.empty_like(weight[self._rows[0]])
        # With D = W and V = 0 the first B is W, whatever rho is: no solve is needed.
        self._both, self._sign = weight.clone(), torch.empty_like(weight)
        self._project()

    def _project(self) -> None:
        size = self._both.abs()
        if self._zeros is not None:
            size.masked_fill_(self._zeros, -1.0)
        self.mask = self._problem.pattern.mask(size, self._problem.sparsity, "layer")
        if self._zeros is not None:
            self.mask |= self._zeros
        self._sign.copy_(self.mask).mul_(-2.0).add_(1.0)

    def run(self, most: int) -> int:
        """Iterate with the published schedule; returns the number of iterations."""
        count, rho, old = 1, _FIRST_RHO, None
        kept = self.mask.numel() * (1 - self._problem.sparsity)
        while count < most:
            count += self._iterate(min(_EVERY - (count == 1), most - count), rho, 1.0)
            if old is not None:
                changed = int((self.mask ^ old).count_nonzero()) / 2
                if changed == 0:
                    break
                growth = 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
                rho *= growth
                self._scale_dual(growth)
            old = self.mask
        return count

    def run_fast(self, most: int) -> int:
        """Iterate with the fast schedule."""
        steps = max(-(-most // _FAST_EVERY), 2)
        growth = (_LAST_RHO / _FIRST_RHO) ** (1 / (steps - 1))
        count = 1
        for step in range(steps):
            count += self._iterate(min(_FAST_EVERY - (step == 0), most - count), _FIRST_RHO * growth**step, _RELAXATION)
            self._scale_dual(growth)
        return count

    def _scale_dual(self, growth: float) -> None:
        """V stays as rho grows; what is held is V / rho."""
        growth = torch.tensor(growth, dtype=self._both.dtype).item()  # so that 1 + (growth - 1) is growth
        for rows in self._rows:
            both = self._both[rows]
            both.div_(self._pulled[: len(both)].copy_(self.mask[rows]).mul_(growth - 1.0).add_(1.0))

    def _iterate(self, times: int, rho: float, relaxation: float) -> int:
        if times <= 0:
            return 0
        matrix = self._gram / rho
        matrix.diagonal().add_(1.0)
        invert_positive_(matrix).mul_(relaxation).diagonal().sub_(relaxation / 2)
        for _ in range(times):
            # Rows know nothing of each other until the mask is chosen.
            for rows in self._rows:
                both, weight = self._both[rows], self._weight[rows]
                pulled = torch.mul(both, self._sign[rows], out=self._pulled[: len(both)]).sub_(weight)
                both.addmm_(pulled, matrix, beta=1 - relaxation / 2).add_(weight, alpha=relaxation / 2)
            self._project()
        return times

    def refit(self, iterations: int) -> Tensor:
        """Best weights on the mask of D, nearly; overwrites what this holds."""
        for rows in self._rows:
            start = zero_(self._both[rows], self.mask[rows])
            residual = (self._weight[rows] - start) @ self._gram
            least_squares_(start, residual, self._gram, self.mask[rows], iterations)
        return self._both


def _rows_at_once(columns: int) -> int:
    return max(_AT_ONCE // columns, 64)
