"""Folders for files that nobody keeps."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lvlm_prune.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def temporary_folder(prefix: str = "lvlm-prune", way_on: str = "") -> Iterator[Path]:
    """A folder of its own in the place for temporary files (`TMPDIR`), removed when the context closes.

    Args:
        prefix: What its name begins with.
        way_on: How the command goes on when it cannot be written.

    Raises:
        RunError: A file cannot be written there, for example because the disk is full.
    """
    try:
        folder = TemporaryDirectory(prefix=f"{prefix}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _not_written(error, way_on) from None
    with folder as place:
        try:
            yield Path(place)
        except OSError as error:
            if error.errno not in _FULL:  # about something else that is read or written meanwhile
                raise
            raise _not_written(error, way_on) from None


def _not_written(error: OSError, way_on: str) -> RunError:
    # Python's own error, where no place can be written at all, names all that it tried.
    reason = (error.strerror or str(error)).split(" found in ")[0]
    problem = f"temporary files cannot be written in {os.environ.get('TMPDIR', '/tmp')} ({reason})"
    return RunError(f"{problem}; TMPDIR names another place{f' ({way_on})' if way_on else ''}")
