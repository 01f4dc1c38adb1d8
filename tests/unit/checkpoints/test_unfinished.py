"""A folder that a run has not finished is no input."""

import json
import shutil

import pytest

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.errors import InputError
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.runs.pack.record import read_record
from tests.conftest import MODEL


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "status"),
    [("pruning.json", "pruning"), ("pruning.json", "copying"), ("recovery.json", "reconstructing")],
)
@pytest.mark.parametrize(
    "arguments", [["prune", "--pruning.sparsity=0.5"], ["recover"], ["evaluate"], ["pack"], ["probe"], ["unpack"]]
)
def test_every_command_refuses_it(name, status, arguments, folder, tmp_path, capsys):
    (folder / name).write_text(json.dumps({"status": status}))
    assert main([*arguments, f"--model.path={folder}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model.path {folder}: its run is not finished ({name} says `{status}`)")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_held_back_says_so(folder):
    (folder / "config.json").rename(folder / "config.json.unfinished")
    with pytest.raises(InputError, match="its run is not finished"):
        CheckpointFolder(folder)


@pytest.mark.parametrize(
    "content",
    ['{"status": "complete"}', '{"status": "scoring"}', '{"status": 5}', "[1]", "{", "", '{"mine": "pruning"}'],
)
def test_what_is_finished_or_of_another_tool_is_taken(content, folder):
    (folder / "pruning.json").write_text(content)
    assert CheckpointFolder(folder).tensors


@pytest.mark.parametrize("name", ["pruning.json", "recovery.json", "probe.json"])
def test_a_record_that_says_nothing_of_its_run_is_none(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is not as a run writes it"):
        Manifest.read(tmp_path, name)


def test_texts_of_a_packing_record_that_are_none(tmp_path):
    (tmp_path / "packing.json").write_text('{"status": "complete", "original_card": 5}')
    assert read_record(tmp_path) is None
