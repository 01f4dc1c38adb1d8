"""A run that is interrupted at any hook, by Ctrl-C or by a scheduler, goes on to the same bytes."""

import signal
from pathlib import Path

import pytest

from lvlm_prune.callbacks import PruneCallback, PruningReport
from lvlm_prune.cli import main
from lvlm_prune.output.locking import FolderLock
from tests.conftest import GOLDEN_ARGUMENTS
from tests.recipes import assert_same_checkpoint

HOOKS = [
    "on_prune_start",
    "on_survey_start",
    "on_survey_block_start",
    "on_survey_batch_end",
    "on_survey_block_end",
    "on_survey_end",
    "on_block_start",
    "on_calibration_batch_end",
    "on_block_calibrated",
    "on_site_calibration_batch_end",
    "on_site_calibrated",
    "on_propagation_batch_end",
    "on_block_end",
    "on_prune_end",
]


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("surveyed") / "pruned"
    assert main([*SURVEYED, f"--output={folder}"]) == 0
    return folder


SURVEYED = [*GOLDEN_ARGUMENTS, "--data.num_samples=2", "--pruning.record=true", "--pruning.allocation=OWLAllocation"]
SURVEYED += ["--pruning.sequential=true"]  # so that every hook is raised


@pytest.mark.parametrize(
    ("hook", "when"),
    [(hook, "first") for hook in HOOKS]
    + [(hook, "last") for hook in ("on_prune_start", "on_survey_end", "on_block_end", "on_prune_end")],
)
def test_interrupted_at_every_hook(hook, when, surveyed, tmp_path, monkeypatch, capsys):
    """Before any other callback saw the hook, and after all others did."""
    folder = tmp_path / "interrupted"
    arguments = [*SURVEYED, f"--output={folder}"]
    place = Onlooker if when == "first" else PruningReport
    called = []

    def interrupt(self, trainer, pl_module, **_):
        called.append(hook)
        if len(called) == (1 if hook in ("on_prune_start", "on_prune_end") or "survey" in hook else 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(place, hook, interrupt)
        callback = [f"--trainer.callbacks={__name__}.Onlooker"] if when == "first" else []
        assert main([*arguments, *callback]) == 130
    said = capsys.readouterr().err.strip()
    if (folder / "pruning.json").exists():
        assert said == f"interrupted: go on with --resume true --output {folder}"
    else:
        assert said == "interrupted"
        assert not folder.exists()
    assert (folder / "config.json").exists() == (hook == "on_prune_end" and when == "last")
    assert main([*arguments, "--resume=true"] if folder.exists() else arguments) == 0
    assert_same_checkpoint(surveyed, folder)


def test_sigterm_ends_a_run_as_ctrl_c_does(surveyed, tmp_path, monkeypatch, capsys):
    """Schedulers send it some seconds before they kill."""
    folder, handler = tmp_path / "terminated", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(PruningReport, "on_block_end", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert main([*SURVEYED, f"--output={folder}"]) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err == f"interrupted: go on with --resume true --output {folder}\n"
    lock = FolderLock(folder)
    assert main([*SURVEYED, f"--output={folder}", "--resume=true"]) == 2
    assert capsys.readouterr().err == f"error: --output {folder}: is being written by another run\n"
    lock.release()
    assert main([*SURVEYED, f"--output={folder}", "--resume=true"]) == 0
    assert_same_checkpoint(surveyed, folder)


class Onlooker(PruneCallback):
    """Comes before the other callbacks, and is interrupted."""
