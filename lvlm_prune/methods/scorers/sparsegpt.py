"""SparseGPT, named as a scorer: see `lvlm_prune.methods.solvers.SparseGPTSolver`, which does the work."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lvlm_prune.methods.patterns import Pattern, ZeroCount
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.solvers.base import LinearProblem, Solver
from lvlm_prune.methods.solvers.scaling import checked_damping
from lvlm_prune.methods.solvers.sparsegpt import SparseGPTSolver, damping_notes, obs_score
from lvlm_prune.methods.statistics import Gram, Statistic


class SparseGPTScorer(Scorer):
    r"""Optimal brain surgeon, column by column (arXiv 2301.00774, Algorithm 1).

    .. math:: S_{ij} = W_{ij}^2 / U_{jj}^2, \qquad
              W_{i,j:} \leftarrow W_{i,j:} - \frac{W_{ij}}{U_{jj}} U_{j,j:} \;\text{where}\; W_{ij} \;\text{goes}

    with U the upper Cholesky factor of the inverse of :math:`H = \sum_t w_t^2 x_t x_t^T` plus damping. Unstructured,
    the scores of all rows are compared within one block of columns, and `<=` the threshold goes as in the released
    code: one weight more than `floor(n * sparsity)` per block. Columns that are zero in every token are zeroed.

    Args:
        block_size: Number of columns in a block. With N:M the largest multiple of M below is taken; there the result
            does not depend on it.
        damping: Share of the mean diagonal of H that is added to its diagonal. Where that leaves H singular, ten times
            as much is tried, and so on; the manifest says what was needed, and for which Linears.
        keep_zeros: Weights that are zero already stay zero: what was pruned before is not brought back.

    Raises:
        ValueError: `block_size` is not positive; `damping` is negative or not finite.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[1.0, 1.0], [1.0, 1.1]]), torch.ones(2))
        >>> weight, mask = SparseGPTScorer().prune(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), gram, 0.25, Unstructured())
        >>> weight, mask
        (tensor([[0.0000, 2.9413],
                [0.0000, 6.8238]]), tensor([[ True, False],
                [ True, False]]))
    """

    statistic = Gram
    updates_weights = True

    def __init__(self, block_size: int = 128, damping: float = 0.01, keep_zeros: bool = False) -> None:
        if block_size < 1:
            raise ValueError(f"`block_size` {block_size}: must be 1 or larger")
        self.block_size = block_size
        self.damping = checked_damping(damping)
        self.keep_zeros = keep_zeros
        self._solver = SparseGPTSolver(block_size, damping, keep_zeros)

    def solver(self) -> Solver:
        """`SparseGPTSolver` with the same options."""
        return self._solver

    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance before any weight is updated, float32 of shape (C_out, C_in)."""
        assert isinstance(statistic, Gram)
        factor = statistic.inverse_factor(self.damping)
        return obs_score(weight.float().masked_fill(factor.dead, 0.0), factor.upper)

    def prune(
        self, weight: Tensor, statistic: Statistic | None, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `Scorer.prune`; a Linear whose target is 0 stays as it is."""
        solution = self._solver.solve(LinearProblem(weight, statistic, sparsity, pattern))
        return solution.weight, solution.mask

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """See `Scorer.working_bytes`."""
        return self._solver.working_bytes(shape, itemsize, on_gpu)

    def cost(self, rows: int, columns: int) -> float:
        """See `Scorer.cost`."""
        return self._solver.cost(rows, columns)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """See `SparseGPTSolver.expected_zeros`."""
        return self._solver.expected_zeros(shape, sparsity, pattern)

    def notes(self, statistic: Statistic | None, mask: Tensor, sparsity: float) -> dict[str, Any]:
        """`damping` where it had to be raised, and the number of `dead_columns` where there are any."""
        assert isinstance(statistic, Gram)
        return damping_notes(statistic.inverse_factor(self.damping), self.damping) if sparsity > 0 else {}

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """How many Gram matrices were singular, and the largest damping that one needed."""
        return self._solver.summary(notes)
