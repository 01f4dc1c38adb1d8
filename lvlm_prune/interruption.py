"""Ctrl-C ends a run within a second, whatever it is doing.

Python looks at signals between two of its own instructions: a factorisation of a large matrix, or a wait for a GPU, is
one instruction. What a run writes survives being killed at any moment, so a thread may end the process the hard way.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 0.7
"""Seconds in which the run may end by itself."""


@contextmanager
def ends_within_a_second(advice: Callable[[], str]) -> Iterator[None]:
    """While the context is open, an interruption that is not over soon ends the process with status 130.

    Does nothing outside of the main thread, which alone gets signals.

    Args:
        advice: What to say then; an empty text says nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrival, notice = socket.socketpair()
    notice.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while (numbers := arrival.recv(1)) and numbers[0] != signal.SIGINT:
            pass
        if numbers and not over.wait(_PATIENCE):
            if text := advice():
                print(text, file=sys.stderr, flush=True)
            os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    earlier = signal.set_wakeup_fd(notice.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(earlier)
        notice.close()
