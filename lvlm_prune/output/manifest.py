"""The manifest `pruning.json`: what was done, to what, with what result; and where an unfinished run stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lvlm_prune.errors import InputError, shortened
from lvlm_prune.output.names import PACKING_RECORD, PROBE_RECORD, PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.private import LEFT_OUT, private_folder
from lvlm_prune.output.questions import is_of_names
from lvlm_prune.output.reading import conforms, read_record
from lvlm_prune.output.records import (
    BlockRecord,
    CompletePacking,
    CompletePruning,
    LinearRecord,
    PackingRecord,
    PruningRecord,
    RunRecord,
)
from lvlm_prune.output.recovery_records import CompleteRecovery, RecoveryRecord
from lvlm_prune.output.score_records import CompleteProbe, ProbeRecord

_KINDS: dict[str, type] = {
    PRUNING_RECORD: PruningRecord,
    RECOVERY_RECORD: RecoveryRecord,
    PROBE_RECORD: ProbeRecord,
    PACKING_RECORD: PackingRecord,
}
_WHEN_COMPLETE = {
    PRUNING_RECORD: CompletePruning,
    RECOVERY_RECORD: CompleteRecovery,
    PROBE_RECORD: CompleteProbe,
    PACKING_RECORD: CompletePacking,
}

METHOD_PHASES = ("gather", "score", "solve", "propagate")
"""Of the phases of a block those that depend on the method."""

FREE_TO_CHANGE = (
    "output",
    "resume",
    "evaluate",
    "held_back",
    "report",
    "packed",
    "push",
    "publishable",
    "config",
    "trainer",
)
"""Options that may differ between a run and its resumption without changing a single byte of the checkpoint."""

# Where the checkpoint and the calibration data are: they may move while what is there stays, which fingerprints tell.
_PLACES = {
    "model": ("config.model.path", "model.path", "model.folder"),
    "calibration": tuple(
        f"{source}.init_args.{name}"
        for source in ("config.data.source", "calibration.source")
        for name in ("path", "image_folder")
    ),
}


class Manifest(dict[str, Any]):
    """The content of `pruning.json`, a plain dictionary that knows how to be written durably.

    Keys: `status` (`copying`, `pruning`, `complete`), `method`, `config`, `model`, `calibration`, `versions`,
    `sparsity`, `blocks`, `linears`, `verified`, `warnings` (only where there are any), `seconds`.
    """

    @property
    def blocks(self) -> list[BlockRecord]:
        """Blocks whose weights are completely written, in order; new ones are appended."""
        return self.setdefault("blocks", [])

    @property
    def linears(self) -> dict[str, LinearRecord]:
        """Full name of each Linear that was to be pruned -> what is known of it; new ones are put in."""
        return self.setdefault("linears", {})

    @classmethod
    def read(cls, folder: Path, name: str = PRUNING_RECORD) -> Manifest:
        """Read the manifest of an output folder.

        Raises:
            InputError: There is none, or it is not as a run writes it.
        """
        path = folder / name
        if not path.is_file():
            raise InputError("output", folder, f"has no {name}: not a folder that this command wrote")
        content = read_run(path)
        if content is None:
            raise InputError("output", folder, f"its {name} is not as a run writes it")
        return cls(content)

    def write(self, folder: Path, name: str = PRUNING_RECORD) -> None:
        """Replace the manifest of the folder in one step; it is on the disk when this returns.

        Until the run is complete it is one line: it is written at each block, and with line breaks that takes Python
        four times as long, seconds where a block has hundreds of experts.
        """
        indent = 1 if self.get("status") == "complete" else None
        replace_durably(folder / name, (json.dumps(self, indent=indent) + "\n").encode())

    def finished_blocks(self) -> list[int]:
        """Blocks whose weights are completely written."""
        return [block["index"] for block in self.get("blocks", [])]

    def blocks_of(self, target: str) -> list[int]:
        """Numbers of the blocks of the language decoder, or of the vision tower."""
        return [block["index"] for block in self.blocks if block.get("target", "language") == target]

    def achieved_sparsity(self, blocks: Iterable[int] | None = None) -> float:
        """Share of zeros over the weights of all Linears that were to be pruned, or of those of some blocks."""
        chosen = None if blocks is None else set(blocks)
        entries = [entry for entry in self.linears.values() if chosen is None or entry["block"] in chosen]
        sizes = [entry["shape"][0] * entry["shape"][1] for entry in entries]
        zeros = sum(entry["achieved"] * size for entry, size in zip(entries, sizes))
        return zeros / max(sum(sizes), 1)

    def cost(self) -> dict[str, float]:
        """What the method took beyond catching, reading, writing and verifying.

        Returns:
            `seconds` of surveying, gathering, scoring, solving and propagating; `block_forwards` of all processes.
        """
        survey, blocks = self.get("survey", {}), self.blocks
        seconds = sum(cast(dict[str, float], block["seconds"])[phase] for block in blocks for phase in METHOD_PHASES)
        return {
            "seconds": survey.get("seconds", 0.0) + seconds,
            "block_forwards": survey.get("block_forwards", 0) + sum(block["forwards"] for block in blocks),
        }

    def refuse_other(self, other: Mapping[str, Any], folder: Path, name: str = PRUNING_RECORD) -> None:
        """Refuse to resume this unfinished run as another one.

        Args:
            other: The record of the run that is to go on.
            folder: Where this one is.
            name: File name of this one; what was left out of it lies beside the folder.

        Raises:
            InputError: Configuration, input checkpoint, calibration data or questions differ, which names the first
                difference; or another version began it, which may prune otherwise.
        """
        began, goes_on = (record.get("versions", {}).get("lvlm_prune") for record in (self, other))
        if self.get("status") != "complete" and None not in (began, goes_on) and began != goes_on:
            problem = f"is the unfinished run of lvlm-prune {shortened(began)}, and this is {goes_on}"
            raise InputError("output", folder, f"{problem}; go on with that version, or write elsewhere")
        if other.get("config") and not self.get("config"):
            raise InputError("output", folder, f"its {name} is not as a run writes it")
        if self.get("asked") != other.get("asked"):
            engine = other.get("asked", {}).get("engine", "(none)")
            before, now = (record.get("asked", {}).get("fingerprint") for record in (self, other))
            problem = f"asks other questions now than in the run in {folder}"
            if is_of_names(before) and not is_of_names(now):
                problem = f"an older version wrote {folder}, and noted names of pictures, not what is in them"
            raise InputError("engine", engine, f"{problem}; write elsewhere")
        moved, beside = self._free_places(), read_beside(folder, name)
        for section in ("config", "model", "calibration"):
            before, now = dict(leaves(self.get(section, {}))), dict(leaves(other.get(section, {})))
            whole = dict(leaves(beside.get(section, {})))
            before = {key: whole.get(key, value) if value == LEFT_OUT else value for key, value in before.items()}
            for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "method", key)):
                if section == "config" and key.split(".")[0] in FREE_TO_CHANGE:
                    continue
                if f"{section}.{key}" in moved or LEFT_OUT in (before.get(key), now.get(key)):
                    continue
                if before.get(key) != now.get(key):
                    if key == "fingerprint":
                        raise _other_input(section, other, folder)
                    if not key:  # nothing at all stands there
                        raise InputError("output", folder, f"its {name} is not as a run writes it")
                    option = key if section == "config" else f"{section}.{key}"
                    state = "finished" if self.get("status") == "complete" else "unfinished"
                    used = before.get(key, "")
                    said = "another, which has no name" if used == "" else used
                    problem = f"the {state} run in {folder} used {said}; repeat it, or write elsewhere"
                    raise InputError(option, now.get(key), problem)

    def _free_places(self) -> set[str]:
        """Options that say where something is whose content is compared; once complete, samples are not read again."""
        sections = ("model",) if self.get("status") == "complete" else ("model", "calibration")
        return {place for name in sections if "fingerprint" in self.get(name, {}) for place in _PLACES[name]}


def read_beside(folder: Path, name: str) -> dict[str, Any]:
    """The record with its private data; empty where none lies beside the folder."""
    return read_run(private_folder(folder) / name) or {}


def read_run(path: Path) -> dict[str, Any] | None:
    """The record of a run, or None where there is none, or where it is not as a run writes it."""
    found = read_record(path, _KINDS.get(path.name, RunRecord))
    if found is None:
        return None
    is_whole = found.get("status") != "complete" or conforms(found, _WHEN_COMPLETE.get(path.name, RunRecord))
    linears = found.get("linears", {}).values() if path.name == PRUNING_RECORD else ()
    return found if is_whole and all({"pruned", "note"} & entry.keys() for entry in linears) else None


def _other_input(section: str, other: Mapping[str, Any], folder: Path) -> InputError:
    if section == "model":
        problem = f"has changed: it is not the checkpoint that the unfinished run in {folder} started from"
        return InputError("model.path", other["model"].get("path"), problem)
    source = other["calibration"].get("source", {})
    problem = f"gives other calibration samples now than in the unfinished run in {folder}"
    return InputError("data.source", source.get("class_path", source), problem)


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a crash either the old or the new content is there, never a part."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the context closes without an error, and is on the disk then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # what an interrupted run left, or a link to somebody's file
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)  # room for the next attempt
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return only once the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested mappings; an empty mapping is a value.

    Example:
        >>> list(leaves({"pool": {"alpha": 2}, "seed": 0}))
        [('pool.alpha', 2), ('seed', 0)]
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
