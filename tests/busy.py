"""Plugins that are busy for minutes with one instruction of Python, which looks at no signal meanwhile.

They are so in a process whose environment names a file, `BUSY`, which they write when they begin.
"""

import hashlib
import os
import signal
import time
from pathlib import Path

from lvlm_prune.callbacks import PruneCallback
from lvlm_prune.methods.scorers import WandaScorer
from tests import warm
from tests.conftest import REPOSITORY


def be_busy() -> None:
    if "BUSY" in os.environ:
        Path(os.environ["BUSY"]).touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


class BusyCallback(PruneCallback):
    """At the start of a block, counted over all runs of a sweep; after a step of training."""

    def __init__(self, block: int = 0, step: int = 0) -> None:
        self.block, self.step, self._blocks = block, step, 0

    def on_block_start(self, trainer, pl_module, block):
        self._blocks += 1
        if self._blocks == self.block:
            be_busy()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            be_busy()


class BusyScorer(WandaScorer):
    """At a weight, counted over the survey and all cells of a probe."""

    def __init__(self, weight: int) -> None:
        super().__init__()
        self.weight, self._weights = weight, 0

    def prune(self, weight, statistic, sparsity, pattern):
        self._weights += 1
        if self._weights == self.weight:
            be_busy()
        return super().prune(weight, statistic, sparsity, pattern)


def interrupt(run: warm.Command, number: int = signal.SIGINT) -> tuple[float, str]:
    """Press Ctrl-C, or send SIGTERM to the first process alone; seconds until the run is gone, and what it said."""
    before = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    _, said = run.communicate(timeout=60)
    return time.monotonic() - before, said


def about_a_second() -> float:
    """A second, and what a busy machine adds to it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 + 2 * os.getloadavg()[0] / cpus


def interrupted_while_busy(folder: Path, *arguments: str) -> tuple[float, int, str]:
    """Run a command until it is busy, then press Ctrl-C; seconds until it ended, exit status, what it said."""
    begun = folder / "busy"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    run = warm.start(*arguments, cwd=folder, BUSY=str(begun), PYTHONPATH=path)
    try:
        while not begun.exists():
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.05)
        seconds, said = interrupt(run)
    finally:
        run.kill()
    return seconds, run.returncode, said
