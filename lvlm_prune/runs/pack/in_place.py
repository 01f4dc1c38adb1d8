"""Packing the folder that `prune` or `recover` has just written."""

from __future__ import annotations

from pathlib import Path

from lvlm_prune.checkpoints.checkpoint import INDEX_NAME
from lvlm_prune.demo import NAMES
from lvlm_prune.errors import InputError, given_as
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.locking import FolderLock
from lvlm_prune.output.manifest import Manifest, read_run, replace_durably
from lvlm_prune.output.names import PACKING_RECORD, PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.own_files import record_of_content, refuse_changed
from lvlm_prune.output.summaries import next_commands
from lvlm_prune.packed.folder import open_checkpoint
from lvlm_prune.packed.format import Format
from lvlm_prune.packed.shards import refuse_changed_shard
from lvlm_prune.plugins import describe
from lvlm_prune.report.card_checks import verify_card
from lvlm_prune.run import Run
from lvlm_prune.runs.pack.record import packed_config, packed_index
from lvlm_prune.runs.pack.run import Packing


def resumes_packing(output: str, packed: bool, resume: bool) -> bool:
    """Whether all that an interrupted run of `--packed true` has left to do is to pack what it wrote.

    A folder of which shards are packed is no longer the one that the run itself would verify.
    """
    return packed and resume and bool(output) and (Path(output) / PACKING_RECORD).is_file()


def pack_output(run: Run, model: LVLMModule, dense: str) -> None:
    """Pack the folder that a run has written, on one process.

    Args:
        run: The run, finished.
        model: What it started from.
        dense: The dense model, where a user is to be told what comes next.

    Raises:
        InputError: It wrote no folder.
    """
    if run.folder is None:
        raise InputError("packed", "true", "is for checkpoint folders; save the model that is in memory, then pack it")
    if run.processes.is_main:
        pack_folder(run.folder, model, run.options.quiet)
        if dense and dense not in NAMES:
            run.say(next_commands(run.folder, dense, describe(run.config), packed=True))


def pack_folder(folder: Path | str, model: LVLMModule, quiet: bool = False) -> None:
    """Pack a folder where it is, or go on with that.

    Args:
        folder: A sparse checkpoint.
        model: What it was made from.
        quiet: Whether nothing is printed.
    """
    with given_as("output"):
        PackInPlace(LVLMModule(str(folder), trust_remote_code=model.trust_remote_code), "bitmask", quiet)()


class PackInPlace(Packing):
    """Packing shard by shard, each in the place of the dense one.

    `config.json` says that the folder is packed before its first shard is: a folder of which some shards are packed and
    others are not is loaded as one that is packed, so that it can be used at any moment.

    Args:
        model: The folder, not yet opened.
        form: How weights are packed.
        quiet: Whether nothing is printed.
    """

    def __init__(self, model: LVLMModule, form: Format, quiet: bool) -> None:
        model.open(open_checkpoint)
        assert model.folder is not None
        super().__init__(model, model.folder.path, form, quiet)
        if (self.folder / PACKING_RECORD).is_file():
            self.record = Manifest.read(self.folder, PACKING_RECORD)
        else:
            self.refuse_larger()

    def _claim(self) -> FolderLock:
        return FolderLock(self.folder)

    def _begin(self) -> None:
        self.record.write(self.folder, PACKING_RECORD)
        replace_durably(self.folder / "config.json", packed_config(self.record["original_config"], self.form))

    def _verify_again(self) -> None:
        """What was packed is gone: its checksums are in the record, and the files beside it in that of the run."""
        shards = self.record["shards"]
        for shard, checksum in shards.items():
            refuse_changed_shard(self.folder, shard, checksum)
        run = read_run(self.folder / RECOVERY_RECORD) or read_run(self.folder / PRUNING_RECORD) or {}
        files = {name: record for name, record in run.get("files", {}).items() if name != "config.json"}
        files["config.json"] = record_of_content(packed_config(self.record["original_config"], self.form))
        if self.record.get("original_index") is not None:
            files[INDEX_NAME] = record_of_content(packed_index(self.folder, self.source.shards))
        refuse_changed(self.folder, files)
        if line := verify_card(self.folder, self.record["original_card"] or "", is_dense=False):
            self._say(line)
        self._say(f"verified: every tensor comes back byte for byte from {len(shards)} shard{'s' * (len(shards) > 1)}")

    def _release(self) -> None:
        """`config.json` was there all the time."""
