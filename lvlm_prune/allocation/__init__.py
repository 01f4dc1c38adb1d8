"""Allocation: how much of each Linear goes."""

from lvlm_prune.allocation.base import Allocation
from lvlm_prune.allocation.uniform import UniformAllocation

__all__ = ["Allocation", "UniformAllocation"]
