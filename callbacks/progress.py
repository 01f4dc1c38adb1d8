"""The progress bar of pruning: blocks, samples within a block, time left, what the block before showed."""

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class PruneProgressBar(TQDMProgressBar, PruneCallback):
    """Lightning's tqdm bar, with a bar for `prune` too. Silent where the output is not a terminal."""

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
        self._bar.leave = False
        self._bar.close()
        self._bar = self._open(trainer, "Surveying", self._blocks)

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
        self._bar.update(block.index + 1 - self._bar.n)

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """The bar of pruning again."""
        self._bar.close()
        self._bar = self._open(trainer, "Pruning", self._blocks)

    @staticmethod
    def _open(trainer: "RunTrainer", title: str, total: int, initial: int = 0) -> Tqdm:
        return Tqdm(
            total=total,
            initial=initial,
            bar_format=title + " {bar:24} {desc}{elapsed} · {remaining} left",
            disable=None if trainer.run.processes.is_main else True,
            leave=True,
        )

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
        self._findings = f" · sparsity {trainer.run.record.achieved_sparsity([block.index]):.3f}"
        self._findings += "".join(
            f" · {name.removeprefix('mean_')} {value:.3f}"
            for name, value in block.record.items()
            if name.startswith("mean_")
        )
        self._bar.update(block.index + 1 - self._bar.n)
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
        self._bar.set_description_str(f"{text} · ", refresh=False)
