"""Commands that start processes of their own, and launchers that start the command: all end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from tests import warm
from tests.busy import about_a_second, interrupt
from tests.recipes import arguments_of, assert_same_result


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of the methods that are tried here."""
    folder = tmp_path_factory.mktemp("one")
    for recipe in ("atv", "wanda"):
        assert main([*arguments_of(recipe), f"--output={folder / recipe}"]) == 0
    return folder


TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]

SLEEPER = '''
import os, time
from pathlib import Path
from lvlm_prune.callbacks import PruneCallback

class Sleeper(PruneCallback):
    """Is busy in the second block, or step, until somebody ends it; a file tells each process' id."""
    def on_block_start(self, trainer, pl_module, block):
        if block.index == 1:
            self.sleep()
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            self.sleep()
    def sleep(self):
        Path(f"busy.{os.environ.get('LOCAL_RANK', 0)}").write_text(str(os.getpid()))
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            sum(range(1000))
'''


def start(folder: Path, *arguments: str) -> warm.Command:
    (folder / "sleeper.py").write_text(SLEEPER)
    return warm.start(*arguments, "--trainer.callbacks=sleeper.Sleeper", cwd=folder)


def wait_until_busy(folder: Path, count: int) -> list[int]:
    """Ids of the processes, in the order of ranks."""
    files = [folder / f"busy.{rank}" for rank in range(count)]
    deadline = time.monotonic() + 300
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def are_gone(pids: list[int]) -> bool:
    """Whether processes end within another second: a busy machine takes a while to end what was killed."""
    deadline = time.monotonic() + 1
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


INTERRUPTIONS = [
    pytest.param([], signal.SIGINT, id="one process"),
    pytest.param(TWO, signal.SIGINT, id="two processes"),
    pytest.param(TWO, signal.SIGTERM, id="two processes, SIGTERM", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("devices", "number"), INTERRUPTIONS)
def test_ctrl_c_ends_within_a_second_and_says_how_to_go_on(devices, number, tmp_path, one):
    output = tmp_path / "out"
    arguments = [*arguments_of("wanda"), f"--output={output}"]
    run = start(tmp_path, *arguments, *devices)
    pids = wait_until_busy(tmp_path, 2 if devices else 1)
    seconds, said = interrupt(run, number)
    assert run.returncode == 128 + number
    assert said == f"interrupted: go on with --resume true --output {output}\n"
    assert seconds < about_a_second()
    assert are_gone(pids)
    assert not (output / "config.json").exists()
    assert main([*arguments, "--resume=true"]) == 0
    assert (output / "model.safetensors").read_bytes() == (one / "wanda" / "model.safetensors").read_bytes()


@pytest.fixture
def recovery(bases, labelled):
    arguments = ["recover", f"--model.path={bases / '2:4-float32'}", "--data.source=TensorSource", *TWO]
    arguments += [f"--data.source.path={labelled}", "--data.validation_samples=2", "--data.batch_size=1"]
    return [*arguments, "--trainer.enable_progress_bar=false", "--report=false"]


@pytest.mark.slow
def test_a_recovery_that_loses_a_process_says_so_and_ends(recovery, tmp_path):
    run = start(tmp_path, *recovery, f"--output={tmp_path / 'out'}")
    _, child = wait_until_busy(tmp_path, 2)
    os.kill(child, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2
    expected = "process 1 of this run ended before its time (signal 9); nothing is lost, resume with --resume true"
    assert said == f"error: {expected}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_recovery_with_two_processes_ends_within_a_second_and_goes_on(number, recovery, run_cli, tmp_path):
    output = tmp_path / "out"
    arguments = [*recovery, f"--output={output}"]
    run = start(tmp_path, *arguments)
    pids = wait_until_busy(tmp_path, 2)
    seconds, said = interrupt(run, number)
    assert run.returncode == 128 + number
    assert said == f"interrupted: go on with --resume true --output {output}\n"
    assert seconds < about_a_second()
    assert are_gone(pids)
    assert not (output / "config.json").exists()
    finished = run_cli(*arguments, "--resume=true")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((output / "recovery.json").read_text())["status"] == "complete"


def test_one_command_starts_the_others_and_outlives_none_of_them(tmp_path, run_cli, one):
    """First a process is killed in the middle; then the same command goes on, again with two processes."""
    output = tmp_path / "out"
    arguments = [*arguments_of("atv"), *TWO, f"--output={output}"]
    run = start(tmp_path, *arguments)
    parent, child = wait_until_busy(tmp_path, 2)
    assert parent == run.pid
    os.kill(child, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2
    expected = "process 1 of this run ended before its time (signal 9); nothing is lost, resume with --resume true"
    assert said == f"error: {expected}\n"
    finished = run_cli(*arguments, "--resume=true")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert finished.stdout.count("verified: ") == 1
    assert_same_result(one / "atv", output)


# ---- other launchers ------------------------------------------------------------------------------------------------
def run_all(folder: Path, environments: list[dict[str, str]], *arguments: str) -> list[tuple[int, str, str]]:
    """Run the same command several times side by side; status, output and errors of each."""
    runs = [warm.start(*arguments, cwd=folder, **environment) for environment in environments]
    said = [run.communicate(timeout=600) for run in runs]
    return [(run.returncode, *texts) for run, texts in zip(runs, said)]


@pytest.mark.slow
def test_torchrun(tmp_path, one):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = [*arguments_of("atv"), *TWO, f"--output={tmp_path / 'out'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "lvlm_prune.cli", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("verified: ") == 1
    assert_same_result(one / "atv", tmp_path / "out")


def slurm(rank: int, per_node: int, nodes: int) -> dict[str, str]:
    """What SLURM puts into the environment of a task."""
    node, local = divmod(rank, per_node)
    numbers = {"NTASKS": per_node * nodes, "NTASKS_PER_NODE": per_node, "NNODES": nodes, "JOB_ID": 7}
    numbers |= {"PROCID": rank, "NODEID": node, "LOCALID": local}
    return {f"SLURM_{name}": str(number) for name, number in numbers.items()} | {"SLURM_JOB_NAME": "prune"}


@pytest.mark.parametrize("verb", ["prune", "recover"])
@pytest.mark.parametrize(("per_node", "nodes"), [(3, 1), (2, 2)])
def test_another_number_of_slurm_tasks_is_refused(verb, per_node, nodes, tmp_path, monkeypatch, capsys):
    """Before any process waits for one that never comes."""
    for name, value in slurm(0, per_node, nodes).items():
        monkeypatch.setenv(name, value)
    assert main([verb, "--trainer.accelerator=cpu", "--trainer.devices=2", f"--output={tmp_path / 'out'}"]) == 2
    said = f"--trainer.devices 2: srun started {per_node * nodes} processes, devices x num_nodes is 2 x 1 = 2"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "slurm on two nodes", "two nodes by hand"])
def test_processes_that_are_started_side_by_side(launcher, tmp_path, one):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if launcher == "slurm":
        own, devices = [slurm(rank, per_node=2, nodes=1) for rank in range(2)], TWO
    else:
        devices = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=2"]
        by_hand = launcher == "two nodes by hand"
        own = [{"NODE_RANK": str(rank)} if by_hand else slurm(rank, per_node=1, nodes=2) for rank in range(2)]
    arguments = [*arguments_of("atv"), *devices, f"--output={tmp_path / 'out'}"]
    said = run_all(tmp_path, [meeting | each for each in own], *arguments)
    assert [status for status, _, _ in said] == [0, 0], said
    assert [output.count("verified: ") for _, output, _ in said] == [1, 0]
    assert_same_result(one / "atv", tmp_path / "out")
