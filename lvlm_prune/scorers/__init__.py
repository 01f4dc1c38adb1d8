"""Scorers: how important each weight is."""

from lvlm_prune.scorers.base import Scorer
from lvlm_prune.scorers.magnitude import MagnitudeScorer
from lvlm_prune.scorers.ria import RIAScorer
from lvlm_prune.scorers.sparsegpt import SparseGPTScorer
from lvlm_prune.scorers.wanda import WandaScorer

__all__ = ["MagnitudeScorer", "RIAScorer", "Scorer", "SparseGPTScorer", "WandaScorer"]
