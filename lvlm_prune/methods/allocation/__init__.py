"""Allocation: how much of each Linear goes."""

from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.allocation.custom import CustomAllocation
from lvlm_prune.methods.allocation.das import DASAllocation
from lvlm_prune.methods.allocation.ecoflap import ECoFLaPAllocation
from lvlm_prune.methods.allocation.kl import KLAllocation
from lvlm_prune.methods.allocation.owl import OWLAllocation
from lvlm_prune.methods.allocation.uniform import UniformAllocation

__all__ = [
    "Allocation",
    "CustomAllocation",
    "DASAllocation",
    "ECoFLaPAllocation",
    "KLAllocation",
    "OWLAllocation",
    "UniformAllocation",
]
