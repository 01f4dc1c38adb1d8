"""One run of `pack`: a sparse checkpoint becomes a packed one, shard by shard.

check everything ─► files beside the weights ─► for each shard: pack ─► read it again, compare ─► index, config.json
(nothing written)                               (one tensor in memory)
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lvlm_prune
from lvlm_prune.checkpoints.checkpoint import INDEX_NAME
from lvlm_prune.clock import command_began
from lvlm_prune.errors import InputError
from lvlm_prune.output.folder import (
    HELD_BACK,
    choose_folder,
    copy_checkpoint,
    folder_bytes,
    refuse_full_disk,
    refuse_unusable,
    release,
    said_of_copies,
)
from lvlm_prune.output.locking import FolderLock, claim
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.names import MODEL_CARD, PACKING_RECORD
from lvlm_prune.output.private import has_private
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.provenance import origin_of
from lvlm_prune.output.summaries import size_ratio
from lvlm_prune.output.units import readable_size
from lvlm_prune.packed.folder import PackedFolder
from lvlm_prune.packed.format import VERSION, Format
from lvlm_prune.packed.origin import dense_checksums
from lvlm_prune.packed.selection import dense_remainder, estimated_zeros, exact_zeros, find_packable
from lvlm_prune.packed.shards import is_packed_shard, pack_shard, verify_shard
from lvlm_prune.report.card import write_card
from lvlm_prune.report.card_checks import verify_card
from lvlm_prune.runs.pack.owning import owning
from lvlm_prune.runs.pack.record import UNPACKING_RECORD, packed_config, packed_index
from lvlm_prune.runs.pack.verifying import verify_beside
from lvlm_prune.runs.publishing import keeps_own_private

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


class Packing(ABC):
    """What packing into another folder and packing in place have in common.

    Args:
        model: The sparse checkpoint, opened.
        folder: Folder to write.
        form: How weights are packed.
        quiet: Whether nothing is printed.
    """

    def __init__(self, model: LVLMModule, folder: Path, form: Format, quiet: bool) -> None:
        assert model.folder is not None
        self.started = command_began()
        self.model, self.source, self.folder = model, model.folder, folder
        self.form, self.quiet = form, quiet
        self.packable = find_packable(model.model, model.runner.decoder, self.source)
        self.record = self._record()

    def __call__(self) -> dict[str, Any]:
        """Pack what is not yet packed; the record of the folder."""
        if self._is_complete():
            self._say(f"{self.folder} is complete already")
            self._verify_again()
            return Manifest.read(self.folder, PACKING_RECORD)
        with owning(self.folder, self._claim):
            self._begin()
            shards = self.source.shards
            with Progress("Packing", len(shards), "shards", shown=not self.quiet) as progress:
                for shard in shards:
                    if not self._is_packed(shard):
                        pack_shard(self.source, shard, self.folder, self.packable.keys(), self.form)
                    progress.update()
            if (self.source.path / INDEX_NAME).is_file():
                replace_durably(self.folder / INDEX_NAME, packed_index(self.folder, shards))
            self._release()
            self._finish()
        return self.record

    @abstractmethod
    def _claim(self) -> FolderLock:
        """Keep other runs out of the folder."""

    @abstractmethod
    def _begin(self) -> None:
        """What comes before the first shard; done again where the run goes on."""

    @abstractmethod
    def _release(self) -> None:
        """What comes once all shards and the index are there."""

    def _is_packed(self, shard: str) -> bool:
        """Whether an earlier run has packed this shard, which has its name only then."""
        return is_packed_shard(self.folder / shard)

    def _verify_again(self) -> None:  # noqa: B027
        """Hold a folder that is complete against what it was made from, where that is still there."""

    def _is_complete(self) -> bool:
        path = self.folder / PACKING_RECORD
        return path.is_file() and Manifest.read(self.folder, PACKING_RECORD).get("status") == "complete"

    def _record(self) -> Manifest:
        files = {"original_config": "config.json", "original_index": INDEX_NAME, "original_card": MODEL_CARD}
        original = {
            name: path.read_bytes().decode(errors="surrogateescape")
            if (path := self.source.path / file).is_file()
            else None
            for name, file in files.items()
        }
        return Manifest(
            status="packing",
            format_version=VERSION,
            config={"format": self.form},
            model=origin_of(self.model.path, self.source),
            versions={"lvlm_prune": lvlm_prune.__version__},
            weights={"dense": self.source.weight_bytes},
            **original,
        )

    def refuse_larger(self) -> None:
        """Refuse a checkpoint that would not become smaller, before anything is written.

        Raises:
            InputError: No tensor would be smaller packed than it is, or the disk has no room for what it becomes.
        """
        zeros = {key: estimated_zeros(self.source, key) for key in self.packable}
        if not self._saved(zeros):
            zeros = {key: exact_zeros(self.source, key) for key in self.packable}
        saved = self._saved(zeros)
        if not saved:
            weights = sum(tensor.size for tensor in self.packable.values())
            share = sum(zeros[key] * tensor.size for key, tensor in self.packable.items()) / max(weights, 1)
            dense = sum(tensor.nbytes for tensor in self.packable.values())
            packed = sum(tensor.packed_bytes(zeros[key]) for key, tensor in self.packable.items())
            problem = (
                f"only {share:.1%} of the weights of its {len(self.packable)} Linears are zero: packed they would take "
                f"{packed / max(dense, 1):.3f} times what they take now; make it sparse with `lvlm-prune prune` first"
            )
            raise InputError("model.path", self.model.path, problem)
        refuse_full_disk(self.folder, folder_bytes(self.source.path) - saved)

    def _saved(self, zeros: dict[str, float]) -> float:
        """Bytes that packing saves; a tensor that would be larger stays as it is."""
        packed = ((tensor, tensor.packed_bytes(zeros[key])) for key, tensor in self.packable.items())
        return sum(max(tensor.nbytes - size, 0) for tensor, size in packed)

    def _finish(self) -> None:
        written = PackedFolder.open(self.folder, "output")
        dense = {key: written[key].nbytes for key in written.packed}
        packed = {
            key: sum(written.stored[name].nbytes for name in parts.values()) for key, parts in written.packed.items()
        }
        remainder = dense_remainder(self.model.model, self.model.runner.decoder, written, written.packed)
        self.record["packed"] = {"tensors": len(dense), "dense": sum(dense.values()), "packed": sum(packed.values())}
        self.record["dense"] = remainder
        self.record["shards"] = dense_checksums(self.folder, written.shards)
        write_card(self.folder, packing=self.record, earlier=self.record["original_card"] or "")
        self.record["weights"]["packed"] = written.weight_bytes
        self.record["seconds"] = time.perf_counter() - self.started
        self.record["status"] = "complete"
        self.record.write(self.folder, PACKING_RECORD)
        self._say(summary(self.record, self.folder, len(written.shards)))

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


class PackRun(Packing):
    """Packing into another folder; see `LVLMTrainer.pack` for the arguments."""

    def __init__(
        self,
        model: LVLMModule,
        output: str,
        form: Format,
        resume: bool,
        publishable: bool | None,
    ) -> None:
        model.open()
        folder = choose_folder(output, f"{model.label}-packed", resume)
        assert model.folder is not None
        private = keeps_own_private(model.folder.path, publishable) or has_private(model.folder.path)
        refuse_unusable(folder, model.folder, PACKING_RECORD, resume, copies=False, private=private)
        super().__init__(model, folder, form, quiet=False)
        self.resume = resume
        if (folder / PACKING_RECORD).is_file():
            Manifest.read(folder, PACKING_RECORD).refuse_other(self.record, folder, PACKING_RECORD)
        if not self._is_complete():
            self.refuse_larger()

    def _claim(self) -> FolderLock:
        return claim(self.folder, PACKING_RECORD, self.resume)

    def _begin(self) -> None:
        self.record.write(self.folder, PACKING_RECORD)
        left_out = (PACKING_RECORD, UNPACKING_RECORD, INDEX_NAME, *self.source.shards)
        copy_checkpoint(self.source, self.folder, leave_out=left_out)
        line = said_of_copies(self.source)
        if line:
            self._say(line)

    def _is_packed(self, shard: str) -> bool:
        there = (self.folder / shard).is_file()
        if there:
            verify_shard(self.source, shard, self.folder)
        return there

    def _verify_again(self) -> None:
        """Shards, index and configuration are read again, and everything that was copied."""
        shards = self.source.shards
        for shard in shards:
            verify_shard(self.source, shard, self.folder)
        made = {"config.json": packed_config(self.record["original_config"], self.form)}
        if (self.source.path / INDEX_NAME).is_file():
            made[INDEX_NAME] = packed_index(self.folder, shards)
        verify_beside(self.source, self.folder, made, otherwise=[MODEL_CARD])
        if line := verify_card(self.folder, self.record["original_card"] or "", is_dense=False):
            self._say(line)
        self._say(f"verified: every tensor comes back byte for byte from {len(shards)} shard{'s' * (len(shards) > 1)}")

    def _release(self) -> None:
        replace_durably(self.folder / HELD_BACK, packed_config(self.record["original_config"], self.form))
        release(self.folder)


def summary(record: Manifest, folder: Path, shards: int) -> str:
    """What packing did, in a few lines."""
    pruned, whole = record["packed"], record["weights"]
    remainder = " · ".join(f"{kind} {readable_size(size)}" for kind, size in record["dense"].items())
    return "\n".join(
        (
            f"packed {pruned['tensors']} pruned tensors ({record['config']['format']}): "
            f"{readable_size(pruned['dense'])} → {readable_size(pruned['packed'])}, "
            f"{size_ratio(pruned)} · all weights: {readable_size(whole['dense'])} → "
            f"{readable_size(whole['packed'])}, {size_ratio(whole)}",
            f"dense as before: {remainder}",
            f"verified: every tensor comes back byte for byte from {shards} shard{'' if shards == 1 else 's'}",
            f"wrote {folder} ({PACKING_RECORD}) · {record['seconds']:.0f} s",
        )
    )
