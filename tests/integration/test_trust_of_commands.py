"""Promises of the commands beside `prune`: what exit status 0 means, and which mistakes are one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvlm_prune.cli import main
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.runs.recover.fitting import FittingRun
from tests.conftest import GOLDEN_MODEL
from tests.integration.conftest import without_pages
from tests.integration.test_trust import DAMAGES


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# ---- a complete folder -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recovered(bases, labelled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recovered") / "out"
    assert main([*recovery(bases, labelled), f"--output={folder}"]) == 0
    return folder


def recovery(bases: Path, labelled: Path) -> list[str]:
    data = ["--data.source=TensorSource", f"--data.source.path={labelled}", "--data.validation_samples=2"]
    return ["recover", f"--model.path={bases / '2:4-float32'}", *data, "--trainer.accelerator=cpu", "--report=false"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["shard", "config.json", "config.yaml", "adapter/adapter_model.safetensors"])
def test_a_recovered_folder_is_verified_again(name, damage, recovered, bases, labelled, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(recovered, folder)
    name = next(folder.glob("model*.safetensors")).name if name == "shard" else name
    damage(folder / name, -2)
    capsys.readouterr()
    assert main([*recovery(bases, labelled), f"--output={folder}", "--resume=true"]) == 2
    line = one_line(capsys)
    assert name in line or "verification failed: tensor " in line


def test_a_whole_recovered_folder_says_so(recovered, bases, labelled, capsys):
    assert main([*recovery(bases, labelled), f"--output={recovered}", "--resume=true"]) == 0
    assert "\nverified: " in capsys.readouterr().out


PROBE = ["probe", *GOLDEN_MODEL, "--data.num_samples=2", "--probing.sparsities=[0.5]", "--probing.pathways=[text]"]
PROBE += ["--probing.pools=[text]", "--probing.map_tokens=0", "--probing.curve_samples=0"]


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "out"
    assert main([*PROBE, f"--output={folder}"]) == 0
    return folder


def another_number(path: Path, offset: int) -> None:
    record = json.loads(path.read_text())
    next(iter(record["linears"].values()))["iou"]["0.5"] = 0.99
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["probe.json", "report.html"])
def test_a_finished_probe_is_held_against_what_was_written(name, damage, probed, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(probed, folder)
    (another_number if name == "probe.json" and damage is DAMAGES["flipped bit"] else damage)(folder / name, -2)
    capsys.readouterr()
    assert main([*PROBE, f"--output={folder}", "--resume=true"]) == (0 if is_newline(name, damage) else 2)
    if not is_newline(name, damage):
        assert name in one_line(capsys)


def is_newline(name: str, damage: Callable) -> bool:
    """Whether all that is cut off is the end of the last line, behind which nothing is said."""
    return name == "probe.json" and damage is DAMAGES["truncated"]


def test_a_finished_probe_whose_record_lacks_what_is_asked_for_is_one_line(probed, tmp_path, capsys):
    shutil.copytree(probed, tmp_path / "out")
    whole = json.loads((probed / "probe.json").read_text())
    for name in ("calibration", "files", "config", "linears", "digest", "model"):
        (tmp_path / "out" / "probe.json").write_text(json.dumps({key: whole[key] for key in whole if key != name}))
        capsys.readouterr()
        assert main([*PROBE, f"--output={tmp_path / 'out'}", "--resume=true"]) == 2, name
        assert "probe.json" in one_line(capsys)


def test_a_whole_probe_says_so(probed, capsys):
    assert main([*PROBE, f"--output={probed}", "--resume=true"]) == 0
    assert "\nverified: " in capsys.readouterr().out


def test_a_probe_that_goes_on_with_scores_scores_every_cell(tmp_path, monkeypatch, blank_figures):
    """Without, no cell is made; a cell that an older version pruned for nothing is made again."""
    arguments = [*PROBE, "--probing.pools=[text, visual]", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, "--evaluate=false"]) == 0
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert record["grid"] == []
    record |= {"status": "probing", "grid": [{"pathway": "text", "pool": "text", "sparsity": 0.5}]}
    (tmp_path / "out" / "probe.json").write_text(json.dumps(record))
    scores = Scores({"color": 1.0}, {"color": 4}, {"color": "vision"})
    monkeypatch.setattr("lvlm_prune.runs.probe.run.NAMES", [PROBE[1].partition("=")[2]])
    monkeypatch.setattr(
        "lvlm_prune.runs.probe.scoring.EmbeddedScoring",
        lambda *_: SimpleNamespace(dense=lambda: scores, cell=lambda _: scores),
    )
    assert main([*arguments, "--resume=true"]) == 0
    grid = json.loads((tmp_path / "out" / "probe.json").read_text())["grid"]
    assert [(cell["pool"], "scores" in cell) for cell in grid] == [("text", True), ("visual", True)]


SWEEP = ["sweep", *GOLDEN_MODEL, "--data.num_samples=2", "--engine=tests.engines.ShareLeft", "--keep=true"]
SWEEP += ["--grid={pruning.sparsity: [0.5, 0.6]}"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "out"
    with pytest.MonkeyPatch.context() as patched:
        without_pages(patched)
        assert main([*SWEEP, f"--output={folder}"]) == 0
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_checkpoints_that_a_sweep_keeps_are_held_against_what_was_written(name, damage, swept, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(swept, folder)
    _, kept = sorted(path for path in (folder / "checkpoints").iterdir() if path.suffix != ".private")
    damage(kept / name, -2)
    capsys.readouterr()
    assert main([*SWEEP, f"--output={folder}"]) == 2
    assert name in one_line(capsys)


@pytest.mark.parametrize("digest", ["of another line", "none"])
def test_a_line_of_a_sweep_that_was_changed_is_measured_again(digest, swept, tmp_path, no_pages, blank_figures):
    """Every version whose lines this one goes on with wrote a digest."""
    folder = tmp_path / "out"
    shutil.copytree(swept, folder)
    dense, first, second = (folder / "sweep.jsonl").read_text().splitlines()
    changed = json.loads(first) | {"retention": 2.0}
    if digest == "none":
        del changed["digest"]
    better = json.dumps(changed)
    (folder / "sweep.jsonl").write_text("\n".join([dense, better, second]) + "\n")
    assert main([*SWEEP, f"--output={folder}"]) == 0
    last = json.loads((folder / "sweep.jsonl").read_text().splitlines()[-1])
    assert last["retention"] == json.loads(first)["retention"]


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_sweep_adds_to_no_file_that_is_somebody_elses_too(kind, swept, tmp_path, no_pages, blank_figures):
    folder, mine = tmp_path / "out", tmp_path / "mine.jsonl"
    shutil.copytree(swept, folder)
    (folder / "sweep.jsonl").rename(mine)
    before = mine.read_bytes()
    (folder / "sweep.jsonl").symlink_to(mine) if kind == "symbolic" else (folder / "sweep.jsonl").hardlink_to(mine)
    more = "--grid={pruning.sparsity: [0.5, 0.6, 0.7]}"
    assert main([*SWEEP[:-1], more, f"--output={folder}"]) == 0
    assert mine.read_bytes() == before
    assert (folder / "sweep.jsonl").read_bytes().startswith(before)


# ---- recovery that goes on, or cannot --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def distilled(bases, labelled, tmp_path_factory) -> dict[str, Any]:
    """The record of a recovery that asks the dense model."""
    folder = tmp_path_factory.mktemp("distilled") / "whole"
    assert main([*recovery(bases, labelled), "--distillation.weight=0.5", f"--output={folder}"]) == 0
    return without_seconds(folder / "recovery.json")


@pytest.mark.parametrize("where", ["_fit", "_write"])
def test_a_resumed_recovery_has_the_record_of_an_uninterrupted_one(
    where, distilled, bases, labelled, tmp_path, monkeypatch
):
    """Interrupted before the first step, when the dense model was asked already, or behind the last one."""
    arguments = [*recovery(bases, labelled), "--distillation.weight=0.5"]

    def interrupted(run: FittingRun) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FittingRun, where, interrupted)
        assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 130
    assert main([*arguments, f"--output={tmp_path / 'out'}", "--resume=true"]) == 0
    assert without_seconds(tmp_path / "out" / "recovery.json") == distilled
    assert distilled["training"]["train_loss"] is not None
    assert distilled["teacher"]["bytes"] > 0


def without_seconds(path: Path) -> dict[str, Any]:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            own = {"seconds", "evaluation_seconds", "output", "resume"}
            return {name: cleaned(item) for name, item in value.items() if name not in own}
        return value

    return cleaned(json.loads(path.read_text()))


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_recovery_writes_nothing_through_links(kind, recovered, bases, labelled, tmp_path, monkeypatch, capsys):
    """In the place of every file that is still to be written, but weights and what is copied, where it is refused."""
    arguments, folder = [*recovery(bases, labelled), f"--output={tmp_path / 'out'}"], tmp_path / "out"

    def interrupted(run: FittingRun) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FittingRun, "_write", interrupted)
        assert main(arguments) == 130
    others = [*(bases / "2:4-float32").rglob("*"), *folder.rglob("*")]
    there = {path.name for path in others} | {"adapter_model.safetensors"}
    files = [path.relative_to(recovered) for path in recovered.rglob("*") if path.is_file()]
    mine = tmp_path / "mine"
    mine.write_text("precious")
    linked = [name for name in files if name.name not in there]
    assert Path("adapter/adapter_config.json") in linked
    for name in linked:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(mine) if kind == "symbolic" else (folder / name).hardlink_to(mine)
    assert main([*arguments, "--resume=true"]) == 0
    assert mine.read_text() == "precious"


SHAPES = ["flipped", "truncated", "text", "other keys", "other weights", "a list", "no loops"]


@pytest.mark.parametrize("damage", SHAPES)
def test_a_training_checkpoint_of_any_other_shape_is_refused(damage, bases, labelled, tmp_path, monkeypatch, capsys):
    arguments, folder = [*recovery(bases, labelled), f"--output={tmp_path / 'out'}"], tmp_path / "out"

    def interrupted(run: FittingRun) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FittingRun, "_write", interrupted)
        assert main(arguments) == 130
    last = folder / "checkpoints" / "last.ckpt"
    spoil(last, damage)
    capsys.readouterr()
    assert main([*arguments, "--resume=true"]) == 2
    assert "--resume true: " in one_line(capsys)


def spoil(path: Path, damage: str) -> None:
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        content = torch.load(path, weights_only=True)
        if damage == "other keys":
            content = {"model": content["state_dict"]}
        elif damage == "other weights":
            content["state_dict"] = {name: weight[:1] for name, weight in content["state_dict"].items()}
        elif damage == "a list":
            content = [content]
        else:
            del content["loops"]
        torch.save(content, path)


def test_a_diverging_recovery_stops_and_names_step_and_learning_rate(bases, labelled, tmp_path, capsys):
    options = ["--optimization.learning_rate=1e30", "--optimization.schedule=constant", "--trainer.max_epochs=9"]
    assert main([*recovery(bases, labelled), *options, f"--output={tmp_path / 'out'}"]) == 2
    line = one_line(capsys)
    assert "the loss is NaN or infinite at step " in line
    assert "the learning rate is 1e+30" in line
    assert not (tmp_path / "out" / "config.json").exists()
