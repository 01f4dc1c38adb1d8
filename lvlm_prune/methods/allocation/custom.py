"""A sparsity for each pattern of names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from lvlm_prune.methods.allocation.base import Allocation


class CustomAllocation(Allocation):
    """Sparsities by hand. Linears that no pattern names share one sparsity, the one that makes the mean the target.

    Args:
        sparsities: Glob pattern on the full name of a Linear -> sparsity; of several patterns that match, the first
            counts.

    Raises:
        ValueError: A sparsity lies outside 0 and 1.

    Example:
        >>> shapes = {"0.q_proj": (10, 10), "0.up_proj": (30, 10), "1.q_proj": (10, 10), "1.up_proj": (30, 10)}
        >>> CustomAllocation({"*.q_proj": 0.2}).allocate(shapes, 0.5)
        {'0.q_proj': 0.2, '0.up_proj': 0.6, '1.q_proj': 0.2, '1.up_proj': 0.6}
    """

    def __init__(self, sparsities: dict[str, float]) -> None:
        for pattern, sparsity in sparsities.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"`sparsities` {pattern}: {sparsity}: must lie between 0 and 1")
        self.sparsities = dict(sparsities)

    def check(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> None:
        """Refuse patterns without a Linear, and sparsities that do not come to the target."""
        self.allocate(shapes, sparsity)

    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """Each Linear's sparsity.

        Raises:
            ValueError: A pattern counts for no Linear, or the mean cannot be the target.
        """
        pattern_of = {name: pattern for name in shapes if (pattern := self._first_match(name)) is not None}
        for pattern in self.sparsities:
            if pattern not in pattern_of.values():
                problem = "an earlier pattern counts for every Linear that this one matches"
                if not any(fnmatchcase(name, pattern) for name in shapes):
                    problem = "matches no Linear that is pruned"
                raise ValueError(f"`sparsities` {pattern}: {problem}")
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        named = sum(self.sparsities[pattern] * sizes[name] for name, pattern in pattern_of.items())
        rest = sum(size for name, size in sizes.items() if name not in pattern_of)
        wanted = sparsity * sum(sizes.values())
        if not rest:
            mean = named / sum(sizes.values())
            if abs(mean - sparsity) > 1e-6:
                problem = f"their mean over all weights is {mean:.6g}; set `sparsity` to it, or name fewer Linears"
                raise ValueError(f"`sparsities` {self.sparsities}: {problem}")
            others = sparsity
        else:
            others = (wanted - named) / rest
            if not 0 <= others <= 1:
                problem = f"all other Linears would need a sparsity of {others:.4g} for a mean of {sparsity:g}"
                raise ValueError(f"`sparsities` {self.sparsities}: {problem}")
        return {name: self.sparsities[pattern_of[name]] if name in pattern_of else others for name in shapes}

    def _first_match(self, name: str) -> str | None:
        return next((pattern for pattern in self.sparsities if fnmatchcase(name, pattern)), None)
