"""The one loop over blocks, and the calibration samples that go through it."""

from lvlm_prune.loop.block import Block
from lvlm_prune.loop.block_loop import BlockLoop

__all__ = ["Block", "BlockLoop"]
