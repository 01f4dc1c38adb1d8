"""Checkpoint folders of Hugging Face's layout: found, read and written one tensor at a time."""

from lvlm_prune.checkpoints.allocator import give_back_freed
from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.headers import TensorInfo
from lvlm_prune.checkpoints.hub import resolve
from lvlm_prune.checkpoints.skeleton import build_skeleton

__all__ = ["CheckpointFolder", "TensorInfo", "build_skeleton", "give_back_freed", "resolve"]
