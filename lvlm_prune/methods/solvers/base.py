"""The interface of a solver: it finds the mask of a Linear and the values of the weights that stay.

scorer    how important is a weight?                    one number for each weight
solver    which weights stay, and with which values?    mask and new weight, from statistics of the Linear's input
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.masking import zero_
from lvlm_prune.methods.patterns import Group, Pattern, ZeroCount
from lvlm_prune.methods.statistics import Gram, Statistic


@dataclass(frozen=True)
class LinearProblem:
    """One Linear that is to be pruned, and all that is known about it.

    Args:
        weight: The dense weight, shape (C_out, C_in), in the model's dtype; not to be changed.
        statistic: Sums over the pool of the Linear's input; None for a method that needs none.
        sparsity: Target share of zeros, in [0, 1).
        pattern: Which weights may go together.
        name: Full name of the Linear.
        block: Number of its block among all blocks of the run.
        bias: Its bias, shape (C_out,); None where it has none.
        siblings: Full name -> weight of each other Linear that is fed by the same input (the keys' and values' for a
            query), as it is by now: pruned for those that were solved before, dense for the others.
        dense_zeros: What is zero in the dense weight, where `weight` is another one; None: look at `weight`.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> LinearProblem(torch.ones(2, 4), None, 0.5, Unstructured(), name="layers.3.self_attn.q_proj").kind
        'q_proj'
    """

    weight: Tensor
    statistic: Statistic | None
    sparsity: float
    pattern: Pattern
    name: str = ""
    block: int = 0
    bias: Tensor | None = None
    siblings: Mapping[str, Tensor] = field(default_factory=dict)
    dense_zeros: Tensor | None = None

    @property
    def kind(self) -> str:
        """What the Linear is for: the last part of its name, `down_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def zeros(self) -> Tensor:
        """Weights that are zero before anything is pruned, bool of the weight's shape."""
        return self.weight == 0 if self.dense_zeros is None else self.dense_zeros

    @property
    def gram(self) -> Gram:
        """The statistic of a solver that asks for `Gram`."""
        assert isinstance(self.statistic, Gram)
        return self.statistic


@dataclass(frozen=True)
class Solution:
    """What a solver made of a Linear.

    Args:
        weight: The new weight, shape and dtype of the dense one, with +0.0 where the mask is True.
        mask: True where pruned, bool of the same shape.
        notes: What the manifest is to say about it, as plain data; most often nothing.
    """

    weight: Tensor
    mask: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


class Solver(ABC):
    """Finds mask and values of a Linear. Subclass it, write `solve`, name the class in YAML.

    Everything but `solve` has a default: see what each says.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods.patterns import Unstructured
        >>> class NegativeGoFirst(Solver):
        ...     statistic = None
        ...     updates_weights = False
        ...     def solve(self, problem):
        ...         mask = problem.pattern.mask(problem.weight.float(), problem.sparsity)
        ...         return Solution(problem.weight.masked_fill(mask, 0.0), mask)
        >>> NegativeGoFirst().solve(LinearProblem(torch.tensor([[-1.0, 2.0]]), None, 0.5, Unstructured())).weight
        tensor([[0., 2.]])
    """

    statistic: type[Statistic] | None = Gram
    """The sums over the pool that `solve` needs of a Linear's input; None where weights are enough."""
    updates_weights: bool = True
    """True where `solve` changes weights that stay; else the writer checks that they are byte-identical."""
    wants_sequential: bool = False
    """True where the input sites of a block are to come one after the other unless it is said otherwise."""
    continues: bool = False
    """True where it begins with what the scorer's own solver found: see `starting_from`."""
    group: Group = "layer"
    """What is compared with what under the unstructured pattern: the weights of a row, or of the whole Linear."""

    @abstractmethod
    def solve(self, problem: LinearProblem) -> Solution:
        """Mask and new weight of one Linear; a target of 0 leaves it as it is.

        Args:
            problem: The Linear with its weight, the sums over the pool, sparsity and pattern.
        """

    def score(self, problem: LinearProblem, rows: slice) -> Tensor:
        """Not required: importance of each weight of some rows, for the report's histogram.

        By default what the weight adds to the output by itself, :math:`|W_{ij}| \\lVert X_j \\rVert_2`.

        Args:
            problem: The Linear, with its dense weight.
            rows: The output channels to look at.

        Returns:
            float32 of shape (rows, C_in).
        """
        norms = None if problem.statistic is None else problem.statistic.squared_norms()
        magnitude = problem.weight[rows].float().abs()
        return magnitude if norms is None else magnitude * norms.sqrt().float()

    @property
    def innermost(self) -> Solver:
        """The solver that others continue or hand on to; itself where it is alone."""
        return self

    def starting_from(self, solver: Solver) -> Solver:
        """Not required: this solver, which begins with what another one found; default: it begins by itself.

        Args:
            solver: What prunes where no solver is named: the scorer's own.
        """
        return self

    def keeps_zeros(self) -> bool:
        """Not required: whether weights that are zero before are zero afterwards; default: where none is updated."""
        return not self.updates_weights

    def quick(self) -> Solver:
        """Not required: a cheaper one on the same sums, with which a survey tries many sparsities; default: self."""
        return self

    def working_bytes(self, shape: tuple[int, int], itemsize: int, on_gpu: bool = False) -> int:
        """Bytes that `solve` takes beside weight, mask and statistic, for the plan.

        Args:
            shape: (C_out, C_in).
            itemsize: Bytes of one weight in memory.
            on_gpu: Whether the weight is on a GPU.
        """
        return shape[0] * shape[1] * (itemsize + 40)

    def statistic_bytes(self, channels: int) -> int:
        """Bytes of the sums over a site of so many channels, and of what is kept with them, for the plan."""
        return 0 if self.statistic is None else self.statistic.nbytes(channels)

    def cost(self, rows: int, columns: int) -> float:
        """How long Linears of one statistic take, in any unit; work is dealt out over processes by it.

        Args:
            rows: Their output channels together.
            columns: Their input channels.
        """
        return float(rows + columns) * columns**2

    def check(self, pattern: Pattern) -> None:  # noqa: B027
        """Not required: refuse a pattern that this solver cannot prune to, before any work.

        Raises:
            ValueError: Pattern and solver contradict each other.
        """

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """What `solve` promises of the zeros in a weight of this shape; empty where only their total is known."""
        return [pattern.expected_zeros(shape, sparsity, self.group)] if sparsity > 0 else []

    def summary(self, notes: Mapping[str, Mapping[str, Any]]) -> str:
        """Not required: one line about the whole run out of the notes of its Linears (by full name)."""
        return ""


class ContinuingSolver(Solver):
    """A solver that begins with what another one found.

    Args:
        start: That other one. Default: what prunes where no solver is named, see `starting_from`.
    """

    continues = True

    def __init__(self, start: Solver | None) -> None:
        self.start = start

    @property
    def first(self) -> Solver:
        """The solver whose mask and values this one goes on from; `TypeError` where none is named."""
        if self.start is None:
            raise TypeError("what to begin with is not said: `start`, or `starting_from`")
        return self.start

    @property
    def innermost(self) -> Solver:
        """See `Solver.innermost`."""
        return self.first.innermost

    def starting_from(self, solver: Solver) -> Solver:
        """See `Solver.starting_from`: this one, with a start that begins with the given one where none was named."""
        start = solver if self.start is None else self.start.starting_from(solver)
        if start is self.start:
            return self
        continued = copy(self)
        continued.start = start
        return continued


def dense(problem: LinearProblem) -> Solution:
    """Nothing goes: the solution of a target of 0."""
    return Solution(problem.weight, torch.zeros_like(problem.weight, dtype=torch.bool))


def sparse_weight(values: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """New values in the dtype of the dense weight, +0.0 where the mask is True and where they vanish in that dtype.

    Args:
        values: float of shape (C_out, C_in).
        mask: True where pruned, bool of the same shape.
        like: The dense weight, whose dtype and device the result has.
    """
    # Adding zero turns a weight that vanishes as -0.0 into +0.0.
    return zero_(values.to(like.dtype), mask).add_(0.0)


def at_least(count: ZeroCount) -> ZeroCount:
    """The same promise, where values that vanish in the model's dtype may add zeros."""
    return ZeroCount(count.size, count.least, columns=count.columns)
