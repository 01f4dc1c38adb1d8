"""Disks that are full, folders that are taken and inputs that change meanwhile: one line, and the command goes on."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvlm_prune.callbacks import SparseCheckpointWriter
from lvlm_prune.cli import main
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output import folder as folders
from lvlm_prune.output.folder import named_folder
from lvlm_prune.output.locking import FolderLock, claim
from lvlm_prune.runs.prune.quality import SampleQuality
from lvlm_prune.runs.sweep.run import WAY_ON
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, GOLDEN_MODEL, MODEL
from tests.engines import ShareLeft
from tests.integration.test_reproduce import arguments as reproduce
from tests.integration.test_sweep import BASE, grid, recipes

PROBE = ["probe", *GOLDEN_MODEL, "--data.num_samples=1", "--probing.sparsities=[0.5]", "--probing.pathways=[text]"]
PROBE += ["--probing.pools=[text]", "--probing.map_tokens=0", "--probing.curve_samples=0"]


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("file", ["sweep.csv", "model.safetensors", "sweep.jsonl", "table.md"])
def test_a_full_disk_in_a_sweep_or_a_table_is_one_line_and_the_same_command_goes_on(
    file, no_pages, tmp_path, monkeypatch, capsys
):
    """At the last file, in the middle of a checkpoint, at a line of results, at a table of a paper."""
    out = tmp_path / "out"
    table = file == "table.md"
    command = reproduce("atv/table_3", out) if table else [*BASE, recipes("magnitude"), f"--output={out}"]
    command += [] if table else [grid(pruning__sparsity=[0.5])]
    replace, fsync = Path.replace, os.fsync

    def full_for_names(self, target):
        if Path(target).name == file or (file == "model.safetensors" and Path(target).name == "config.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    def full_for_lines(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_for_names)
        if file == "sweep.jsonl" and Path("/proc/self/fd").exists():
            patched.setattr(os, "fsync", full_for_lines)
        assert main(command) == 2
    line = one_line(capsys)
    assert "No space left on device" in line
    assert WAY_ON in line
    assert "--resume" not in line
    assert main(command) == 0


def test_a_folder_that_another_probe_writes_is_refused(tmp_path, capsys):
    lock = FolderLock(tmp_path)
    assert main([*PROBE, f"--output={tmp_path}"]) == 2
    assert one_line(capsys) == f"error: --output {tmp_path}: is being written by another run"
    assert not list(tmp_path.iterdir())
    lock.release()


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main([*PROBE, "--output=out"]) == 2
    assert "the working directory: cannot be used" in one_line(capsys)


def test_a_search_whose_samples_changed_does_not_go_on(tmp_path, monkeypatch, capsys):
    """Tries on other samples could not be compared."""
    samples = load_file(GOLDEN / "calib.safetensors")
    save_file(samples, tmp_path / "calib.safetensors")
    command = ["prune", GOLDEN_MODEL[0], "--data.source=TensorSource", "--data.num_samples=2", "--keep=0.7"]
    command += [f"--data.source.path={tmp_path / 'calib.safetensors'}", "--held_back=0", "--report=false"]
    measured = []

    def quality(self, written) -> dict:
        measured.append(written)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"agreement": 0.5, "kl": 1.0, "samples": 1, "tokens": 9}

    monkeypatch.setattr(SampleQuality, "__call__", quality)
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 130
    changed = {name: -tensor if name.endswith("pixel_values") else tensor for name, tensor in samples.items()}
    save_file(changed, tmp_path / "calib.safetensors")
    capsys.readouterr()
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 2
    assert "--data.source TensorSource: gives other samples to measure on now" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["prune", "probe"])
def test_what_another_run_writes_meanwhile_stays(verb, tmp_path, capsys, monkeypatch):
    """Between the first look at the output folder and the first file in it."""
    name = "lvlm_prune.callbacks.checkpoint.claim" if verb == "prune" else "lvlm_prune.runs.probe.run.claim"

    def late(folder, *arguments):
        folder.mkdir()
        (folder / "recovery.json").write_text("{}")
        return claim(folder, *arguments)

    monkeypatch.setattr(name, late)
    command = GOLDEN_ARGUMENTS if verb == "prune" else PROBE
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 2
    assert one_line(capsys) == (
        f"error: --output {tmp_path / 'out'}: was written by another run meanwhile; choose another folder"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recovery.json"]


@pytest.mark.parametrize("verb", ["sweep", "evaluate", "compare", "reproduce"])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_folder_that_a_run_has_taken_meanwhile_is_not_added_to(verb, is_done, tmp_path, capsys, monkeypatch):
    """While it has nothing in it yet, and when it is finished."""
    out, locks = tmp_path / "out", []
    command = {
        "sweep": [*BASE, recipes("magnitude"), grid(pruning__sparsity=[0.5])],
        "evaluate": ["evaluate", GOLDEN_MODEL[0], "--engine=tests.engines.ShareLeft"],
        "compare": ["compare", str(MODEL), str(MODEL)],
        "reproduce": reproduce("atv/table_3", out),
    }[verb]
    monkeypatch.setattr("lvlm_prune.runs.compare.run.ComparedFolder", lambda path: path)
    monkeypatch.setattr("lvlm_prune.runs.compare.run.comparison", lambda folders: {})
    monkeypatch.setattr("lvlm_prune.runs.compare.run.comparison_markdown", lambda record: "")
    monkeypatch.setattr("lvlm_prune.output.locking._PATIENCE", 0)
    make = folders.make_folder

    def taken(folder):
        make(folder)
        if is_done:
            (folder / "pruning.json").write_text("{}")
        elif not locks:
            locks.append(FolderLock(folder))

    monkeypatch.setattr("lvlm_prune.output.locking.make_folder", taken)
    assert main([*command, f"--output={out}"]) == 2
    said = "exists, is not empty and holds no" if is_done else "is being written by another run"
    assert f"error: --output {out}: {said}" in one_line(capsys)
    assert [path.name for path in out.iterdir()] == ["pruning.json"] * is_done


def test_the_lock_of_a_folder_that_was_removed_is_none(tmp_path, monkeypatch):
    """A run that opens a folder which another one removes and makes anew would be alone in what nobody sees."""
    folder = tmp_path / "out"
    folder.mkdir()
    flock = fcntl.flock

    def after_removal(descriptor, operation):
        folder.rmdir()
        folder.mkdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with pytest.raises(InputError, match="was removed by another run"):
        FolderLock(folder)


@pytest.mark.parametrize("kind", ["sweep", "search"])
def test_a_sweep_or_search_that_another_process_is_at_is_refused(kind, no_pages, tmp_path, monkeypatch, capsys):
    """The whole time, not only while a model of it is written; another part of a sweep is let in."""
    out, first = tmp_path / "out", []
    sweep = [*BASE, recipes("magnitude"), grid(pruning__sparsity=[0.5])]
    command = sweep if kind == "sweep" else [*GOLDEN_ARGUMENTS, "--keep=0.7"]
    owner, name = (ShareLeft, "score") if kind == "sweep" else (SampleQuality, "__call__")
    work = getattr(owner, name)

    def meanwhile(self, *arguments, **options):
        if not first:
            first.append(True)
            assert main([*command, f"--output={out}"]) == 2
            written = out if kind == "sweep" else out.with_name("out.search")
            assert one_line(capsys) == f"error: --output {written}: is being written by another run"
            if kind == "sweep":
                assert main([*command, f"--output={out}", "--part=2/2"]) == 0
        if kind == "search":
            raise RunError("enough of tries")
        return work(self, *arguments, **options)

    monkeypatch.setattr(owner, name, meanwhile)
    assert main([*command, f"--output={out}"]) == (0 if kind == "sweep" else 2)
    assert first


def test_an_input_that_is_written_while_it_is_read_is_one_line(tmp_path, monkeypatch, capsys):
    """Where tensors lie was read from the header: with another file under its name they lie elsewhere."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    weights = model / "model.safetensors"
    start = SparseCheckpointWriter.on_prune_start

    def begin(self, trainer, pl_module):
        start(self, trainer, pl_module)
        tensors = load_file(weights)
        save_file({f"{place}": tensor for place, tensor in enumerate(tensors.values())}, weights, {"format": "pt"})

    monkeypatch.setattr(SparseCheckpointWriter, "on_prune_start", begin)
    command = [one for one in GOLDEN_ARGUMENTS if not one.startswith("--model.path")]
    assert main([*command, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    assert f"{weights} was changed while it was in use" in one_line(capsys)


@pytest.mark.parametrize("added", ["model.safetensors", "adapter_config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_came_beside_the_weights_and_changes_what_is_loaded_is_refused(
    added, finished, bases, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = [*GOLDEN_ARGUMENTS, f"--model.path={bases / 'dense-float32'}", "--method=magnitude", f"--output={out}"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if not finished:
            patched.setattr(SparseCheckpointWriter, "on_prune_end", interrupted)
        assert main(command) == (0 if finished else 130)
    if added == "model.safetensors":
        save_file(load_file(MODEL / added), out / added)
    else:
        (out / added).write_text("{}")
    capsys.readouterr()
    assert main([*command, "--resume=true"]) == 2
    assert f"{added} came after the run" in one_line(capsys)
    (out / added).unlink()
    assert main([*command, "--resume=true"]) == 0


@pytest.mark.parametrize("verb", ["prune", "compare", "sweep"])
def test_the_way_back_out_of_a_folder_that_is_not_there_makes_none(verb, no_pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    magnitude = ["--pruning.scorer=MagnitudeScorer", "--report=false"]
    if verb == "compare":
        for name in ("a", "b"):
            assert main([*GOLDEN_ARGUMENTS, *magnitude, f"--output=runs/{name}"]) == 0
    begun = {
        "prune": [*GOLDEN_ARGUMENTS, *magnitude],
        "compare": ["compare", "runs/a", "runs/b"],
        "sweep": [*BASE, recipes("magnitude"), "--grid={}"],
    }
    assert main([*begun[verb], "--output=fresh/new/../../fresh/out/.."]) == 0
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("runs")} <= {"fresh", "fresh.private"}
    assert not {"new", "out"} & {path.name for path in (tmp_path / "fresh").iterdir()}
    assert any((tmp_path / "fresh").glob("*.json*"))


def test_the_way_back_out_of_a_link_is_that_of_the_disk(tmp_path, monkeypatch):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    monkeypatch.chdir(tmp_path)
    assert named_folder("link/../out") == Path("disk/out")
    assert named_folder("../out") == Path("../out")
    assert named_folder("link/out") == Path("link/out")
