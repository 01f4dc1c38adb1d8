"""The Trainer: Lightning's, with `prune`, `recover`, `evaluate`, `compare`, `probe` and `sweep` beside `fit`.

prune()  check everything ─► launch processes ─► catch block-0 inputs ─► block loop ─► verify, report
         (nothing written)                       (rank r takes its share of the samples)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import Tensor

from lvlm_prune.activations import SampleRow, row_of_tower, rows_of
from lvlm_prune.blocks import (
    IMAGE,
    MODALITIES,
    VIDEO,
    CaughtBatch,
    CheckpointFolder,
    Part,
    StreamedWeights,
    TowerRunner,
    Weights,
    modality_of_tokens,
)
from lvlm_prune.callbacks import (
    BlockMetrics,
    BlockwisePruning,
    EmbeddedEvaluation,
    PluginSurvey,
    PruneProgressBar,
    PruningReport,
    RetentionEvaluation,
    SparseCheckpointWriter,
)
from lvlm_prune.data import (
    CalibrationBatch,
    CalibrationDataModule,
    RecoveryDataModule,
    fingerprint,
    load_processor,
)
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.footprint import BatchSize, Method
from lvlm_prune.hidden_states import Wanted, checked_place
from lvlm_prune.interruption import interruptible
from lvlm_prune.launching import Joined, Launch
from lvlm_prune.loop import BlockLoop
from lvlm_prune.manifest import FILE_NAME, Manifest
from lvlm_prune.measuring import Stopwatch
from lvlm_prune.module import LVLMModule
from lvlm_prune.output_folder import choose_folder
from lvlm_prune.planning import Plan, make_plan
from lvlm_prune.plugins import describe, own_instance
from lvlm_prune.processes import Processes
from lvlm_prune.recovery.distillation import Distillation
from lvlm_prune.recovery.optimization import Optimization
from lvlm_prune.recovery.reconstruction import Reconstruction
from lvlm_prune.report.picture import Picture, picture_of
from lvlm_prune.run_memory import RunMemory
from lvlm_prune.sharing import CaughtSamples, SharedCalibration, survey_key
from lvlm_prune.survey import surveyed_samples
from lvlm_prune.sweep.results import FinishedRun


class LVLMTrainer(L.Trainer):
    """Lightning's Trainer with the verbs of this project.

    Attributes:
        manifest: What was done so far; becomes `pruning.json`.
        rows: The calibration samples of this process.
        sample_numbers: Numbers of the calibration samples of all processes, ascending.
        processes: All processes of the run.
        picture: One calibration sample whose visual tokens can be drawn; None where there is none.
        recorded: Tensors that callbacks want written to `statistics.safetensors`.
        run_config: The configuration that repeats the run, as plain data.
        memory: Memory of this process, and where its samples wait.
        exits_when_interrupted: Whether Ctrl-C may end the whole process where the run does not end at once.
        shared: What this run has in common with others of a sweep; None: it is the only one.

    Args:
        hidden_states: Where hidden states and what else belongs to a calibration sample wait for their turn: on the
            `device`, in `host` memory, or on `disk` in memory-mapped files. `auto` takes the first of these with room.
        scratch: Folder on the disk for memory-mapped files, which are nameless and vanish with the process; default:
            the disk of the output folder.
        options: Those of Lightning's Trainer.
    """

    callbacks: list[Callback]
    manifest: Manifest
    rows: list[SampleRow]
    sample_numbers: list[int]
    processes: Processes
    weights: Weights
    recorded: dict[str, Tensor]
    picture: Picture | None = None
    run_config: Mapping[str, Any] | None = None
    output_folder: Path | None = None
    resume_run: bool = False
    evaluate_run: bool = True
    report_run: bool = True
    quiet: bool = False
    memory: RunMemory
    exits_when_interrupted: bool = False
    shared: SharedCalibration | None = None

    def __init__(self, hidden_states: Wanted = "auto", scratch: str = "", **options: Any) -> None:
        self.hidden_states, self.scratch = checked_place(hidden_states), scratch
        if scratch and not os.access(scratch, os.W_OK | os.X_OK):
            raise InputError("trainer.scratch", scratch, "is not a folder that can be written")
        super().__init__(**options)

    def prune(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
        report: bool = True,
        plan: bool = False,
    ) -> Manifest:
        """Prune a checkpoint block by block and write a sparse one.

        Args:
            model: The model to prune.
            datamodule: The calibration set.
            output: Folder to write, new or empty. Default: `runs/<model>-<method>-<sparsity>`. A model that is already
                in memory is pruned in place and nothing is written.
            resume: Go on with the unfinished run in `output`.
            evaluate: Score the embedded model before and after on the embedded benchmark (other models are not scored).
            report: Write `report.html` and its figures.
            plan: Only say what would be pruned and what memory and disk that needs; write nothing.

        Returns:
            The manifest; empty after a plan.
        """
        started = time.perf_counter()
        self.resume_run, self.evaluate_run, self.report_run = resume, evaluate, report
        self._forget_samples()
        callbacks = self._prune_callbacks()
        launch = Launch(self, callbacks) if self.shared is None else Joined(self, callbacks, self.shared.launch)
        self.processes = launch.processes
        at_once = self.exits_when_interrupted and self.shared is None
        with interruptible(self._way_on, at_once, launch), launch.together():
            try:
                if launch.joins:
                    launch.start()
                finished = self._prepare(launch.fabric, model, datamodule, callbacks, output)
                if finished is None and not plan:
                    launch.start()
                self.processes = launch.processes
                with self._watched_memory() as self.memory:
                    if plan:
                        self.say(str(self._plan(model, datamodule, callbacks)))
                    else:
                        self._carry_out(launch.fabric, model, datamodule, callbacks, finished, started)
            except BaseException as error:
                self._raise_hook(launch.fabric, model, "on_exception", exception=error)
                raise
            finally:
                self._raise_hook(launch.fabric, model, "teardown", stage="prune")
        return self.manifest

    def recover(
        self,
        model: LVLMModule,
        datamodule: RecoveryDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
        report: bool = True,
        method: Literal["lora", "full", "blockwise"] = "lora",
        optimization: Optimization = Optimization(),  # noqa: B008  (jsonargparse shows its fields; never changed)
        dense: str = "",
        distillation: Distillation = Distillation(),  # noqa: B008
        reconstruction: Reconstruction = Reconstruction(),  # noqa: B008
    ) -> Manifest:
        """Train a pruned checkpoint to give back accuracy; every pruned weight stays zero.

        Args:
            model: The pruned model. The embedded one is dense and is pruned by ATV to 70% first.
            datamodule: What to train and to validate on.
            output: Folder to write, new or empty. Default: `runs/<model>-recovered`.
            resume: Go on with the unfinished run in `output`, from its last validation.
            evaluate: Score the embedded model before and after on the embedded benchmark (other models are not scored).
            report: Write `report.html` and its figures.
            method: Train sparse LoRA adapters on answers, or the pruned Linears themselves (`full`); or fit the
                adapters of each block to the dense block's outputs, one block in memory at a time (`blockwise`).
            optimization: Learning rate and its schedule.
            dense: Dense checkpoint, for distillation and `blockwise`. Default: the one that the pruned model's record
                names.
            distillation: How far the dense model's own answers count in the loss.
            reconstruction: How the adapters of a block are fitted.

        Returns:
            The record: what was trained, on what, with what result; also `recovery.json` in the output folder.
        """
        from lvlm_prune.recovery.blockwise import BlockwiseRun
        from lvlm_prune.recovery.fitting import FittingRun
        from lvlm_prune.recovery.run import Recipe, RecoveryRun

        recipe = Recipe(method, optimization, dense, distillation, reconstruction)
        kind: type[RecoveryRun] = BlockwiseRun if method == "blockwise" else FittingRun
        run = kind(self, model, datamodule, recipe, output, resume, evaluate, report)
        self.output_folder = run.folder
        return run()

    def probe(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
    ) -> Manifest:
        """Split QKV and feed-forward Linears into a text and a visual pathway, and see what pruning each one costs.

        Args:
            model: The dense model; it is not changed, and no checkpoint is written.
            datamodule: The calibration set, with text and visual tokens.
            output: Folder to write, new or empty. Default: `runs/<model>-probe`.
            resume: Go on with the unfinished probe in `output`, behind its last finished cell.
            evaluate: Score every cell of the grid on the embedded model (other models are not scored).

        Returns:
            What was found; also `probe.json` in the output folder, beside `report.html`.
        """
        from lvlm_prune.probing.run import ProbeRun

        return ProbeRun(self, model, datamodule, output, resume, evaluate)()

    def _prepare(
        self,
        fabric: Fabric,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        callbacks: list[Callback],
        output: str,
    ) -> Manifest | None:
        """Check everything that can be checked before any work, on each process by itself.

        Returns:
            The manifest of a finished run that is asked to go on; None where there is something to do.
        """
        model.open()
        datamodule.setup("prune")
        self.output_folder = self._output_folder(model, output, callbacks) if model.folder is not None else None
        finished = self._finished_run(model, datamodule) if self.resume_run else None
        if self._needs_samples(callbacks) and datamodule.source.needs_processor and model.processor is None:
            assert model.folder is not None
            model.processor = load_processor(model.folder.path, model.trust_remote_code)
        self._raise_hook(fabric, model, "setup", stage="prune")
        return finished

    def _carry_out(
        self,
        fabric: Fabric,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        callbacks: list[Callback],
        finished: Manifest | None,
        started: float,
    ) -> None:
        if finished is None:
            # A folder that is named after what is there already may be another one on each process.
            self.output_folder = self.processes.on_main(lambda: self.output_folder)
            self._prune(fabric, model, datamodule, callbacks)
            self.manifest["seconds"] = time.perf_counter() - started
        else:
            self.manifest = finished
            self.say(f"{self.output_folder} is complete already")
        self._raise_hook(fabric, model, "on_prune_end")

    def sweep(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        recipes: list[str] | str = [],  # noqa: B006
        grid: dict[str, Any] = {},  # noqa: B006
        seeds: list[int] | int | None = None,
        engine: Engine = lazy_instance(BuiltinEngine),
        output: str = "",
        part: str = "",
        keep: bool = False,
        across: str = "",
    ) -> list[FinishedRun]:
        """Prune with every combination of recipes, options and seeds, score each, and write one table and one figure.

        Samples are caught, and the dense model is surveyed, once for all runs on the same calibration set. The same
        command goes on where an earlier one stopped, with whatever of a changed grid is finished already.

        Args:
            model: The model to prune.
            datamodule: The calibration set.
            recipes: YAML files like those in `configs/prune`, or patterns of such; their `pruning` key is read.
                Default: ATV.
            grid: Option to vary -> its values, `{pruning.sparsity: [0.5, 0.6], pruning.pool.alpha: [1, 2]}`; any option
                under `pruning` or `data`. A recipe that does not know an option runs without it.
            seeds: Calibration seeds. Default: that of `data`.
            engine: What scores the checkpoints.
            output: Folder to write, new, empty or of an earlier sweep. Default: `runs/<model>-sweep`.
            part: `1/2` does the first half of the runs; several processes can share a folder in this way, and the last
                one, or the command without `part`, writes the whole table.
            keep: Keep the pruned checkpoints, with their reports, under `checkpoints`.
            across: Option that the columns of the table and the figure's axis stand for. Default: the sparsity.

        Returns:
            The finished runs of the grid.
        """
        from lvlm_prune.sweep.grid import Grid
        from lvlm_prune.sweep.run import SweepRun

        points = Grid.of(recipes, grid, seeds, datamodule)
        return SweepRun(self, model, points, own_instance(engine), output, part, keep, across)()

    def evaluate(
        self,
        model: LVLMModule,
        baseline: str = "",
        engine: Engine = lazy_instance(BuiltinEngine),
        output: str = "",
    ) -> dict[str, Any]:
        """Score a checkpoint, and tell what is left of the scores of the dense one.

        Args:
            model: The checkpoint, for example a pruned one.
            baseline: Folder or hub id of the dense checkpoint. Default: none, and so no retention.
            engine: What scores checkpoints: the built-in engine, or a harness in an interpreter of its own.
            output: Folder for `evaluation.json` and `evaluation.md`, new, empty or of an earlier evaluation. Default:
                the checkpoint's own where `prune` or `recover` wrote it, so that its report shows the retention; else
                `runs/<model>-evaluation`.

        Returns:
            What was found; also `evaluation.json`.
        """
        from lvlm_prune.evaluation.run import EvaluationRun

        return EvaluationRun(self, model, baseline, own_instance(engine), output)()

    @staticmethod
    def compare(folders: list[str], output: str = "") -> dict[str, Any]:
        """Hold output folders of prune and recover side by side.

        Settings that differ, sparsity per block, overlap of the kept weights, and scores where there are any.

        Args:
            folders: Two or more folders.
            output: Folder for `report.html`, `compare.json` and `compare.md`, new, empty or of an earlier comparison.
                Default: the tables are only printed.

        Returns:
            What was found; also `compare.json`.
        """
        from lvlm_prune.comparison.run import compare

        return compare(folders, output)

    def _prune(
        self, fabric: Fabric, model: LVLMModule, datamodule: CalibrationDataModule, callbacks: list[Callback]
    ) -> None:
        self.weights = model.weights(fabric.device)
        self.manifest.update(self._provenance(model, datamodule))
        self.manifest["catch_seconds"] = 0.0
        finished = self._finished_blocks()
        *towers, last = model.parts
        started = False
        for part in [*(tower for tower in towers if not finished.issuperset(tower.numbers)), last]:
            clock = Stopwatch()
            if self._needs_samples(callbacks):
                self._catch(fabric, model, datamodule, callbacks, part)
            self._settle(model, callbacks, part)
            self.manifest["catch_seconds"] += clock.lap()
            if not started:
                self._raise_hook(fabric, model, "on_prune_start")
                started = True
            if self._surveys(callbacks):
                self._survey(fabric, model, callbacks)
            self._prune_part(fabric, model, callbacks, part)

    def _prune_part(self, fabric: Fabric, model: LVLMModule, callbacks: list[Callback], part: Part) -> None:
        """Prune the blocks that the samples are at, but for those that an interrupted run finished."""
        weights = self._weights_of(part)
        loop = BlockLoop(
            part,
            weights,
            self.rows if self._gathers(callbacks) else [],
            raise_hook=lambda name, **arguments: self._raise_hook(fabric, model, name, **arguments),
            gathers=lambda: self._gathers(callbacks),
            needs=lambda: _needs(callbacks, "needs"),
            agree=self.processes.agree,
            placement=self.memory.placement,
        )
        done = [index - part.first for index in self.manifest.finished_blocks() if index in part.numbers]
        loop.run(done, load_done=lambda place: weights.load_block(place, self._written(model)))

    def _weights_of(self, part: Part) -> Weights:
        return self.weights if part.target == "language" else self.weights.of(part.runner.decoder)

    def _written(self, model: LVLMModule) -> CheckpointFolder | None:
        """The checkpoint as far as it is pruned; None for a model in memory."""
        if model.folder is None or self.output_folder is None:
            return None
        return model.folder.at(self.output_folder)

    def _finished_blocks(self) -> set[int]:
        """Blocks that an interrupted run finished, where it is to go on."""
        if not self.resume_run or self.output_folder is None or not self._is_resumable():
            return set()
        return set(Manifest.read(self.output_folder).finished_blocks())

    def _plan(self, model: LVLMModule, datamodule: CalibrationDataModule, callbacks: list[Callback]) -> Plan:
        """What would be pruned. Calibration samples are read, for their lengths; weights are not.

        Raises:
            InputError: The model is in memory already, or no callback prunes.
        """
        weights = model.weights(torch.device("cpu"))
        pruning = next((callback for callback in callbacks if isinstance(callback, BlockwisePruning)), None)
        if not isinstance(weights, StreamedWeights) or pruning is None:
            raise InputError("plan", "true", "is for checkpoint folders and a pruning method")
        sizes: list[BatchSize] = []
        if self._needs_samples(callbacks):
            batches = datamodule.calibration_batches(model.processor, 0, self.world_size)
            sizes = [BatchSize.of(batch.inputs, model.model.config, pruning.visual) for batch in batches]
        targets = pruning.targets or dict.fromkeys(pruning.shapes, pruning.sparsity)
        footprints = []
        for part in model.parts:
            in_tower = [each for size in sizes for each in size.samples_in_tower()]
            self.memory.sizes = in_tower if part.target == "vision" else sizes
            footprints.append(self.memory.predict(model, part, self._method(pruning, callbacks)))
        return make_plan(model, weights, targets, pruning.shapes, footprints)

    def _is_resumable(self) -> bool:
        return self.output_folder is not None and (self.output_folder / FILE_NAME).is_file()

    def _way_on(self) -> str:
        return f"go on with --resume true --output {self.output_folder}" if self._is_resumable() else ""

    def _survey(self, fabric: Fabric, model: LVLMModule, callbacks: list[Callback]) -> None:
        """Look at the dense model before any block is pruned, unless an interrupted run already did.

        Findings are in `manifest["survey"]` afterwards, and the samples are where they were: at the input of block 0.
        """
        key = self._survey_key(callbacks)
        if key is not None and self.shared is not None and (found := self.shared.take_survey(key)) is not None:
            self.manifest["survey"] = found
        if self.manifest.get("survey"):
            self._raise_hook(fabric, model, "on_survey_restored")
            return
        clock = Stopwatch()
        self.manifest["survey"] = {}
        surveying = [callback for callback in callbacks if getattr(callback, "wants_survey", False)]
        counts = [getattr(callback, "survey_samples", None) for callback in surveying]
        wanted = frozenset().union(*(surveyed_samples(count, self.sample_numbers) for count in counts))
        loop = BlockLoop(
            model.parts[-1],
            self.weights,
            [row for row in self.rows if row.sample in wanted],
            raise_hook=lambda name, **arguments: self._raise_hook(fabric, model, name, **arguments),
            gathers=lambda: True,
            needs=lambda: _needs(callbacks, "survey_needs"),
            agree=self.processes.agree,
            placement=self.memory.placement,
        ).fork()
        self._raise_hook(fabric, model, "on_survey_start")
        forwards = self.processes.sum(torch.tensor([float(loop.survey())], dtype=torch.float64))
        self.manifest["survey"] |= {"block_forwards": int(forwards.item()), "seconds": clock.lap()}
        self._raise_hook(fabric, model, "on_survey_end")
        if key is not None and self.shared is not None:
            self.shared.keep_survey(key, self.manifest["survey"])

    def _survey_key(self, callbacks: list[Callback]) -> str | None:
        """What the survey depends on; None where that is not known."""
        asking = [callback for callback in callbacks if getattr(callback, "wants_survey", False)]
        plugins = [name for callback in asking if isinstance(callback, PluginSurvey) for name in callback.surveyors]
        options = (self.run_config or {}).get("pruning")
        if options is None or not all(isinstance(callback, PluginSurvey) for callback in asking):
            return None
        return survey_key(options, plugins)

    def _finished_run(self, model: LVLMModule, datamodule: CalibrationDataModule) -> Manifest | None:
        """The manifest of the output folder if nothing is left to do there but, at most, evaluation and report.

        Raises:
            InputError: The folder holds the result of another run.
        """
        if not self._is_resumable():
            return None
        assert self.output_folder is not None
        found = Manifest.read(self.output_folder)
        if found.get("status") != "complete":
            return None
        now = self._provenance(model, datamodule)
        found.refuse_other({**now, "calibration": found["calibration"]}, self.output_folder)
        found.setdefault("seconds", 0.0)
        return found

    def _catch(
        self,
        fabric: Fabric,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        callbacks: list[Callback],
        part: Part,
    ) -> None:
        """Run everything before the first block of `part` for this process' samples; afterwards the rest can go.

        What comes before it may be pruned already.
        """
        self.rows = []
        self.memory.forget()
        if self.shared is not None and self.shared.samples is not None:
            taken = self.shared.samples.fork()
            self.rows, self.sample_numbers = taken.rows, taken.numbers
            self.manifest["calibration"], self.picture = taken.calibration, taken.picture
            caught = {id(row.batch): row.batch for row in self.rows}.values()
            for held, size in zip(caught, taken.sizes, strict=True):
                self.memory.hold(held, size)
            return
        digests: dict[int, str] = {}
        tokens = torch.zeros(len(MODALITIES), dtype=torch.float64)
        error: BaseException | None = None
        weights = self._weights_of(part)
        weights.load_frame(self._written(model) if part.first > 0 else None)
        in_tower = part.target == "vision"
        try:
            ranks = (self.processes.rank, self.processes.count)
            # In a tower nothing tells the images of several samples apart.
            batch_size = 1 if in_tower else None
            for batch in datamodule.calibration_batches(model.processor, *ranks, batch_size=batch_size):
                catch = self._catch_calls if in_tower else self._catch_batch
                rows = catch(fabric, model, batch, part)
                size = BatchSize.of(batch.inputs, model.model.config, self._visual(callbacks))
                for one in {id(row.batch): row.batch for row in rows}.values():
                    self.memory.hold(one, size.in_tower(one.token_shape[1]) if in_tower else size)
                self.rows += rows
                modality = modality_of_tokens(
                    model.model.config, batch.inputs["input_ids"], batch.inputs.get("attention_mask")
                )
                tokens += torch.bincount(modality[modality >= 0], minlength=len(MODALITIES)).cpu()
                self.picture = self.picture or _first_picture(batch, modality, model.model.config)
                digests.update(zip(batch.indices, batch.digests, strict=True))
        except Exception as problem:
            error = problem
        self.processes.agree(error)
        weights.release_frame(not in_tower and any(row.batch.needs_token_embedding for row in self.rows))
        everywhere = {index: value for part in self.processes.gather(digests) for index, value in part.items()}
        self.sample_numbers = numbers = sorted(everywhere)
        if not numbers:
            raise RunError("no calibration sample could be read; every one was skipped")
        shares = dict(zip(numbers, datamodule.sample_weights(numbers)))
        self.rows = [replace(row, weight=shares[row.sample]) for row in self.rows]
        summed = self.processes.sum(tokens).tolist()
        self.manifest["calibration"] |= {
            "num_samples": len(numbers),
            "fingerprint": fingerprint(everywhere[number] for number in numbers),
            "skipped": [item for part in self.processes.gather(datamodule.skipped) for item in part],
            "tokens": {name: int(count) for name, count in zip(MODALITIES, summed) if count},
        }
        pictures = [picture for picture in self.processes.gather(self.picture) if picture is not None]
        self.picture = min(pictures, key=lambda picture: picture.sample, default=None)
        if self.shared is not None:
            samples = CaughtSamples(self.rows, self.memory.sizes, numbers, self.manifest["calibration"], self.picture)
            self.shared.samples = samples.fork()

    @torch.no_grad()
    def _catch_batch(
        self, fabric: Fabric, model: LVLMModule, batch: CalibrationBatch, part: Part | None = None
    ) -> list[SampleRow]:
        caught = model.runner.catch(_on_device(batch, fabric, model))
        _refuse_not_finite(caught, batch)
        return rows_of(caught, model.model.config, batch.indices)

    @torch.no_grad()
    def _catch_calls(self, fabric: Fabric, model: LVLMModule, batch: CalibrationBatch, part: Part) -> list[SampleRow]:
        assert isinstance(part.runner, TowerRunner)
        calls = part.runner.catch_calls(_on_device(batch, fabric, model))
        for caught, _ in calls:
            _refuse_not_finite(caught, batch)
        return [row_of_tower(caught, batch.indices[0], modality) for caught, modality in calls]

    def _forget_samples(self) -> None:
        """Nothing done yet, no sample caught."""
        self.manifest, self.recorded, self.rows, self.sample_numbers = Manifest(), {}, [], []
        self.picture = None

    # ---- memory ------------------------------------------------------------------------------------------------------
    def _watched_memory(self) -> RunMemory:
        """Look at memory from now on; the output folder is known."""
        device = self.strategy.root_device
        return RunMemory(self.hidden_states, device, self.scratch, self.output_folder, sharing=self.num_devices)

    def _settle(self, model: LVLMModule, callbacks: list[Callback], part: Part) -> None:
        """Choose where the samples wait, now that their sizes are known, and note what memory the run will need."""
        pruning = next((callback for callback in callbacks if isinstance(callback, BlockwisePruning)), None)
        if pruning is not None:
            method, earlier = self._method(pruning, callbacks), self.manifest.get("memory", {})
            self.manifest["memory"] = self.memory.settle(model, part, method, earlier)

    def _method(self, pruning: BlockwisePruning, callbacks: list[Callback]) -> Method:
        """What takes memory of what the callbacks do."""
        return Method(
            pruning.pool if pruning.wants_activations else None,
            pruning.scorer,
            _needs(callbacks, "needs"),
            self._surveys(callbacks),
            _needs(callbacks, "survey_needs"),
            pruning.prunes_experts,
        )

    @staticmethod
    def _visual(callbacks: list[Callback]) -> list[str]:
        return next((one.visual for one in callbacks if isinstance(one, BlockwisePruning)), ["image", "video"])

    # ---- composition of the run --------------------------------------------------------------------------------------
    def _prune_callbacks(self) -> list[Callback]:
        """The user's callbacks, then survey, writer, progress bar, evaluation, metrics, report; each unless given.

        The survey comes before the writer, which keeps what was found.
        """
        given: list[Callback] = [callback for callback in self.callbacks if not isinstance(callback, ProgressBar)]
        # Only what is written and verified can be scored.
        evaluations = [callback for callback in given if isinstance(callback, RetentionEvaluation)]
        given = [callback for callback in given if callback not in evaluations]
        tail: list[Callback] = [SparseCheckpointWriter(), *(evaluations or [EmbeddedEvaluation()]), BlockMetrics()]
        tail.append(PruningReport())
        if isinstance(self.progress_bar_callback, PruneProgressBar):
            tail.insert(1, self.progress_bar_callback)
        elif self.progress_bar_callback is not None:  # Lightning's default bar knows nothing of pruning
            tail.insert(1, PruneProgressBar())
        tail = [PluginSurvey(callback) for callback in given if isinstance(callback, BlockwisePruning)] + tail
        return given + [callback for callback in tail if not any(isinstance(one, type(callback)) for one in given)]

    @staticmethod
    def _gathers(callbacks: list[Callback]) -> bool:
        return any(getattr(callback, "wants_activations", False) for callback in callbacks)

    @staticmethod
    def _surveys(callbacks: list[Callback]) -> bool:
        return any(getattr(callback, "wants_survey", False) for callback in callbacks)

    @classmethod
    def _needs_samples(cls, callbacks: list[Callback]) -> bool:
        return cls._gathers(callbacks) or cls._surveys(callbacks)

    def _raise_hook(self, fabric: Fabric, model: LVLMModule, name: str, **arguments: Any) -> None:
        fabric.call(name, trainer=self, pl_module=model, **arguments)

    def say(self, text: str) -> None:
        """Print for the user, once for all processes."""
        if self.processes.is_main and not self.quiet:
            print(text, flush=True)

    def accelerator_name(self) -> str:
        """`cpu`, `cuda` or `mps`."""
        return self.strategy.root_device.type

    def _output_folder(self, model: LVLMModule, output: str, callbacks: list[Callback]) -> Path:
        label = next((callback.run_label() for callback in callbacks if hasattr(callback, "run_label")), "pruned")
        return choose_folder(output, f"{model.label}-{label}", self.resume_run)

    def _provenance(self, model: LVLMModule, datamodule: CalibrationDataModule | RecoveryDataModule) -> dict[str, Any]:
        """What the run starts from, for the manifest."""
        import lightning
        import transformers

        import lvlm_prune

        source: dict[str, Any] = {"path": model.path, "class": type(model.model).__name__}
        if model.folder is not None:
            source |= {"folder": str(model.folder.path), "fingerprint": model.folder.fingerprint()}
        return {
            "config": describe(self.run_config or {"model": model, "data": datamodule}),
            "model": source | {"dtype": str(model.compute_dtype).removeprefix("torch.")},
            "calibration": {"source": describe(datamodule.source), "seed": datamodule.seed},
            "versions": {
                "lvlm_prune": lvlm_prune.__version__,
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "transformers": transformers.__version__,
            },
            "processes": self.world_size,
            "device": str(self.strategy.root_device),
        }


def _needs(callbacks: list[Callback], name: str) -> frozenset[str]:
    """What any of the callbacks wants recorded of a forward."""
    return frozenset().union(*(getattr(callback, name, ()) for callback in callbacks))


def _on_device(batch: CalibrationBatch, fabric: Fabric, model: LVLMModule) -> dict[str, Tensor]:
    return {
        name: value.to(fabric.device, model.compute_dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.inputs.items()
    }


def _refuse_not_finite(caught: CaughtBatch, batch: CalibrationBatch) -> None:
    if not torch.isfinite(caught.hidden).all():
        samples = ", ".join(map(str, batch.indices))
        raise RunError(f"NaN or infinity before the first block for calibration sample {samples}")


def _first_picture(batch: CalibrationBatch, modality: Tensor, config: Any) -> Picture | None:
    """Of the samples of a batch, the first one whose visual tokens have known places."""
    for number, sample in enumerate(batch.indices):
        images, videos = (int((modality[number] == code).sum()) for code in (IMAGE, VIDEO))
        found = None if videos else picture_of(batch.inputs, number, sample, images, config)
        if found is not None:
            return found
    return None
