"""The numbers of a run, to Lightning's loggers, while it runs: CSV, TensorBoard, Weights & Biases, ...

lvlm-prune prune --trainer.logger CSVLogger --trainer.logger.save_dir runs/logs

    step 0, 1, 2, ...   one step per block: survey/* of the dense model, then block/* of the pruned one
    last step           run/* of the whole run

A run that goes on logs what it had found once more: loggers begin anew with each command (that for CSV empties
what it finds), and so the last log of a run is whole.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.loop import Block
from lvlm_prune.memory.measuring import Stopwatch, peak_memory
from lvlm_prune.output.private import without_private

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class BlockMetrics(PruneCallback):
    """Logs what the manifest says of a block as soon as the block is done; without a logger it does nothing."""

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Log the options of the run, and the blocks that an interrupted one finished."""
        for logger in trainer.loggers:
            # Without paths: what a logger writes into the folder of the run may be published with it.
            logger.log_hyperparams(without_private(trainer.run.config))
        for record in trainer.run.record.blocks:
            self._log_block(trainer, record)

    def on_survey_block_start(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Start the clock."""
        self._clock = Stopwatch(trainer.strategy.root_device)

    def on_survey_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Log what surveying the block took."""
        peak = peak_memory(trainer.strategy.root_device)
        found = {"survey/seconds": self._clock.lap(), "survey/peak_memory_bytes": float(peak)}
        self._log(trainer, found, block.index)

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Log what the survey found, block by block where it says so of blocks or of their Linears."""
        found = _numbers(trainer.run.record["survey"], "survey")
        first = pl_module.parts[-1].first
        for index in range(len(pl_module.runner)):
            name = pl_module.runner.name(index)
            of_block = {
                path.replace(f"{name}.", "").replace(f"/{name}", ""): value
                for path, value in found
                if any(part == name or part.startswith(f"{name}.") for part in path.split("/"))
            }
            if of_block:
                self._log(trainer, of_block, first + index)

    def on_survey_restored(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Log what the interrupted run had found in its survey, as it did."""
        self.on_survey_end(trainer, pl_module)

    def on_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Log the block's numbers of the manifest."""
        self._log_block(trainer, trainer.run.record.blocks[-1])

    def _log_block(self, trainer: "RunTrainer", record: Mapping[str, Any]) -> None:
        index, block = record["index"], record["name"]
        found = dict(_numbers({key: record[key] for key in record if key not in _NOT_NUMBERS}, "block"))
        found["block/sparsity"] = trainer.run.record.achieved_sparsity([index])
        budgets = record.get("visual_tokens")
        if budgets:
            found["block/visual_tokens"] = sum(budgets) / len(budgets)
        for name, entry in trainer.run.record.linears.items():
            if entry["block"] == index:
                of = name.removeprefix(f"{block}.")
                found[f"sparsity/{of}"] = entry["achieved"]
                if "error" in entry:
                    found[f"error/{of}"] = entry["error"]
        self._log(trainer, found, index)

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Log sparsity, time and retention of the whole run, and let the loggers write."""
        manifest = trainer.run.record
        if trainer.run.was_complete:
            return
        found = {"run/sparsity": manifest["sparsity"]["achieved"]}
        if "seconds" in manifest:
            found["run/seconds"] = manifest["seconds"]
        if "evaluation" in manifest:
            found |= dict(_numbers(manifest["evaluation"]["retention"], "run/retention"))
        self._log(trainer, found, max(pl_module.num_blocks - 1, 0))
        if trainer.run.processes.is_main:
            for logger in trainer.loggers:
                logger.finalize("success")

    @staticmethod
    def _log(trainer: "RunTrainer", found: Mapping[str, float], step: int) -> None:
        if trainer.run.processes.is_main:
            for logger in trainer.loggers:
                logger.log_metrics(dict(found), step=step)
                logger.save()  # what a run that dies had found is there


# Lists and names, or what the step says already.
_NOT_NUMBERS = frozenset({"index", "name", "visual_tokens", "scores"})


def _numbers(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Path of every number in nested mappings -> the number."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        path = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found += _numbers(value, path)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((path, float(value)))
    return found
