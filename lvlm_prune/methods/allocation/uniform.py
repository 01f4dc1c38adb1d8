"""The uniform allocation."""

from collections.abc import Mapping

from lvlm_prune.methods.allocation.base import Allocation


class UniformAllocation(Allocation):
    """The same sparsity for every Linear.

    Example:
        >>> UniformAllocation().allocate({"q_proj": (4, 4), "up_proj": (8, 4)}, 0.5)
        {'q_proj': 0.5, 'up_proj': 0.5}
    """

    uniform = True

    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """`sparsity` for every Linear."""
        return dict.fromkeys(shapes, sparsity)
