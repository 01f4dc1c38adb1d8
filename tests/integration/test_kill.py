"""Killed by the system at any moment, with one process and with two: what is left goes on to the same bytes."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from lvlm_prune.cli import main
from tests import warm
from tests.conftest import ALL_BLOCKS, GOLDEN_ARGUMENTS

pytestmark = pytest.mark.slow

ARGUMENTS = [*GOLDEN_ARGUMENTS, ALL_BLOCKS, "--pruning.record=true"]
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]

KILLER = '''
import os, signal
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.callbacks import PruneCallback

class KillInWrite(PruneCallback):
    """Half of the bytes of one tensor arrive, then the process is gone."""
    def __init__(self, number: int):
        write, self.count = CheckpointFolder.write, 0
        def dying(folder, key, tensor):
            self.count += 1
            if self.count == number:
                tensor = tensor.clone()
                tensor[: len(tensor) // 2] = 7
                write(folder, key, tensor)
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder, key, tensor)
        CheckpointFolder.write = dying
'''


def wait_for(path: Path, run: warm.Command) -> None:
    while not path.exists() and run.poll() is None:
        time.sleep(0.001)


def assert_goes_on(output: Path, whole: Path) -> None:
    if (output / "config.json").exists():
        assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert main([*ARGUMENTS, f"--output={output}", "--resume=true"]) == 0
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    for name in ("model.safetensors", "statistics.safetensors", "config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*ARGUMENTS, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def seconds(request, tmp_path_factory) -> tuple[list[str], float]:
    """Options for one process or two, and how long such a run has an output folder before it is done."""
    folder, devices = tmp_path_factory.mktemp("seconds"), TWO if request.param == 2 else []
    run = warm.start(*ARGUMENTS, *devices, f"--output={folder / 'out'}", cwd=folder)
    wait_for(folder / "out", run)
    begun = time.monotonic()
    assert run.wait(600) == 0
    return devices, time.monotonic() - begun


@pytest.mark.parametrize(
    ("seconds", "seed"), [(1, seed) for seed in range(10)] + [(2, seed) for seed in range(5)], indirect=["seconds"]
)
def test_killed_at_a_random_moment(seed, seconds, whole, tmp_path):
    """Of two processes, one or the other is killed; the other one ends by itself."""
    devices, duration = seconds
    chance = random.Random(seed)
    output = tmp_path / "out"
    run = warm.start(*ARGUMENTS, *devices, f"--output={output}", cwd=tmp_path)
    wait_for(output, run)
    time.sleep(chance.random() * duration)
    try:
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children()]
        chance.choice(processes).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        processes = []
    run.wait(60)
    _, alive = psutil.wait_procs([process for process in processes if process.pid != run.pid], timeout=60)
    assert not alive
    assert_goes_on(output, whole)


@pytest.mark.parametrize("seed", range(10))
def test_killed_in_the_middle_of_a_write(seed, whole, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    number = random.Random(seed).randint(1, 28)
    kill = ["--trainer.callbacks=killer.KillInWrite", f"--trainer.callbacks.number={number}"]
    run = warm.start(*ARGUMENTS, *kill, f"--output={tmp_path / 'out'}", cwd=tmp_path)
    assert run.wait(600) == -signal.SIGKILL
    assert not (tmp_path / "out" / "config.json").exists()
    assert_goes_on(tmp_path / "out", whole)
