"""Which sparsity to try next, where a model is to keep a given share.

level          1    2    3   ...   36   37
sparsity       5%  7.5%  10%      92.5% 95%
               keeps enough  ◄── bracket ──►  keeps too little
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOWEST, STEP, LEVELS = 0.05, 0.025, 37


def sparsity_of(level: int) -> float:
    """The sparsity that a level, 1 ... `LEVELS`, stands for.

    Example:
        >>> sparsity_of(1), sparsity_of(LEVELS)
        (0.05, 0.95)
    """
    return round(LOWEST + STEP * (level - 1), 6)


@dataclass
class Bracket:
    """What is known of one recipe: it keeps enough at `low`, too little at `high`.

    A recipe of which nothing is known is halved; one that is known to keep enough, because a weaker recipe does, is
    probed above that in growing steps first.

    Args:
        low: Highest level that keeps enough, as far as is known; 0 for none.
        high: Lowest level that keeps too little, as far as is known; `LEVELS` + 1 for none.

    Example:
        >>> bracket = Bracket()
        >>> while level := bracket.next():
        ...     bracket.note(level, sparsity_of(level) <= 0.6)
        >>> sparsity_of(bracket.low)
        0.6
    """

    low: int = 0
    high: int = LEVELS + 1

    def __post_init__(self) -> None:
        self._stride, self._is_known = 2, self.low > 0

    def next(self) -> int | None:
        """The level to try; None where nothing is left to try."""
        if self.high - self.low <= 1:
            return None
        if self._is_known and self.high > LEVELS:
            return min(self.low + self._stride, LEVELS)
        return (self.low + self.high) // 2

    def note(self, level: int, is_enough: bool) -> None:
        """Take notice of what came out of a try."""
        if is_enough:
            self.low, self._stride = max(self.low, level), 2 * self._stride
        else:
            self.high = min(self.high, level)


def best_of(brackets: Mapping[str, Bracket]) -> tuple[str, int] | None:
    """Recipe and level of the sparsest model that keeps enough; the first recipe where several are equal."""
    found = max(brackets, key=lambda recipe: brackets[recipe].low, default=None)
    return None if found is None or not brackets[found].low else (found, brackets[found].low)
