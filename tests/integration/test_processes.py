"""Several processes do what one does, and end together.

One spawn per number of processes, with all methods and all failures in it: starting Python takes longer than pruning.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from tests.busy import about_a_second, heed_interruptions, interrupt
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, REPOSITORY

# 7 samples divide neither by two nor by three.
RECIPES = {
    "wanda": [],
    "atv": ["--pruning.record=true"],
    "atv_attention": ["--pruning.record=true"],
    "atv_diversity": [],
    "amia": ["--pruning.record=true"],
    "sparsegpt": [],
    "das": [],
    "tamp": [],
    "owl": [],
    "ecoflap": ["--pruning.allocation.samples=3"],
    "mllm_pruner": [],
    "alps": [],
    "alps_kl": ["--pruning.allocation.samples=3"],
    "best": ["--pruning.allocation.samples=3", "--pruning.allocation.groups=kind"],
    "fast": ["--pruning.pattern=2:4"],
    "magnitude": [],
}
FEWER_SAMPLES_THAN_PROCESSES = {"atv": "atv_one_sample", "sparsegpt": "sparsegpt_one_sample"}

PLUGINS = '''
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.callbacks import PruneCallback

class BrokenScorer(WandaScorer):
    """Fails on one process only: on the one that prunes `down_proj`."""
    def prune(self, weight, statistic, sparsity, pattern):
        if weight.shape[1] > 64:
            raise IndexError("a mistake of the plugin's author")
        return super().prune(weight, statistic, sparsity, pattern)

class FailingHook(PruneCallback):
    """Fails on the last process, at a place where nobody asks whether anybody failed."""
    def on_block_start(self, trainer, pl_module, block):
        if trainer.run.processes.rank == trainer.run.processes.count - 1:
            raise KeyError("a mistake in a callback")

class FullDisk(PruneCallback):
    """The disk of the process that writes is full at the second block."""
    def on_block_end(self, trainer, pl_module, block):
        write = CheckpointFolder.write
        def full(*_):
            CheckpointFolder.write = write
            raise OSError(28, "No space left on device")
        if block.index == 1:
            CheckpointFolder.write = full
'''


def arguments_of(recipe: str, samples: int = 7) -> list[str]:
    config = REPOSITORY / "configs" / "prune" / f"{recipe}.yaml"
    return [*GOLDEN_ARGUMENTS, f"--config={config}", f"--data.num_samples={samples}", *RECIPES[recipe]]


def failures(folder: Path) -> dict[str, list[str]]:
    samples = load_file(GOLDEN / "calib.safetensors")
    samples["s5.pixel_values"][:] = float("nan")
    save_file(samples, folder / "broken.safetensors")
    broken = [argument for argument in GOLDEN_ARGUMENTS if "source.path" not in argument]
    return {
        "nan": [*broken, f"--data.source.path={folder / 'broken.safetensors'}"],
        "plugin": [*GOLDEN_ARGUMENTS, "--pruning.scorer=plugins.BrokenScorer"],
        "hook": [*GOLDEN_ARGUMENTS, "--trainer.callbacks=plugins.FailingHook"],
        "disk": [*GOLDEN_ARGUMENTS, "--trainer.callbacks=plugins.FullDisk"],
        "option": [*GOLDEN_ARGUMENTS, "--data.num_samples=9"],
        "mismatch": [*GOLDEN_ARGUMENTS, "--trainer.devices=5"],
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of every method."""
    folder = tmp_path_factory.mktemp("one")
    for recipe in RECIPES:
        assert main([*arguments_of(recipe), f"--output={folder / recipe}"]) == 0
    for recipe, name in FEWER_SAMPLES_THAN_PROCESSES.items():
        assert main([*arguments_of(recipe, samples=1), f"--output={folder / name}"]) == 0
    return folder


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["two processes", "three processes"]
)
def many(request, tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """What several processes make of it: the folder of all outputs, and what each process said and returned."""
    count, folder = request.param, tmp_path_factory.mktemp("many")
    (folder / "plugins.py").write_text(PLUGINS)
    jobs = {recipe: arguments_of(recipe) for recipe in RECIPES}
    jobs |= {name: arguments_of(recipe, samples=1) for recipe, name in FEWER_SAMPLES_THAN_PROCESSES.items()}
    jobs |= {"atv_again": arguments_of("atv")} | failures(folder)
    devices = ["--trainer.accelerator=cpu", f"--trainer.devices={count}"]
    # Like torchrun, this process keeps the store at which the processes of a run meet.
    stores = {name: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in jobs}
    described = [
        {
            "name": name,
            "arguments": [*arguments[:1], *devices, *arguments[1:], f"--output={folder / name}"],
            "port": stores[name].port,
        }
        for name, arguments in jobs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(described))
    run_workers(folder, count)
    said = {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(count)] for name in jobs}
    return folder, said


def run_workers(folder: Path, count: int) -> None:
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process_worker", "jobs.json"],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        assert [worker.wait(600) for worker in workers] == [0] * count
    finally:
        for worker in workers:
            worker.kill()


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_do_not_depend_on_the_number_of_processes(recipe, one, many):
    folder, said = many
    assert [found["status"] for found in said[recipe]] == [0] * len(said[recipe]), said[recipe]
    assert "".join(found["stderr"] for found in said[recipe]) == ""
    assert [found["stdout"].count("verified: ") for found in said[recipe]] == [1] + [0] * (len(said[recipe]) - 1)
    assert_same_result(one / recipe, folder / recipe)


@pytest.mark.parametrize("recipe", FEWER_SAMPLES_THAN_PROCESSES)
def test_a_process_without_samples_takes_part(recipe, one, many):
    folder, said = many
    name = FEWER_SAMPLES_THAN_PROCESSES[recipe]
    assert [found["status"] for found in said[name]] == [0] * len(said[name]), said[name]
    assert_same_result(one / name, folder / name)


def assert_same_result(expected: Path, found: Path) -> None:
    manifests = [json.loads((folder / "pruning.json").read_text()) for folder in (expected, found)]
    if manifests[0]["updates_weights"]:
        zeros = [zeros_of(folder) for folder in (expected, found)]
        assert all(torch.equal(zeros[0][name], zeros[1][name]) for name in zeros[0])
        weights = [load_file(folder / "model.safetensors") for folder in (expected, found)]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-7)
    else:
        assert (expected / "model.safetensors").read_bytes() == (found / "model.safetensors").read_bytes()
    if (expected / "statistics.safetensors").exists():
        recorded = [load_file(folder / "statistics.safetensors") for folder in (expected, found)]
        assert recorded[0].keys() == recorded[1].keys()
        assert all(torch.equal(recorded[0][name], recorded[1][name]) for name in recorded[0])
    for name, entry in manifests[0]["linears"].items():
        assert manifests[1]["linears"][name]["target"] == pytest.approx(entry["target"], abs=1e-9)
    surveys = [manifest.get("survey", {}) for manifest in manifests]
    assert surveys[0].get("block_forwards") == surveys[1].get("block_forwards")
    assert surveys[0].get("pool") == pytest.approx(surveys[1].get("pool"))
    if "calibration" in manifests[0]:
        assert manifests[0]["calibration"].get("fingerprint") == manifests[1]["calibration"].get("fingerprint")


def test_the_same_number_of_processes_gives_the_same_bytes(many):
    folder, _ = many
    for name in ("model.safetensors", "statistics.safetensors"):
        assert (folder / "atv" / name).read_bytes() == (folder / "atv_again" / name).read_bytes()


def spoken(said: list[dict]) -> str:
    """What the one process said that spoke."""
    texts = [found["stderr"] for found in said if found["stderr"]]
    assert len(texts) == 1, texts
    return texts[0]


FAILURES = {
    "nan": (2, ["error: NaN or infinity before the first block for calibration sample 5"]),
    "plugin": (1, ["Traceback", "a mistake of the plugin's author"]),
    "hook": (1, ["Traceback", "a mistake in a callback"]),
    "disk": (2, ["error: --output", "No space left on device", "--resume true"]),
    "option": (2, ["error: --data.num_samples 9"]),
    "mismatch": (2, ["error: --trainer.devices 5: torchrun started", "devices x num_nodes is 5 x 1 = 5"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_where_one_process_fails_all_fail_and_one_speaks(failure, many):
    folder, said = many
    status, parts = FAILURES[failure]
    assert [found["status"] for found in said[failure]] == [status] * len(said[failure]), said[failure]
    text = spoken(said[failure])
    assert all(part in text for part in parts), text
    assert status == 1 or len(text.strip().splitlines()) == 1
    assert not (folder / failure / "config.json").exists()


# ---- one command that starts the other processes itself -------------------------------------------------------------
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


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    (folder / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "-m", "lvlm_prune.cli", *arguments, "--trainer.callbacks=sleeper.Sleeper"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interruptions,
    )


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
    assert not any(is_alive(pid) for pid in pids)
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
    assert not any(is_alive(pid) for pid in pids)
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
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "lvlm_prune.cli", *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
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
