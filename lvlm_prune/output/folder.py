"""The folder that a run writes: refused before anything is done, filled with a copy of the input, released at the end.

Until the run is complete and verified `config.json` is held back, so that nobody can load an unfinished checkpoint.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output.manifest import replace_durably, sync_file, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HELD_BACK = "config.json.unfinished"


def choose_folder(output: str, name: str, resume: bool) -> Path:
    """The folder that a run writes: the one asked for, or a new one under `runs`.

    Args:
        output: What the user asked for; empty for none.
        name: Name of the new folder; numbered where it is taken.
        resume: Whether an unfinished run goes on, which only the user can point at.

    Raises:
        InputError: An unfinished run is to go on, and nobody says where.
    """
    if output:
        return Path(output)
    if resume:
        raise InputError("resume", "true", "needs --output, the folder of the unfinished run")
    wanted = Path("runs") / name
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def refuse_unusable(folder: Path, source: Path | None, record: str, resume: bool, copies: bool = True) -> None:
    """Refuse an output folder that cannot be written.

    Args:
        folder: The output folder, which need not exist.
        source: The input checkpoint; None for a model in memory.
        record: Name of the manifest that an unfinished run of the same kind left.
        resume: Whether such a run goes on.
        copies: Whether a copy of the input is going to be written, which needs room.

    Raises:
        InputError: The folder exists and is not empty, lies in the input, cannot be written or has no room.
    """
    if source is not None:
        _refuse_overlap(folder, source.resolve())
    if folder.exists() and not folder.is_dir():
        raise InputError("output", folder, "is a file")
    if folder.is_symlink() and not folder.exists():
        raise InputError("output", folder, f"is a link to {os.readlink(folder)}, which does not exist")
    occupied = is_occupied(folder, record)
    if occupied and not resume:
        way_out = "go on with --resume true, or " if (folder / record).is_file() else ""
        raise InputError("output", folder, f"exists and is not empty; {way_out}choose another folder")
    existing = existing_folder(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError("output", folder, f"no permission to write in {existing}")
    if source is not None and copies:
        _refuse_full_disk(folder, source.resolve(), occupied)


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not exist."""
    return shutil.disk_usage(existing_folder(folder)).free


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())


def _refuse_overlap(folder: Path, source: Path) -> None:
    if folder.resolve().is_relative_to(source):
        raise InputError("output", folder, f"lies inside the input checkpoint {source}")
    if source.is_relative_to(folder.resolve()):
        raise InputError("output", folder, f"holds the input checkpoint {source}")


def _refuse_full_disk(folder: Path, source: Path, occupied: bool) -> None:
    there = {path.relative_to(folder): path.stat().st_size for path in _files(folder)} if occupied else {}
    needed = sum(
        max(path.stat().st_size - there.get(path.relative_to(source), 0), 0)
        for path in _files(source)
        if path.name != "config.json"  # it may be held back under another name, and is small
    )
    free = free_bytes(folder)
    if needed > free:
        problem = f"needs {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free on this disk"
        raise InputError("output", folder, problem)


def is_occupied(folder: Path, record: str) -> bool:
    """Whether there is more in a folder than what a run leaves that dies before its manifest `record` is written."""
    return folder.is_dir() and any(path.name != f"{record}.tmp" for path in folder.iterdir())


def make_folder(folder: Path) -> None:
    """Create a folder and those above it; they are there after a crash too."""
    missing = [parent for parent in (folder, *folder.resolve().parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


class FolderLock:
    """Keeps other runs out of an output folder until it is released, or the process ends.

    Where the file system knows no locks, nothing is kept out.

    Args:
        folder: The folder, which exists.

    Raises:
        InputError: Another run is writing it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError("output", folder, "is being written by another run") from None
        except OSError:
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Let other runs in; a second time it does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`, which repeats the run."""
    replace_durably(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong while something is written into the output folder becomes one line.

    Raises:
        RunError: The disk is full, or cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, about something else than the disk
            raise
        reason = f"{error.strerror or error} (nothing is lost; resume with --resume true)"
        raise RunError(f"--output {folder}: {reason}") from None


def copy_checkpoint(source: Path, folder: Path, leave_out: tuple[str, ...]) -> None:
    """Copy a checkpoint folder, with `config.json` held back; the copy is on the disk when this returns.

    Args:
        source: The input checkpoint.
        folder: Where the copy goes.
        leave_out: Records of the run that made the input, which would be taken for those of this run; a folder among
            them is left out with all that is in it.
    """
    source = source.resolve()
    folders = {folder}
    for path in _files(source):
        relative = path.relative_to(source)
        if str(relative) in leave_out or relative.parts[0] in leave_out:
            continue
        target = folder / (HELD_BACK if str(relative) == "config.json" else relative)
        make_folder(target.parent)
        shutil.copyfile(path, target)
        sync_file(target)
        folders.add(target.parent)
    for changed in folders:
        sync_folder(changed)


def release(folder: Path) -> None:
    """Put `config.json` in place: from now on the folder can be loaded."""
    if (folder / HELD_BACK).exists():
        (folder / HELD_BACK).replace(folder / "config.json")
        sync_folder(folder)


def folder_bytes(folder: Path) -> int:
    """Size of all files of a checkpoint folder, hidden ones left out."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    """Every file of a checkpoint folder, hidden ones (caches, git) left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
