"""When the command that is under way began: seconds on the screen are those that its user waited, imports included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_BEGAN: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def command() -> Iterator[None]:
    """While the context is open a command is under way, which began with it."""
    token = _BEGAN.set(time.perf_counter())
    try:
        yield
    finally:
        _BEGAN.reset(token)


def command_began() -> float:
    """What `time.perf_counter` said when the command began; from Python, where there is none, what it says now.

    Example:
        >>> with command():
        ...     command_began() == command_began()
        True
    """
    began = _BEGAN.get()
    return time.perf_counter() if began is None else began
