"""Plugins that write to what they are given to look at, or give what is none: a run refuses them in one line."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvlm_prune.cli import main

MINE = """
import torch
from lvlm_prune.methods import Saliency
from lvlm_prune.methods.pools import TextOnlyPool
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers import SparseGPTSolver
from lvlm_prune.methods.statistics import ChannelNorm


class MyScorer(WandaScorer):
    def score(self, weight, statistic):
        return weight.abs_().float()


class MyStatistic(ChannelNorm):
    def add(self, inputs, weights):
        super().add(inputs.mul_(2), weights)


class OtherScorer(WandaScorer):
    statistic = MyStatistic


class MySaliency(Saliency):
    name = "mine"

    def __call__(self, tokens):
        return tokens.hidden_out.sub_(1)[tokens.visual].float().norm(dim=-1)


class MyPool(TextOnlyPool):
    def select(self, tokens):
        tokens.visual[0] = True
        return super().select(tokens)


class MySolver(SparseGPTSolver):
    def solve(self, problem):
        problem.gram.tensors()[0].diagonal().add_(1.0)
        return super().solve(problem)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The working folder, where a module `mine` is looked for; no other test sees it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pruning.scorer=mine.MyScorer"], "--pruning.scorer MyScorer: MyScorer.score: changes `weight`"),
        (["--pruning.scorer=mine.OtherScorer"], "MyStatistic.add: changes `inputs`"),
        (["--pruning.pool.saliency=mine.MySaliency"], "AsymmetricPool.select: changes `hidden_out`"),
        (["--pruning.pool=mine.MyPool"], "MyPool.select: changes `visual`"),
        (["--pruning.solver=mine.MySolver"], "MySolver.solve: changes `statistic`"),
    ],
    ids=["scorer", "statistic", "saliency", "pool", "solver"],
)
def test_what_is_written_to_ends_the_run_in_one_line(options, said, golden_arguments, place: Path, capsys):
    (place / "mine.py").write_text(MINE)
    assert main([*golden_arguments, *options, "--output=out"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(re.escape(said), line)
    assert not (place / "out" / "config.json").exists()


NO_SAMPLE = """
from lvlm_prune.data.tensors import TensorSource


class NoSource(TensorSource):
    def __getitem__(self, index):
        return None
"""


@pytest.mark.parametrize("verb", ["prune", "recover"])
def test_what_is_no_sample_is_one_line(verb, golden_arguments, labelled, place: Path, capsys):
    (place / "mine.py").write_text(NO_SAMPLE)
    if verb == "recover":
        assert main([*golden_arguments, "--output=sparse"]) == 0
    arguments = golden_arguments if verb == "prune" else ["recover", "--model.path=sparse"]
    data = ["--data.source=mine.NoSource", f"--data.source.path={labelled}"]
    assert main([*arguments, *data, "--output=out"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sample 0: NoSource gives NoneType, expected a Conversation, a Document or model inputs" in line
    assert not (place / "out" / "config.json").exists()
