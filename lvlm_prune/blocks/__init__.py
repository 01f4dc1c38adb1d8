"""Find, catch and run the decoder blocks of transformers models: the only room that knows their insides."""

from lvlm_prune.blocks.capture import CaughtBatch
from lvlm_prune.blocks.decoder import Decoder, find_decoder, prunable_linears
from lvlm_prune.blocks.execution import BlockRunner, Part, Target
from lvlm_prune.blocks.experts import ExpertMatrix, ExpertStack, find_expert_stacks, has_routed_experts
from lvlm_prune.blocks.modality import attended, modality_of_tokens, tokens_by_modality, with_image_positions
from lvlm_prune.blocks.placement import PLACES, Place, Placement, place_batches
from lvlm_prune.blocks.towers import TowerRunner, find_towers
from lvlm_prune.blocks.weights import ResidentWeights, StreamedWeights, Weights

__all__ = [
    "PLACES",
    "BlockRunner",
    "CaughtBatch",
    "Decoder",
    "ExpertMatrix",
    "ExpertStack",
    "Part",
    "Place",
    "Placement",
    "ResidentWeights",
    "StreamedWeights",
    "Target",
    "TowerRunner",
    "Weights",
    "attended",
    "find_decoder",
    "find_expert_stacks",
    "find_towers",
    "has_routed_experts",
    "modality_of_tokens",
    "place_batches",
    "prunable_linears",
    "tokens_by_modality",
    "with_image_positions",
]
