"""Seconds and bytes that go into the manifest and into benchmarks."""

import sys
import time

import torch


class Stopwatch:
    """Seconds between laps, with the accelerator's queue emptied first."""

    clock = staticmethod(time.perf_counter)
    """Where the time comes from; a benchmark on a busy machine takes processor time instead."""

    def __init__(self) -> None:
        self._start = self.clock()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self.clock()
        elapsed, self._start = now - self._start, now
        return elapsed


def peak_memory() -> int:
    """Largest memory of this process so far in bytes: the device's where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
