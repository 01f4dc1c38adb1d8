"""A card that says something else than what the folder holds is no verified one; one that is missing comes back."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from lvlm_prune.report.card import DENSE_CARD
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, GOLDEN_MODEL, MODEL
from tests.integration.test_sweep import grid, recipes

DENSE = "---\nlicense: mit\ntags:\n- vision\n---\n# The dense model\n\nIt sees.\n"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Every command that writes a card, finished; in the order in which one goes on from the other."""
    folder = tmp_path_factory.mktemp("cards")
    model = folder / "model"
    shutil.copytree(MODEL, model)
    (model / "README.md").write_text(DENSE)
    (model / "NOTES.md").write_text("Of the model.\n")
    samples = load_file(GOLDEN / "calib.safetensors")
    samples |= {key.replace("input_ids", "labels"): one.clone() for key, one in samples.items() if "input_ids" in key}
    save_file(samples, folder / "labelled.safetensors")
    few = [
        "--data.source=TensorSource",
        f"--data.source.path={folder / 'labelled.safetensors'}",
        "--trainer.max_steps=1",
    ]
    quick = ["--report=false", "--evaluate=false"]

    def of(verb: str, base: str, *options: str) -> list[str]:
        return [verb, f"--model.path={folder / base}", f"--output={folder / verb}", *options]

    found = {
        "prune": [*GOLDEN_ARGUMENTS, "--pruning.scorer=MagnitudeScorer", *of("prune", "model")[1:]],
        "recover": of("recover", "prune", *few, *quick),
        "pack": of("pack", "recover"),
        "unpack": of("unpack", "pack"),
        "sweep": ["sweep", *GOLDEN_MODEL[1:], "--keep=true", "--engine=tests.engines.ShareLeft", recipes("magnitude")],
    }
    found["sweep"] += [grid(pruning__sparsity=[0.5]), *of("sweep", "model")[1:]]
    for command in found.values():
        assert main(command) == 0
    return found


def output_of(command: list[str]) -> Path:
    return Path(next(one for one in command[::-1] if one.startswith("--output=")).partition("=")[2])


def card_of(command: list[str]) -> Path:
    """The card, of a sweep that of the only checkpoint that it keeps."""
    return next(output_of(command).glob("checkpoints/*/README.md"), output_of(command) / "README.md")


def changed(old: str, new: str) -> Callable[[Path], None]:
    def change(card: Path) -> None:
        text = card.read_text()
        assert old in text
        card.write_text(text.replace(old, new, 1))

    return change


CHANGES = {
    "its own text": changed("set to zero", "not set to zero"),
    "the dense card": changed("It sees.", "It sees all."),
    "its end": lambda card: card.write_text(card.read_text() + "And more.\n"),
    "its license": changed("license: mit", "license: apache-2.0"),
    "its line": changed(DENSE_CARD, ""),
    "all of it": lambda card: card.write_text("# My model\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("verb", ["prune", "recover", "pack", "unpack", "sweep"])
def test_a_card_that_its_user_changed_stays_and_that_is_said(verb, change, commands, capsys):
    """The rest of the folder is verified; what people add to cards is theirs."""
    card = card_of(commands[verb])
    before = card.read_text()
    change(card)
    changed_text = card.read_text()
    capsys.readouterr()
    resume = [*commands[verb], *([] if verb == "sweep" else ["--resume=true"])]
    try:
        assert main(resume) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "README.md" in line]
        assert "README.md is not the card that was written (" in line
        assert line.endswith("; it stays as it is, and is not verified")
        assert card.read_text() == changed_text
    finally:
        card.write_text(before)
    assert main(resume) == 0
    assert "README.md" not in capsys.readouterr().out
    assert card.read_text() == before


@pytest.mark.parametrize("verb", ["prune", "recover", "pack", "sweep"])
def test_a_card_that_is_missing_is_written_again(verb, commands, capsys):
    card = card_of(commands[verb])
    before = card.read_text()
    card.unlink()
    capsys.readouterr()
    assert main([*commands[verb], *([] if verb == "sweep" else ["--resume=true"])]) == 0
    assert "README.md was missing; it is written again" in capsys.readouterr().out
    assert card.read_text() == before


@pytest.mark.parametrize("verb", ["prune", "recover", "pack", "unpack"])
def test_other_texts_are_held_against_what_was_copied(verb, commands, capsys):
    folder = output_of(commands[verb])
    (folder / "NOTES.md").write_text("Of another.\n")
    capsys.readouterr()
    try:
        assert main([*commands[verb], "--resume=true"]) == 2
        assert "NOTES.md" in capsys.readouterr().err
    finally:
        (folder / "NOTES.md").write_text("Of the model.\n")


def test_the_card_of_an_adapter_too(commands, capsys):
    card = output_of(commands["recover"]) / "adapter" / "README.md"
    before = card.read_text()
    card.write_text(before + "\nUse it anywhere.\n")
    capsys.readouterr()
    try:
        assert main([*commands["recover"], "--resume=true"]) == 0
        assert "adapter/README.md is not the card that was written (line " in capsys.readouterr().out
        assert card.read_text() == before + "\nUse it anywhere.\n"
    finally:
        card.write_text(before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_scores_do_not_take_away_what_its_user_wrote(change, commands, tmp_path, capsys):
    shutil.copytree(output_of(commands["prune"]), tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    change(card)
    text = card.read_text()
    asked = ["evaluate", f"--model.path={tmp_path / 'out'}", "--engine=tests.engines.ShareLeft"]
    capsys.readouterr()
    assert main([*asked, f"--output={tmp_path / 'out'}"]) == 0
    kept = text if "set to zero" not in text or "not set to zero" in text or DENSE_CARD not in text else ""
    if kept:  # of its own text something would be lost
        assert card.read_text() == text
    else:
        assert "Not scored" not in card.read_text()
        assert text.split(DENSE_CARD)[1] == card.read_text().split(DENSE_CARD)[1]


def test_a_card_with_scores_is_the_one_that_was_written(commands, tmp_path):
    shutil.copytree(output_of(commands["prune"]), tmp_path / "out")
    asked = ["evaluate", f"--model.path={tmp_path / 'out'}", "--engine=tests.engines.ShareLeft"]
    assert main([*asked, f"--output={tmp_path / 'out'}"]) == 0
    assert "Not scored" not in (tmp_path / "out" / "README.md").read_text()
    assert main([*commands["prune"], f"--output={tmp_path / 'out'}", "--resume=true"]) == 0
