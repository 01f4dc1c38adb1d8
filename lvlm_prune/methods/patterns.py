"""Sparsity patterns: which of the lowest scores go.

    unstructured     per output row (or over the whole matrix), the floor(n * sparsity) lowest scores
    N:M              of every M consecutive input columns the N highest stay
    N:M, N:M, ...    each Linear has one of these, or stays dense; the allocation says which

In a mask, True means pruned.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Group = Literal["row", "layer"]

IN_CACHES = 2**18
"""Elements that a CPU's caches hold while something is done with them; more at once is slower, and takes memory."""


@dataclass(frozen=True)
class ZeroCount:
    """How many zeros a pruned weight must have, for each group of weights that were compared with each other.

    Args:
        size: Number of weights in a group, counted along rows: C_in for rows, M for N:M, all for a whole matrix.
        least: Zeros that each group must have.
        most: Zeros that it may have, beside those of the dense weight; None where ties and the like may add to them.
        columns: The input columns that this is about; None for all.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 1.0, 1.0]])
        >>> ZeroCount(size=4, least=2, most=2).of(weight)
        tensor([2, 1])
        >>> ZeroCount(size=4, least=2, columns=slice(0, 2)).of(weight)
        tensor([2])
    """

    size: int
    least: int
    most: int | None = None
    columns: slice | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Zeros in each group of this weight, int64."""
        part = weight if self.columns is None else weight[:, self.columns]
        groups = part.reshape(-1, self.size)
        # In pieces that stay in a CPU's caches, and counted as int32: a sum over bool makes integers of them first.
        if len(groups) == 1:
            return torch.stack([(some == 0).count_nonzero() for some in groups[0].split(IN_CACHES)]).sum().reshape(1)
        pieces = groups.split(max(IN_CACHES // self.size, 1))
        return torch.cat([(some == 0).sum(dim=1, dtype=torch.int32) for some in pieces]).long()


class Pattern(ABC):
    """Turns scores into a mask, and knows how many zeros that makes. As text it is what a user writes, `2:4`."""

    written_as_text = True

    @abstractmethod
    def mask(self, score: Tensor, sparsity: float, group: Group = "row") -> Tensor:
        """Which weights go.

        Args:
            score: Importance, float32 of shape (C_out, C_in); low scores go, ties by lowest column index.
            sparsity: Share of weights to prune, in [0, 1).
            group: What is compared: the weights of one output `row`, or of the whole `layer`.

        Returns:
            Bool of shape (C_out, C_in), True where the weight is pruned.
        """

    @abstractmethod
    def pruned_per_group(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> int:
        """Number of weights that `mask` prunes in each comparison group of a matrix of this shape."""

    @abstractmethod
    def groups(self, matrix: Tensor, group: Group = "row") -> Tensor:
        """The matrix viewed as (number of comparison groups, group size)."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsities that a Linear can have beside 0, ascending; empty where it can have any."""
        return ()

    def mixes(self, mean: float) -> bool:
        """Whether Linears must differ to have this mean, as it is none of the levels that the pattern allows."""
        return False

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of a Linear that gets this sparsity."""
        return self

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> ZeroCount:
        """What `mask` promises of a matrix of this shape."""
        count = self.pruned_per_group(shape, sparsity, group)
        size = self.groups(torch.empty(shape, device="meta"), group).shape[1]
        return ZeroCount(size, count, count)


class Unstructured(Pattern):
    """The `floor(n * sparsity)` lowest scores of each comparison group.

    Example:
        >>> Unstructured().mask(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), sparsity=0.5)
        tensor([[False,  True, False,  True]])
    """

    def mask(self, score: Tensor, sparsity: float, group: Group = "row") -> Tensor:
        """See `Pattern.mask`."""
        grouped = self.groups(score, group)
        count = self.pruned_per_group((score.shape[0], score.shape[1]), sparsity, group)
        return lowest(grouped, count).view_as(score)

    def pruned_per_group(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> int:
        """`floor(n * sparsity)` for groups of n weights."""
        size = shape[1] if group == "row" else shape[0] * shape[1]
        return int(size * sparsity)

    def groups(self, matrix: Tensor, group: Group = "row") -> Tensor:
        """Rows, or the whole matrix as one group."""
        return matrix if group == "row" else matrix.reshape(1, -1)

    def __str__(self) -> str:
        return "unstructured"


class SemiStructured(Pattern):
    """N:M, of every M consecutive input columns the N highest scores stay.

    Args:
        keep: N, the number of weights that stay in each group.
        group_size: M, the number of consecutive input columns in a group.

    Example:
        >>> SemiStructured(2, 4).mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), sparsity=0.5)
        tensor([[False,  True,  True, False]])
    """

    def __init__(self, keep: int, group_size: int) -> None:
        if not 0 < keep < group_size:
            raise ValueError(f"`N:M` needs 0 < N < M, got {keep}:{group_size}")
        self.keep, self.group_size = keep, group_size

    @property
    def sparsity(self) -> float:
        """Share of weights that the pattern prunes, 1 - N/M."""
        return 1 - self.keep / self.group_size

    @property
    def levels(self) -> tuple[float, ...]:
        """The one sparsity that the pattern has, 1 - N/M."""
        return (self.sparsity,)

    def mixes(self, mean: float) -> bool:
        """Below the pattern's sparsity, where some Linears stay dense."""
        return mean < self.sparsity - 1e-9

    def mask(self, score: Tensor, sparsity: float, group: Group = "row") -> Tensor:
        """See `Pattern.mask`; `sparsity` and `group` are given by the pattern itself, but nothing goes at 0."""
        if sparsity == 0:
            return torch.zeros_like(score, dtype=torch.bool)
        columns = self.groups(score).unbind(1)
        mask = torch.empty(score.numel() // self.group_size, self.group_size, dtype=torch.bool, device=score.device)
        # M is small: counting how many of the others go before is several times faster than sorting tiny groups.
        for place, column in enumerate(columns):
            before = torch.zeros(len(column), dtype=torch.int16, device=score.device)
            for other_place, other in enumerate(columns):
                if other_place != place:
                    before += other <= column if other_place < place else other < column
            mask[:, place] = before < self.group_size - self.keep
        return mask.view_as(score)

    def pruned_per_group(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> int:
        """M - N, or nothing at a sparsity of 0."""
        return 0 if sparsity == 0 else self.group_size - self.keep

    def groups(self, matrix: Tensor, group: Group = "row") -> Tensor:
        """Every M consecutive input columns."""
        return matrix.reshape(-1, self.group_size)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group_size}"


class SemiStructuredChoice(Pattern):
    """Several N:M patterns, of which each Linear has one or stays dense.

    An allocation deals out their sparsities, and the sparsity of a Linear says which of them it has.

    Args:
        choices: N:M patterns of different sparsities, two or more.

    Raises:
        ValueError: There are fewer, or two of the same sparsity.

    Example:
        >>> pattern = SemiStructuredChoice([SemiStructured(2, 4), SemiStructured(1, 4)])
        >>> pattern.mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), sparsity=0.75)
        tensor([[ True,  True,  True, False]])
        >>> pattern.levels, str(pattern.at(0.5))
        ((0.5, 0.75), '2:4')
    """

    def __init__(self, choices: Sequence[SemiStructured]) -> None:
        self.choices = sorted(choices, key=lambda choice: choice.sparsity)
        if len(choices) < 2:
            raise ValueError(f"needs two patterns or more, got {len(choices)}")
        for some, other in pairwise(self.choices):
            if some.sparsity == other.sparsity:
                best, *_ = sorted((some, other), key=lambda choice: -choice.group_size)
                raise ValueError(f"{some} and {other} have the same sparsity; give {best}, which allows more masks")

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsity of each pattern to choose from, ascending."""
        return tuple(choice.sparsity for choice in self.choices)

    def mixes(self, mean: float) -> bool:
        """Always: with one pattern for all Linears it would be that pattern."""
        return True

    def at(self, sparsity: float) -> SemiStructured:
        """The sparsest choice that does not exceed this sparsity; the densest if all do."""
        fitting = [choice for choice in self.choices if choice.sparsity <= sparsity + 1e-9]
        return fitting[-1] if fitting else self.choices[0]

    def mask(self, score: Tensor, sparsity: float, group: Group = "row") -> Tensor:
        """See `SemiStructured.mask`."""
        return self.at(sparsity).mask(score, sparsity, group)

    def pruned_per_group(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> int:
        """See `SemiStructured.pruned_per_group`."""
        return self.at(sparsity).pruned_per_group(shape, sparsity, group)

    def groups(self, matrix: Tensor, group: Group = "row") -> Tensor:
        """Those of the choice with the widest groups."""
        return max(self.choices, key=lambda choice: choice.group_size).groups(matrix)

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, group: Group = "row") -> ZeroCount:
        """See `Pattern.expected_zeros`."""
        return self.at(sparsity).expected_zeros(shape, sparsity, group)

    def __str__(self) -> str:
        return ",".join(map(str, self.choices))


def lowest(grouped: Tensor, count: int) -> Tensor:
    """The `count` lowest values of each row, ties by lowest column index: what a stable sort gives, without sorting.

    Args:
        grouped: Values, shape (rows, n).
        count: How many are taken of each row, at most the length of a row.

    Returns:
        Bool of the same shape, True where a value is among them.

    Example:
        >>> lowest(torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0]]), 2)
        tensor([[False,  True, False,  True, False]])
    """
    if count == 0:
        return torch.zeros_like(grouped, dtype=torch.bool)
    threshold = kth_lowest(grouped, count)
    mask = grouped <= threshold
    if grouped.is_cuda:  # to look for the rows with ties would make it wait
        below = grouped < threshold
        room = count - below.sum(dim=1, keepdim=True)
        return below | ((grouped == threshold) & ((grouped == threshold).cumsum(dim=1) <= room))
    counts = mask.view(torch.int8).sum(dim=1, dtype=torch.int32)  # a third of the time of a sum of bool
    tied_rows = (counts > count).nonzero().flatten()
    if len(tied_rows):
        tied, below = grouped[tied_rows] == threshold[tied_rows], grouped[tied_rows] < threshold[tied_rows]
        room = count - below.sum(dim=1, keepdim=True)
        mask[tied_rows] = below | (tied & (tied.cumsum(dim=1) <= room))
    return mask


def kth_lowest(values: Tensor, count: int) -> Tensor:
    """The value of each row that `count` of its values are not above, shape (rows, 1).

    On a CPU numpy's partition takes a tenth of the time of `torch.kthvalue`.

    Example:
        >>> kth_lowest(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        tensor([[2.]])
    """
    if torch.are_deterministic_algorithms_enabled() and values.is_cuda:
        # The value is the same either way, but torch refuses `kthvalue`, whose index is not.
        return values.sort(dim=1).values[:, count - 1 : count]
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.kthvalue(count, dim=1, keepdim=True).values
    partitioned = np.partition(values.detach().numpy(), count - 1, axis=1)
    return torch.from_numpy(partitioned[:, count - 1 : count].copy())


def parse_pattern(text: str) -> Pattern:
    """The pattern that a user wrote: `unstructured`, `N:M`, or several `N:M` with commas between.

    Raises:
        ValueError: Anything else.

    Example:
        >>> parse_pattern("2:4").sparsity
        0.5
        >>> parse_pattern("2:4, 1:4").levels
        (0.5, 0.75)
    """
    if text == "unstructured":
        return Unstructured()
    found = [re.fullmatch(r"\s*(\d{1,9}):(\d{1,9})\s*", part) for part in text.split(",")]
    if not all(found):
        raise ValueError("must be `unstructured`, `N:M`, for example `2:4`, or several of them, for example `2:4,1:4`")
    choices = [SemiStructured(int(part[1]), int(part[2])) for part in found if part]
    return choices[0] if len(choices) == 1 else SemiStructuredChoice(choices)
