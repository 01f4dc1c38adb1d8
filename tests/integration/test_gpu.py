"""On a real GPU: what the emulated one cannot show. `benchmarks/gpu.sh` runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvlm_prune.cli import main
from tests.conftest import GOLDEN_ARGUMENTS, REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

RECIPES = ("wanda", "atv", "sparsegpt", "amia", "tamp", "mllm_pruner", "ecoflap")


def pruned(folder: Path, recipe: str, *options: str) -> dict[str, torch.Tensor]:
    config = f"--config={REPOSITORY / 'configs' / 'prune' / recipe}.yaml"
    arguments = [GOLDEN_ARGUMENTS[0], config, *GOLDEN_ARGUMENTS[1:], "--evaluate=false", f"--output={folder}"]
    assert main([*arguments, "--trainer.enable_progress_bar=false", *options]) == 0
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_agree_with_those_of_the_cpu(recipe, tmp_path):
    """Rounding differs, so weights whose scores nearly tie may change places."""
    on_cpu = pruned(tmp_path / "cpu", recipe, "--trainer.accelerator=cpu")
    on_gpu = pruned(tmp_path / "cuda", recipe, "--trainer.accelerator=cuda")
    different = sum(int(((on_cpu[name] == 0) != (on_gpu[name] == 0)).sum()) for name in on_cpu)
    assert different <= 0.01 * sum(weight.numel() for name, weight in on_cpu.items() if "proj.weight" in name)


@pytest.mark.parametrize("recipe", ["wanda", "atv", "sparsegpt"])
def test_bytes_do_not_depend_on_where_samples_wait(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which Lightning would set, and leave
    options = ("--trainer.accelerator=cuda", "--trainer.deterministic=true")
    places = [
        pruned(tmp_path / place, recipe, *options, f"--trainer.hidden_states={place}")
        for place in ("device", "host", "disk")
    ]
    torch.use_deterministic_algorithms(False)
    for other in places[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in places[0].items())


def test_a_run_says_what_it_took_of_the_device(tmp_path):
    pruned(tmp_path / "out", "wanda", "--trainer.accelerator=cuda")
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert all(block["peak_memory_bytes"] > 0 for block in record["blocks"])
    assert record["memory"]["measured"]["device"] > 0
