"""What `pack` and `unpack` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lvlm_prune.distributed.interruption import interruptible
from lvlm_prune.output.folder import FolderLock, writing


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """While the context is open no other run writes the folder; an interruption or a full disk says how to go on.

    Raises:
        InputError: Another run is writing it.
        RunError: The disk is full, or cannot be written.
    """
    with interruptible(lambda: f"go on with --resume true --output {folder}", at_once=False), writing(folder):
        lock = FolderLock(folder)
        try:
            yield
        finally:
            lock.release()


@contextmanager
def progress_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over shards; gone when the context closes."""
    bar = Tqdm(
        total=total,
        bar_format=f"{title} {{bar:24}} {{n_fmt}}/{{total_fmt}} shards · {{elapsed}} · {{remaining}} left",
        disable=True if quiet else None,
        leave=False,
    )
    try:
        yield bar.update
    finally:
        bar.close()


def megabytes(size: float) -> str:
    """A number of bytes as a reader takes it in.

    Example:
        >>> megabytes(1_234_567), megabytes(81_000), megabytes(65_000_000_000)
        ('1.2 MB', '0.08 MB', '65.0 GB')
    """
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e6:.2f} MB"
