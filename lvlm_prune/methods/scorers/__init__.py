"""Scorers: how important each weight is."""

from lvlm_prune.methods.scorers.base import MaskSolver, Scorer
from lvlm_prune.methods.scorers.magnitude import MagnitudeScorer
from lvlm_prune.methods.scorers.ria import RIAScorer
from lvlm_prune.methods.scorers.sparsegpt import SparseGPTScorer
from lvlm_prune.methods.scorers.wanda import WandaScorer

__all__ = ["MagnitudeScorer", "MaskSolver", "RIAScorer", "Scorer", "SparseGPTScorer", "WandaScorer"]
