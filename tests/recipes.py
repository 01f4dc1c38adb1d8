"""Recipes on the golden model, and whether two runs of one gave the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.output.manifest import Manifest
from tests.conftest import GOLDEN_ARGUMENTS, REPOSITORY

# 5 samples divide neither by two nor by three.
RECIPES = {
    "wanda": ["--evaluate=true"],
    "atv": ["--pruning.record=true", "--evaluate=true"],
    "atv_attention": ["--pruning.record=true"],
    "atv_diversity": [],
    "amia": ["--pruning.record=true"],
    "sparsegpt": [],
    "das": [],
    "tamp": [],
    "owl": [],
    "ecoflap": ["--pruning.allocation.samples=2"],
    "mllm_pruner": [],
    "alps": [],
    "alps_dense_target": ["--pruning.record=true"],
    "alps_kl": ["--pruning.allocation.samples=2"],
    "best": ["--pruning.allocation.samples=2", "--pruning.pattern=3:4,2:4,1:4"],
    "fast": ["--pruning.pattern=2:4"],
    "magnitude": [],
}


def arguments_of(recipe: str, samples: int = 5) -> list[str]:
    config = REPOSITORY / "configs" / "prune" / f"{recipe}.yaml"
    return [*GOLDEN_ARGUMENTS, f"--config={config}", f"--data.num_samples={samples}", *RECIPES[recipe]]


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in load_file(folder / "model.safetensors").items()}


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


def assert_same_checkpoint(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name not in ("pruning.json", "report.html", "config.yaml"):  # these tell times and the folder's own name
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def interrupt_and_go_on(arguments: list[str], output: Path) -> None:
    """Run a command that is interrupted while its second block is pruned, and then have it go on."""
    calibrated = BlockwisePruning.on_block_calibrated

    def interrupted(self, trainer, pl_module, block) -> None:
        if block.index == 1:
            raise KeyboardInterrupt
        calibrated(self, trainer, pl_module, block)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BlockwisePruning, "on_block_calibrated", interrupted)
        assert main([*arguments, f"--output={output}"]) == 130
    assert len(Manifest.read(output).finished_blocks()) == 1
    assert main([*arguments, f"--output={output}", "--resume=true"]) == 0
