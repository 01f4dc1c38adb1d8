"""Pools: which tokens calibrate, and how much each counts."""

from lvlm_prune.pools.ablations import AttendedPool, RandomTokensPool
from lvlm_prune.pools.amia import AMIAPool
from lvlm_prune.pools.asymmetric import AsymmetricPool
from lvlm_prune.pools.base import Pool
from lvlm_prune.pools.contribution import ContributionPool
from lvlm_prune.pools.mixed import MixedPool
from lvlm_prune.pools.single_modality import TextOnlyPool, VisualOnlyPool

__all__ = [
    "AMIAPool",
    "AsymmetricPool",
    "AttendedPool",
    "ContributionPool",
    "MixedPool",
    "Pool",
    "RandomTokensPool",
    "TextOnlyPool",
    "VisualOnlyPool",
]
