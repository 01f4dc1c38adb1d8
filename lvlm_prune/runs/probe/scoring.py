"""How the cells of a probe are scored: in memory on the embedded benchmark, or by an engine on a folder each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from lvlm_prune.blocks.routing import routed
from lvlm_prune.checkpoints.allocator import keeping_freed
from lvlm_prune.evaluation.pathways import routed_when_loaded, write_pathways
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.output.folder import writing
from lvlm_prune.run import Run
from lvlm_prune.runs.probe.pathways import PathwayPruning

if TYPE_CHECKING:
    from lvlm_prune.evaluation.engine import Engine


class CellScoring(Protocol):
    """Scores the dense model and models of which one pathway is pruned."""

    def dense(self) -> Scores | None:
        """Scores of the dense model; None on a process that scores nothing."""

    def cell(self, cell: PathwayPruning) -> Scores | None:
        """Scores with one pathway pruned; None on a process that scores nothing."""


class EmbeddedScoring:
    """The embedded model in memory, on its own benchmark, by the main process alone.

    Args:
        run: The run.
        folder: The embedded checkpoint.
        images: Pictures of the benchmark.
        texts: Its questions without a picture.
    """

    def __init__(self, run: Run, folder: Path, images: int, texts: int) -> None:
        self.scores = run.processes.is_main
        if self.scores:
            from lvlm_prune.evaluation.embedded import EmbeddedBenchmark

            disable_progress_bar()
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
            self.processor = AutoProcessor.from_pretrained(folder)
            self.questions = EmbeddedBenchmark(images, texts).questions

    def dense(self) -> Scores | None:
        """See `CellScoring`."""
        from lvlm_prune.evaluation.answers import score

        with keeping_freed():
            return score(self.model, self.processor, self.questions) if self.scores else None

    def cell(self, cell: PathwayPruning) -> Scores | None:
        """See `CellScoring`."""
        if not self.scores:
            return None
        with routed(self.model, cell.pruned, cell.pathway):
            return self.dense()


class EngineScoring:
    """An engine, on a folder with two pathways that is removed again.

    Args:
        run: The run.
        dense_folder: The dense checkpoint.
        scratch: Where the folder with two pathways is written; must be on a disk with room for the pruned weights.
        engine: The engine.
    """

    def __init__(self, run: Run, dense_folder: Path, scratch: Path, engine: Engine) -> None:
        self.run, self.dense_folder, self.scratch, self.engine = run, dense_folder, scratch, engine

    def dense(self) -> Scores | None:
        """See `CellScoring`."""
        return self._score(self.dense_folder, "dense")

    def cell(self, cell: PathwayPruning) -> Scores | None:
        """See `CellScoring`."""
        processes = self.run.processes
        processes.on_main(self._clear)
        processes.on_main(lambda: self._write(cell))
        with routed_when_loaded(self.scratch):
            found = self._score(self.scratch, "pruned")
        processes.on_main(self._clear)
        return found

    def _score(self, folder: Path, title: str) -> Scores:
        return self.engine.score(folder, self.run.processes, self.run.hardware.device, title)

    def _write(self, cell: PathwayPruning) -> None:
        with writing(self.scratch.parent):
            write_pathways(self.dense_folder, self.scratch, cell.pruned, cell.pathway)

    def _clear(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
