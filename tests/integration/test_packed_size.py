"""`prune --packed_size`: the packed checkpoint takes no more than it was to, and hardly less."""

import json

import pytest
import yaml

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.errors import RunError
from lvlm_prune.output.private import private_folder
from lvlm_prune.recipes import with_recipe
from lvlm_prune.runs.prune.sizing import PackedSize
from tests.conftest import GOLDEN_ARGUMENTS

DENSE = CheckpointFolder(CHECKPOINT).weight_bytes
QUICK = ["prune", "--method=magnitude", "--report=false", "--evaluate=false", "--packed=true"]


@pytest.mark.parametrize(("size", "wanted"), [("0.7", 0.7 * DENSE), (f"{DENSE / 2e6:.3f} MB", DENSE / 2)])
def test_the_shards_take_what_they_were_to_take(size, wanted, tmp_path):
    out = tmp_path / "out"
    assert main([*QUICK, f"--packed_size={size}", f"--output={out}"]) == 0
    assert 0.985 * wanted <= CheckpointFolder(out).weight_bytes <= wanted
    target = json.loads((out / "pruning.json").read_text())["sparsity"]["target"]
    assert yaml.safe_load((out / "config.yaml").read_text())["pruning"]["sparsity"] == target


def test_sparsity_that_is_not_uniform_gives_the_size_too(tmp_path):
    """ECoFLaP's, OWL's or KL's: what counts is the mean."""
    out, options = tmp_path / "out", ["--data.num_samples=4", "--pruning.allocation=DASAllocation"]
    recipe = ["prune", "--method=sparsegpt", "--report=false", "--evaluate=false", "--packed=true", *options]
    assert main([*recipe, "--model.dtype=float32", "--packed_size=0.6", f"--output={out}"]) == 0
    targets = {entry["target"] for entry in json.loads((out / "pruning.json").read_text())["linears"].values()}
    assert len(targets) > 1
    assert 0.585 * DENSE <= CheckpointFolder(out).weight_bytes <= 0.6 * DENSE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--packed_size=0.5", "--packed=false"], "--packed_size 0.5: needs --packed true"),
        (["--packed_size=0.5", "--keep=0.9"], "--packed_size 0.5: and --keep both decide"),
        (["--packed_size=abc"], "--packed_size abc: must be a size with a unit"),
        (["--packed_size=-1GB"], "--packed_size -1GB: must be a size with a unit"),
        (["--packed_size=0"], "--packed_size 0: without a unit it is a share"),
        (["--packed_size=1.5"], "--packed_size 1.5: without a unit it is a share"),
        (["--packed_size=900GB"], "--packed_size 900GB: the dense shards take no more than that"),
        (["--packed_size=1kB"], "--packed_size 1kB: the smallest that 98% zeros in its 14 Linears give is"),
        (["--packed_size=0.6", "--pruning.pattern=2:4"], "--packed_size 0.6: needs a sparsity that is free"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(options, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*GOLDEN_ARGUMENTS, "--packed=true", *options, f"--output={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not out.exists()


def test_the_automatic_method_searches_nothing_where_the_size_is_given():
    assert "--keep_recipes" in with_recipe(["prune", "--method=auto", "--keep=0.9"])
    assert "--keep_recipes" not in with_recipe(["prune", "--method=auto", "--packed=true", "--packed_size=0.6"])


def test_what_is_private_is_put_aside_where_the_size_was_missed(tmp_path, capsys, monkeypatch):
    """The folder stays, and somebody may upload it all the same."""
    out = tmp_path / "out"

    def refuse(size, folder):
        raise RunError(f"{folder} is too large")

    monkeypatch.setattr(PackedSize, "refuse_missed", refuse)
    assert main([*QUICK, "--packed_size=0.7", "--publishable=true", f"--output={out}"]) == 2
    assert "is too large" in capsys.readouterr().err
    assert private_folder(out).is_dir()
