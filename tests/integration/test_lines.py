"""What is said stays one line, and files can be written, whatever paths and ids have in them."""

import json
import os
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.markdown import markdown_table
from tests.conftest import GOLDEN_ARGUMENTS, MODEL

NAMES = {
    "line break": "a\nb",
    "line separator": "a\u2028b",
    "escape sequence": "a\x1b[31mb",
    "not UTF-8": os.fsdecode(b"a\xffb"),
    "markup": "a<b>&amp;`|b",
}


@pytest.fixture(params=NAMES.values(), ids=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def said(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: --"), error
    assert len(error.splitlines()) == 1, error
    assert "\x1b" not in error
    error.encode()
    return error


def test_a_path_that_is_refused_is_named_in_one_line(name: str, tmp_path: Path, capsys) -> None:
    missing = str(tmp_path / name)
    assert main(["prune", f"--model.path={missing}", f"--output={tmp_path / 'out'}"]) == 2
    assert "--model.path" in said(capsys)
    (tmp_path / name).mkdir()
    (tmp_path / name / "there").touch()
    assert main([*GOLDEN_ARGUMENTS, f"--output={missing}"]) == 2
    assert "--output" in said(capsys)


def test_a_model_is_written_to_a_folder_of_any_name(name: str, tmp_path: Path, capsys, blank_figures) -> None:
    folder = tmp_path / name
    if name == NAMES["not UTF-8"]:
        assert main([*GOLDEN_ARGUMENTS, f"--output={folder}"]) == 2
        assert "not valid UTF-8" in said(capsys)
        assert not folder.exists()
        return
    arguments = [one for one in GOLDEN_ARGUMENTS if "report" not in one]
    assert main([*arguments, "--data.num_samples=2", "--evaluate=false", f"--output={folder}"]) == 0
    assert Manifest.read(folder)["verified"]
    for file in ("README.md", "report.html", "config.yaml"):
        text = (folder / file).read_text(encoding="utf-8")
        assert "<b>&amp;" not in text or file == "config.yaml", file


def test_the_id_of_a_sample_stays_in_its_line(name: str, tmp_path: Path, capsys) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    record = {"id": name.encode("utf-8", "replace").decode(), "image": "missing.png", "conversations": turns}
    (tmp_path / "samples.json").write_text(json.dumps([record]))
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={tmp_path / 'samples.json'}"]
    arguments = [f"--data.source.image_folder={tmp_path}", f"--model.path={MODEL}"]
    assert main(["prune", *source, *arguments, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "\x1b" not in error


def test_a_cell_of_a_table_stays_a_cell(name: str) -> None:
    lines = markdown_table([name], [[name]]).split("\n")
    assert len(lines) == 3
    assert all(line.replace("\\|", "").count("|") == 2 for line in lines)
    assert "<b>" not in "".join(lines)
