"""Pruned checkpoints and labelled samples to recover on."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.run import RunOptions
from tests.conftest import GOLDEN, MODEL, REPOSITORY

CALIBRATION = GOLDEN / "calib.safetensors"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Pruned checkpoints: unstructured and 2:4, in float32 and bfloat16."""
    folder = tmp_path_factory.mktemp("bases")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        dense = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=dtype)
        dense.save_pretrained(folder / f"dense-{name}", max_shard_size="300KB")
        for pattern in ("unstructured", "2:4"):
            pruning = BlockwisePruning(pattern=pattern, exclude="*.k_proj")
            output = folder / f"{pattern}-{name}"
            source = TensorSource(str(CALIBRATION))
            lvlm_prune.prune(folder / f"dense-{name}", source, pruning, output, report=False, publishable=False)
    return folder


@pytest.fixture
def recover(labelled):
    def run(base: Path, output: Path, *options: str, data: Path = labelled) -> int:
        arguments = [f"--model.path={base}", "--data.source=TensorSource", f"--data.source.path={data}"]
        arguments += ["--data.validation_samples=2", "--data.batch_size=2", "--trainer.enable_progress_bar=false"]
        # To hold the model against the dense one takes a quarter of the time: who tests that asks for it.
        arguments += ["--trainer.accelerator=cpu", "--report=false", "--evaluate=false"]
        return main(["recover", *arguments, f"--output={output}", *options])

    return run


@pytest.fixture
def refused(recover, labelled, capsys):
    def check(said: str, base: Path, output: Path, *options: str, data: Path = labelled) -> None:
        """One line that says it, exit status 2, and nothing written."""
        assert recover(base, output, *options, data=data) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0]
        assert not output.exists()

    return check


@pytest.fixture
def no_pages(monkeypatch) -> None:
    without_pages(monkeypatch)


def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep that are kept have a page each, which takes longer than the run."""
    without = lambda **options: RunOptions(**options | {"report": False})  # noqa: E731
    monkeypatch.setattr("lvlm_prune.runs.sweep.run.RunOptions", without)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory) -> Path:
    """The embedded model, pruned by magnitude, with its report."""
    folder = tmp_path_factory.mktemp("evaluate") / "pruned"
    config = f"--config={REPOSITORY / 'configs' / 'prune' / 'magnitude.yaml'}"
    assert main(["prune", config, "--pruning.sparsity=0.6", "--evaluate=false", f"--output={folder}"]) == 0
    return folder
