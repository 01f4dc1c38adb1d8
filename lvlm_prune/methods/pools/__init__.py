"""Pools: which tokens calibrate, and how much each counts."""

from lvlm_prune.methods.pools.ablations import AttendedPool, RandomTokensPool
from lvlm_prune.methods.pools.amia import AMIAPool
from lvlm_prune.methods.pools.asymmetric import AsymmetricPool
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.pools.contribution import ContributionPool
from lvlm_prune.methods.pools.mixed import MixedPool
from lvlm_prune.methods.pools.single_modality import EarlyVisualPool, TextOnlyPool, VisualOnlyPool

__all__ = [
    "AMIAPool",
    "AsymmetricPool",
    "AttendedPool",
    "ContributionPool",
    "EarlyVisualPool",
    "MixedPool",
    "Pool",
    "RandomTokensPool",
    "TextOnlyPool",
    "VisualOnlyPool",
]
