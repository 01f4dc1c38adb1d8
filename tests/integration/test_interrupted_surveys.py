"""What a survey found is not lost where a run is interrupted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlm_prune.callbacks import BlockwisePruning, PluginSurvey, PruningReport
from lvlm_prune.cli import main
from tests.conftest import ALL_BLOCKS, GOLDEN_ARGUMENTS

ALLOCATIONS = ["DASAllocation", "OWLAllocation", "ECoFLaPAllocation", "KLAllocation"]


def interrupt_behind(owner: type, hook: str, at: int, arguments: list[str], monkeypatch) -> None:
    """Run a command that is interrupted where the callback would hear of a block; it can be gone on with."""

    def interrupt(self, trainer, pl_module, block):
        if block.index == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, hook, interrupt)
        assert main(arguments) == 130


def arguments_of(allocation: str) -> list[str]:
    arguments = [*GOLDEN_ARGUMENTS, ALL_BLOCKS, f"--pruning.allocation={allocation}", "--data.num_samples=3"]
    if allocation in ("ECoFLaPAllocation", "KLAllocation"):
        arguments.append("--pruning.allocation.samples=2")
    return arguments


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """What a run with an allocation writes that nobody interrupts; each is made once."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def written(allocation: str) -> Path:
        if not (folder / allocation).exists():
            assert main([*arguments_of(allocation), f"--output={folder / allocation}"]) == 0
        return folder / allocation

    return written


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_resuming_does_not_survey_again_and_gives_the_same_bytes(allocation, uninterrupted, tmp_path, monkeypatch):
    arguments, whole = arguments_of(allocation), uninterrupted(allocation)
    folder = tmp_path / "interrupted"
    interrupt_behind(BlockwisePruning, "on_block_end", 1, [*arguments, f"--output={folder}"], monkeypatch)
    for hook in ("on_survey_block_start", "on_survey_batch_end", "on_survey_end"):
        monkeypatch.setattr(PluginSurvey, hook, lambda *_, **__: pytest.fail("surveyed again"))
    assert main([*arguments, f"--output={folder}", "--resume=true"]) == 0
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    surveys = [json.loads((path / "pruning.json").read_text())["survey"] for path in (folder, whole)]
    assert surveys[0]["allocation"] == surveys[1]["allocation"]


def test_a_survey_that_was_interrupted_starts_over(uninterrupted, tmp_path, monkeypatch):
    arguments, whole = arguments_of("OWLAllocation"), uninterrupted("OWLAllocation")
    folder = tmp_path / "interrupted"
    interrupt_behind(PluginSurvey, "on_survey_block_end", 2, [*arguments, f"--output={folder}"], monkeypatch)
    assert main([*arguments, f"--output={folder}", "--resume=true"]) == 0
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("killed_at", [0, 2, 3])
@pytest.mark.parametrize("allocation", ["ECoFLaPAllocation", "KLAllocation"])
def test_a_survey_that_tries_changes_goes_on_behind_the_last_finished_block(
    allocation, killed_at, uninterrupted, tmp_path, monkeypatch
):
    """These surveys take most of a run; the dense model has four blocks."""
    arguments, whole = arguments_of(allocation), uninterrupted(allocation)
    folder = tmp_path / "interrupted"
    interrupt_behind(PruningReport, "on_survey_block_end", killed_at, [*arguments, f"--output={folder}"], monkeypatch)
    assert json.loads((folder / "pruning.json").read_text())["surveying"]["blocks"] == killed_at + 1
    seen: list[int] = []
    started = PluginSurvey.on_survey_block_start

    def note(self, trainer, pl_module, block, tail):
        seen.append(block.index)
        started(self, trainer, pl_module, block, tail)

    monkeypatch.setattr(PluginSurvey, "on_survey_block_start", note)
    assert main([*arguments, f"--output={folder}", "--resume=true"]) == 0
    assert seen == list(range(killed_at + 1, 4))
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    records = [json.loads((path / "pruning.json").read_text()) for path in (folder, whole)]
    assert "surveying" not in records[0]
    assert records[0]["survey"]["allocation"] == records[1]["survey"]["allocation"]
    # The answers of the dense model may have been asked for again.
    again = records[0]["survey"]["block_forwards"] - records[1]["survey"]["block_forwards"]
    assert 0 <= again <= 2 * (3 - killed_at)
