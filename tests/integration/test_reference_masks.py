"""The masks, statistics and selected tokens of the released code, reproduced through the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvlm_prune.cli import main
from tests.conftest import ALL_BLOCKS, ALL_SAMPLES, GOLDEN

ASYMMETRIC = ["--pruning.pool=AsymmetricPool", "--pruning.pool.saliency=DriftSaliency"]
RUNS = {
    "wanda_s0.5": ["--pruning.pool=MixedPool", "--pruning.sparsity=0.5"],
    "wanda_2of4": ["--pruning.pool=MixedPool", "--pruning.pattern=2:4"],
    "atv_floor_s0.5_a0.0": [*ASYMMETRIC, "--pruning.pool.alpha=0.0", "--pruning.sparsity=0.5"],
    "atv_floor_s0.5_a1.0": [*ASYMMETRIC, "--pruning.pool.alpha=1.0", "--pruning.sparsity=0.5"],
    "atv_released_s0.6_a1.5": [
        *ASYMMETRIC,
        "--pruning.pool.alpha=1.5",
        "--pruning.pool.rounding=released",
        "--pruning.sparsity=0.6",
    ],
    "atv_floor_2of4_a1.0": [*ASYMMETRIC, "--pruning.pool.alpha=1.0", "--pruning.pattern=2:4"],
    "amia_s0.5": ["--pruning.pool=AMIAPool", "--pruning.pool.pairs=positive", "--pruning.sparsity=0.5"],
}


@pytest.mark.parametrize("tag", RUNS)
def test_released_code_is_reproduced(tag: str, golden_arguments: list[str], tmp_path: Path):
    output = tmp_path / "pruned"
    arguments = [*golden_arguments, ALL_BLOCKS, ALL_SAMPLES, *RUNS[tag], "--pruning.record=true"]
    assert main([*arguments, f"--output={output}"]) == 0
    reference = load_file(GOLDEN / f"{tag}.safetensors")
    recorded = load_file(output / "statistics.safetensors")
    weights = load_file(output / "model.safetensors")
    different = total = 0
    for key, expected in reference.items():
        kind, _, name = key.partition(".")
        if kind == "mask":
            block, _, linear = name.partition(".")
            weight = next(w for k, w in weights.items() if k.endswith(f"layers.{block}.{linear}.weight"))
            different += int(((weight == 0) != expected).sum())
            total += expected.numel()
        elif kind in ("scaler_row", "drift") and not tag.startswith("amia"):  # divided by the selected tokens there
            torch.testing.assert_close(recorded[key], expected, rtol=1e-5, atol=1e-7)
        elif kind in ("sel", "amia_sel", "image_mask"):
            assert torch.equal(recorded[key], expected), key
    assert total > 100_000
    assert different <= 1e-4 * total
