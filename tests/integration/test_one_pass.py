"""`--pruning.calibrate_on dense`: every block sees the dense model's inputs, and runs once for each sample."""

from pathlib import Path

import pytest

from lvlm_prune import prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.output.manifest import Manifest
from tests.conftest import GOLDEN_ARGUMENTS
from tests.families import Sample, make_inputs, tiny_model
from tests.full_forward import prune_by_full_forwards
from tests.recipes import interrupt_and_go_on

ARGUMENTS = [*GOLDEN_ARGUMENTS, "--pruning.calibrate_on=dense", "--pruning.record=true"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_masks_are_those_of_the_dense_models_own_forward(family: str) -> None:
    model, reference = tiny_model(family), tiny_model(family)
    batches = [
        make_inputs(family, model, [sample]) for sample in (Sample(3, 0, 5), Sample(2, 1, 9), Sample(4, None, 6))
    ]
    expected = prune_by_full_forwards(reference, batches, calibrate_on="dense")
    method = BlockwisePruning(sparsity=0.5, pool=MixedPool(), experts="keep", calibrate_on="dense")
    manifest = prune(model, batches, method)
    assert set(expected) == {name for name, entry in manifest["linears"].items() if "note" not in entry}
    different = sum(int(((model.get_submodule(name).weight == 0) != mask).sum()) for name, mask in expected.items())
    assert different <= max(2, 1e-4 * sum(mask.numel() for mask in expected.values()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_pass") / "whole"
    assert main([*ARGUMENTS, f"--output={folder}"]) == 0
    return folder


def test_a_block_runs_once_for_each_sample(whole: Path) -> None:
    manifest = Manifest.read(whole)
    assert {block["forwards"] for block in manifest["blocks"]} == {manifest["calibration"]["num_samples"]}


def test_it_goes_on_with_the_dense_models_inputs(whole: Path, tmp_path: Path) -> None:
    interrupt_and_go_on(ARGUMENTS, tmp_path / "out")
    for name in ("model.safetensors", "statistics.safetensors"):
        assert (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_resumed_run_keeps_to_its_inputs(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [one for one in ARGUMENTS if "calibrate_on" not in one]
    assert main([*other, f"--output={whole}", "--resume=true"]) == 2
    assert "--pruning.calibrate_on pruned" in capsys.readouterr().err
