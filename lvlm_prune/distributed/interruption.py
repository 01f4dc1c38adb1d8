"""Ctrl-C says how to go on, and ends a run within a second, whatever it is doing; so does SIGTERM.

Schedulers (SLURM, Kubernetes) and `kill` send SIGTERM, and kill a process that has not ended some seconds later.

Python looks at signals between two of its own instructions: a factorisation of a large matrix, or a wait for a GPU, is
one instruction. What a run writes survives being killed at any moment, so a thread may end the process the hard way.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from lvlm_prune.distributed.launching import Children
from lvlm_prune.distributed.ranks import is_first_process
from lvlm_prune.errors import Terminated, exit_status

_PATIENCE = 0.5
"""Seconds in which the run may end by itself."""

_INTERRUPTIONS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextmanager
def interruptible(way_on: Callable[[], str], at_once: bool, children: Children | None = None) -> Iterator[None]:
    """While the context is open, an interruption ends the run and says how to go on.

    Args:
        way_on: How; an empty text where there is nothing yet to go on from.
        at_once: The process is all the run's: SIGTERM interrupts it too, and where the interruption is not over soon,
            it ends the hard way.
        children: Processes that the run started; an interruption may stand for the loss of one.

    Raises:
        KeyboardInterrupt: The run was interrupted; its text says how to go on. `Terminated` where SIGTERM did it.
    """

    def end(interruption: KeyboardInterrupt) -> None:
        error = children.error_to_show(interruption) if children is not None and children.lost_child else interruption
        if is_first_process():
            said = said_of_interruption(way_on()) if error is interruption else f"error: {error}"
            print(said, file=sys.stderr, flush=True)
        os._exit(exit_status(error))

    with _ends_within_a_second(end) if at_once else nullcontext():
        try:
            yield
        except KeyboardInterrupt as interruption:
            raise type(interruption)(way_on()) from None


def said_of_interruption(way_on: object = "") -> str:
    """What is printed where a run was interrupted, with how to go on where that is known."""
    return f"interrupted: {way_on}" if way_on else "interrupted"


@contextmanager
def _ends_within_a_second(end: Callable[[KeyboardInterrupt], None]) -> Iterator[None]:
    """Does nothing outside of the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrival, notice = socket.socketpair()
    notice.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while (numbers := arrival.recv(1)) and numbers[0] not in _INTERRUPTIONS:
            pass
        if numbers and not over.wait(_PATIENCE):
            end(_INTERRUPTIONS[numbers[0]]())

    threading.Thread(target=watch, daemon=True).start()
    earlier = signal.set_wakeup_fd(notice.fileno(), warn_on_full_buffer=False)
    earlier_handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, earlier_handler)
        signal.set_wakeup_fd(earlier)
        notice.close()


def _terminate(*_: object) -> NoReturn:
    raise Terminated
