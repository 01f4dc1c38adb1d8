"""`prune` and `recover`, from what was asked for to a folder that is packed and published.

options, checked ─► run ─► folder, verified ─► packed where it is ─► what is private put aside ─► size ─► uploaded
                           (all that is left, where an interrupted run had come as far as packing)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.distributed.ranks import is_first_process
from lvlm_prune.errors import InputError
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.recovery.options import RecoveryOptions
from lvlm_prune.run import Run, RunOptions, RunTrainer
from lvlm_prune.runs.pack.in_place import pack_folder, pack_output, resumes_packing
from lvlm_prune.runs.prune.participants import Participants
from lvlm_prune.runs.prune.run import PruneRun
from lvlm_prune.runs.prune.sizing import PackedSize
from lvlm_prune.runs.publishing import Publication
from lvlm_prune.runs.recover.blockwise import BlockwiseRun
from lvlm_prune.runs.recover.fitting import FittingRun
from lvlm_prune.runs.search.run import SearchRun
from lvlm_prune.runs.unused import unused_aims


@dataclass(frozen=True)
class Aim:
    """How sparse a model is to get, where not the method says so; see `LVLMTrainer.prune`.

    Args:
        keep: Share of the dense model's answers that is kept; 0 for none.
        minutes: Bound for the tries that this takes; 0 for none.
        recipes: Recipes that are tried for it.
        packed_size: Size that the packed shards may take; empty for any.
    """

    keep: float = 0.0
    minutes: float = 0.0
    recipes: list[str] = field(default_factory=list)
    packed_size: str = ""

    def check(self, packed: bool) -> None:
        """Refuse what does not go together, before anything is opened.

        Args:
            packed: Whether the folder is to be packed.

        Raises:
            InputError: Names the option.
        """
        if self.packed_size and (self.keep or not packed):
            problem = "and --keep both decide how sparse the model gets" if packed else "needs --packed true"
            raise InputError("packed_size", self.packed_size, problem)
        if not 0 <= self.minutes < float("inf"):
            raise InputError("keep_minutes", self.minutes, "must be 0 (no bound) or more")
        if self.minutes and not self.keep:
            problem = "does nothing without --keep, the share to keep, for example 0.99"
            raise InputError("keep_minutes", self.minutes, problem)
        if self.recipes and not self.keep:
            wanted = "--method auto and --keep_recipes want the share to keep, for example 0.99"
            raise InputError("keep", self.keep, f"{wanted}; or --packed true with a --packed_size")

    def unused(self, trainer: RunTrainer, model: LVLMModule, options: RunOptions) -> list[str]:
        """A line for each option that was given and changes nothing, which this or other options make it.

        Args:
            trainer: Whose callback prunes.
            model: The model, which need not be opened.
            options: Of the run.
        """
        pruning = Participants(trainer.callbacks).pruning
        aim = "--keep" if self.keep else "--packed_size" if self.packed_size else ""
        return [] if pruning is None else [*unused_aims(pruning, model, options, aim)]


def prune(
    trainer: RunTrainer,
    model: LVLMModule,
    datamodule: CalibrationDataModule,
    output: str,
    options: RunOptions,
    aim: Aim,
    push: str,
) -> Manifest:
    """See `LVLMTrainer.prune`."""
    aim.check(options.packed)
    publish = Publication("" if options.plan else push, options.publishable)
    unused = aim.unused(trainer, model, options)
    size = PackedSize(aim.packed_size, model, trainer) if aim.packed_size else None
    finish = Finish(model, publish, options.packed, size)
    if (earlier := finish.gone_on(output, options.resume, PRUNING_RECORD)) is not None:
        return earlier
    run: PruneRun | SearchRun
    if aim.keep:
        run = SearchRun(trainer, model, datamodule, output, options, aim.keep, aim.minutes, aim.recipes)
    else:
        run = PruneRun(trainer, model, datamodule, output, options, config=None if size is None else size.config)
    for line in unused:
        run.run.say(line)
    manifest = run()
    if not options.plan:
        finish(run.run, dense=model.path if trainer.owns_process else "")
    return manifest


def recover(
    trainer: RunTrainer,
    model: LVLMModule,
    datamodule: RecoveryDataModule,
    recovery: RecoveryOptions,
    output: str,
    options: RunOptions,
    push: str,
) -> Manifest:
    """See `LVLMTrainer.recover`."""
    finish = Finish(model, Publication(push, options.publishable), options.packed)
    if (earlier := finish.gone_on(output, options.resume, RECOVERY_RECORD)) is not None:
        return earlier
    kind = BlockwiseRun if recovery.method == "blockwise" else FittingRun
    run = kind(trainer, model, datamodule, recovery, output, options)
    record = run()
    finish(run.run, dense=run.dense_name if trainer.owns_process else "")
    return record


@dataclass(frozen=True)
class Finish:
    """How a run's folder is finished.

    Args:
        model: What the run started from.
        publish: What is done with the finished folder.
        packed: Whether it is packed.
        size: What its packed shards may take; None: whatever they take.
    """

    model: LVLMModule
    publish: Publication
    packed: bool = False
    size: PackedSize | None = None

    def __call__(self, run: Run, dense: str = "") -> None:
        """Finish the folder that a run has written.

        Args:
            run: The run, which is over.
            dense: The dense model, where a user is to be told what comes next.

        Raises:
            InputError: The run wrote no folder, which was to be packed.
            RunError: The folder is larger than it was to be, or could not be uploaded.
        """
        if self.packed:
            pack_output(run, self.model, dense)
        if run.folder is not None and is_first_process():
            self._publish(run.folder)

    def gone_on(self, output: str, resume: bool, record: str) -> Manifest | None:
        """Pack and publish, where that is all that an interrupted run has left to do.

        Args:
            output: The run's folder.
            resume: Whether the run is to go on.
            record: Name of the run's record in that folder.

        Returns:
            That record; None where the run itself has something to do.
        """
        if not resumes_packing(output, self.packed, resume):
            return None
        folder = Path(output)
        if is_first_process():
            pack_folder(folder, self.model)
            self._publish(folder)
        return Manifest.read(folder, record)

    def _publish(self, folder: Path) -> None:
        self.publish.put_aside(folder)
        if self.size is not None:
            self.size.refuse_missed(folder)
        self.publish.upload(folder)
