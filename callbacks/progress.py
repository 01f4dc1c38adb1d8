"""Progress of pruning (blocks, samples within a block, time left, what the block before showed) and of training."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.units import readable_percent

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class PruneProgressBar(TQDMProgressBar, PruneCallback):
    """Lightning's tqdm bar, with a bar for `prune` too: a line a minute where there is no terminal."""

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Open the bar: one step per block, part of it with each sample gathered and each batch propagated."""
        self._blocks, self._findings = pl_module.num_blocks, ""
        self._count(trainer)
        self._bar = self._open(trainer, "Pruning", self._blocks, len(trainer.run.record.get("blocks", [])))

    def _count(self, trainer: "RunTrainer") -> None:
        batches = len({id(row.batch) for row in trainer.run.samples.rows})
        self._share = 1 / max(len(trainer.run.samples.rows) + batches, 1)
        self._samples, self._seen = len(trainer.run.samples.rows), 0

    def on_survey_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """A bar of its own, in the place of the one of pruning: one step per block, too."""
        self._bar.close(leave=False)
        self._bar = self._open(
            trainer, "Surveying", self._blocks, trainer.run.record.get("surveying", {}).get("blocks", 0)
        )

    def on_survey_block_start(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Show which block it is."""
        self._seen = 0
        self._show(block)

    def on_survey_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One sample surveyed."""
        self._seen += 1
        self._bar.update(1 / self._samples)
        self._show(block)

    def on_survey_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Blocks that the decoder skips for a sample count as well."""
        self._bar.advance_to(block.index + 1)

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """The bar of pruning again."""
        self._bar.close()
        self._bar = self._open(trainer, "Pruning", self._blocks)

    @staticmethod
    def _open(trainer: "RunTrainer", title: str, total: int, initial: int = 0) -> Progress:
        return Progress(title, total, initial=initial, shown=trainer.run.processes.is_main, leave=True)

    def on_block_start(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Show which block it is; the samples of the vision tower are others than those of the decoder."""
        self._count(trainer)
        self._show(block)

    def on_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """One sample gathered."""
        self._seen += 1
        self._bar.update(self._share)
        self._show(block)

    def on_propagation_batch_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """One batch propagated."""
        self._bar.update(self._share)

    def on_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Show what the block showed."""
        self._findings = f" · sparsity {readable_percent(trainer.run.record.achieved_sparsity([block.index]))}"
        self._findings += "".join(
            f" · {name.removeprefix('mean_')} {value:.3f}"
            for name, value in block.record.items()
            if name.startswith("mean_")
        )
        self._bar.advance_to(block.index + 1)
        self._show(block)

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Close the bar."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def on_exception(self, trainer: "RunTrainer", pl_module: "LVLMModule", exception: BaseException) -> None:  # type: ignore[override]
        """Close the bar, so that the error stands on a line of its own."""
        if hasattr(self, "_bar"):
            self._bar.close()

    def _show(self, block: Block) -> None:
        text = f"block {block.index + 1}/{self._blocks} · sample {self._seen}/{self._samples}{self._findings}"
        self._bar.describe(text)


class TrainingProgress(Callback):
    """A line a minute while a model is trained, where Lightning's bar would fill a file."""

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Count from the step at which the training goes on."""
        total = trainer.estimated_stepping_batches
        self._progress = Progress("Training", total, "steps", initial=trainer.global_step, shown=trainer.is_global_zero)

    def on_train_batch_end(self, trainer: "Trainer", *_: Any) -> None:
        """As many steps as the optimizer made."""
        self._progress.advance_to(trainer.global_step)
