"""The example of docs/write_your_own.md: exactly the code of the page, checked, and run from the command line."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.methods.testing import check_plugin
from lvlm_prune.output.manifest import Manifest

PAGE = Path(__file__).parents[2] / "docs" / "write_your_own.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The page's files, in the working directory."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["mine.py", "test_mine.py", "mysolver.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("mine")
    for name, _ in blocks:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_example_keeps_its_contract_and_is_short(mine, tmp_path):
    importlib.import_module("test_mine").test_the_scorer_keeps_its_contract()
    check_plugin(mine.ChannelMoments)
    lines = [line for line in (tmp_path / "mine.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 26


def test_the_example_prunes_and_verifies_from_the_command_line(mine, golden_arguments, tmp_path):
    options = ["--pruning.scorer=mine.DeviationScorer", "--pruning.sparsity=0.5", "--output=out", "--evaluate=false"]
    assert main([*golden_arguments, *options]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest["status"] == "complete"
    assert manifest["method"]["init_args"]["scorer"] == {"class_path": "mine.DeviationScorer", "init_args": {}}


def test_the_solver_keeps_its_contract_and_prunes(mine, golden_arguments, tmp_path):
    check_plugin(importlib.import_module("mysolver").RowScale())
    options = ["--pruning.solver=mysolver.RowScale", "--pruning.sparsity=0.5", "--output=out", "--evaluate=false"]
    assert main([*golden_arguments, *options]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    # The samples went through the dense model too.
    assert manifest["blocks"][0]["forwards"] == 3 * manifest["calibration"]["num_samples"]


SHAPELESS = """
from lvlm_prune.methods import Scorer


class ColumnScorer(Scorer):
    def score(self, weight, statistic):
        return weight.float().abs().mean(0)


class LaterScorer(Scorer):
    '''Right for small weights.'''

    def score(self, weight, statistic):
        score = weight.float().abs()
        return score if weight.shape[1] == 128 else score[:1]
"""


@pytest.mark.parametrize(
    ("verb", "scorer", "said"),
    [
        ("prune", "ColumnScorer", r"--pruning.scorer ColumnScorer: ColumnScorer.score: float32 of shape \(128,\), exp"),
        ("prune", "LaterScorer", r"LaterScorer.score: float32 of shape \(1, \d+\), expected float32 of shape"),
    ],
)
def test_scores_of_the_wrong_shape_end_in_one_line(verb, scorer, said, golden_arguments, tmp_path, monkeypatch, capsys):
    """They would be broadcast, prune other weights than were meant, and fail when the whole run is verified."""
    (tmp_path / "shapeless.py").write_text(SHAPELESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([verb, *golden_arguments[1:], f"--pruning.scorer=shapeless.{scorer}", "--output=out"]) == 2
    sys.modules.pop("shapeless", None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line)
    # What shows on small weights already is refused before there is a folder.
    assert (tmp_path / "out").exists() == (scorer == "LaterScorer")
