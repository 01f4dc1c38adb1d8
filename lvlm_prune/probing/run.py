"""One probe: a survey of the dense model, then every cell of the grid, then the page.

check ─► catch block-0 inputs ─► survey of the dense model ─► for each cell: prune one pathway ─► scores ─► page
                                 overlap of masks, map, ...     block by block, as `prune` does
"""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric import Fabric
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from lvlm_prune.data import CalibrationDataModule, MixtureSource, load_processor
from lvlm_prune.errors import InputError
from lvlm_prune.launching import Launch
from lvlm_prune.loop import BlockLoop
from lvlm_prune.manifest import Manifest, replace_durably
from lvlm_prune.output_folder import choose_folder
from lvlm_prune.plugins import describe, plugin_class
from lvlm_prune.probing.pathways import PathwayPruning
from lvlm_prune.probing.routing import routed
from lvlm_prune.report.names import PAGE_NAME
from lvlm_prune.report.page import write_page
from lvlm_prune.report.probe import grid_markdown, probe_page

if TYPE_CHECKING:
    from lvlm_prune.callbacks import ModalityProbe
    from lvlm_prune.evaluation.scores import Scores
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer

RECORD_NAME = "probe.json"


class ProbeRun:
    """See `LVLMTrainer.probe` for the arguments."""

    def __init__(
        self,
        trainer: LVLMTrainer,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str,
        evaluate: bool,
    ) -> None:
        from lvlm_prune.callbacks import ModalityProbe

        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        given = next((callback for callback in trainer.callbacks if isinstance(callback, ModalityProbe)), None)
        self.probe: ModalityProbe = given or ModalityProbe()
        self.folder = choose_folder(output, f"{model.label}-probe", resume=False)
        self.evaluates = evaluate and model.path == "demo"
        self.started = time.perf_counter()

    def __call__(self) -> Manifest:
        """Do all of it.

        Raises:
            InputError: Something does not fit; nothing was written.
        """
        trainer, model, data = self.trainer, self.model, self.datamodule
        trainer._forget_samples()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError("output", self.folder, "exists and is not empty; choose another folder")
        model.open()
        data.setup("prune")
        if data.source.needs_processor and model.processor is None:
            assert model.folder is not None
            model.processor = load_processor(model.folder.path, model.trust_remote_code)
        cells = [
            PathwayPruning(pathway, pool, sparsity, self.probe.scorer, self.probe.visual)
            for sparsity, pathway, pool in product(self.probe.sparsities, self.probe.pathways, self.probe.pools)
        ]
        names = PathwayPruning("text", "text", 0.5, self.probe.scorer, self.probe.visual)
        names.plan(model)
        self.probe.targets = {name: name for name in names.shapes}
        for cell in cells:
            cell.plan(model)
        launch = Launch(trainer, [self.probe])
        with launch.together():
            launch.start()
            trainer.processes = launch.processes
            with trainer._watched_memory() as trainer.memory:
                self._measure(launch.fabric, names, cells)
        return trainer.manifest

    def _measure(self, fabric: Fabric, names: PathwayPruning, cells: list[PathwayPruning]) -> None:
        trainer, model, data = self.trainer, self.model, self.datamodule
        trainer.weights = model.weights(fabric.device)
        trainer.manifest.update(trainer._provenance(model, data) | {"probe": describe(self.probe)})
        trainer._catch(fabric, model, data, [names])
        trainer._settle(model, [self.probe, names])
        self.probe.set_of_sample = self._sets()
        trainer._survey(fabric, model, [self.probe])
        self._score_dense()
        trainer.manifest["grid"] = [self._cell(cell) for cell in cells]
        self._finish()

    def _sets(self) -> dict[int, str]:
        """Number of each sample -> name of the data set that it comes from."""
        source, selection = self.datamodule.source, self.datamodule.select()
        numbers = range(len(selection))
        if not isinstance(source, MixtureSource):
            return dict.fromkeys(numbers, plugin_class(source).__name__)
        labels = [f"{part + 1} {plugin_class(each).__name__}" for part, each in enumerate(source.sources)]
        return {number: labels[source.part_of(selection[number])] for number in numbers}

    def _prune(self, cell: PathwayPruning) -> None:
        """Prune one pathway block by block; later blocks are calibrated on what the earlier ones now put out."""
        trainer, model = self.trainer, self.model
        cell.on_prune_start(trainer, model)
        loop = BlockLoop(
            model.runner,
            trainer.weights,
            trainer.rows,
            raise_hook=lambda name, **arguments: getattr(cell, name)(trainer, model, **arguments),
            gathers=lambda: True,
            needs=lambda: cell.needs,
            agree=trainer.processes.agree,
            placement=trainer.memory.placement,
        ).fork()
        loop.run()

    def _cell(self, cell: PathwayPruning) -> dict[str, Any]:
        """Prune one pathway, and score the model."""
        trainer = self.trainer
        self._prune(cell)
        result: dict[str, Any] = {
            "pathway": cell.pathway,
            "pool": cell.pool_name,
            "sparsity": cell.sparsity,
        }
        if self.evaluates and trainer.processes.is_main:
            from lvlm_prune.evaluation.scores import retention

            scores = self._score(cell)
            kept = retention(scores, self._dense_scores)
            result |= {"scores": scores.to_dict(), "retention": kept.to_dict()}
        retained = f" · {100 * result['retention']['average']:.1f}% retained" if "retention" in result else ""
        trainer.say(
            f"{result['pathway']} pathway · pool {result['pool']} · {100 * cell.sparsity:g}% of "
            f"{len(cell.shapes)} Linears{retained}"
        )
        cell.pruned.clear()
        return result

    def _score_dense(self) -> None:
        if not (self.evaluates and self.trainer.processes.is_main):
            return
        from lvlm_prune.demo.benchmark import EmbeddedBenchmark

        assert self.model.folder is not None
        disable_progress_bar()
        self._whole = AutoModelForImageTextToText.from_pretrained(self.model.folder.path, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(self.model.folder.path)
        self._questions = EmbeddedBenchmark(self.probe.images, self.probe.texts).questions
        self._dense_scores = self._score()
        self.trainer.manifest["dense"] = self._dense_scores.to_dict()

    def _score(self, cell: PathwayPruning | None = None) -> Scores:
        """The embedded model on its benchmark, one pathway pruned."""
        from lvlm_prune.evaluation.exact_match import score

        with routed(self._whole, {} if cell is None else cell.pruned, "text" if cell is None else cell.pathway):
            return score(self._whole, self._processor, self._questions)

    def _finish(self) -> None:
        trainer, manifest = self.trainer, self.trainer.manifest
        manifest["seconds"] = time.perf_counter() - self.started
        if not trainer.processes.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if trainer.run_config is not None:
            config = yaml.safe_dump(dict(trainer.run_config), sort_keys=False)
            replace_durably(self.folder / "config.yaml", config.encode())
        manifest.write(self.folder, RECORD_NAME)
        table = grid_markdown(manifest)
        if table:
            replace_durably(self.folder / "probe.md", table.encode())
        write_page(self.folder, *probe_page(manifest))
        trainer.say(
            (table + "\n" if table else "") + f"wrote {self.folder} ({PAGE_NAME} · {RECORD_NAME}) · "
            f"{manifest['seconds']:.0f} s"
        )
