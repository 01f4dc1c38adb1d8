"""One run of `prune`, from a dense checkpoint to a sparse one.

check everything ─► launch processes ─► for tower, decoder: catch the samples ─► blocks ─► verify, score, report
(nothing written)                       (rank r takes its share of the samples)            (callbacks)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lvlm_prune.blocks import StreamedWeights, tokens_by_modality
from lvlm_prune.clock import command_began
from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.demo import NAMES
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Launch, SharedLaunch
from lvlm_prune.errors import InputError, first_line
from lvlm_prune.loop.catching import CaughtSamples
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.memory.planning import make_plan
from lvlm_prune.memory.sizes import BatchSize
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import first_model, record_of
from lvlm_prune.output.folder import choose_folder, free_bytes
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import PRUNING_RECORD
from lvlm_prune.output.provenance import provenance
from lvlm_prune.plugins import mounted
from lvlm_prune.pruning.input_zeros import zeros_of_input
from lvlm_prune.pruning.lines import not_finite_line
from lvlm_prune.run import Run, RunOptions, RunTrainer, described_config
from lvlm_prune.runs.prune.participants import Participants, with_defaults
from lvlm_prune.runs.prune.quality import SampleQuality
from lvlm_prune.runs.prune.sharing import SharedCalibration
from lvlm_prune.runs.prune.stream import CalibrationStream
from lvlm_prune.runs.session import ended, is_foreign, prepare_source, session, slow_products_line
from lvlm_prune.runs.unused import unused_options
from lvlm_prune.threads import suitable_threads


class PruneRun:
    """See `LVLMTrainer.prune`.

    Args:
        trainer: Its loggers and progress bar.
        model: The model to prune.
        datamodule: The calibration set.
        output: Folder to write; empty for one of its own.
        options: What the user asked for.
        callbacks: Those of the run, the method among them; default: the trainer's.
        config: What repeats the run; default: what the trainer was given, or a description of the objects.
        hardware: Devices; default: the trainer's.
        shared: What the run has in common with others on the same calibration set; None: it is the only one.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str,
        options: RunOptions,
        callbacks: Sequence[Callback] | None = None,
        config: Mapping[str, Any] | None = None,
        hardware: Hardware | None = None,
        shared: SharedCalibration | None = None,
    ) -> None:
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.output, self.shared = output, shared
        began = command_began() if shared is None else time.perf_counter()
        given = trainer.callbacks if callbacks is None else callbacks
        self.callbacks = with_defaults(given, trainer.progress_bar_callback)
        self.participants = Participants(self.callbacks)
        if config is None:
            config = trainer.config or described_config(model, datamodule, **self.participants.sections())
        hardware = hardware or Hardware.of(trainer)
        self.launch = (
            Launch(hardware, self.callbacks)
            if shared is None
            else SharedLaunch(hardware, self.callbacks, shared.launch)
        )
        self.run = Run(options, config, hardware, self.callbacks, processes=self.launch.processes, began=began)

    def __call__(self) -> Manifest:
        """Prune, or go on with what an interrupted run left; or only say what would be done."""
        run, launch = self.run, self.launch
        with (
            session(self.trainer, run, launch, self._way_on, at_once=self.shared is None),
            ended(self.raise_hook, "prune"),
        ):
            if launch.joins:
                launch.start()
            finished = self._prepare()
            if finished is None and not run.options.plan:
                launch.start()
            run.processes = launch.processes
            with self.trainer.watched_memory() as run.memory:
                if run.options.plan:
                    run.say(self._plan())
                else:
                    with suitable_threads(self.model.block_weights, run.hardware.devices):
                        self._carry_out(finished)
        return run.record

    def raise_hook(self, name: str, **arguments: Any) -> None:
        """Call a hook of all callbacks; what their plugins say against an argument names the option."""
        with mounted(pruning=self.participants.pruning):
            self.launch.fabric.call(name, trainer=self.trainer, pl_module=self.model, **arguments)

    def _way_on(self) -> str:
        return f"go on with --resume true --output {self.run.folder}" if self._is_resumable() else ""

    def _is_resumable(self) -> bool:
        folder = self.run.folder
        return folder is not None and (folder / PRUNING_RECORD).is_file()

    # ---- before any work ---------------------------------------------------------------------------------------------
    def _prepare(self) -> Manifest | None:
        """Check everything that can be checked before any work, on each process by itself.

        Returns:
            The manifest of a finished run that is asked to go on; None where there is something to do.
        """
        run, model, data = self.run, self.model, self.datamodule
        if self.participants.pruning is None:
            raise InputError("trainer.callbacks", len(self.callbacks), "callbacks, and none of them prunes")
        model.open()
        data.setup("prune")
        run.folder = None if model.folder is None else self._choose_folder()
        finished = self._finished_run() if run.options.resume else None
        if self.participants.samples():
            prepare_source(model, data.source)
        self.raise_hook("setup", stage="prune")
        return finished

    def _choose_folder(self) -> Path:
        label = next((callback.run_label() for callback in self.callbacks if hasattr(callback, "run_label")), "pruned")
        return choose_folder(self.output, f"{self.model.label}-{label}", self.run.options.resume)

    def _finished_run(self) -> Manifest | None:
        """The manifest of the output folder if nothing is left to do there but, at most, evaluation and report.

        Raises:
            InputError: The folder holds the result of another run.
        """
        folder = self.run.folder
        if folder is None or not self._is_resumable():
            return None
        found = Manifest.read(folder)
        if found.get("status") != "complete":
            return None
        now = provenance(self.run.config, self.run.hardware, self.model, self.datamodule)
        found.refuse_other({**now, "calibration": found["calibration"]}, folder)
        found.setdefault("seconds", 0.0)
        return found

    def _plan(self) -> str:
        """What would be pruned, in lines.

        Calibration samples are read, for their lengths; of weights a few KiB, which tell whether they were pruned.

        Raises:
            InputError: The model is in memory already, or no callback prunes.
        """
        run, model = self.run, self.model
        pruning, method = self.participants.pruning, self.participants.method()
        weights = model.weights(torch.device("cpu"))
        if not isinstance(weights, StreamedWeights) or pruning is None or method is None:
            raise InputError("plan", "true", "is for checkpoint folders and a pruning method")
        sizes: list[BatchSize] = []
        tokens: Counter[str] = Counter()
        if self.participants.samples():
            limits = ModelLimits.of(model.model)
            processes = run.hardware.world_size
            batches = self.datamodule.calibration_batches(model.processor, 0, processes, limits=limits)
            for batch in batches:
                sizes.append(BatchSize.of(batch.inputs, model.model.config, pruning.visual))
                tokens.update(tokens_by_modality(model.model.config, batch.inputs))
        targets = pruning.targets or dict.fromkeys(pruning.shapes, pruning.sparsity)
        footprints = []
        for part in model.parts:
            in_tower = [each for size in sizes for each in size.samples_in_tower()]
            run.memory.sizes = in_tower if part.target == "vision" else sizes
            footprints.append(run.memory.predict(model, part, method))
        assert run.folder is not None
        free = free_bytes(run.folder)
        count = len(self.datamodule.select()) - len(self.datamodule.skipped) if sizes else 0
        surveys = self.participants.survey_lines(model, count)
        plan = make_plan(model, weights, targets, pruning.shapes, footprints, free, surveys)
        zeros = pruning.line_of_zeros(zeros_of_input(model, weights, pruning.shapes))
        few = self._few_samples(count, len(self.datamodule.skipped))
        return "\n".join(filter(None, [pruning.headline(model, count), zeros, *self._unused(tokens), few, str(plan)]))

    def _unused(self, tokens: Mapping[str, int]) -> Iterator[str]:
        if (pruning := self.participants.pruning) is not None:
            yield from unused_options(pruning, self.datamodule, self.model, tokens)

    # ---- the work ----------------------------------------------------------------------------------------------------
    def _carry_out(self, finished: Manifest | None) -> None:
        run = self.run
        if finished is None:
            # A folder that is named after what is there already may be another one on each process.
            run.folder = run.processes.on_main(lambda: run.folder)
            self._prune()
            self._measure()
            run.record["seconds"] = run.record["work_seconds"] = time.perf_counter() - run.began
        else:
            run.was_complete = True
            run.record = finished
            run.say(f"{run.folder} is complete already")
        self.raise_hook("on_prune_end")

    def _prune(self) -> None:
        """Prune tower by tower, then the decoder; each starts from samples that are caught behind what is done."""
        run, model, device = self.run, self.model, self.launch.fabric.device
        run.weights = model.weights(device)
        run.record.update(provenance(run.config, run.hardware, model, self.datamodule))
        run.record.update(first_model(record_of(model.folder.path) if model.folder is not None else {}))
        run.record["catch_seconds"] = 0.0
        stream = CalibrationStream(run, model, self.datamodule, self.participants, device, self.raise_hook, self.shared)
        self._say_of_broken_tensors()
        finished = self._finished_blocks()
        *towers, last = model.parts
        parts = [*(tower for tower in towers if not finished.issuperset(tower.numbers)), last]
        for part in parts:
            clock = Stopwatch(device)
            stream.catch(part)
            run.record["catch_seconds"] += clock.lap()
            if part is parts[0]:
                self.raise_hook("on_prune_start")
                for line in self._unused(run.record["calibration"].get("tokens", {})):
                    run.say(line)
                calibration = run.record["calibration"]
                if few := self._few_samples(calibration.get("num_samples", 0), len(calibration.get("skipped", []))):
                    run.say(few)
                self._say_of_slow_products()
            if self.participants.surveying():
                stream.survey()
            stream.prune(part)

    def _say_of_broken_tensors(self) -> None:
        """Before samples go through them: what comes out is refused without knowing where it comes from."""
        folder, weights = self.model.folder, self.run.weights
        if folder is None or not isinstance(weights, StreamedWeights) or not self.run.processes.is_main:
            return
        broken = [key for key in weights.keys_beside_blocks() if not folder.is_finite(key)]
        if line := not_finite_line(broken):
            self.run.record["warnings"] = [line]
            self.run.say(f"warning: {line}")

    def _few_samples(self, count: int, left_out: int) -> str:
        """What is said of a calibration set of `count` samples; empty where it is as large as by default."""
        default = self.datamodule.source.default_num_samples
        if not self.participants.samples() or not default or count >= default:
            return ""
        why = f"as --data.num_samples says; {default} are the default"
        if self.datamodule.num_samples is None:
            why = f"all that the source has; {default} would be taken of more"
        why += f" ({left_out} more could not be read)" if left_out else ""
        return f"calibration: {count} sample{'s' * (count != 1)}, {why}"

    def _say_of_slow_products(self) -> None:
        line = slow_products_line(self.trainer, self.model, self.launch.fabric.device)
        if line and self.shared is None:
            self.run.say(line)

    def _measure(self) -> None:
        """What pruning cost, on samples that did not calibrate; one process is enough for a few."""
        run, model = self.run, self.model
        wanted = run.options.evaluate and run.options.held_back
        if not wanted or run.folder is None or model.folder is None or model.path in NAMES:
            return
        if problem := self._lacks_samples():
            run.record["quality"] = {"not_measured": problem}
            return
        run.samples = CaughtSamples()
        run.memory.forget()
        written, count = model.folder.at(run.folder), run.options.held_back
        samples, are_others = self.datamodule.held_back(count)
        are_others = are_others or not self.participants.samples()  # where none calibrate, all are held back
        measure = SampleQuality(model, samples, are_others, self.launch.fabric.device)
        run.record["quality"] = run.processes.on_main(lambda: measure(written))

    def _lacks_samples(self) -> str:
        """Why a method that needs no samples cannot be measured on any; empty where there are some."""
        if self.participants.samples():
            return ""
        source = self.datamodule.source
        if is_foreign(source, self.model):
            return "the method needs no samples, and none were given; --data.source says which"
        try:
            prepare_source(self.model, source)
        except InputError as error:
            return first_line(error)
        return ""

    def _finished_blocks(self) -> set[int]:
        """Blocks that an interrupted run finished, where it is to go on."""
        folder = self.run.folder
        if not self.run.options.resume or folder is None or not self._is_resumable():
            return set()
        return set(Manifest.read(folder).finished_blocks())
