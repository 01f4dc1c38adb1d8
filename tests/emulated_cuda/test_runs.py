"""What else runs on a GPU gives what it gives on the CPU; and what a run says about the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import TensorSource
from lvlm_prune.memory.hidden_states import available_device_memory
from lvlm_prune.methods.pools import MixedPool
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, MODEL
from tests.emulated_cuda import runs
from tests.emulated_cuda.process import DeviceProcess
from tests.emulated_cuda.runs import REPOSITORY
from tests.families import make_inputs, tiny_model

pytestmark = pytest.mark.emulated_gpu

MEBIBYTE = 2**20


# ---- one process, from Python ----------------------------------------------------------------------------------------
def deterministic(recipe: str, output: Path) -> runs.Outcome:
    try:
        return runs.prune(recipe, "cuda", "device", output, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("recipe", ["wanda", "wanda_variant", "amia", "sparsegpt"])
def test_a_deterministic_run_is_not_refused_by_torch(recipe, on_device, tmp_path):
    found = on_device(deterministic, recipe, tmp_path / "out")
    assert found.tensors
    assert not [line for line in found.nondeterministic if "cumsum" in line]


def model_in_memory(where: str) -> tuple[str, list[str]]:
    """Prune a model that is in memory already; where its weights are afterwards, and what they are."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval().to(where)
    lvlm_prune.prune(model, TensorSource(str(GOLDEN / "calib.safetensors")), BlockwisePruning())
    weights = list(model.state_dict().values())
    return str(weights[0].device), [runs.digest(weight) for weight in weights]


def test_a_model_in_memory_is_pruned_where_it_is(built):
    with DeviceProcess(devices=2) as process:
        _, on_cpu = process(model_in_memory, "cpu")
        place, on_second = process(model_in_memory, "cuda:1")
    assert place == "cuda:1"
    assert on_second == on_cpu


def family_in_memory(family: str, where: str, dtype: torch.dtype) -> list[str]:
    model = tiny_model(family, dtype).to(where)
    samples = [make_inputs(family, model, [sample]) for sample in runs.SAMPLES]
    samples = [{name: value.to(where) for name, value in one.items()} for one in samples]
    lvlm_prune.prune(
        model, samples, BlockwisePruning(pool=MixedPool(), min_expert_tokens=1), targets=["language", "vision"]
    )
    return [runs.digest(weight) for weight in model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama", "qwen3_omni_moe"])
def test_towers_experts_and_half_precision(family, dtype, on_device):
    assert on_device(family_in_memory, family, "cuda", dtype) == on_device(family_in_memory, family, "cpu", dtype)


# ---- what is said about memory ---------------------------------------------------------------------------------------
def room_before_and_after() -> tuple[int, int]:
    torch.cuda.empty_cache()
    before = available_device_memory(torch.device("cuda"))
    torch.empty(64 * MEBIBYTE, dtype=torch.uint8, device="cuda")  # freed at once, and kept by torch
    return before, available_device_memory(torch.device("cuda"))


def test_what_torch_keeps_of_freed_memory_is_there_to_be_taken(on_device):
    before, after = on_device(room_before_and_after)
    assert after == before


def record_of(gigabytes: float, output: Path, accelerator: str) -> dict:
    arguments = [*GOLDEN_ARGUMENTS, "--evaluate=false", f"--trainer.accelerator={accelerator}"]
    with DeviceProcess(gigabytes=gigabytes) as process:
        outcome = process(runs.command, arguments, output, keep=True)
    assert outcome.status == 0, outcome.screen
    return json.loads((output / "pruning.json").read_text())


@pytest.mark.slow
def test_samples_wait_in_host_memory_where_the_device_is_too_small(built, tmp_path):
    large = record_of(24, tmp_path / "large", "cuda")
    assert large["memory"]["hidden_states"] == "device"
    # As large as what is predicted to be taken, of which a part is never used.
    small = record_of(large["memory"]["predicted"]["device"] / 2**30, tmp_path / "small", "cuda")
    assert small["memory"]["hidden_states"] == "host"
    assert all(0 < block["peak_memory_bytes"] < 100 * MEBIBYTE for block in large["blocks"])


# ---- commands --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--data.batch_size=3", "--trainer.hidden_states=host"], ["--model.dtype=bfloat16"]]
)
def test_commands_write_what_they_write_on_the_cpu(options, run, tmp_path):
    arguments = [*GOLDEN_ARGUMENTS, "--evaluate=false", *options]
    outcomes = [run(*arguments, f"--trainer.accelerator={where}", output=tmp_path / where) for where in ("cpu", "cuda")]
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.screen for outcome in outcomes]
    assert outcomes[0].tensors == outcomes[1].tensors
    assert not outcomes[1].races


def command(folder: Path, devices: int, *options: str) -> subprocess.CompletedProcess:
    """A command of its own on emulated devices, as a user starts it."""
    path = os.pathsep.join([str(REPOSITORY / "tests" / "emulated_cuda" / "autostart"), str(REPOSITORY)])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "EMULATED_CUDA_DEVICES": str(devices)}
    arguments = [*GOLDEN_ARGUMENTS, "--evaluate=false", f"--output={folder}", *options]
    line = [sys.executable, "-m", "lvlm_prune.cli", *arguments]
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=600)


def test_nothing_but_the_run_is_on_the_screen(built, tmp_path):
    ended = command(tmp_path / "out", 1, "--trainer.accelerator=cuda")
    assert ended.returncode == 0, ended.stderr
    lines = (ended.stdout + ended.stderr).splitlines()
    assert not [line for line in lines if "GPU" in line or "Tensor Cores" in line or "CUDA" in line]


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["WandaScorer", "SparseGPTScorer"])
def test_two_processes_under_the_rules_of_nccl(scorer, built, run, tmp_path):
    options = ["--trainer.accelerator=cuda", f"--pruning.scorer={scorer}"]
    ended = command(tmp_path / "two", 2, "--trainer.devices=2", *options)
    assert ended.returncode == 0, ended.stderr
    alone = run(*GOLDEN_ARGUMENTS, "--evaluate=false", *options)
    assert runs.digests(tmp_path / "two") == alone.tensors
