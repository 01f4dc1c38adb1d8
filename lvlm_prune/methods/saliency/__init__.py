"""Saliency: how much each visual token matters at a block."""

from lvlm_prune.methods.saliency.attention import AttentionSaliency
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.saliency.diversity import DiversitySaliency
from lvlm_prune.methods.saliency.drift import DriftSaliency
from lvlm_prune.methods.saliency.random import RandomSaliency

__all__ = ["AttentionSaliency", "DiversitySaliency", "DriftSaliency", "RandomSaliency", "Saliency"]
