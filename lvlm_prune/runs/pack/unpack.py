"""One run of `unpack`: a packed checkpoint becomes the sparse one that it was made from, byte for byte.

check everything ─► files beside the weights ─► for each shard: unpack ─► read it again, compare ─► index, config.json
(nothing written)                               (one tensor in memory)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_prune.checkpoints.checkpoint import INDEX_NAME, CheckpointFolder
from lvlm_prune.checkpoints.hub import resolve
from lvlm_prune.clock import command_began
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output.folder import (
    HELD_BACK,
    choose_folder,
    copy_checkpoint,
    is_occupied,
    refuse_full_disk,
    refuse_unusable,
    release,
    said_of_copies,
)
from lvlm_prune.output.locking import claim
from lvlm_prune.output.manifest import Manifest, replace_durably, sync_folder
from lvlm_prune.output.names import MODEL_CARD, PACKING_RECORD
from lvlm_prune.output.private import has_private
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.provenance import origin_of
from lvlm_prune.output.units import readable_size
from lvlm_prune.packed.folder import PackedFolder, one_shard
from lvlm_prune.packed.shards import UNVERIFIED, unpack_shard
from lvlm_prune.report.card import has_own_card
from lvlm_prune.report.card_checks import verify_card_given_back
from lvlm_prune.runs.pack.owning import owning
from lvlm_prune.runs.pack.record import UNPACKING_RECORD, dense_config, dense_index, read_record
from lvlm_prune.runs.pack.verifying import verify_beside

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


class UnpackRun:
    """See `LVLMTrainer.unpack` for the arguments."""

    def __init__(self, model: LVLMModule, output: str, resume: bool) -> None:
        self.started = command_began()
        path = resolve(model.path, None if model.revision == "main" else model.revision)
        self.packed = PackedFolder.open(path)
        self.folder = choose_folder(output, f"{model.label}-unpacked", resume)
        self.resume = resume
        # The record is removed at the end: the folder that was packed had none.
        unfinished = any((self.folder / name).exists() for name in (UNPACKING_RECORD, HELD_BACK))
        self.is_complete = resume and is_occupied(self.folder, UNPACKING_RECORD) and not unfinished
        if self.is_complete:
            return
        carries = has_private(path)
        refuse_unusable(self.folder, self.packed.stored, UNPACKING_RECORD, resume, copies=False, private=carries)
        self.record = Manifest(
            status="unpacking",
            model=origin_of(model.path, self.packed),
        )
        if (self.folder / UNPACKING_RECORD).is_file():
            Manifest.read(self.folder, UNPACKING_RECORD).refuse_other(self.record, self.folder, UNPACKING_RECORD)
        self._refuse_full_disk()

    def __call__(self) -> dict[str, Any]:
        """Unpack what is not yet unpacked; sizes of all weights before and after, in bytes, and seconds."""
        if self.is_complete:
            self._verify_again()
        else:
            self._write()
        packed = self.packed
        sizes = {"packed": packed.weight_bytes, "dense": CheckpointFolder(self.folder, "output").weight_bytes}
        seconds = time.perf_counter() - self.started
        change = f"all weights: {readable_size(sizes['packed'])} → {readable_size(sizes['dense'])}"
        if self.is_complete:
            text = f"{self.folder} is complete already\nverified: every file is as it was packed · {change}"
        else:
            text = f"unpacked {len(packed.packed)} tensors · {change}\nwrote {self.folder} · {seconds:.0f} s"
        print(text, flush=True)
        return sizes | {"seconds": seconds}

    def _write(self) -> None:
        packed, shards = self.packed, self.packed.shards
        with owning(self.folder, lambda: claim(self.folder, UNPACKING_RECORD, self.resume)):
            self.record.write(self.folder, UNPACKING_RECORD)
            left_out = (PACKING_RECORD, UNPACKING_RECORD, INDEX_NAME, *shards)
            copy_checkpoint(packed.stored, self.folder, leave_out=left_out)
            if line := said_of_copies(packed.stored):
                print(line, flush=True)
            with Progress("Unpacking", len(shards), "shards") as progress:
                for shard in shards:
                    if (self.folder / shard).is_file():  # of an earlier run
                        self._verify(shard, shard)
                    else:
                        self._unpack(shard)
                    progress.update()
            origin = read_record(packed.path)
            if (packed.path / INDEX_NAME).is_file():
                replace_durably(self.folder / INDEX_NAME, dense_index(packed, origin))
            self._give_card_back(origin)
            replace_durably(self.folder / HELD_BACK, dense_config(packed.stored, origin))
            release(self.folder)
            (self.folder / UNPACKING_RECORD).unlink()
            sync_folder(self.folder)

    def _verify_again(self) -> None:
        """Nothing is to be done, but exit status 0 is to say that the folder holds what was packed.

        Raises:
            InputError: It does not; somebody else may have written it.
        """
        packed, origin = self.packed, read_record(self.packed.path)
        made = {"config.json": dense_config(packed.stored, origin)}
        if (packed.path / INDEX_NAME).is_file():
            made[INDEX_NAME] = dense_index(packed, origin)
        try:
            for shard in packed.shards:
                self._verify(shard, shard)
            verify_beside(packed.stored, self.folder, made, otherwise=[MODEL_CARD])
        except (InputError, RunError) as error:
            problem = error.problem if isinstance(error, InputError) else str(error)
            raise InputError("output", self.folder, f"is not what {packed.path} unpacks to ({problem})") from None
        card = self._card_given_back(origin)
        if card is None and not self._has_packed_card(origin) and (packed.path / MODEL_CARD).is_file():
            card = (packed.path / MODEL_CARD).read_bytes()
        if card is not None and (line := verify_card_given_back(self.folder, card.decode(errors="replace"))):
            print(line, flush=True)

    def _unpack(self, shard: str) -> None:
        """Write one shard, read it again, and only then give it its name."""
        unverified = f"{shard}{UNVERIFIED}"
        unpack_shard(self.packed.path, shard, self.folder, unverified)
        self._verify(shard, unverified)
        (self.folder / unverified).replace(self.folder / shard)
        sync_folder(self.folder)

    def _verify(self, shard: str, name: str) -> None:
        """Hold a shard that was written under some name against the packed one."""
        written = one_shard(self.folder, name, "output")
        packed = PackedFolder(one_shard(self.packed.path, shard))
        for key in packed:
            if key not in written or not written.same_bytes(key, packed):
                raise RunError(f"verification failed: {key} is not in {shard} as it was packed")

    def _give_card_back(self, origin: Manifest | None) -> None:
        """The card that was packed, unless somebody wrote another one since."""
        content = self._card_given_back(origin)
        if content is not None:
            replace_durably(self.folder / MODEL_CARD, content)
        elif self._has_packed_card(origin):
            (self.folder / MODEL_CARD).unlink(missing_ok=True)

    def _has_packed_card(self, origin: Manifest | None) -> bool:
        return origin is not None and "original_card" in origin and has_own_card(self.packed.path)

    def _card_given_back(self, origin: Manifest | None) -> bytes | None:
        """The card that was packed; None where there was none, or the packed folder has another one now."""
        given = origin["original_card"] if origin is not None and self._has_packed_card(origin) else None
        return None if given is None else given.encode(errors="surrogateescape")

    def _refuse_full_disk(self) -> None:
        there = sum(path.stat().st_size for path in map(self._written, self.packed.shards) if path.is_file())
        needed = sum(self.packed[key].nbytes for key in self.packed) - there
        refuse_full_disk(self.folder, needed)

    def _written(self, shard: str) -> Path:
        return self.folder / shard
