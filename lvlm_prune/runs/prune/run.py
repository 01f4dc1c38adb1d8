"""One run of `prune`, from a dense checkpoint to a sparse one.

check everything ─► launch processes ─► for tower, decoder: catch the samples ─► blocks ─► verify, score, report
(nothing written)                       (rank r takes its share of the samples)            (callbacks)
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.data import CalibrationDataModule, load_processor
from lvlm_prune.distributed.interruption import interruptible
from lvlm_prune.distributed.launching import Joined, Launch
from lvlm_prune.errors import InputError
from lvlm_prune.memory.footprint import BatchSize
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.memory.planning import Plan, make_plan
from lvlm_prune.output.folder import choose_folder, free_bytes
from lvlm_prune.output.manifest import FILE_NAME, Manifest
from lvlm_prune.output.provenance import provenance
from lvlm_prune.runs.prune.participants import Demands, with_defaults
from lvlm_prune.runs.prune.stream import CalibrationStream
from lvlm_prune.threads import suitable_threads

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer


class PruneRun:
    """See `LVLMTrainer.prune` for the arguments."""

    def __init__(self, trainer: LVLMTrainer, model: LVLMModule, datamodule: CalibrationDataModule, output: str) -> None:
        self.started = time.perf_counter()
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.output = output
        trainer.forget_samples()
        self.callbacks = callbacks = with_defaults(trainer.callbacks, trainer.progress_bar_callback)
        self.demands = Demands(callbacks)
        shared = trainer.shared
        self.launch = Launch(trainer, callbacks) if shared is None else Joined(trainer, callbacks, shared.launch)
        self.raise_hook = partial(self.launch.fabric.call, trainer=trainer, pl_module=model)

    def __call__(self) -> Manifest:
        """Do all of it, or what an interrupted run left; or only say what would be done."""
        trainer, launch = self.trainer, self.launch
        trainer.processes = launch.processes
        at_once = trainer.exits_when_interrupted and trainer.shared is None
        with interruptible(self._way_on, at_once, launch), launch.together():
            try:
                if launch.joins:
                    launch.start()
                finished = self._prepare()
                if finished is None and not trainer.plan_run:
                    launch.start()
                trainer.processes = launch.processes
                with trainer.watched_memory() as trainer.memory:
                    if trainer.plan_run:
                        trainer.say(str(self._plan()))
                    else:
                        with suitable_threads(self.model.block_weights, trainer.num_devices):
                            self._carry_out(finished)
            except BaseException as error:
                self.raise_hook("on_exception", exception=error)
                raise
            finally:
                self.raise_hook("teardown", stage="prune")
        return trainer.manifest

    def _way_on(self) -> str:
        return f"go on with --resume true --output {self.trainer.output_folder}" if self._is_resumable() else ""

    def _is_resumable(self) -> bool:
        folder = self.trainer.output_folder
        return folder is not None and (folder / FILE_NAME).is_file()

    # ---- before any work ---------------------------------------------------------------------------------------------
    def _prepare(self) -> Manifest | None:
        """Check everything that can be checked before any work, on each process by itself.

        Returns:
            The manifest of a finished run that is asked to go on; None where there is something to do.
        """
        trainer, model, data = self.trainer, self.model, self.datamodule
        model.open()
        data.setup("prune")
        trainer.output_folder = None if model.folder is None else self._choose_folder()
        finished = self._finished_run() if trainer.resume_run else None
        if self.demands.samples() and data.source.needs_processor and model.processor is None:
            assert model.folder is not None
            model.processor = load_processor(model.folder.path, model.trust_remote_code)
        self.raise_hook("setup", stage="prune")
        return finished

    def _choose_folder(self) -> Path:
        label = next((callback.run_label() for callback in self.callbacks if hasattr(callback, "run_label")), "pruned")
        return choose_folder(self.output, f"{self.model.label}-{label}", self.trainer.resume_run)

    def _finished_run(self) -> Manifest | None:
        """The manifest of the output folder if nothing is left to do there but, at most, evaluation and report.

        Raises:
            InputError: The folder holds the result of another run.
        """
        folder = self.trainer.output_folder
        if folder is None or not self._is_resumable():
            return None
        found = Manifest.read(folder)
        if found.get("status") != "complete":
            return None
        now = provenance(self.trainer, self.model, self.datamodule)
        found.refuse_other({**now, "calibration": found["calibration"]}, folder)
        found.setdefault("seconds", 0.0)
        return found

    def _plan(self) -> Plan:
        """What would be pruned. Calibration samples are read, for their lengths; weights are not.

        Raises:
            InputError: The model is in memory already, or no callback prunes.
        """
        trainer, model, pruning, method = self.trainer, self.model, self.demands.pruning, self.demands.method()
        weights = model.weights(torch.device("cpu"))
        if not isinstance(weights, StreamedWeights) or pruning is None or method is None:
            raise InputError("plan", "true", "is for checkpoint folders and a pruning method")
        sizes: list[BatchSize] = []
        if self.demands.samples():
            batches = self.datamodule.calibration_batches(model.processor, 0, trainer.world_size)
            sizes = [BatchSize.of(batch.inputs, model.model.config, pruning.visual) for batch in batches]
        targets = pruning.targets or dict.fromkeys(pruning.shapes, pruning.sparsity)
        footprints = []
        for part in model.parts:
            in_tower = [each for size in sizes for each in size.samples_in_tower()]
            trainer.memory.sizes = in_tower if part.target == "vision" else sizes
            footprints.append(trainer.memory.predict(model, part, method))
        assert trainer.output_folder is not None
        free = free_bytes(trainer.output_folder)
        return make_plan(model, weights, targets, pruning.shapes, footprints, free)

    # ---- the work ----------------------------------------------------------------------------------------------------
    def _carry_out(self, finished: Manifest | None) -> None:
        trainer = self.trainer
        if finished is None:
            # A folder that is named after what is there already may be another one on each process.
            trainer.output_folder = trainer.processes.on_main(lambda: trainer.output_folder)
            self._prune()
            trainer.manifest["seconds"] = time.perf_counter() - self.started
        else:
            trainer.manifest = finished
            trainer.say(f"{trainer.output_folder} is complete already")
        self.raise_hook("on_prune_end")

    def _prune(self) -> None:
        """Prune tower by tower, then the decoder; each starts from samples that are caught behind what is done."""
        trainer, model, device = self.trainer, self.model, self.launch.fabric.device
        trainer.weights = model.weights(device)
        trainer.manifest.update(provenance(trainer, model, self.datamodule))
        trainer.manifest["catch_seconds"] = 0.0
        stream = CalibrationStream(trainer, model, self.datamodule, self.demands, device, self.raise_hook)
        finished = self._finished_blocks()
        *towers, last = model.parts
        parts = [*(tower for tower in towers if not finished.issuperset(tower.numbers)), last]
        for part in parts:
            clock = Stopwatch()
            stream.catch(part)
            trainer.manifest["catch_seconds"] += clock.lap()
            if part is parts[0]:
                self.raise_hook("on_prune_start")
            if self.demands.surveying():
                stream.survey()
            stream.prune(part)

    def _finished_blocks(self) -> set[int]:
        """Blocks that an interrupted run finished, where it is to go on."""
        folder = self.trainer.output_folder
        if not self.trainer.resume_run or folder is None or not self._is_resumable():
            return set()
        return set(Manifest.read(folder).finished_blocks())
