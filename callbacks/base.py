"""The lifecycle of pruning, in Lightning's manner.

setup(stage="prune")
on_prune_start
  on_block_start(block)
    on_calibration_batch_end(block, sample)     activations of every site are at hand here, and only here
  on_block_calibrated(block)                    pruning happens here
    on_propagation_batch_end(block)
  on_block_end(block)                           pruned outputs propagated, weights about to be released
on_prune_end
teardown
"""

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from lvlm_prune.activations import Activations
from lvlm_prune.loop import Block

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer


class PruneCallback(Callback):
    """A callback of `lvlm-prune prune`. Subclass it and override the hooks you need; all others do nothing.

    Stock Lightning callbacks take part too: their `setup`, `teardown` and `on_exception` are called.
    """

    wants_activations: bool = False
    """True where `on_calibration_batch_end` is to be called: the loop leaves out the gathering pass otherwise."""
    wants_outputs: bool = False
    """True where the activations are to hold the outputs of the Linears as well."""

    def on_prune_start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """All calibration samples are caught at the input of the first block; nothing is pruned yet."""

    def on_block_start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """The block's dense weights are loaded."""

    def on_calibration_batch_end(
        self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One calibration sample went through the block, not yet pruned."""

    def on_block_calibrated(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """All calibration samples went through the block: prune it now."""

    def on_propagation_batch_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """One calibration batch went through the pruned block and is the input of the next one now."""

    def on_block_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """The block is done; its weights are released after this hook."""

    def on_prune_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """All blocks are done."""
