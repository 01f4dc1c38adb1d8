"""One recovery from a pruned checkpoint to a better one with the same zeros.

check ─► what the dense model says ─► train ─────────────────► merge into a copy, verify ─► adapter, record, scores
(nothing written)  teacher/           checkpoints/ or blocks/                              these folders removed
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder, resolve
from lvlm_prune.clock import command_began
from lvlm_prune.data import RecoveryDataModule
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.demo import NAMES
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Children, follow_parent, refuse_mismatch
from lvlm_prune.errors import InputError
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import record_of
from lvlm_prune.output.folder import (
    choose_folder,
    copy_checkpoint,
    make_folder,
    refuse_unusable,
    release,
    said_of_copies,
    write_config,
    writing,
)
from lvlm_prune.output.locking import FolderLock
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import RECOVERY_RECORD, RUN_FILES
from lvlm_prune.output.own_files import records_of, refuse_changed
from lvlm_prune.output.private import keeps_private
from lvlm_prune.output.summaries import next_commands, summary
from lvlm_prune.output.units import readable_percent
from lvlm_prune.output.verification import digest_of, refuse_other_findings
from lvlm_prune.plugins import describe, plugin_class
from lvlm_prune.recovery.masks import StoredMasks, ZeroMask, is_pruned, refuse_unpruned
from lvlm_prune.recovery.merging import verify_merged
from lvlm_prune.recovery.objective import RecoveryObjective
from lvlm_prune.recovery.options import RecoveryOptions
from lvlm_prune.report.card import read_card, write_adapter_card, write_card
from lvlm_prune.report.card_checks import verify_card
from lvlm_prune.run import Run, RunOptions, RunTrainer, described_config
from lvlm_prune.runs.recover.embedded import DEMO_SPARSITY, prune_embedded, scored_beside_dense
from lvlm_prune.runs.recover.provenance import pattern_of, recovery_provenance
from lvlm_prune.runs.recover.quality import recovered_quality
from lvlm_prune.runs.session import prepare_source, session, slow_products_line
from lvlm_prune.threads import suitable_threads

if TYPE_CHECKING:
    from lvlm_prune.callbacks import SparseLoRA


# Folders of an unfinished run, inside its output.
CHECKPOINTS, TEACHER, BLOCKS = WORK_FOLDERS = ("checkpoints", "teacher", "blocks")
SCORING = "scoring"
"""What the record says once the checkpoint is whole and verified, and not yet scored."""
# Of the run that made the base; they would be taken for records of this run.
_RECORDS = (*RUN_FILES, *WORK_FOLDERS)


def _origin(base_record: Mapping[str, Any]) -> str | None:
    """What the pruned model was made from, by its record."""
    return base_record.get("origin") or base_record.get("model", {}).get("path")


class RecoveryRun(ABC):
    """What all methods share: checks before anything is written, and what follows training.

    Args:
        trainer: Devices, loggers, callbacks.
        model: The pruned model.
        datamodule: What to train on.
        recovery: How.
        output: Folder to write.
        options: What the user asked for.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        model: LVLMModule,
        datamodule: RecoveryDataModule,
        recovery: RecoveryOptions,
        output: str,
        options: RunOptions,
    ) -> None:
        self.trainer, self.model, self.datamodule, self.recovery = trainer, model, datamodule, recovery
        self.resume = options.resume
        self.started = command_began()
        hardware = Hardware.of(trainer)
        refuse_mismatch(hardware)
        model.objective = self.objective = RecoveryObjective(recovery.optimization)
        self.folder = self._output_folder(output)
        self.run = Run(options, self._config(), hardware, trainer.callbacks, folder=self.folder)
        self.record = self.run.record
        self.weights: StreamedWeights
        self.dense: LVLMModule | None = None
        self.lora: SparseLoRA | None = None
        self.children = Children()

    def __call__(self) -> Manifest:
        """Recover, or go on with what an interrupted run left."""
        follow_parent()
        with session(self.trainer, self.run, self.children, self._way_on):
            return self._carry_out()

    def _way_on(self) -> str:
        started = (self.folder / RECOVERY_RECORD).is_file()
        return f"go on with --resume true --output {self.folder}" if started else ""

    def _carry_out(self) -> Manifest:
        if self.resume and self.folder.is_dir():
            self._keep_others_out()
        earlier = Manifest.read(self.folder, RECOVERY_RECORD) if self.resume else None
        self._check_options()
        self._find_base(earlier)
        self._check(earlier)
        if earlier is not None and earlier.get("status") == "complete":
            self._say(f"{self.folder} is complete already")
            self._verify_again(earlier)
            return earlier
        self._examine(earlier)
        with suitable_threads(self.model.block_weights, self.trainer.num_devices):
            self._recover(earlier)
        return self.record

    def _recover(self, earlier: Manifest | None) -> None:
        """Train, write, score."""
        with writing(self.folder):
            self._begin(earlier)
            if line := slow_products_line(self.trainer, self.model, self.trainer.strategy.root_device):
                self._say(line)
            self._train()
            if self.trainer.is_global_zero:
                self._write()
        if self.trainer.is_global_zero:
            clock = time.perf_counter()
            self._score()
            self.record["evaluation_seconds"] = time.perf_counter() - clock
            self._finish()

    @abstractmethod
    def _train(self) -> None:
        """Train, and fill `record["training"]`."""

    @abstractmethod
    def _write(self) -> None:
        """Write and verify the recovered checkpoint."""

    # ---- before training ---------------------------------------------------------------------------------------------
    def _output_folder(self, output: str) -> Path:
        if not output and self.trainer.world_size > 1:
            raise InputError("output", "''", "several processes write into one folder: name it")
        label = self.model.label + "-atv-70" * (self.model.path in NAMES)
        return choose_folder(output, f"{label}-recovered", self.resume)

    def _find_base(self, earlier: Manifest | None) -> None:
        """The pruned checkpoint; the embedded model is dense, so it is pruned first."""
        if self.model.path not in NAMES:
            return
        if earlier is not None:
            self.model.path = earlier.get("model", {}).get("path") or self.model.path
        elif self.trainer.is_global_zero:
            self._refuse_unusable(CheckpointFolder(resolve(self.model.path)))
            self._say(
                f"no pruned model given: the embedded one is pruned by ATV to {readable_percent(DEMO_SPARSITY)} first"
            )
            self.model.path = str(prune_embedded(self.trainer, self.run, self.model.path))
        else:
            problem = "is pruned by one process only; prune it first and give the folder as --model.path"
            raise InputError("model.path", self.model.path, problem)

    @abstractmethod
    def _check_options(self) -> None:
        """Check options that make no sense whatever the checkpoint is: the embedded one is pruned first."""

    def _check(self, earlier: Manifest | None) -> None:
        """Check everything that can be checked without going through the data."""
        model, data = self.model, self.datamodule
        model.refuse_vision("recover")
        model.open()
        assert model.folder is not None
        if self.trainer.is_global_zero:
            self._refuse_unusable(model.folder)
        prepare_source(model, data.source)
        data.connect(model.processor, ModelLimits.of(model.model))
        data.setup("fit")
        self.base_record = record_of(model.folder.path)
        # Made before adapters change the names of modules.
        self.weights = StreamedWeights(model.model, model.runner.decoder, model.folder, "cpu")
        self.lora = self._adapters()
        self._refuse_unpruned()
        if self.recovery.needs_dense:
            from lvlm_prune.recovery.dense import open_dense

            self.dense = open_dense(self.recovery.dense, model, self.base_record)
        elif self.recovery.dense:
            raise InputError(
                "dense", self.recovery.dense, "does nothing without --distillation.weight or --method blockwise"
            )
        self.record.update(
            recovery_provenance(self.run, model, data, self.recovery.method, self.base_record, self.dense)
        )
        if earlier is not None:
            earlier.refuse_other(self.record, self.folder, RECOVERY_RECORD)

    def _adapters(self) -> SparseLoRA | None:
        """The user's adapters, or default ones; None for a method that trains none."""
        from lvlm_prune.callbacks import SparseLoRA

        if self.recovery.method == "full":
            return None
        given = (callback for callback in self.trainer.callbacks if isinstance(callback, SparseLoRA))
        return next(given, None) or SparseLoRA()

    def _refuse_unpruned(self) -> None:
        """Find the pruned Linears, one weight in memory at a time.

        Raises:
            InputError: There are none, or none where an adapter is to be.
        """
        linears = self.model.linears()
        self.pruned_names = [name for name in linears if is_pruned(self.weights.stored(f"{name}.weight"))]
        refuse_unpruned(self.model.path, self.pruned_names)
        if self.lora is not None:
            self.lora.select(self.pruned_names)

    def _examine(self, earlier: Manifest | None) -> None:
        """Go through the data once, before anything is written; where an interrupted run did, look at some of it.

        Raises:
            InputError: A sample cannot be used, or is another one than the interrupted run had.
        """
        examined = {} if earlier is None else earlier.get("data", {}).get("examined", {})
        if "sampled" in examined:
            self.record["data"]["examined"] = examined
            if self.trainer.is_global_zero and self.datamodule.sampled() != examined["sampled"]:
                problem = f"gives other samples now than in the unfinished run in {self.folder}"
                raise InputError("data.source", plugin_class(self.datamodule.source).__name__, problem)
        elif self.trainer.is_global_zero:
            self.record["data"]["examined"] = asdict(self.datamodule.examine())

    def _begin(self, earlier: Manifest | None) -> None:
        """From here on the folder can be resumed."""
        if not self.trainer.is_global_zero:
            return
        make_folder(self.folder)
        self._keep_others_out()
        assert self.model.folder is not None
        self._refuse_unusable(self.model.folder)  # another run may have come first
        if earlier is not None and "teacher" in earlier:
            self.record["teacher"] = earlier["teacher"]
        self.record["status"] = "training"
        self.record.write(self.folder, RECOVERY_RECORD)
        write_config(self.folder, self.record["config"])

    def _keep_others_out(self) -> None:
        """Lock the folder until the run ends, however it ends."""
        if self.run.lock is None and self.trainer.is_global_zero:
            self.run.lock = FolderLock(self.folder)

    def _refuse_unusable(self, base: CheckpointFolder) -> None:
        pruned = record_of(base.path)
        origin = {"model": {"path": self.model.path}, "origin": _origin(pruned), "config": describe(self.run.config)}
        private = keeps_private(self.run.options.publishable, origin)
        refuse_unusable(self.folder, base, RECOVERY_RECORD, self.resume, private=private)

    def _config(self) -> Mapping[str, Any]:
        """What repeats the run."""
        if self.trainer.config:
            return self.trainer.config
        adapters = self._adapters()
        sections = self.recovery.sections() | ({} if adapters is None else {"lora": adapters})
        found = described_config(self.model, self.datamodule, **sections)
        return found | {"method": self.recovery.method, "dense": self.recovery.dense}

    # ---- after training ----------------------------------------------------------------------------------------------
    def _copy_base(self) -> CheckpointFolder:
        """A copy of the base to overwrite; nobody can load it yet."""
        base = self.model.folder
        assert base is not None
        if line := said_of_copies(base):
            self._say(line)
        self.record["files"] = copy_checkpoint(base, self.folder, leave_out=_RECORDS)
        self.record["files"] |= records_of(self.folder, [self.folder / "config.yaml"])
        return base.at(self.folder)

    def _verify_again(self, earlier: Manifest) -> None:
        """Nothing is to be done, but exit status 0 is to say that the folder holds what was promised."""
        if not self.trainer.is_global_zero:
            return
        base = self.model.folder
        assert base is not None
        refuse_changed(self.folder, earlier.get("files", {}))
        masks = StoredMasks(self.pruned_names, self.weights)
        found = verify_merged(base, base.at(self.folder), self.weights, masks, pattern_of(self.base_record))
        refuse_other_findings(earlier["linears"], found)
        if line := verify_card(self.folder, read_card(base.path), is_dense=False):
            self._say(line)
        self._say(f"verified: every pruned weight +0.0 in {len(masks)} Linears, all other tensors as they were")

    def _verify(self, masks: Mapping[str, ZeroMask]) -> None:
        """Read what was written again, and note what it holds."""
        base = self.model.folder
        assert base is not None
        pattern = pattern_of(self.base_record)
        refuse_changed(self.folder, self.record.get("files", {}))
        found = verify_merged(base, base.at(self.folder), self.weights, masks, pattern)
        zeros, digests = found.pop("zeros"), found.pop("digests")
        found["changed_linears"] = sum(
            digest_of(self.weights.stored(f"{name}.weight")) != digest for name, digest in digests.items()
        )
        self.record["verified"] = found
        self.record["pattern"] = str(pattern) if pattern is not None else "unstructured"
        self.record["linears"] = {
            name: {
                "shape": list(mask.shape),
                "zeros": zeros[name],
                "achieved": zeros[name] / (mask.shape[0] * mask.shape[1]),
                "digest": digests[name],
            }
            for name, mask in masks.items()
        }

    def _release(self) -> None:
        """What is written is whole and verified: from here on the folder can be used, also by what scores it."""
        self.record["status"] = SCORING
        self.record.write(self.folder, RECOVERY_RECORD)
        release(self.folder)

    def _score(self) -> None:
        """The embedded model dense, pruned and recovered, on the embedded benchmark; others on a few samples."""
        origin = _origin(self.base_record)
        self.record["origin"] = origin
        if not self.run.options.evaluate:
            return
        if origin not in NAMES:
            device = self.trainer.strategy.root_device
            self.record["quality"] = recovered_quality(
                self.model, self.folder, self.datamodule, self.recovery.dense, self.base_record, device
            )
            return
        assert self.model.folder is not None
        self.record["evaluation"] = scored_beside_dense(origin, self.model.folder.path, self.folder, self.base_record)

    def _take_time(self) -> None:
        self.record["seconds"] = time.perf_counter() - self.started

    def _finish(self) -> None:
        for name in WORK_FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._take_time()
        self.record["status"] = "complete"
        assert self.model.folder is not None
        write_card(self.folder, record=self.record, earlier=read_card(self.model.folder.path))
        if (self.folder / "adapter").is_dir():
            write_adapter_card(self.folder / "adapter", self.record)
        self.record.write(self.folder, RECOVERY_RECORD)
        if self.run.options.report:
            # Matplotlib takes its time to load; who wants no page does not wait for it.
            from lvlm_prune.report.page import read_from, write_page
            from lvlm_prune.report.recovery import recovery_page

            with read_from(self.folder, RECOVERY_RECORD, self.resume):
                page = recovery_page(self.record, self.folder, self._take_time)
            write_page(self.folder, *page)
            self.record.write(self.folder, RECOVERY_RECORD)
        self._say(summary(self.record, self.folder))
        if "evaluation" not in self.record and self.dense_name not in NAMES and not self.run.options.packed:
            self._say(next_commands(self.folder, self.dense_name, self.record["config"], recovers=False))

    @property
    def dense_name(self) -> str:
        """The dense model, as far as the record of the base names it."""
        return (self.base_record.get("dense") or {}).get("path") or "DENSE"

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero and not self.run.options.quiet:
            print(text, flush=True)
