"""Saliency: how much each visual token matters at a block."""

from lvlm_prune.saliency.base import Saliency
from lvlm_prune.saliency.drift import DriftSaliency
from lvlm_prune.saliency.random import RandomSaliency

__all__ = ["DriftSaliency", "RandomSaliency", "Saliency"]
