"""SparseSwaps: a mask made better by exchanging weights, one pair of each row at a time (arXiv 2512.10922).

row    ▓▓░▓░▓      of all pairs (one that stays, one that went) the exchange that takes most off the row's error
         ⇄         ‖(w - w') X‖², as the Gram matrix of the tokens has it; again, until none takes anything off
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.masking import zeroed
from lvlm_prune.methods.patterns import IN_CACHES, Pattern, SemiStructured, ZeroCount, lowest
from lvlm_prune.methods.solvers.base import ContinuingSolver, LinearProblem, Solution, Solver, dense
from lvlm_prune.methods.solvers.scaling import UnitDiagonal

# An exchange that takes less than this share off the row's error is rounding of float32.
_WORTH_IT = 1e-6


class SparseSwapsSolver(ContinuingSolver):
    r"""The mask of another solver, made better by exchanging weights that stay for ones that went; no value changes.

    .. math:: L = r H r^\top, \quad r = w \odot m, \qquad
              \Delta L_{u,p} = 2 w_u (r H)_u + w_u^2 H_{uu} - 2 w_p (r H)_p + w_p^2 H_{pp} - 2 w_u w_p H_{up}

    where m is 1 at what is pruned, u stays and is to go, and p went and is to come back (arXiv 2512.10922). In each
    round every row makes the exchange with the lowest change of its loss, so that each round's loss is at most the
    one before; a row ends where no exchange lowers it. With N:M only weights of one group are exchanged.

    Rows, and groups of N:M, keep their number of zeros: the start has to compare within rows, as Wanda does, or it is
    taken as it is and every row keeps the number that it has.

    Args:
        start: Whose mask to begin with. Default: that of `pruning.scorer`.
        rounds: At most so many exchanges in each row.
        candidates: How many weights a round looks at in each row on either side, those that by themselves would cost
            least and bring most; their pairs are all looked at. As many as there are in a row: the paper's. With N:M
            all pairs of a group are looked at.

    Raises:
        ValueError: A number is out of range, or the start updates weights.

    Example:
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.scorers import MagnitudeScorer
        >>> from lvlm_prune.methods.statistics import Gram
        >>> gram = Gram(3)
        >>> gram.add(torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1]]), torch.ones(2))
        >>> problem = LinearProblem(torch.tensor([[1.0, 2.0, 3.0]]), gram, 0.5, Unstructured())
        >>> start = MagnitudeScorer().solver()
        >>> start.solve(problem).weight, SparseSwapsSolver(start).solve(problem).weight
        (tensor([[0., 2., 3.]]), tensor([[1., 2., 0.]]))
    """

    updates_weights = False

    def __init__(self, start: Solver | None = None, rounds: int = 25, candidates: int = 32) -> None:
        if rounds < 1:
            raise ValueError(f"`rounds` {rounds}: must be at least 1")
        if candidates < 1:
            raise ValueError(f"`candidates` {candidates}: must be at least 1")
        if start is not None and start.updates_weights:
            raise ValueError(f"`start` {type(start).__name__}: must leave the weights as they are")
        super().__init__(start)
        self.rounds, self.candidates = rounds, candidates

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        if problem.sparsity == 0:
            return dense(problem)
        begun = self.first.solve(problem)
        scaled = UnitDiagonal(problem.gram, damping=0.0)
        mask, made = begun.mask.clone(), 0
        # A pair has an entry for each two candidates, or for each two weights of a group.
        width = problem.weight.shape[1]
        group = problem.pattern.group_size if isinstance(problem.pattern, SemiStructured) else 0
        entries = width * group if group else min(self.candidates, width) ** 2
        rows = max(IN_CACHES // max(entries, width), 1)
        for start in range(0, len(mask), rows):
            here = slice(start, start + rows)
            weight = scaled.weight(problem.weight[here])
            made += _exchange_(mask[here], weight, scaled.gram, self.rounds, self.candidates, group)
        # Nothing is solved with the Gram matrix: whether it is singular is not looked at.
        dead = int(scaled.dead.sum())
        notes = {**begun.notes, **({"dead_columns": dead} if dead else {}), "exchanges": made}
        return Solution(zeroed(problem.weight, mask), mask, notes)

    def quick(self) -> Solver:
        """The start by itself: exchanges change little in which Linear can spare most."""
        return self.first.quick()

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """H in float32 and the new weight, beside a few rows; or what the first solver takes."""
        ours = 4 * shape[1] ** 2 + shape[0] * shape[1] * (itemsize + 1) + 64 * max(IN_CACHES, self.candidates**2)
        return max(self.first.working_bytes(shape, itemsize, on_gpu), ours)

    def statistic_bytes(self, channels: int) -> int:
        """The products alone, in float64."""
        return 8 * channels**2

    def cost(self, rows: int, columns: int) -> float:
        """A row of H for either weight of each exchange, and the pairs, beside what the first solver takes."""
        return self.first.cost(rows, columns) + float(rows) * self.rounds * (4 * columns + self.candidates**2)

    def check(self, pattern: Pattern) -> None:
        """See `Solver.check`: what the first solver refuses.

        Raises:
            ValueError: The first solver updates weights.
        """
        if self.first.updates_weights:
            name = type(self.first).__name__.removesuffix("Solver")
            raise ValueError(f"`solver` SparseSwapsSolver: cannot begin with {name}, which updates weights")
        self.first.check(pattern)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """What the first solver promises: exchanges stay within rows, and within groups of N:M."""
        return self.first.expected_zeros(shape, sparsity, pattern)

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """What the solver whose mask is improved has to say at the end; empty for nothing."""
        return self.first.summary(notes)


def _exchange_(mask: Tensor, weight: Tensor, gram: Tensor, rounds: int, candidates: int, group: int) -> int:
    """Exchange weights of these rows, in place.

    Args:
        mask: True where pruned, bool of shape (rows, C_in); overwritten.
        weight: float32 of the same shape.
        gram: H, float32 of shape (C_in, C_in).
        rounds: At most so many exchanges in each row.
        candidates: How many weights are looked at on either side.
        group: M of N:M; 0 where a row is one group.

    Returns:
        How many exchanges were made.
    """
    gone = zeroed(weight, ~mask)
    answers, alone = gone @ gram, weight.square() * gram.diagonal()
    loss = (gone * answers).sum(dim=1)
    find = _best_in_groups if group else _best_of_candidates
    rows, made = torch.arange(len(mask), device=mask.device), 0
    for _ in range(rounds):
        go = (2 * weight * answers + alone).masked_fill(mask, torch.inf)
        come = (alone - 2 * weight * answers).masked_fill(~mask, torch.inf)
        change, leaving, coming = find(go, come, weight, gram, group or candidates)
        worth = change < -_WORTH_IT * loss
        if not worth.any():
            break
        made += int(worth.sum())
        at, leaving, coming = rows[worth], leaving[worth], coming[worth]
        mask[at, leaving], mask[at, coming] = True, False
        moved = weight[at, leaving, None] * gram[leaving] - weight[at, coming, None] * gram[coming]
        answers[at] += moved
        loss = loss + torch.where(worth, change, 0.0)
    return made


def _best_of_candidates(
    go: Tensor, come: Tensor, weight: Tensor, gram: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best exchange of each row among the pairs of its candidates.

    Args:
        go: Change of the loss where a weight goes, float32 of shape (rows, C_in); infinite where it has gone.
        come: The same where it comes back; infinite where it stays.
        weight: float32 of the same shape.
        gram: H, float32 of shape (C_in, C_in).
        candidates: Number of them on either side.

    Returns:
        Change of the loss, which goes, which comes back: of shape (rows,).
    """
    count = min(candidates, go.shape[1])
    leaving, coming = _places_of_lowest(go, count), _places_of_lowest(come, count)
    alone_go, alone_come = go.gather(1, leaving), come.gather(1, coming)
    both = weight.gather(1, leaving)[:, :, None] * weight.gather(1, coming)[:, None, :]
    pairs = alone_go[:, :, None] + alone_come[:, None, :] - 2 * both * gram[leaving[:, :, None], coming[:, None, :]]
    change, best = pairs.flatten(1).min(dim=1)
    return (
        change,
        leaving.gather(1, (best // count)[:, None])[:, 0],
        coming.gather(1, (best % count)[:, None])[:, 0],
    )


def _places_of_lowest(values: Tensor, count: int) -> Tensor:
    """Columns of the `count` lowest values of each row, ascending; ties by lowest index, unlike those of `topk`."""
    columns = torch.arange(values.shape[1], device=values.device)
    places = torch.where(lowest(values, count), columns, len(columns))
    return places.topk(count, dim=1, largest=False, sorted=True).values


def _best_in_groups(go: Tensor, come: Tensor, weight: Tensor, gram: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best exchange of each row within one of its groups; arguments and result as `_best_of_candidates`."""
    shape = (len(go), -1, size)
    starts = torch.arange(0, go.shape[1], size, device=go.device)
    columns = starts[:, None] + torch.arange(size, device=go.device)
    within = gram[columns[:, :, None], columns[:, None, :]]
    grouped = weight.view(shape)
    both = grouped[:, :, :, None] * grouped[:, :, None, :]
    pairs = go.view(shape)[:, :, :, None] + come.view(shape)[:, :, None, :] - 2 * both * within
    change, best = pairs.flatten(1).min(dim=1)
    first = best // size**2 * size
    return change, first + best % size**2 // size, first + best % size
