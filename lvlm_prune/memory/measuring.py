"""Seconds and bytes that go into the manifest and into benchmarks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

_INTERVAL = 0.01  # seconds
_STATUS = Path("/proc/self/status")


class Stopwatch:
    """Seconds between laps, with the queue of the device emptied first where that is a GPU.

    Args:
        device: Where the work is done that is measured.
    """

    clock = staticmethod(time.perf_counter)
    """Where the time comes from; a benchmark on a busy machine takes processor time instead."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._start = self.clock()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self.clock()
        elapsed, self._start = now - self._start, now
        return elapsed


def peak_memory(device: torch.device | str) -> int:
    """Largest memory of this process so far in bytes: that of the device where it is a GPU, else resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_memory() -> int:
    """Bytes of this process' memory that are backed by no file: mapped files can be dropped at any time, these cannot.

    Where the system does not tell them apart, all resident bytes.
    """
    if not _STATUS.exists():
        return psutil.Process().memory_info().rss
    descriptor = os.open(_STATUS, os.O_RDONLY)
    try:
        return _anonymous_of(descriptor)
    finally:
        os.close(descriptor)


def _anonymous_of(descriptor: int) -> int:
    status = os.pread(descriptor, 8192, 0)
    return 1024 * int(status.partition(b"RssAnon:")[2].split(maxsplit=1)[0])


class MemorySampler:
    """Peak of `anonymous_memory`, looked at a hundred times a second by a thread of its own.

    Attributes:
        start: Bytes when sampling began.
        peak: The most bytes seen so far.
    """

    def __init__(self) -> None:
        self._stop = Event()
        self.start = self.peak = anonymous_memory()
        self._thread = Thread(target=self._run, name="memory sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        descriptor = os.open(_STATUS, os.O_RDONLY) if _STATUS.exists() else None
        try:
            while not self._stop.wait(_INTERVAL):
                self.peak = max(self.peak, anonymous_memory() if descriptor is None else _anonymous_of(descriptor))
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Stop sampling the memory of the process; the peak stays."""
        self._stop.set()
        self._thread.join()
