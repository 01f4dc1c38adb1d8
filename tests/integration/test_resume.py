"""A run that dies at any moment leaves a folder that cannot be loaded by mistake, and goes on to the same bytes."""

import errno
import json
from pathlib import Path

import pytest

from lvlm_prune.blocks import CheckpointFolder
from lvlm_prune.callbacks import PruneCallback, SparseCheckpointWriter
from lvlm_prune.cli import main
from tests.conftest import GOLDEN_ARGUMENTS

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


def assert_same_checkpoint(one: Path, other: Path):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name not in ("pruning.json", "report.html", "config.yaml"):  # these tell times and the folder's own name
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(("hook", "block"), [("on_block_start", 0), ("on_block_calibrated", 1), ("on_block_end", 2)])
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


@pytest.mark.parametrize("call", [1, 9, 28])
def test_full_disk_in_the_middle_of_a_block(call, golden_arguments, uninterrupted, tmp_path, monkeypatch, capsys):
    folder, calls, write = tmp_path / "full", [0], CheckpointFolder.write

    def failing_write(self, key, tensor):
        calls[0] += 1
        if calls[0] == call:
            tensor = tensor.clone()
            tensor[: len(tensor) // 2] = 7  # half of the bytes arrive, then the disk is full
            write(self, key, tensor)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, key, tensor)

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


HOOKS = ["on_prune_start", "on_block_start", "on_calibration_batch_end", "on_propagation_batch_end", "on_prune_end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_interrupted_at_every_hook(hook, golden_arguments, uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "interrupted"
    arguments = [*golden_arguments, "--pruning.record=true", f"--output={folder}"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SparseCheckpointWriter if hook == "on_prune_end" else PruneCallback, hook, interrupt)
        if hook == "on_prune_start":
            patched.setattr(SparseCheckpointWriter, "_start", interrupt)
        assert main(arguments) == 130
    assert not (folder / "config.json").exists()
    assert main([*arguments, "--resume=true"]) == 0
    assert_same_checkpoint(uninterrupted, folder)


def test_interrupted_while_copying(golden_arguments, uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "interrupted"
    arguments = [*golden_arguments, "--pruning.record=true", f"--output={folder}"]

    def interrupt(source, target):
        Path(target).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lvlm_prune.output_folder.shutil.copyfile", interrupt)
        assert main(arguments) == 130
    assert main([*arguments, "--resume=true"]) == 0
    assert_same_checkpoint(uninterrupted, folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--pruning.sparsity=0.6", "--pruning.sparsity 0.6: the unfinished run"),
        ("--data.num_samples=5", "--data.num_samples 5: the unfinished run"),
        ("--pruning.pool.alpha=2", "--pruning.pool.init_args.alpha 2.0: the unfinished run"),
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
    import shutil

    from safetensors.torch import load_file, save_file

    from tests.conftest import GOLDEN

    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    samples = load_file(GOLDEN / "calib.safetensors")
    save_file(samples, tmp_path / "calib.safetensors")
    arguments = [
        "prune",
        f"--model.path={tmp_path / 'model'}",
        "--data.source=TensorSource",
        f"--data.source.path={tmp_path / 'calib.safetensors'}",
        f"--output={tmp_path / 'out'}",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(PruneCallback, "on_propagation_batch_end", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    samples["s3.pixel_values"][0, 0] += 1
    save_file(samples, tmp_path / "calib.safetensors")
    capsys.readouterr()
    assert main([*arguments, "--resume=true"]) == 2
    assert "calibration.fingerprint" in capsys.readouterr().err
    samples["s3.pixel_values"][0, 0] -= 1
    save_file(load_file(GOLDEN / "calib.safetensors"), tmp_path / "calib.safetensors")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    next(weight for weight in weights.values() if weight.ndim == 2)[0, 0] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert main([*arguments, "--resume=true"]) == 2
    assert "model.fingerprint" in capsys.readouterr().err


def test_resuming_a_complete_run_changes_nothing(uninterrupted, golden_arguments):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir() if path.suffix == ".safetensors"}
    assert main([*golden_arguments, "--pruning.record=true", f"--output={uninterrupted}", "--resume=true"]) == 0
    assert before == {path.name: path.read_bytes() for path in uninterrupted.iterdir() if path.suffix == ".safetensors"}
    assert json.loads((uninterrupted / "pruning.json").read_text())["status"] == "complete"
