"""Saliency: how much each visual token matters at a block."""

from lvlm_prune.saliency.attention import AttentionSaliency
from lvlm_prune.saliency.base import Saliency
from lvlm_prune.saliency.diversity import DiversitySaliency
from lvlm_prune.saliency.drift import DriftSaliency
from lvlm_prune.saliency.random import RandomSaliency

__all__ = ["AttentionSaliency", "DiversitySaliency", "DriftSaliency", "RandomSaliency", "Saliency"]
