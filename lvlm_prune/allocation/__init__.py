"""Allocation: how much of each Linear goes."""

from lvlm_prune.allocation.base import Allocation
from lvlm_prune.allocation.custom import CustomAllocation
from lvlm_prune.allocation.das import DASAllocation
from lvlm_prune.allocation.ecoflap import ECoFLaPAllocation
from lvlm_prune.allocation.owl import OWLAllocation
from lvlm_prune.allocation.uniform import UniformAllocation

__all__ = [
    "Allocation",
    "CustomAllocation",
    "DASAllocation",
    "ECoFLaPAllocation",
    "OWLAllocation",
    "UniformAllocation",
]
