"""Find, catch, run and stream the decoder blocks of transformers models: the only place that knows their insides."""

from lvlm_prune.blocks.capture import CaughtBatch
from lvlm_prune.blocks.checkpoint import CheckpointFolder, TensorInfo
from lvlm_prune.blocks.decoder import Decoder, find_decoder, prunable_linears
from lvlm_prune.blocks.execution import BlockRunner, Part, Target
from lvlm_prune.blocks.experts import ExpertMatrix, ExpertStack, find_expert_stacks
from lvlm_prune.blocks.heap import give_back_freed
from lvlm_prune.blocks.hub import resolve
from lvlm_prune.blocks.modality import (
    AUDIO,
    IMAGE,
    MODALITIES,
    PADDING,
    TEXT,
    VIDEO,
    attended,
    modality_of_tokens,
    with_image_positions,
)
from lvlm_prune.blocks.placement import PLACES, Place, Placement, place_batches
from lvlm_prune.blocks.skeleton import build_skeleton
from lvlm_prune.blocks.towers import TowerRunner, find_towers
from lvlm_prune.blocks.weights import ResidentWeights, StreamedWeights, Weights

__all__ = [
    "AUDIO",
    "IMAGE",
    "MODALITIES",
    "PADDING",
    "PLACES",
    "TEXT",
    "VIDEO",
    "BlockRunner",
    "CaughtBatch",
    "CheckpointFolder",
    "Decoder",
    "ExpertMatrix",
    "ExpertStack",
    "Part",
    "Place",
    "Placement",
    "ResidentWeights",
    "StreamedWeights",
    "Target",
    "TensorInfo",
    "TowerRunner",
    "Weights",
    "attended",
    "build_skeleton",
    "find_decoder",
    "find_expert_stacks",
    "find_towers",
    "give_back_freed",
    "modality_of_tokens",
    "place_batches",
    "prunable_linears",
    "resolve",
    "with_image_positions",
]
