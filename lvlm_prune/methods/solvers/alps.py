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

from lvlm_prune.methods.patterns import Pattern, ZeroCount
from lvlm_prune.methods.products import invert_lower_
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver, at_least, dense, sparse_weight
from lvlm_prune.methods.solvers.refit import conjugate_gradients
from lvlm_prune.methods.solvers.scaling import UnitDiagonal, checked_damping, singular_line

Schedule = Literal["fast", "paper"]

# The published schedule: iterations with one rho, and the rho of the first of them.
_EVERY, _FIRST_RHO = 3, 0.1

# The fast schedule: iterations with one rho, the last rho, and by how much a step overshoots (over-relaxation).
_FAST_EVERY, _LAST_RHO, _RELAXATION = 2, 1.5, 1.5

# Weights that a step works on at once.
_AT_ONCE = 2**24

# Products with H that bring the values on the found mask near their optimum.
_REFIT_ITERATIONS, _REFIT_TOLERANCE = 6, 1e-4


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
    steps (B is replaced by 1.5 B - 0.5 D): a third of the iterations; on two Linears of
    a pretrained decoder the loss was 3 and 7% larger than with the published schedule.

    H + rho I is factorised and inverted anew for each rho: about n^3 operations, as much as a step for a square weight,
    and several times less than one eigendecomposition. So a Linear takes no more than H and an inverse beside its
    statistic, in float32, which is exact enough as rho is never below 0.1. The largest Linear of a 72B model,
    8192 x 29568, takes 7.0 GB for its statistic, 7.9 GB for H and inverse and 5.0 GB for weights; with its block and
    the other statistics that is 23.2 GB by this formula; nothing of that size was run.

    Args:
        iterations: At most so many. Default: 16 with the fast schedule, 300 with the published one.
        schedule: `fast` or `paper`.
        damping: Share of the mean diagonal of H that is added to its diagonal.

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

    def __init__(self, iterations: int | None = None, schedule: Schedule = "fast", damping: float = 0.01) -> None:
        if iterations is not None and iterations < 1:
            raise ValueError(f"`iterations` {iterations}: must be at least 1")
        if schedule not in ("fast", "paper"):
            raise ValueError(f"`schedule` {schedule}: must be `fast` or `paper`")
        self.iterations, self.schedule = iterations, schedule
        self.damping = checked_damping(damping)

    @property
    def _most(self) -> int:
        if self.iterations is not None:
            return self.iterations
        return 16 if self.schedule == "fast" else 300

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        scaled = UnitDiagonal(problem.gram, self.damping)
        weight = scaled.weight(problem.weight)
        target = weight @ scaled.gram
        splitting = _Splitting(weight, target, scaled.gram, problem)
        count = splitting.run_fast(self._most) if self.schedule == "fast" else splitting.run(self._most)
        values, _ = conjugate_gradients(
            target, scaled.gram, splitting.mask, splitting.sparse, _REFIT_ITERATIONS, _REFIT_TOLERANCE
        )
        mask = splitting.mask
        notes = scaled.notes() | ({"iterations": count} if self.schedule == "paper" else {})
        return Solution(sparse_weight(scaled.unscaled(values), mask, problem.weight), mask, notes)

    def quick(self) -> Solver:
        """A third of the iterations."""
        return ALPSSolver(6, "fast", self.damping)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """H and an inverse in float32, and seven matrices of the weight's size, those of a step for some rows only."""
        weights, square = shape[0] * shape[1], shape[1] ** 2
        squares = 3 if 2 * shape[0] > shape[1] else 2
        return 4 * (5 * weights + 2 * min(weights, max(_AT_ONCE, 64 * shape[1])) + squares * square + square // 4)

    def statistic_bytes(self, channels: int) -> int:
        """The products alone, in float64."""
        return 8 * channels**2

    def cost(self, rows: int, columns: int) -> float:
        """An inverse for each rho, a product with it per iteration, products with H of the refit."""
        most = min(self._most, 60)
        return columns**2 * (columns * most / _FAST_EVERY + rows * (most + _REFIT_ITERATIONS))

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """`floor(n * sparsity)` of the whole Linear, or N:M; values that vanish in the model's dtype add to it."""
        return [at_least(count) for count in super().expected_zeros(shape, sparsity, pattern)]

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """How many Gram matrices are nearly singular."""
        return singular_line(notes)


class _Splitting:
    """State of the iteration.

    D is zero where the mask is True, V where it is False: one matrix holds D and V / rho.

    Args:
        weight: W in scaled units, float32 of shape (C_out, C_in); overwritten.
        target: W H.
        gram: H, float32 of shape (C_in, C_in).
        problem: Pattern and sparsity.
    """

    def __init__(self, weight: Tensor, target: Tensor, gram: Tensor, problem: LinearProblem) -> None:
        self._target, self._gram, self._problem = target, gram, problem
        count = max(_AT_ONCE // weight.shape[1], 64)
        self._rows = [slice(start, start + count) for start in range(0, len(weight), count)]
        # With D = W and V = 0 the first B is W, whatever rho is: no solve is needed.
        self._both = weight
        self._project()

    def _project(self) -> None:
        self.mask = self._problem.pattern.mask(self._both.abs(), self._problem.sparsity, "layer")
        self._kept = (~self.mask).float()

    @property
    def sparse(self) -> Tensor:
        """D."""
        return self._both.masked_fill(self.mask, 0.0)

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
        self._both.mul_(self._kept.mul(1 - 1 / growth).add_(1 / growth))

    def _iterate(self, times: int, rho: float, relaxation: float) -> int:
        root = self._gram.clone()
        root.diagonal().add_(rho)
        torch.linalg.cholesky_ex(root, out=(root, torch.empty((), dtype=torch.int32, device=root.device)))
        # Products are several times faster than triangular solves of narrow matrices.
        invert_lower_(root)
        inverse = root.T @ root if 2 * len(self._both) > len(root) else None
        for _ in range(times):
            # Rows know nothing of each other until the mask is chosen.
            for rows in self._rows:
                self._step(rows, root, inverse, rho, relaxation)
            self._project()
        return max(times, 0)

    def _step(self, rows: slice, root: Tensor, inverse: Tensor | None, rho: float, relaxation: float) -> None:
        both, kept = self._both[rows], self._kept[rows]
        right = torch.addcmul(self._target[rows], both, kept, value=2 * rho).sub_(both, alpha=rho)
        free = right @ inverse if inverse is not None else (right @ root.T) @ root
        # `both` holds D and V / rho beside each other: where D is kept it becomes D + relaxation * (B - D), elsewhere
        # V / rho + relaxation * B.
        both.add_(free.addcmul_(both, kept, value=-1), alpha=relaxation)
