"""Who writes an output folder: one run at a time, or commands that add to it one after the other."""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lvlm_prune.errors import InputError
from lvlm_prune.output.folder import identity, is_occupied, make_folder, refuse_other_content

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 5.0
"""Seconds for which a command waits that only adds to a folder."""


class FolderLock:
    """Keeps other runs out of an output folder until it is released, or the process ends.

    Where the file system knows no locks, nothing is kept out.

    Args:
        folder: The folder, which exists.
        file: Name of a file in it; only runs that lock the same one are kept out.

    Raises:
        InputError: Another run is writing it, or has removed it just now.
    """

    def __init__(self, folder: Path, file: str = "") -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(folder / file, os.O_RDWR if file else os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError("output", folder, "is being written by another run") from None
        except OSError:
            os.close(descriptor)
            return
        self._descriptor = descriptor
        found = os.fstat(descriptor)
        if identity(folder / file) != (found.st_dev, found.st_ino):  # the lock of something that nobody sees any more
            self.release()
            raise InputError("output", folder, "was removed by another run meanwhile")

    def release(self) -> None:
        """Let other runs in; a second time it does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def claim(folder: Path, record: str, resume: bool) -> FolderLock:
    """Make an output folder, and keep other runs out; what one wrote there since this run looked stays as it is.

    Args:
        folder: The output folder.
        record: Name of the manifest that this kind of run writes.
        resume: Whether an unfinished run goes on.

    Raises:
        InputError: Another run is writing the folder, or has written it.
    """
    make_folder(folder)
    lock = FolderLock(folder)
    if is_occupied(folder, record) and not (resume and (folder / record).is_file()):
        lock.release()
        raise InputError("output", folder, "was written by another run meanwhile; choose another folder")
    return lock


@contextmanager
def shared(folder: Path, records: Collection[str], kind: str) -> Iterator[None]:
    """While the context is open nobody else writes an output folder to which several commands may add.

    Waits for another command of that kind, which takes a moment.

    Args:
        folder: The output folder, which may be missing.
        records: Patterns of the names of the command's records, see `refuse_other_content`.
        kind: What the command writes, for people.

    Raises:
        InputError: A run that has the folder for itself is writing it, or somebody wrote something else there.
    """
    make_folder(folder)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            lock = FolderLock(folder)
            break
        except InputError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
    try:
        refuse_other_content(folder, records, kind)
        yield
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted run left in a folder, if it is there, but not what another process is writing.

    Raises:
        InputError: Another run is writing it, or it is a link, and what it leads to is somebody's.
    """
    if folder.is_symlink():
        raise InputError("output", folder, f"is a link to {os.readlink(folder)}; a run removes only what it wrote")
    if folder.is_dir():
        lock = FolderLock(folder)
        shutil.rmtree(folder)
        lock.release()
