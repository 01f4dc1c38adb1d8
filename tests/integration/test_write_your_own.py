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


FAULTY = """
import torch

from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Selection, Solution, Solver


class ColumnScorer(Scorer):
    def score(self, weight, statistic):
        return weight.float().abs().mean(0)


class LaterScorer(Scorer):
    '''Right for small weights.'''

    def score(self, weight, statistic):
        score = weight.float().abs()
        return score if weight.shape[1] == 128 else score[:1]


class LaterNaN(Scorer):
    def score(self, weight, statistic):
        score = weight.float().abs()
        return score if weight.shape[1] == 128 else score.where(score < score.mean(), torch.nan)


class NamedStatistic(Scorer):
    statistic = "Gram"

    def score(self, weight, statistic):
        return weight.float().abs()


class NeedsText(Saliency):
    needs = "outputs"

    def __call__(self, tokens):
        return tokens.hidden_out[tokens.visual].float().norm(dim=-1)


class ShortCutoffs(Pool):
    def select(self, tokens, linear=None):
        return Selection(tokens.text, candidates=tokens.visual_index)

    def cutoffs(self, sum_over_processes):
        return [1]

    def held_tokens(self, text, visual):
        return visual


class OwnChoices(Pool):
    per_linear = True

    def select(self, tokens, linear=None):
        return Selection(tokens.text)

    def select_each(self, tokens, linears):
        return {}


class TensorNotes(Solver):
    statistic = None

    def solve(self, problem):
        mask = problem.pattern.mask(problem.weight.float().abs(), problem.sparsity, self.group)
        return Solution(problem.weight.masked_fill(mask, 0.0), mask, {"share": mask.float().mean()})


class TooMuch(Allocation):
    def allocate(self, shapes, sparsity):
        return dict.fromkeys(shapes, sparsity + 0.1)
"""
BEFORE = ("ColumnScorer", "NamedStatistic", "NeedsText", "TooMuch")
"""What shows before the run is refused before there is a folder."""


@pytest.mark.parametrize(
    ("option", "plugin", "said"),
    [
        (
            "scorer",
            "ColumnScorer",
            r"--pruning.scorer ColumnScorer: ColumnScorer.score: float32 of shape \(128,\), exp",
        ),
        ("scorer", "LaterScorer", r"LaterScorer.score: float32 of shape \(1, \d+\), expected float32 of shape"),
        ("scorer", "LaterNaN", r"LaterNaN.score: NaN for [\d,]+ of [\d,]+ weights"),
        ("scorer", "NamedStatistic", r"--pruning.scorer .*\.statistic: 'Gram', expected the class of a Statistic"),
        ("pool.saliency", "NeedsText", r"--pruning.pool.saliency .*\.needs: 'outputs', expected a set of some of "),
        ("pool", "ShortCutoffs", r"ShortCutoffs.cutoffs: \[1\] for \d+ samples, expected a whole number for each"),
        ("pool", "OwnChoices", r"OwnChoices.select: NoneType, expected a Selection"),
        ("solver", "TensorNotes", r"TensorNotes.solve, notes: .* is no plain data for the manifest"),
        ("allocation", "TooMuch", r"TooMuch.allocate: a mean of 0.6 over all weights, expected the target 0.5"),
    ],
)
def test_a_broken_contract_ends_a_run_in_one_line(
    option, plugin, said, golden_arguments, tmp_path, monkeypatch, capsys
):
    """Scores of another shape would be broadcast, prune other weights than were meant, and fail in the end."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = [f"--pruning.{option}=faulty.{plugin}", "--pruning.sparsity=0.5", "--output=out", "--evaluate=false"]
    assert main([*golden_arguments, *options]) == 2
    sys.modules.pop("faulty", None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line)
    assert (tmp_path / "out").exists() == (plugin not in BEFORE)
