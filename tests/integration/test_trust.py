"""Promises that hold whatever lies in the folders: the input stays as it is, and exit status 0 means verified."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.evaluation.scores import Scores, retention
from tests.conftest import GOLDEN_ARGUMENTS, MODEL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete output whose remaining weights were updated, with statistics."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    arguments = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer", "--evaluate=true", "--publishable=false"]
    assert main([*GOLDEN_ARGUMENTS, *arguments, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """An output that is pruned up to block 1."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    model = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(MODEL, model)
    with pytest.MonkeyPatch.context() as patched:
        really = CheckpointFolder.write
        calls = []

        def stopping(self, key, tensor):
            calls.append(key)
            if len(calls) > 8:
                raise OSError(28, "No space left on device")
            really(self, key, tensor)

        patched.setattr(CheckpointFolder, "write", stopping)
        arguments = ["--pruning.record=true", f"--model.path={model}", f"--output={folder}"]
        assert main([*GOLDEN_ARGUMENTS, *arguments]) == 2
    assert len(json.loads((folder / "pruning.json").read_text())["blocks"]) == 1
    return folder


def resumed(folder: Path, *options: str) -> int:
    model = json.loads((folder / "pruning.json").read_text())["model"]["path"]
    options = [*options, f"--model.path={model}", "--publishable=false"]
    return main([*GOLDEN_ARGUMENTS, *options, f"--output={folder}", "--resume=true"])


def relink(kind: str, file: Path, target: Path) -> None:
    file.unlink()
    if kind == "symbolic":
        file.symlink_to(target)
    else:
        os.link(target, file)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "hard to a third checkpoint"])
@pytest.mark.parametrize("name", ["shard", "config.json.unfinished"])
def test_an_input_is_never_written_through_a_link(kind, name, interrupted, tmp_path, capsys):
    """Tools that remove duplicates put links in the place of files that are equal."""
    folder, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(interrupted, folder)
    shutil.copytree(MODEL, model)
    name = CheckpointFolder(model).shards[-1] if name == "shard" else name
    source = model
    if kind == "hard to a third checkpoint":
        if name == "config.json.unfinished":
            pytest.skip("only weights are written in place")
        source = tmp_path / "third"
        shutil.copytree(model, source)
    before = contents(source)
    relink(kind.split()[0], folder / name, source / name.removesuffix(".unfinished"))
    capsys.readouterr()
    options = ["--pruning.record=true", f"--model.path={model}", f"--output={folder}", "--resume=true"]
    assert main([*GOLDEN_ARGUMENTS, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {folder}: {name} is ")
    assert contents(source) == before


def test_a_circle_of_links_in_an_output_is_no_traceback(interrupted, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(interrupted, folder)
    relink("symbolic", folder / "config.json.unfinished", folder / "config.json.unfinished")
    capsys.readouterr()
    assert resumed(folder, "--pruning.record=true") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json.unfinished is a link to " in line


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path, offset: int) -> None:
    os.truncate(path, path.stat().st_size - (1 if path.suffix != ".yaml" else 40))  # lines of YAML need no end


def remove(path: Path, offset: int) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, int], None]] = {"flipped bit": flip, "truncated": truncate, "missing": remove}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["shard", "config.json", "statistics.safetensors", "config.yaml"])
def test_a_complete_folder_is_verified_again(name, damage, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    checkpoint, offset = CheckpointFolder(folder), -2
    linear = next(iter(json.loads((folder / "pruning.json").read_text())["linears"]))
    if name == "shard":
        key = next(key for key in checkpoint if key.endswith(linear.removeprefix("model.language_model.") + ".weight"))
        place, stored = checkpoint[key], checkpoint.read(key)
        kept = int(stored.flatten().nonzero()[0])  # of a weight that SparseGPT updated
        name, offset = place.shard, place.start + kept * stored.element_size()
    damage(folder / name, offset)
    capsys.readouterr()
    options = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer"]
    assert resumed(folder, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line or linear in line
    assert "config.json.unfinished" not in line  # it has none any more


def test_a_complete_folder_that_is_whole_says_so(finished, capsys):
    before = contents(finished)
    assert resumed(finished, "--pruning.record=true", "--pruning.scorer=SparseGPTScorer") == 0
    assert "\nverified: sparsity 50.02% (target 50%, unstructured), " in capsys.readouterr().out
    assert contents(finished) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["config.json.unfinished", "statistics.0.part", "config.yaml"])
def test_what_a_run_left_for_itself_is_checked_when_it_goes_on(name, damage, interrupted, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(interrupted, folder)
    damage(folder / name, -2)
    capsys.readouterr()
    assert resumed(folder, "--pruning.record=true") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {folder}: {name} is ")
    assert not (folder / "config.json").exists()


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a record; of lists, of named Linears and of files only the first one."""
    if isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else [0]
        for key in keys[:1] if path in (("linears",), ("files",)) else keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("depth", [1, pytest.param(99, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [None, "x"])
@pytest.mark.parametrize("command", [pytest.param("resume", marks=pytest.mark.slow), "compare"])
def test_a_record_of_another_shape_is_no_traceback(command, wrong, depth, finished, tmp_path, capsys):
    """Of what was written by hand, or by another version: one line, or nothing that matters here."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    whole, faults = json.loads((folder / "pruning.json").read_text()), []
    if command == "compare":  # a scored folder; what resumes scores again
        scored = Scores({"color": 0.5}, {"color": 8}, {"color": "vision"})
        kept = retention(scored, scored).to_dict()
        whole["evaluation"] = {"dense": scored.to_dict(), "pruned": scored.to_dict(), "retention": kept}
    for path in (path for path in places(whole) if len(path) <= depth):
        changed = json.loads(json.dumps(whole))
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = wrong
        shutil.rmtree(folder)
        shutil.copytree(finished, folder)
        (folder / "pruning.json").write_text(json.dumps(changed))
        capsys.readouterr()
        try:
            status = (
                main(["compare", str(folder), str(folder)]) if command == "compare" else resumed_as(finished, folder)
            )
        except Exception as error:
            faults.append(f"{path}: {type(error).__name__}: {error}")
            continue
        lines = capsys.readouterr().err.splitlines()
        if status not in (0, 2) or len(lines) != (status == 2):
            faults.append(f"{path}: status {status}, {lines}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["left out", "another"])
def test_a_record_of_other_linears_is_not_taken_for_verified(name, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "pruning.json").read_text())
    linear = record["linears"].pop(next(iter(record["linears"])))
    (folder / "pruning.json").write_text(
        json.dumps(record | {"linears": record["linears"] | ({} if name == "left out" else {name: linear})})
    )
    capsys.readouterr()
    assert resumed_as(finished, folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its pruning.json does not name the Linears that are pruned" in line


SAID: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sparsity": lambda record: record["sparsity"].update(achieved=0.9),
    "target": lambda record: record["sparsity"].update(target=0.9),
    "pattern": lambda record: record.update(pattern="2:4"),
    "untouched tensors": lambda record: record["verified"].update(untouched_tensors=3),
    "sparsity of a Linear": lambda record: next(iter(record["linears"].values())).update(achieved=0.9),
    "no zeros of a Linear": lambda record: next(iter(record["linears"].values())).pop("zeros"),
    "no files": lambda record: record.pop("files"),
}


@pytest.mark.parametrize("change", SAID.values(), ids=SAID.keys())
def test_a_complete_folder_is_not_said_to_hold_what_only_its_record_says(change, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "pruning.json").read_text())
    change(record)
    (folder / "pruning.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert resumed_as(finished, folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "record" in line or "its pruning.json " in line


def test_scores_of_another_shape_are_no_traceback(finished, tmp_path, capsys):
    """An `evaluation.json` that is not as `evaluate` writes it says nothing about the checkpoint."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    task = {"score": 0.5, "baseline": 0.5, "retention": 1.0, "questions": 8}
    whole = {"tasks": {"color": task}, "average": 0.5, "baseline_average": 0.5, "retention": 1.0}
    for path in [None, *places(whole)]:
        changed = json.loads(json.dumps(whole))
        if path is not None:
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = "x"
        (folder / "evaluation.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(["compare", str(folder), str(folder)]) == 0, path
        assert ("100.0%" in capsys.readouterr().out) == (path is None), path


def resumed_as(finished: Path, folder: Path) -> int:
    """A run that goes on in a copy of a folder."""
    model = json.loads((finished / "pruning.json").read_text())["model"]["path"]
    options = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer", "--evaluate=true", f"--model.path={model}"]
    return main([*GOLDEN_ARGUMENTS, *options, f"--output={folder}", "--resume=true"])
