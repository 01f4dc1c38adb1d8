"""Runs from Python are recorded and go on as those of the command line."""

import json

import pytest
import torch

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning, PruningReport
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.errors import InputError
from lvlm_prune.methods.pools import MixedPool, TextOnlyPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.run import RunTrainer
from tests.conftest import GOLDEN


def test_from_python_a_resume_with_another_method_is_refused(tmp_path, monkeypatch, blank_figures):
    """A run from Python records its method as the command line does."""
    folder = tmp_path / "out"
    source = TensorSource(str(GOLDEN / "calib.safetensors"))

    def run(pruning: BlockwisePruning, **options):
        return lvlm_prune.prune(GOLDEN / "model", source, pruning, folder, **options)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PruningReport, "on_block_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(BlockwisePruning(sparsity=0.5, pool=MixedPool()))
    begun = json.loads((folder / "pruning.json").read_text())
    assert begun["config"]["pruning"]["sparsity"] == 0.5
    others = {
        "pruning.sparsity": BlockwisePruning(sparsity=0.8, pool=MixedPool()),
        "pruning.pattern": BlockwisePruning(pattern="2:4", pool=MixedPool()),
        "pruning.pool.class_path": BlockwisePruning(sparsity=0.5, pool=TextOnlyPool()),
        "pruning.scorer.class_path": BlockwisePruning(sparsity=0.5, pool=MixedPool(), scorer=MagnitudeScorer()),
    }
    for option, other in others.items():
        with pytest.raises(InputError) as refused:
            run(other, resume=True)
        assert refused.value.option in (option, "pruning.name")
    assert run(BlockwisePruning(sparsity=0.5, pool=MixedPool()), resume=True)["status"] == "complete"


def test_a_folder_that_python_wrote_holds_nothing_private_either(tmp_path):
    place = tmp_path / "patients"
    place.mkdir()
    (place / "calibration.safetensors").write_bytes((GOLDEN / "calib.safetensors").read_bytes())
    data = CalibrationDataModule(TensorSource(str(place / "calibration.safetensors")), num_samples=2)
    for name, options in (("out", {}), ("whole", {"publishable": False})):
        method = lvlm_prune.load_pruning("magnitude", sparsity=0.5)
        lvlm_prune.prune(GOLDEN / "model", data, method, tmp_path / name, report=False, **options)
    assert str(place) not in (tmp_path / "out" / "pruning.json").read_text()
    assert str(place) in (tmp_path / "out.private" / "pruning.json").read_text()
    assert str(place) in (tmp_path / "whole" / "pruning.json").read_text()
    assert not (tmp_path / "whole.private").exists()


IDS = torch.arange(5, 25)[None]
NO_INPUTS = {
    "nothing": None,
    "a path": "samples.json",
    "a number": [5],
    "no tokens": [{}],
    "a list of tokens": [{"input_ids": [[5, 6]]}],
    "one dimension": [{"input_ids": IDS[0]}],
    "two samples in one": [{"input_ids": IDS.repeat(2, 1)}],
    "none at all": [{"input_ids": IDS[:, :0]}],
    "no whole numbers": [{"input_ids": IDS.float()}],
}


@pytest.mark.parametrize("calibration", NO_INPUTS.values(), ids=NO_INPUTS)
def test_what_are_no_model_inputs_is_refused(calibration, tmp_path):
    with pytest.raises(InputError) as refused:
        lvlm_prune.prune(GOLDEN / "model", calibration, output=tmp_path / "out")
    assert refused.value.option == "calibration"
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_recipe_for_a_method_is_refused():
    with pytest.raises(InputError, match=r'load_pruning\("wanda"'):
        lvlm_prune.prune(GOLDEN / "model", [{"input_ids": IDS}], "wanda")


def test_callbacks_of_which_none_prunes_are_refused(tmp_path):
    with pytest.raises(InputError, match="none of them prunes"):
        lvlm_prune.prune(
            GOLDEN / "model", [{"input_ids": IDS}], trainer=RunTrainer(logger=False), output=tmp_path / "a"
        )


def test_no_output_is_the_default_one(tmp_path, monkeypatch):
    """And no folder that is called None."""
    monkeypatch.chdir(tmp_path)
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    lvlm_prune.prune(GOLDEN / "model", source, lvlm_prune.load_pruning("magnitude"), output=None, report=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_null_for_a_plugin_in_a_recipe_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("pruning: {scorer: null}")
    with pytest.raises(InputError, match=r"pruning\.scorer null: expected Scorer"):
        lvlm_prune.load_pruning(tmp_path / "mine.yaml")


def test_a_recipe_that_there_is_not_is_one_line():
    with pytest.raises(InputError, match=r"^--config wand: no such file, and no recipe .*; there are .*wanda"):
        lvlm_prune.load_pruning("wand")
