"""A folder that was packed where it is has nothing to be compared with but its own records, and is held to them."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from tests.conftest import GOLDEN_ARGUMENTS, MODEL


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[list[str], Path]:
    """A command, and what it wrote."""
    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    model.save_pretrained(folder / "model", max_shard_size="300KB")
    options = ["--pruning.scorer=MagnitudeScorer", "--pruning.sparsity=0.6", "--packed=true"]
    command = [*GOLDEN_ARGUMENTS, f"--model.path={folder / 'model'}", *options]
    assert main([*command, f"--output={folder / 'out'}"]) == 0
    return command, folder / "out"


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def changed(file: Path) -> None:
    file.write_bytes(file.read_bytes().rstrip()[:-1] + b"\n")


def test_a_folder_that_is_whole_is_verified_again(packed, capsys):
    command, folder = packed
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    capsys.readouterr()
    assert main([*command, f"--output={folder}", "--resume=true"]) == 0
    assert "verified: every tensor comes back byte for byte from " in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("damage", [flipped, changed, Path.unlink])
@pytest.mark.parametrize("name", ["shard", "config.json", "config.yaml", "model.safetensors.index.json"])
def test_a_folder_that_was_changed_is_refused(name, damage, packed, tmp_path, capsys):
    command, folder = packed
    shutil.copytree(folder, tmp_path / "out")
    name = CheckpointFolder(tmp_path / "out").shards[-1] if name == "shard" else name
    damage(tmp_path / "out" / name)
    capsys.readouterr()
    assert main([*command, f"--output={tmp_path / 'out'}", "--resume=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {tmp_path / 'out'}: ")
