"""Read what is needed next while the present is in work."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Thread

from torch import Tensor


class Prefetch:
    """Named tensors that are read in the background.

    Args:
        tensors: Reads and gives one (name, tensor) after the other.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = tensors
        self._found: list[tuple[str, Tensor]] = []
        self._error: BaseException | None = None
        self._dropped = False
        # A program that is interrupted does not wait for it.
        self._thread = Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for pair in self._tensors:
                if self._dropped:
                    return
                self._found.append(pair)
        except BaseException as error:
            self._error = error

    def take(self) -> list[tuple[str, Tensor]]:
        """Everything, once it is read.

        Raises:
            BaseException: What reading raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def drop(self) -> None:
        """Nobody wants it any more; returns when its memory is free."""
        self._dropped = True
        self._thread.join()
        self._found.clear()
