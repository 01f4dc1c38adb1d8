"""Pools: which tokens calibrate, and how much each counts."""

from lvlm_prune.pools.asymmetric import AsymmetricPool
from lvlm_prune.pools.base import Pool
from lvlm_prune.pools.mixed import MixedPool
from lvlm_prune.pools.single_modality import TextOnlyPool, VisualOnlyPool

__all__ = ["AsymmetricPool", "MixedPool", "Pool", "TextOnlyPool", "VisualOnlyPool"]
