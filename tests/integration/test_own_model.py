"""A model of the user's own is never calibrated, trained or scored on the embedded model's world."""

import json

import pytest

from lvlm_prune.cli import main
from lvlm_prune.demo import CHECKPOINT, is_embedded
from tests.conftest import MODEL

OWN = f"--model.path={MODEL}"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["prune"], "--data.source EmbeddedSource"),
        (["prune", "--method=tamp"], "--data.source EmbeddedSource"),
        (["probe"], "--data.source EmbeddedSource"),
        (["sweep"], "--engine.benchmark EmbeddedBenchmark"),
        (["evaluate"], "--engine.benchmark EmbeddedBenchmark"),
    ],
)
def test_another_model_needs_data_of_its_own(arguments, option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, OWN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: ")
    assert "Source" in line
    assert not list(tmp_path.iterdir())


def test_what_needs_no_data_asks_for_none(tmp_path):
    out = tmp_path / "out"
    assert main(["prune", OWN, "--method=magnitude", "--report=false", f"--output={out}"]) == 0
    assert json.loads((out / "pruning.json").read_text())["status"] == "complete"


def test_what_was_made_of_the_embedded_model_is_embedded():
    assert is_embedded(CHECKPOINT)
    assert not is_embedded(MODEL)
