"""SparseGPT: prune a weight and let the remaining ones make up for it (ICML 2023, arXiv 2301.00774).

columns    ░░░░░░░░│▓▓▓▓▓▓▓▓│············      ░ done   ▓ this column block   · later ones
                    mask of the block; then, column by column, the error of what goes
                    is spread over the columns to its right: at once inside the block,
                    in one product over all later blocks when the block is done
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.patterns import Pattern, SemiStructured, ZeroCount, kth_lowest
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver, dense, sparse_weight
from lvlm_prune.methods.solvers.scaling import checked_damping
from lvlm_prune.methods.statistics import InverseFactor

# Columns that get the error of a column at once; a product over the rest of the block follows.
_NEXT_COLUMNS = 32


class SparseGPTSolver(Solver):
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
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.statistics import Gram
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[1.0, 1.0], [1.0, 1.1]]), torch.ones(2))
        >>> problem = LinearProblem(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), gram, 0.25, Unstructured())
        >>> SparseGPTSolver().solve(problem).weight
        tensor([[0.0000, 2.9413],
                [0.0000, 6.8238]])
    """

    def __init__(self, block_size: int = 128, damping: float = 0.01, keep_zeros: bool = False) -> None:
        if block_size < 1:
            raise ValueError(f"`block_size` {block_size}: must be 1 or larger")
        self.block_size = block_size
        self.damping = checked_damping(damping)
        self.keep_zeros = keep_zeros

    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before stay zero: as the option `keep_zeros` says."""
        return self.keep_zeros

    def score(self, problem: LinearProblem, rows: slice) -> Tensor:
        """Importance before any weight is updated, float32 of shape (rows, C_in)."""
        factor = problem.gram.inverse_factor(self.damping)
        return obs_score(problem.weight[rows].float().masked_fill(factor.dead, 0.0), factor.upper)

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        weight, pattern = problem.weight, problem.pattern
        factor = problem.gram.inverse_factor(self.damping)
        updated = weight.float().masked_fill(factor.dead, 0.0)
        mask = torch.zeros_like(updated, dtype=torch.bool)
        zeros = problem.zeros if self.keep_zeros else None
        for columns in self._column_blocks(weight.shape[1], pattern):
            within = factor.upper[columns, columns]
            forced = None if zeros is None else zeros[:, columns]
            values, gone = _prune_columns(updated[:, columns], within, problem.sparsity, pattern, forced)
            error = values * gone / within.diagonal()
            updated[:, columns.stop :].addmm_(error, factor.upper[columns, columns.stop :], alpha=-1)
            updated[:, columns], mask[:, columns] = values, gone
        mask |= factor.dead
        return Solution(sparse_weight(updated, mask, weight), mask, damping_notes(factor, self.damping))

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """See `Solver.working_bytes`: the weight in float32 and in its own dtype, or the factor in float64."""
        rows, width = shape
        copies = 4 if itemsize == 4 else 4 + itemsize
        return max(rows * (width * copies + self.block_size * 40), 8 * width**2)

    def cost(self, rows: int, columns: int) -> float:
        """One factorisation for all of them, then an update per row and column."""
        return float(rows + columns) * columns**2

    def _column_blocks(self, width: int, pattern: Pattern) -> list[slice]:
        size = self.block_size
        if isinstance(pattern, SemiStructured):
            size = _multiple(size, pattern.group_size)
        return [slice(start, min(start + size, width)) for start in range(0, width, size)]

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """One more than `floor(n * sparsity)` per column block, or N:M; ties and dead columns add to it."""
        rows, width = shape
        if sparsity == 0:
            return []
        if isinstance(pattern, SemiStructured):
            return [ZeroCount(pattern.group_size, pattern.group_size - pattern.keep)]
        counts = []
        for columns in self._column_blocks(width, pattern):
            size = rows * (columns.stop - columns.start)
            counts.append(ZeroCount(size, int(size * sparsity) + 1, columns=columns))
        return counts

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """How many Gram matrices were singular, and the largest damping that one needed."""
        raised = {name: note["damping"] for name, note in notes.items() if "damping" in note}
        if not raised:
            return ""
        worst = max(raised, key=lambda name: raised[name])
        return (
            f"singular Gram matrix at {len(raised)} Linears: damping raised from {self.damping:g} to "
            f"{raised[worst]:g} at most ({worst})"
        )


def damping_notes(factor: InverseFactor, damping: float) -> dict[str, Any]:
    """For the manifest: `damping` where it had to be raised, and the number of `dead_columns` where there are any."""
    notes: dict[str, Any] = {} if factor.damping == damping else {"damping": factor.damping}
    return notes | ({"dead_columns": factor.dead_channels} if factor.dead_channels else {})


def _multiple(size: int, group_size: int) -> int:
    """The largest multiple of the group size up to `size`, but at least one group."""
    return max(size // group_size, 1) * group_size


def obs_score(weight: Tensor, upper: Tensor) -> Tensor:
    """What the loss grows by where a weight goes and those after it make up for it, float32 of the weight's shape."""
    return (weight / upper.diagonal()).square()


def _prune_columns(
    weight: Tensor, upper: Tensor, sparsity: float, pattern: Pattern, zeros: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values of one block of columns, each as it was when its turn came, and which of them go.

    Args:
        weight: The block, float32 of shape (C_out, block size), earlier blocks' errors already spread over it.
        upper: The block's part of U, float32 of shape (block size, block size).
        sparsity: Share of the block's weights that go.
        pattern: Over the whole block, or over every M consecutive columns once they are up to date.
        zeros: Which of them go in any case, and count among those that do; None for none.
    """
    # Transposed, a column is contiguous. Its error goes at once to the few columns that come next, and together with
    # theirs to the rest of the block: rank-1 updates of the whole block would be all memory traffic.
    columns = weight.T.contiguous()
    spread = upper / upper.diagonal()[:, None]
    if isinstance(pattern, SemiStructured):
        gone = torch.zeros_like(columns)
    else:
        score = _before_all(obs_score(weight, upper), zeros)
        gone = (score <= kth_lowest(score.reshape(1, -1), int(score.numel() * sparsity) + 1)).float().T.contiguous()
    few = _NEXT_COLUMNS
    if isinstance(pattern, SemiStructured):
        few = _multiple(few, pattern.group_size)
    for start in range(0, len(columns), few):
        end = min(start + few, len(columns))
        for index in range(start, end):
            if isinstance(pattern, SemiStructured) and index % pattern.group_size == 0:
                group = slice(index, index + pattern.group_size)
                forced = None if zeros is None else zeros[:, group]
                score = _before_all(obs_score(columns[group].T, upper[group, group]), forced)
                gone[group] = pattern.mask(score, sparsity).T
                if forced is not None:
                    gone[group] = gone[group].masked_fill(forced.T, 1.0)
            columns[index + 1 : end].addr_(spread[index, index + 1 : end], columns[index] * gone[index], alpha=-1)
        columns[end:] -= spread[start:end, end:].T @ (columns[start:end] * gone[start:end])
    return columns.T, gone.T.bool()


def _before_all(score: Tensor, zeros: Tensor | None) -> Tensor:
    """The scores, with the lowest one for what goes in any case."""
    return score if zeros is None else score.masked_fill(zeros, -1.0)
