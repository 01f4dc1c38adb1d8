"""The lifecycle of pruning, in Lightning's manner.

setup(stage="prune")
on_prune_start
  on_survey_start                               only where somebody wants a survey of the dense model
    on_survey_block_start(block, tail)
    on_survey_calibration_batch_end(block, sample), on_survey_block_calibrated(block)   where activations are wanted
    on_survey_block_changes(block, tail)        the samples are still at the input of the block
    on_survey_batch_end(block, sample)          once per sample and block
    on_survey_block_end(block)
  on_survey_end                                 findings go to the manifest; on_survey_restored where they are there
  on_block_start(block)
    on_calibration_batch_end(block, sample)     activations of every site are at hand here, and only here
  on_block_calibrated(block)                    pruning happens here
    on_site_calibration_batch_end(block, sample), on_site_calibrated(block, names)      or here, site after site
    on_propagation_batch_end(block)
  on_block_end(block)                           pruned outputs propagated, weights about to be released
on_prune_end
teardown
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class PruneCallback(Callback):
    """A callback of `lvlm-prune prune`. Subclass it and override the hooks you need; all others do nothing.

    Stock Lightning callbacks take part too: their `setup`, `teardown` and `on_exception` are called.
    """

    wants_activations: bool = False
    """True where `on_calibration_batch_end` is to be called: the loop leaves out the gathering pass otherwise."""
    needs: frozenset[str] = frozenset()
    """What the activations are to hold besides the inputs of the Linears, of `lvlm_prune.methods.tokens.NEEDS`."""
    wants_survey: bool = False
    """True where the dense model is to be surveyed before the first block is pruned."""
    survey_needs: frozenset[str] = frozenset()
    """As `needs`, for the activations in `on_survey_batch_end`."""
    wants_survey_activations: bool = False
    """True where `on_survey_calibration_batch_end` is wanted: each block runs once more, before the samples pass on."""
    survey_samples: int | None = None
    """How many calibration samples the survey is to run at least, see `surveyed_samples`; None: all of them."""

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """All calibration samples are caught at the input of the first block; nothing is pruned yet."""

    def on_survey_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """The samples are about to go through the dense model once; afterwards they are where they were."""

    def on_survey_block_start(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """The dense block is loaded, all samples are at its input; no sums over processes here."""

    def on_survey_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One sample ran through the dense block, and is still at its input; activations are valid only here."""

    def on_survey_block_calibrated(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """All samples to survey ran through the dense block; sums over processes are made here."""

    def on_survey_block_changes(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Weights of the block may be changed and tried on `tail`, and have to be as they were afterwards."""

    def on_survey_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One calibration sample went through the dense block; no sums over processes here."""

    def on_survey_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """All samples to survey went through the dense block; its weights are released after this hook."""

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Put what was found into `trainer.run.record["survey"]`, as plain data, the same on all processes."""

    def on_survey_restored(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """An interrupted run surveyed the model already; what it found is in `trainer.run.record["survey"]`."""

    def on_block_start(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """The block's dense weights are loaded."""

    def on_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One calibration sample went through the block, not yet pruned."""

    def on_block_calibrated(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """All calibration samples went through the block: prune it now."""

    def on_site_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One sample went through the block, as it is by now, as far as the site at hand; only `site_inputs` holds."""

    def on_site_calibrated(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, names: Sequence[str]
    ) -> None:
        """All samples did: prune these Linears of the block now, see `Block.open_sites`."""

    def on_propagation_batch_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """One calibration batch went through the pruned block and is the input of the next one now."""

    def on_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """The block is done; its weights are released after this hook."""

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """All blocks are done."""
