"""How many threads compute, and how they wait for each other.

By themselves torch's threads are as many as the machine has cores, and those that are done early spin until the others
are. In a container with a quota, or beside another program, one of them does not run at all for a while, and the others
burn the time that it needs: a small model takes ten to forty times as long. So threads are as many as can run, they
sleep while they wait, and where blocks are tiny there is one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

# Matrix products of blocks below this many weights are over before a second thread is awake: measured with float32 and
# 230 tokens on two cores, two threads take 1.0 times one's time at 0.4 million weights, 0.65 times at 1.8 million.
TINY_BLOCK = 1_000_000


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait; to be called before torch is imported.

    What the environment says about it already stays as it is.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use at the same time: by its affinity, and by the quota of its control groups.

    A quota of part of a CPU more counts as none: a thread that is stopped for lack of quota keeps the others waiting.

    Args:
        root: Where `proc` and `sys` are found.

    Returns:
        At least 1.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, int(min([cpus, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each control group around this process may use, where that is limited."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy, without names
            base, read = root / "sys/fs/cgroup", _quota_of_version_2
        elif "cpu" in controllers.split(","):
            base, read = root / "sys/fs/cgroup" / controllers, _quota_of_version_1
            if not base.is_dir():
                base = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Seen from inside a container, its own group is the root, whatever its path is outside.
        inside = PurePosixPath(path.lstrip("/"))
        for folder in [inside, *inside.parents]:
            quota = read(base / folder)
            if quota is not None:
                yield quota


def _quota_of_version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_of_version_1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


@contextmanager
def suitable_threads(block_weights: int, processes: int = 1) -> Iterator[None]:
    """Let torch use no more threads than can run at the same time, and one where blocks are tiny.

    Nothing changes where `OMP_NUM_THREADS` or `MKL_NUM_THREADS` says how many; afterwards it is as before. The order in
    which sums are made may depend on the number of threads, so this is settled before the first of them.

    Args:
        block_weights: Weights of the largest block.
        processes: Processes of this run on this machine, which share its CPUs.
    """
    import torch

    before = torch.get_num_threads()
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        most = 1 if block_weights < TINY_BLOCK else max(1, available_cpus() // processes)
        torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
