"""A table of a sweep: what stands in one cell differs in nothing but the seed."""

import csv

import pytest

from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.runs.sweep.grid import SPARSITY, Point
from lvlm_prune.runs.sweep.results import FinishedRun
from lvlm_prune.runs.sweep.tables import csv_table, markdown_table

RIA = {"class_path": "RIAScorer", "init_args": {"exponent": 1}}
DENSE = Scores({"color": 1.0}, {"color": 4}, {"color": "vision"})
PAIRS = {
    "pruning.scorer": ["WandaScorer", "lvlm_prune.methods.scorers.RIAScorer"],
    "pruning.scorer.exponent": [0.1234567, 0.1234568],
    "pruning.solver": [RIA, {**RIA, "init_args": {"exponent": 2}}],
    "data.source.path": ["mine.json", "yours.json"],
    "pruning.visual": [["image"], ["image", "video"]],
}


def finished(option, value, accuracy) -> FinishedRun:
    point = Point("atv", {option: value}, 0, {"pruning": {"pattern": "unstructured"}, "data": {}})
    record = {"method": "ATV", "sparsity": {"target": 0.5, "achieved": 0.5}, "seconds": 1.0}
    scores = Scores({"color": accuracy}, {"color": 4}, {"color": "vision"})
    return FinishedRun(point, record, scores, retention(scores, DENSE))


@pytest.mark.parametrize(("option", "values"), PAIRS.items(), ids=PAIRS)
@pytest.mark.parametrize("across", [SPARSITY, "the option"])
def test_runs_with_other_options_share_no_cell(option, values, across):
    runs = [finished(option, value, accuracy) for value, accuracy in zip(values, (0.25, 0.75))]
    text = markdown_table(runs, option if across == "the option" else across)
    assert "25.0 (25.0)" in text
    assert "75.0 (75.0)" in text
    first, second = csv.DictReader(csv_table(runs).splitlines())
    assert first[option] != second[option]


def test_short_names_stay_where_they_are_enough():
    runs = [finished("pruning.scorer", value, 0.5) for value in PAIRS["pruning.scorer"]]
    assert "atv · scorer RIAScorer" in markdown_table(runs, SPARSITY)
