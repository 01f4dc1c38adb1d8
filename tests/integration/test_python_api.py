"""Runs from Python are recorded and go on as those of the command line."""

import json

import pytest

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning, PruningReport
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.errors import InputError
from lvlm_prune.methods.pools import MixedPool, TextOnlyPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from tests.conftest import GOLDEN


def test_from_python_a_resume_with_another_method_is_refused(tmp_path, monkeypatch):
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


def test_a_recipe_that_there_is_not_is_one_line():
    with pytest.raises(InputError, match=r"^--config wand: no such file, and no recipe .*; there are .*wanda"):
        lvlm_prune.load_pruning("wand")
