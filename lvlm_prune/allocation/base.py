"""The interface of an allocation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar


class Allocation(ABC):
    """Deals the target sparsity out over the Linears. Subclass it, write `allocate`, name the class in YAML."""

    uniform: ClassVar[bool] = False
    """True where every Linear gets the target itself, which N:M patterns require."""

    @abstractmethod
    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """Target sparsity of each Linear, whose parameter-weighted mean is `sparsity` within 1e-6.

        Args:
            shapes: Full name of each Linear -> (C_out, C_in), in the order of the blocks.
            sparsity: Target share of zeros over all of them.
        """
