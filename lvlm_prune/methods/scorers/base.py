"""The interface of a scorer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvlm_prune.methods.contract import scored
from lvlm_prune.methods.masking import zeroed
from lvlm_prune.methods.patterns import IN_CACHES, Group, Pattern, ZeroCount
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver
from lvlm_prune.methods.statistics import Statistic


class Scorer(ABC):
    """How important each weight of a Linear is. Subclass it, write `score`, name the class in YAML.

    A scorer that also changes the remaining weights overrides `prune` and sets `updates_weights`; one that compares
    other groups of weights than the pattern does overrides `expected_zeros`, against which the written
    checkpoint is held.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> class SignedScorer(Scorer):
        ...     def score(self, weight, statistic):
        ...         return weight.float()
        >>> SignedScorer().prune(torch.tensor([[-1.0, 2.0]]), None, 0.5, Unstructured())
        (tensor([[0., 2.]]), tensor([[ True, False]]))
    """

    statistic: ClassVar[type[Statistic] | None] = None
    """The sums that `score` needs of a Linear's input; None where weights are enough."""
    updates_weights: ClassVar[bool] = False
    """True where `prune` changes weights that stay; else the writer checks that they are byte-identical."""
    by_row: ClassVar[bool] = False
    """True where the scores of a row depend on no other row of the weight: large weights are scored in parts then."""
    group: Group = "row"
    """What is compared with what under the unstructured pattern."""

    @abstractmethod
    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance of each weight, float32 of shape (C_out, C_in).

        Args:
            weight: The Linear's weight, shape (C_out, C_in), in the model's dtype.
            statistic: The sums over the pool of this Linear's input site; None when `statistic` is None.
        """

    def prune(
        self, weight: Tensor, statistic: Statistic | None, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """The new weight, same shape and dtype as the dense one, with +0.0 where the mask is True; and the mask."""
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        rows = max(self._scores_at_once(weight.numel(), weight.is_cuda) // weight.shape[1], 1)
        for start in range(0, len(weight), rows):
            here = slice(start, start + rows)
            mask[here] = pattern.mask(scored(self, weight[here], statistic), sparsity, self.group)
        return zeroed(weight, mask), mask

    def solver(self) -> Solver:
        """Not required: what prunes by this scorer where no `pruning.solver` is named; default: `MaskSolver`."""
        return MaskSolver(self)

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """Bytes that `prune` takes beside weight and mask, for the plan.

        Args:
            shape: (C_out, C_in).
            itemsize: Bytes of one weight in memory.
            on_gpu: Whether the weight is on a GPU.
        """
        weights = shape[0] * shape[1]
        return weights * itemsize + self._scores_at_once(weights, on_gpu) * 40

    def _scores_at_once(self, weights: int, on_gpu: bool) -> int:
        """Scores that are held at once: on a CPU as many as its caches hold, on a GPU enough to keep it busy."""
        if not self.by_row or self.group != "row":
            return weights
        return min(weights, 2**22 if on_gpu else IN_CACHES)

    def cost(self, rows: int, columns: int) -> float:
        """How long Linears of one statistic take, in any unit; work is dealt out over processes by it.

        Args:
            rows: Their output channels together.
            columns: Their input channels.
        """
        return float(rows * columns)

    def check(self, pattern: Pattern) -> None:  # noqa: B027
        """Refuse a pattern that this scorer cannot prune to, before any work.

        Raises:
            ValueError: Pattern and scorer contradict each other.
        """

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """What `prune` promises of the zeros in a weight of this shape; empty where only their total is known."""
        return [pattern.expected_zeros(shape, sparsity, self.group)]

    def notes(self, statistic: Statistic | None, mask: Tensor, sparsity: float) -> dict[str, Any]:
        """What the manifest is to say of a Linear that was just pruned, as plain data; most often nothing."""
        return {}

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """One line about the whole run out of the notes of its Linears (by full name); empty where all is well."""
        return ""


class MaskSolver(Solver):
    """Prunes by the scores of a scorer, and leaves what stays as it is. What prunes where no solver is named.

    Args:
        scorer: How important each weight is.

    Example:
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> from lvlm_prune.methods.scorers import MagnitudeScorer
        >>> problem = LinearProblem(torch.tensor([[-1.0, 2.0]]), None, 0.5, Unstructured())
        >>> MaskSolver(MagnitudeScorer()).solve(problem).weight
        tensor([[0., 2.]])
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.statistic, self.updates_weights, self.group = scorer.statistic, scorer.updates_weights, scorer.group

    def solve(self, problem: LinearProblem) -> Solution:
        """See `Solver.solve`."""
        weight, mask = self.scorer.prune(problem.weight, problem.statistic, problem.sparsity, problem.pattern)
        return Solution(weight, mask, self.scorer.notes(problem.statistic, mask, problem.sparsity))

    def score(self, problem: LinearProblem, rows: slice) -> Tensor:
        """The scorer's importance of each weight of some rows, float32 of shape (rows, C_in)."""
        in_part = self.scorer.by_row and self.scorer.group == "row"
        seen = problem.weight[rows] if in_part else problem.weight
        score = scored(self.scorer, seen, problem.statistic)
        return score if in_part else score[rows]

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """Bytes that the scorer takes beside weight, mask and statistic, for the plan."""
        return self.scorer.working_bytes(shape, itemsize, on_gpu)

    def cost(self, rows: int, columns: int) -> float:
        """How long the scorer takes for Linears of one statistic, in any unit; see `Solver.cost`."""
        return self.scorer.cost(rows, columns)

    def check(self, pattern: Pattern) -> None:
        """Refuse a pattern that the scorer cannot prune to."""
        self.scorer.check(pattern)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """How many weights the scorer takes of each part in which they are compared; see `Solver.expected_zeros`."""
        return self.scorer.expected_zeros(shape, sparsity, pattern)

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """What the scorer has to say at the end, by the notes of each Linear; empty for nothing."""
        return self.scorer.summary(notes)
