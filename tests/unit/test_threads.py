"""As many threads as can run, and none that spins while it waits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvlm_prune import threads
from lvlm_prune.threads import TINY_BLOCK, available_cpus, suitable_threads, wait_asleep

# Says what the environment has when a package is first looked for, and ends there.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            print(os.environ.get({variable!r}))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Watch())
from lvlm_prune.cli import main
main(["prune", "--pruning.sparsity", "0.6"])
"""


def machine(folder: Path, groups: str, files: dict[str, str]) -> Path:
    """The files of a machine whose process is in these control groups."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/outside/of/the/container\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            "4:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            "2:cpuacct:/\n1:cpu:/\n0::/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            8,
        ),
        (
            "4:cpuacct,cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "550000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            5,
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what is this\n"}, 8),
    ],
)
def test_cpus_are_those_of_the_affinity_within_every_quota(groups, files, cpus, tmp_path):
    assert available_cpus(machine(tmp_path, groups, files)) == cpus


def test_affinity_counts_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5}, raising=False)
    assert available_cpus(tmp_path) == 2


@pytest.mark.parametrize(
    ("weights", "cpus", "processes", "expected"),
    [(TINY_BLOCK - 1, 8, 1, 1), (TINY_BLOCK, 8, 1, 6), (TINY_BLOCK, 3, 1, 3), (TINY_BLOCK, 4, 2, 2)],
)
def test_threads_are_one_for_tiny_blocks_and_never_more_than_cpus(weights, cpus, processes, expected, monkeypatch):
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with suitable_threads(weights, processes):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 6
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        with suitable_threads(weights, processes):
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_what_the_user_says_about_waiting_stays(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    wait_asleep()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("package", "variable", "value"),
    [("torch", "OMP_WAIT_POLICY", "PASSIVE"), ("transformers", "TRANSFORMERS_VERBOSITY", "error")],
)
def test_the_environment_is_set_before_packages_that_read_it_are_imported(package, variable, value):
    environment = {name: value for name, value in os.environ.items() if name not in (variable, "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", WATCH.format(package=package, variable=variable)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert said.stdout.split() == [value], said.stderr
