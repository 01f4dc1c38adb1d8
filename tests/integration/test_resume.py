"""A run that dies at any moment leaves a folder that cannot be loaded by mistake, and goes on to the same bytes."""

import errno
import hashlib
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from lvlm_prune.callbacks import PruneCallback, PruningReport
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.output import folder as output_folder
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, MODEL
from tests.families import FAMILIES, Sample, make_inputs
from tests.recipes import assert_same_checkpoint

KILLER = '''
import os, signal
from lvlm_prune.callbacks import PruneCallback

class KillProcess(PruneCallback):
    """Dies as a process dies that the system kills: no exception, no cleaning up."""
    def __init__(self, hook: str, block: int):
        self.hook, self.block = hook, block
    def on_block_start(self, trainer, pl_module, block):
        self.die("on_block_start", block)
    def on_block_calibrated(self, trainer, pl_module, block):
        self.die("on_block_calibrated", block)
    def on_block_end(self, trainer, pl_module, block):
        self.die("on_block_end", block)
    def die(self, hook, block):
        if (hook, block.index) == (self.hook, self.block):
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "pruned"
    assert main([*GOLDEN_ARGUMENTS, "--pruning.record=true", f"--output={folder}"]) == 0
    return folder


@pytest.mark.parametrize(("hook", "block"), [("on_block_start", 0), ("on_block_calibrated", 1), ("on_block_end", 0)])
def test_killed_and_resumed_is_byte_identical(hook, block, run_cli, golden_arguments, uninterrupted, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = [*golden_arguments, "--pruning.record=true", f"--output={tmp_path / 'killed'}"]
    kill = [
        "--trainer.callbacks=killer.KillProcess",
        f"--trainer.callbacks.hook={hook}",
        f"--trainer.callbacks.block={block}",
    ]
    died = run_cli(*arguments, *kill)
    assert died.returncode == -9
    assert not (tmp_path / "killed" / "config.json").exists()
    resumed = run_cli(*arguments, "--resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_checkpoint(uninterrupted, tmp_path / "killed")


@pytest.mark.parametrize(
    "options",
    [
        ["--method=fast"],
        pytest.param(["--method=best", "--pruning.allocation.samples=2"], marks=pytest.mark.slow),
        pytest.param(
            ["--method=best", "--pruning.allocation.samples=2", "--pruning.pattern=3:4,2:4,1:4"], marks=pytest.mark.slow
        ),
    ],
    ids=["fast", "best", "several patterns"],
)
def test_recipes_that_solve_are_killed_and_resumed_to_the_same_bytes(options, run_cli, golden_arguments, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = [*golden_arguments, *options]
    assert main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    kill = ["killer.KillProcess", "on_block_calibrated", "1"]
    killing = [f"--trainer.callbacks{part}={value}" for part, value in zip(("", ".hook", ".block"), kill)]
    assert run_cli(*arguments, *killing, f"--output={tmp_path / 'killed'}").returncode == -9
    assert not (tmp_path / "killed" / "config.json").exists()
    assert main([*arguments, f"--output={tmp_path / 'killed'}", "--resume=true"]) == 0
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("call", [1, 14])
def test_full_disk_in_the_middle_of_a_block(call, golden_arguments, uninterrupted, tmp_path, monkeypatch, capsys):
    folder, calls, write = tmp_path / "full", [0], CheckpointFolder.write

    def failing_write(self, key, tensor):
        calls[0] += 1
        write(self, key, half_done(tensor) if calls[0] == call else tensor)
        if calls[0] == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [*golden_arguments, "--pruning.record=true", f"--output={folder}"]
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFolder, "write", failing_write)
        assert main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert "No space left on device" in message[0]
    assert "--resume true" in message[0]
    assert not (folder / "config.json").exists()
    assert main([*arguments, "--resume=true"]) == 0
    assert_same_checkpoint(uninterrupted, folder)


@pytest.mark.parametrize("name", ["pruning.json", "report.html", "statistics.0.part", "statistics.safetensors"])
def test_full_disk_at_every_kind_of_file(
    name, golden_arguments, uninterrupted, tmp_path, monkeypatch, capsys, blank_figures
):
    """The last write of each; no temporary file takes room afterwards."""
    folder, rename = tmp_path / "full", Path.replace

    def failing_replace(self, target):
        if Path(target).name == name and (name != "pruning.json" or (folder / "config.json").exists()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    report = f"--report={str(name == 'report.html').lower()}"
    arguments = [*golden_arguments, "--pruning.record=true", report, f"--output={folder}"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing_replace)
        assert main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert f"--output {folder}: No space left on device" in message[0]
    assert not list(folder.glob("*.tmp"))
    assert main([*arguments, "--resume=true"]) == 0
    if name == "report.html":  # the uninterrupted run made none
        (folder / name).unlink()
        shutil.rmtree(folder / "report")
    assert_same_checkpoint(uninterrupted, folder)


def half_done(tensor):
    """Half of the bytes arrive."""
    tensor = tensor.clone()
    tensor[: len(tensor) // 2] = 7
    return tensor


WRITES = [
    (CheckpointFolder, "write"),
    (output_folder.shutil, "copyfile"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "mkdir"),
]


@pytest.fixture
def crashes(monkeypatch, tmp_path):
    """Run a command, and make a picture of its output folder as a crash would leave it at every write of the run.

    Half of what the write was to write has arrived; `replace` and the like have not happened yet.
    """

    def run(arguments: list[str], folder: Path) -> list[Path]:
        pictures: list[Path] = []

        def crash_at(place: object, name: str) -> None:
            really = getattr(place, name)

            def writing(*values, **options):
                tensor = place is CheckpointFolder
                target = values[0].path if tensor else Path(values[1 if name in ("copyfile", "replace") else 0])
                if target == folder or folder in target.parents:
                    if tensor:
                        really(values[0], values[1], half_done(values[2]))
                    elif name == "copyfile":
                        content = Path(values[0]).read_bytes()
                        target.write_bytes(content[: len(content) // 2])
                    if folder.is_dir():
                        picture = tmp_path / f"crash{len(pictures)}"
                        copytree(folder, picture)
                        pictures.append(picture)
                return really(*values, **options)

            patched.setattr(place, name, writing)

        copytree = shutil.copytree
        with monkeypatch.context() as patched:
            for place, name in WRITES:
                crash_at(place, name)
            assert main([*arguments, f"--output={folder}"]) == 0
        return pictures

    return run


def contents_of(folder: Path) -> frozenset[tuple[str, str]]:
    """Names and digests of all files, and the names of folders."""
    return frozenset(
        (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in folder.rglob("*")
    )


def test_a_crash_at_every_write_is_visibly_unfinished_and_goes_on(crashes, tmp_path):
    """Files are compared only where they differ between crashes: one sample, a model of two blocks, every write."""
    config = FAMILIES["qwen2_vl"].config()
    config.text_config.num_hidden_layers, config.text_config.layer_types = 2, config.text_config.layer_types[:2]
    model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "dense")
    sample = make_inputs("qwen2_vl", model, [Sample(3, 0, 5)])
    save_file({f"s0.{name}": value for name, value in sample.items()}, tmp_path / "samples.safetensors")
    arguments = ["prune", f"--model.path={tmp_path / 'dense'}", "--data.source=TensorSource", "--report=false"]
    arguments += [f"--data.source.path={tmp_path / 'samples.safetensors'}", "--pruning.record=true", "--evaluate=false"]
    whole = tmp_path / "whole"
    pictures = crashes(arguments, whole)
    assert len(pictures) > 2 * 7 + 20  # every Linear, and what is written beside the weights
    for picture in {contents_of(picture): picture for picture in pictures}.values():  # a folder goes on the same again
        if (picture / "config.json").exists():
            assert (picture / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        else:
            with pytest.raises((OSError, ValueError)):
                AutoModelForImageTextToText.from_pretrained(picture)
        assert main([*arguments, f"--output={picture}", "--resume=true"]) == 0, picture
        assert_same_checkpoint(whole, picture)
        shutil.rmtree(picture)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--pruning.sparsity=0.6", "--pruning.sparsity 0.6: the unfinished run"),
        ("--data.num_samples=5", "--data.num_samples 5: the unfinished run"),
        ("--pruning.pool.alpha=2", "--pruning.pool.init_args.alpha 2: the unfinished run"),
    ],
)
def test_resume_with_another_configuration_is_refused(change, named, golden_arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patched:
        patched.setattr(PruneCallback, "on_propagation_batch_end", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*golden_arguments, f"--output={folder}"])
    capsys.readouterr()
    assert main([*golden_arguments, change, f"--output={folder}", "--resume=true"]) == 2
    assert named in capsys.readouterr().err


def test_resume_with_other_calibration_data_or_another_checkpoint_is_refused(
    tmp_path, golden_arguments, capsys, monkeypatch
):
    shutil.copytree(MODEL, tmp_path / "model")
    samples = load_file(GOLDEN / "calib.safetensors")
    save_file(samples, tmp_path / "calib.safetensors")
    arguments = [
        "prune",
        f"--model.path={tmp_path / 'model'}",
        "--data.source=TensorSource",
        f"--data.source.path={tmp_path / 'calib.safetensors'}",
        f"--output={tmp_path / 'out'}",
        "--report=false",
        "--evaluate=false",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(PruneCallback, "on_propagation_batch_end", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    samples["s3.pixel_values"][0, 0] += 1
    save_file(samples, tmp_path / "calib.safetensors")
    capsys.readouterr()
    assert main([*arguments, "--resume=true"]) == 2
    assert "--data.source" in (said := capsys.readouterr().err)
    assert "other calibration samples" in said
    samples["s3.pixel_values"][0, 0] -= 1
    save_file(load_file(GOLDEN / "calib.safetensors"), tmp_path / "calib.safetensors")
    model = CheckpointFolder(tmp_path / "model")
    key = next(key for key in model if len(model[key].shape) == 2)
    weight = model.read(key)
    weight[-1, -1] += 1
    model.write(key, weight)
    assert main([*arguments, "--resume=true"]) == 2
    assert f"--model.path {tmp_path / 'model'}: has changed" in capsys.readouterr().err


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Arguments without the places of checkpoint and samples, and a run that was interrupted after its first block."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, "model")
    shutil.copy(GOLDEN / "calib.safetensors", "calib.safetensors")
    arguments = ["prune", "--data.source=TensorSource", "--data.num_samples=2", "--pruning.record=true"]
    arguments += ["--report=false", "--evaluate=false"]
    here = ["--model.path=model", "--data.source.path=calib.safetensors", "--output=out"]
    with monkeypatch.context() as patched:
        patched.setattr(PruningReport, "on_block_end", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert main([*arguments, *here]) == 143
    return arguments


def test_what_only_moved_is_no_other_input(begun, uninterrupted, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move("../model", "model")
    shutil.move("../calib.safetensors", "samples.safetensors")
    here = ["--model.path=model", "--data.source.path=samples.safetensors", "--output=../out", "--resume=true"]
    assert main([*begun, *here]) == 0
    assert_same_checkpoint(uninterrupted, tmp_path / "out")
    # Samples are not read again once a run is complete: others would not be noticed.
    shutil.copy("samples.safetensors", "others.safetensors")
    here[1] = "--data.source.path=others.safetensors"
    capsys.readouterr()
    assert main([*begun, *here]) == 2
    assert "--data.source.init_args.path others.safetensors: the finished run" in capsys.readouterr().err


def test_the_same_weights_in_other_shards_are_refused(begun, tmp_path, capsys):
    """Blocks would be written to places where the copy that was begun has other tensors."""
    weights = load_file("model/model.safetensors")
    save_file(weights, "model/model.safetensors", metadata={"format": "pt", "longer": "header"})
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    here = ["--model.path=model", "--data.source.path=calib.safetensors", "--output=out", "--resume=true"]
    capsys.readouterr()
    assert main([*begun, *here]) == 2
    said = "has changed: the unfinished run in out started from another model.safetensors"
    assert capsys.readouterr().err == f"error: --model.path model: {said}\n"
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}
