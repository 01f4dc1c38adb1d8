"""What a sweep found: one JSON line per finished run, so that nothing finished is done again.

sweep.jsonl             {"identity": ..., "recipe": ..., "options": ..., "seed": ..., "scores": ..., ...}
sweep-1of2.jsonl        the same, of a process that does a part of the runs; all are read together
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.scores import Retention, Scores, retention
from lvlm_prune.output.folder import refuse_other_content
from lvlm_prune.output.locking import FolderLock, shared
from lvlm_prune.output.manifest import replace_durably, sync_folder
from lvlm_prune.output.own_files import digest_of_json
from lvlm_prune.output.reading import conforms
from lvlm_prune.output.records import TriedRecord
from lvlm_prune.output.score_records import DenseRecord, SweptRecord
from lvlm_prune.runs.sweep.grid import Point

DENSE = "dense-"
"""What the identity of the dense model's line begins with."""

_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


class Results:
    """Finished runs of a folder, by identity.

    Args:
        folder: The sweep's output folder.
        file_name: Where this process appends.
        kind: What the runs belong to; files of results are named after it.
    """

    def __init__(self, folder: Path, file_name: str = "sweep.jsonl", kind: str = "sweep") -> None:
        self.folder, self.path, self.kind = folder, folder / file_name, kind
        self.records: dict[str, dict[str, Any]] = {}
        self._own = [f"{kind}*.jsonl"]
        self._lock: FolderLock | None = None

    def read(self) -> Results:
        """Read what all processes finished so far. A line that was cut off by a crash, or changed, is left out.

        Raises:
            InputError: The folder holds something else.
        """
        refuse_other_content(self.folder, self._own, self.kind)
        for file in sorted(self.folder.glob(f"{self.kind}*.jsonl")):
            if not file.is_file():  # a pipe would be waited for
                raise InputError("output", self.folder, f"holds {file.name}, which is no regular file")
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if _is_finished(record, self.kind):
                    self.records[record["identity"]] = record
        return self

    def begin(self) -> None:
        """Make the folder one of its kind before anything is finished, so that it can be gone on with.

        From here on no other process appends to this file, until `release`; others may to files of their own.

        Raises:
            InputError: Another process does.
        """
        if self._lock is not None:
            return
        with shared(self.folder, self._own, self.kind):
            if not self.path.exists():
                self.path.touch()
                sync_folder(self.folder)
            elif self.path.is_symlink() or self.path.stat().st_nlink > 1:  # what it leads to may be somebody's
                replace_durably(self.path, self.path.read_bytes())
        self._lock = FolderLock(self.folder, self.path.name)
        self.read()  # another process may have finished meanwhile

    def release(self) -> None:
        """Let other processes append to the file."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a finished run; it is on the disk when this returns."""
        self.records[record["identity"]] = dict(record)
        new = not self.path.exists()
        with self.path.open("ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write((json.dumps({**record, "digest": digest_of_json(record)}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.folder)

    def forget_beginning(self) -> None:
        """Leave things as they were where nothing was finished, now or before: the command fails."""
        if self._lock is None:  # another process has it
            return
        with suppress(OSError):
            if not self.path.stat().st_size:
                self.remove()

    def remove(self) -> None:
        """Remove the file of this process, and the folder where nothing else is in it: that may be somebody's."""
        with suppress(OSError):
            self.path.unlink()
            self.folder.rmdir()


def _is_finished(record: Any, kind: str) -> bool:
    """Whether a line that was read, without its `digest` from now on, is one that a run wrote, and as it wrote it."""
    if not isinstance(record, dict) or not isinstance(record.get("identity"), str):
        return False
    digest = record.pop("digest", None)
    shape: type = SweptRecord if kind == "sweep" else TriedRecord
    if kind == "sweep" and record["identity"].startswith(DENSE):
        shape = DenseRecord
    try:
        return conforms(record, shape) and digest == digest_of_json(record)
    except RecursionError:
        return False


@dataclass(frozen=True)
class FinishedRun:
    """A point of the grid and what became of it.

    Args:
        point: Recipe, options and seed of the run.
        record: Its line of `sweep.jsonl`, as plain data.
        scores: What the pruned model scores, by task.
        kept: Share of the dense model's accuracy that is left.
    """

    point: Point
    record: Mapping[str, Any]
    scores: Scores
    kept: Retention


def finished_runs(
    points: Iterable[Point], records: Mapping[str, Mapping[str, Any]], key: str, dense: Scores
) -> list[FinishedRun]:
    """The points that are finished, in the order of the grid.

    Args:
        points: The grid.
        records: Lines by identity.
        key: What all runs have in common, see `record_identity`.
        dense: Scores of the dense model.
    """
    runs = []
    for point in points:
        record = records.get(record_identity(point, key))
        if record is not None and was_asked_the_same(record, dense):
            scores = Scores.from_dict(record["scores"])
            runs.append(FinishedRun(point, record, scores, retention(scores, dense)))
    return runs


def was_asked_the_same(record: Mapping[str, Any], dense: Scores) -> bool:
    """Whether a run was scored on the questions of the dense model."""
    return bool(record["scores"]["counts"] == dense.counts)


def record_identity(point: Point, key: str) -> str:
    """What a run depends on: its own configuration, and what all of them have in common (model, engine)."""
    return f"{point.identity[:32]}-{key}"


def share(points: Sequence[Point], part: str) -> list[Point]:
    """The points that one of several processes does: `2/3` is the second third, runs on the same data together.

    Raises:
        InputError: `part` is not of that form.
    """
    found = _PART.fullmatch(part)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise InputError("part", part, "must be of the form 1/2, the first of two parts")
    start, end = (len(points) * edge // count for edge in (number - 1, number))
    return list(points[start:end])


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
