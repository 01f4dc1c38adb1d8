"""Runs from Python are recorded and go on as those of the command line."""

import json

import pytest

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning, PruningReport
from lvlm_prune.data import TensorSource
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
