"""The output folder of `pack` and `unpack` while it is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lvlm_prune.distributed.interruption import interruptible
from lvlm_prune.output.folder import writing
from lvlm_prune.output.locking import FolderLock


@contextmanager
def owning(folder: Path, take: Callable[[], FolderLock]) -> Iterator[None]:
    """While the context is open no other run writes the folder; an interruption or a full disk says how to go on.

    Args:
        folder: The folder.
        take: Locks it.

    Raises:
        InputError: Another run is writing it, or has written it.
        RunError: The disk is full, or cannot be written.
    """
    with interruptible(lambda: f"go on with --resume true --output {folder}", at_once=False), writing(folder):
        lock = take()
        try:
            yield
        finally:
            lock.release()
