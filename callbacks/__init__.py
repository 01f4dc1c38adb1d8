"""Callbacks of the pruning lifecycle, one per file."""

from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.checkpoint import SparseCheckpointWriter
from lvlm_prune.callbacks.evaluation import EmbeddedEvaluation, RetentionEvaluation
from lvlm_prune.callbacks.frozen_masks import FrozenMasks
from lvlm_prune.callbacks.loss_history import LossHistory
from lvlm_prune.callbacks.metrics import BlockMetrics
from lvlm_prune.callbacks.modality_probe import ModalityProbe
from lvlm_prune.callbacks.progress import PruneProgressBar, TrainingProgress
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.callbacks.reconstruction import BlockwiseReconstruction
from lvlm_prune.callbacks.report import PruningReport
from lvlm_prune.callbacks.sparse_lora import SparseLoRA
from lvlm_prune.callbacks.survey import PluginSurvey

__all__ = [
    "BlockMetrics",
    "BlockwisePruning",
    "BlockwiseReconstruction",
    "EmbeddedEvaluation",
    "FrozenMasks",
    "LossHistory",
    "ModalityProbe",
    "PluginSurvey",
    "PruneCallback",
    "PruneProgressBar",
    "PruningReport",
    "RetentionEvaluation",
    "SparseCheckpointWriter",
    "SparseLoRA",
    "TrainingProgress",
]
