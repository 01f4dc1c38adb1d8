"""One probe: a survey of the dense model, then every cell of the grid, then the page.

check ─► catch block-0 inputs ─► dense model scored ─► surveyed ─► for each cell: prune one pathway ─► scores ─► page
                                                       masks, map    block by block, as `prune` does
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning.fabric import Fabric

from lvlm_prune.clock import command_began
from lvlm_prune.data import CalibrationDataModule, MixtureSource
from lvlm_prune.demo import NAMES
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError
from lvlm_prune.loop import BlockLoop
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.folder import (
    choose_folder,
    refuse_unusable,
    way_on_of_command,
    write_config,
    writing,
)
from lvlm_prune.output.locking import claim
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.names import FIGURE_FOLDER, PAGE_NAME, PROBE_RECORD
from lvlm_prune.output.own_files import digest_of_json, records_of, refuse_changed
from lvlm_prune.output.provenance import provenance
from lvlm_prune.output.units import readable_percent
from lvlm_prune.plugins import describe, mounted, plugin_class
from lvlm_prune.report.page import read_from, write_page
from lvlm_prune.report.probe import grid_markdown, probe_page, summarise
from lvlm_prune.run import Run, RunOptions, RunTrainer, described_config
from lvlm_prune.runs.probe.pathways import PathwayPruning
from lvlm_prune.runs.prune.participants import Participants
from lvlm_prune.runs.prune.stream import CalibrationStream
from lvlm_prune.runs.session import join, prepare_source, session
from lvlm_prune.threads import suitable_threads

if TYPE_CHECKING:
    from lvlm_prune.callbacks import ModalityProbe
    from lvlm_prune.evaluation.engine import Engine
    from lvlm_prune.evaluation.scores import Scores
    from lvlm_prune.runs.probe.scoring import CellScoring

# What a resumed probe takes from the record that an interrupted one left.
_FINDINGS = ("survey", "blocks", "linears", "map", "contributions", "dense", "grid")

# Where a model with two pathways lies while an engine scores it.
_SCRATCH = "unfinished"


class ProbeRun:
    """See `LVLMTrainer.probe` for the arguments.

    Args:
        probe: What to look at; default: the trainer's callback.
        engine: What scores the cells instead of the embedded benchmark; with it any model is scored.

    Attributes:
        check_dense: Refuses scores of the dense model that will not do, before anything is surveyed or pruned; for
            engines, which score on every process.
    """

    check_dense: Callable[[Scores], None] | None = None

    def __init__(
        self,
        trainer: RunTrainer,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str,
        resume: bool,
        evaluate: bool,
        probe: ModalityProbe | None = None,
        engine: Engine | None = None,
    ) -> None:
        from lvlm_prune.callbacks import ModalityProbe

        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        given = probe or next((callback for callback in trainer.callbacks if isinstance(callback, ModalityProbe)), None)
        self.probe: ModalityProbe = given or ModalityProbe()
        self.folder, self.resume = choose_folder(output, f"{model.label}-probe", resume), resume
        self.evaluates = evaluate and (engine is not None or model.path in NAMES)
        self.engine = engine
        self.scoring: CellScoring | None = None
        config = trainer.config or described_config(model, datamodule, probing=self.probe)
        self.run = Run(RunOptions(resume, evaluate), config, Hardware.of(trainer), [self.probe], folder=self.folder)
        self.started = command_began()

    def __call__(self) -> Manifest:
        """Probe, or go on with what an interrupted probe left.

        Raises:
            InputError: Something does not fit; nothing was written.
        """
        run, model, data = self.run, self.model, self.datamodule
        model.refuse_vision("probe")
        model.open()
        refuse_unusable(
            self.folder, model.folder, PROBE_RECORD, self.resume, copies=False, scratch=_SCRATCH, private=False
        )
        earlier = Manifest.read(self.folder, PROBE_RECORD) if self.resume else None
        data.setup("prune")
        prepare_source(model, data.source)
        cells = [
            PathwayPruning(pathway, pool, sparsity, self.probe.scorer, self.probe.visual)
            for sparsity, pathway, pool in product(self.probe.sparsities, self.probe.pathways, self.probe.pools)
        ]
        names = PathwayPruning("text", "text", 0.5, self.probe.scorer, self.probe.visual)
        names.plan(model)
        self.probe.targets = {name: name for name in names.shapes}
        for cell in cells:
            cell.plan(model)
        launch = Launch(run.hardware, [self.probe])
        with session(self.trainer, run, launch, self._way_on):
            join(run, launch)
            if earlier is not None and earlier.get("status") == "complete":
                now = self._provenance()
                earlier.refuse_other({**now, "calibration": earlier["calibration"]}, self.folder, PROBE_RECORD)
                run.say(f"{self.folder} is complete already")
                self._verify_again(earlier)
                return earlier
            threads = suitable_threads(model.block_weights, run.hardware.devices)
            with self.trainer.watched_memory() as run.memory, threads:
                self._measure(launch.fabric, names, cells, earlier)
        return run.record

    def _way_on(self) -> str:
        started = (self.folder / PROBE_RECORD).is_file()
        return way_on_of_command(f"go on with --resume true --output {self.folder}" if started else "")

    def _measure(
        self, fabric: Fabric, names: PathwayPruning, cells: list[PathwayPruning], earlier: Manifest | None
    ) -> None:
        run, model, data, manifest = self.run, self.model, self.datamodule, self.run.record
        run.weights = model.weights(fabric.device)
        manifest.update(self._provenance() | {"probe": describe(self.probe), "grid": []})

        def raise_hook(name: str, **arguments: Any) -> None:
            with mounted(probing=self.probe):
                fabric.call(name, trainer=self.trainer, pl_module=model, **arguments)

        stream = CalibrationStream(run, model, data, Participants([self.probe, names]), fabric.device, raise_hook)
        stream.catch(model.parts[-1])
        if earlier is not None:
            earlier.refuse_other(manifest, self.folder, PROBE_RECORD)
            manifest.update({name: earlier[name] for name in _FINDINGS if name in earlier})
        self._score_dense()
        self._note("probing")
        self.probe.set_of_sample = self._sets()
        stream.survey()
        self._note("probing")
        manifest["grid"] = self._finished(cells)
        if self.scoring is None:
            run.say(
                "no pathway is pruned: probe scores only those of the embedded model, with --evaluate true "
                "(`lvlm-prune reproduce atv/table_1` measures it of any)"
            )
        else:
            for cell in cells[len(manifest["grid"]) :]:
                manifest["grid"].append(self._cell(cell, self.scoring))
                self._note("probing")
        self._finish()

    def _provenance(self) -> dict[str, Any]:
        found = provenance(self.run.config, self.run.hardware, self.model, self.datamodule)
        asked = self.engine.fingerprint() if self.engine is not None and self.evaluates else ""
        return found | (
            {"asked": {"engine": plugin_class(self.engine).__name__, "fingerprint": asked}} if asked else {}
        )

    def _finished(self, cells: list[PathwayPruning]) -> list[dict[str, Any]]:
        """The cells that an interrupted probe finished; those of older versions without scores are made again."""
        finished = []
        for cell, found in zip(cells, self.run.record["grid"]):
            same = (found["pathway"], found["pool"], found["sparsity"]) == (cell.pathway, cell.pool_name, cell.sparsity)
            if not same or "scores" not in found:
                break
            finished.append(found)
        return finished

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
        trainer, run, model = self.trainer, self.run, self.model
        cell.on_prune_start(trainer, model)

        def raise_hook(name: str, **arguments: Any) -> None:
            with mounted(probing=self.probe):
                getattr(cell, name)(trainer, model, **arguments)

        loop = BlockLoop(
            model.parts[-1],
            run.weights,
            run.samples.rows,
            raise_hook=raise_hook,
            gathers=lambda: True,
            needs=lambda: cell.needs,
            agree=run.processes.agree,
            placement=run.memory.placement,
            device=trainer.strategy.root_device,
        ).fork()
        loop.run()

    def _cell(self, cell: PathwayPruning, scoring: CellScoring) -> dict[str, Any]:
        """Prune one pathway, and score the model."""
        run = self.run
        self._prune(cell)
        result: dict[str, Any] = {
            "pathway": cell.pathway,
            "pool": cell.pool_name,
            "sparsity": cell.sparsity,
        }
        scores = scoring.cell(cell)
        if scores is not None:
            from lvlm_prune.evaluation.scores import Scores, retention

            kept = retention(scores, Scores.from_dict(run.record["dense"]))
            result |= {"scores": scores.to_dict(), "retention": kept.to_dict()}
        retained = f" · {100 * result['retention']['average']:.1f}% retained" if "retention" in result else ""
        run.say(
            f"{result['pathway']} pathway · pool {result['pool']} · {readable_percent(cell.sparsity)} of "
            f"{len(cell.shapes)} Linears{retained}"
        )
        cell.pruned.clear()
        return result

    def _score_dense(self) -> None:
        if not self.evaluates:
            return
        from lvlm_prune.runs.probe.scoring import EmbeddedScoring, EngineScoring

        assert self.model.folder is not None
        dense, probe = self.model.folder.path, self.probe
        self.scoring = (
            EmbeddedScoring(self.run, dense, probe.images, probe.texts)
            if self.engine is None
            else EngineScoring(self.run, dense, self.folder / _SCRATCH, self.engine)
        )
        if "dense" not in self.run.record:
            scores = self.scoring.dense()
            if scores is not None:
                from lvlm_prune.evaluation.scores import refuse_unanswered

                self.run.record["dense"] = refuse_unanswered(scores).to_dict()
        if self.check_dense is not None:
            from lvlm_prune.evaluation.scores import Scores

            self.check_dense(Scores.from_dict(self.run.record["dense"]))

    def _note(self, status: str) -> None:
        """Write down what is known; from here on the folder can be resumed."""
        self.run.record["status"] = status
        if self.run.processes.is_main:
            with writing(self.folder):
                if self.run.lock is None:
                    self.run.lock = claim(self.folder, PROBE_RECORD, self.resume)
                self.run.record.write(self.folder, PROBE_RECORD)

    def _verify_again(self, earlier: Manifest) -> None:
        """Nothing is to be done, but exit status 0 is to say that the folder holds what was found.

        Raises:
            InputError: A file is missing, or is not the one that was written; names it.
        """
        refuse_changed(self.folder, earlier.get("files", {}))
        if earlier.get("digest") != _digest(earlier):
            raise InputError("output", self.folder, f"{PROBE_RECORD} is not the one that was written; write elsewhere")
        self.run.say(f"verified: {1 + len(earlier['files'])} files are as they were written")

    def _take_time(self) -> None:
        self.run.record["seconds"] = time.perf_counter() - self.started

    def _finish(self) -> None:
        run, manifest = self.run, self.run.record
        self._take_time()
        if not run.processes.is_main:
            return
        table = grid_markdown(manifest)
        shutil.rmtree(self.folder / _SCRATCH, ignore_errors=True)  # of an interrupted one, where nothing is scored now
        with writing(self.folder):
            write_config(self.folder, run.config)
            if table:
                replace_durably(self.folder / "probe.md", table.encode())
            with read_from(self.folder, PROBE_RECORD, self.resume):
                page = probe_page(manifest, self._take_time)
            write_page(self.folder, *page)
            written = ("config.yaml", "probe.md", PAGE_NAME, FIGURE_FOLDER)
            manifest["files"] = records_of(self.folder, [self.folder / name for name in written])
        manifest["digest"] = _digest(manifest)
        self._note("complete")
        for sparsity, overlap in summarise(manifest)["mean_iou"].items():
            at = readable_percent(float(sparsity))
            run.say(f"masks from text and from visual tokens overlap by {overlap:.1%} at {at} sparsity")
        run.say(
            (table + "\n" if table else "") + f"wrote {self.folder} ({PAGE_NAME} · {PROBE_RECORD}) · "
            f"{manifest['seconds']:.0f} s"
        )


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of what a probe found, as its record holds it."""
    return digest_of_json({name: record[name] for name in _FINDINGS if name in record})
