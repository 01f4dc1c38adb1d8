"""Several processes do what one does, and end together.

They start once per number of processes, for all methods and all failures.
"""

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from tests import warm
from tests.conftest import ALL_SAMPLES, GOLDEN, GOLDEN_ARGUMENTS, REPOSITORY
from tests.recipes import RECIPES, arguments_of, assert_same_result

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


def failures(folder: Path) -> dict[str, list[str]]:
    samples = load_file(GOLDEN / "calib.safetensors")
    samples["s5.pixel_values"][:] = float("nan")
    save_file(samples, folder / "broken.safetensors")
    arguments = [*GOLDEN_ARGUMENTS, "--data.num_samples=5"]
    broken = [*(argument for argument in GOLDEN_ARGUMENTS if "source.path" not in argument), ALL_SAMPLES]
    return {
        "nan": [*broken, f"--data.source.path={folder / 'broken.safetensors'}"],
        "plugin": [*arguments, "--pruning.scorer=plugins.BrokenScorer"],
        "hook": [*arguments, "--trainer.callbacks=plugins.FailingHook"],
        "disk": [*arguments, "--trainer.callbacks=plugins.FullDisk"],
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
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    workers = [
        warm.start(
            "jobs.json", cwd=folder, module="tests.process_worker", RANK=str(rank), LOCAL_RANK=str(rank), **shared
        )
        for rank in range(count)
    ]
    try:
        assert [worker.wait(600) for worker in workers] == [0] * count
    finally:
        for worker in workers:
            worker.kill()


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
    "nan": (2, ["error: calibration sample 5: NaN or infinity before the first block (--data.on_error skip "]),
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
