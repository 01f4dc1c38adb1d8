"""Tables of the papers, scored by lm-eval in an interpreter of its own on a task in its own format."""

import csv
import json

import pytest

from lvlm_prune.cli import main
from lvlm_prune.runs.reproduce.tables import calibration_sets, load_table
from tests.local_questions import LM_EVAL, WITHOUT_LM_EVAL, write_lm_eval_task, write_questions

CAPTIONS = {"source": {"class_path": "lvlm_prune.data.EmbeddedSource"}, "num_samples": 4}


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL, reason=WITHOUT_LM_EVAL)
@pytest.mark.parametrize("table", ["atv/table_3", "tamp/table_1", "mllm_pruner/table_4", "atv/table_1"])
def test_a_harness_scores_a_table_of_each_paper_and_the_pathways(table, tmp_path):
    write_lm_eval_task(tmp_path / "tasks", write_questions(tmp_path / "data", 2))
    parts = load_table(table).parts
    columns = list(dict.fromkeys(one.name for part in parts for one in part.benchmarks))
    out = tmp_path / "out"
    command = ["reproduce", table, "--model.path=demo", "--model.dtype=float32", f"--output={out}"]
    command.append(f"--calibration={json.dumps(dict.fromkeys(calibration_sets(), CAPTIONS))}")
    command += [f"--tasks={json.dumps(dict.fromkeys(columns, 'mine'))}", "--trainer.accelerator=cpu"]
    command += ["--engine=LMEvalEngine", f"--engine.python={LM_EVAL}", "--engine.tasks=[mine]"]
    command.append(f"--engine.include_path={tmp_path / 'tasks'}")
    command.append("--engine.model_args={dtype: float32, max_images: '1'}")
    assert main(command) == 0
    with (out / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["column"] in columns]
    asked = {(row["model"], row["row"]) for row in rows}
    assert asked >= {(part.model.path, row.label) for part in parts for row in part.rows}
    assert all(row["measured"] for row in rows)
    dense = [float(row["measured"]) for row in rows if row["row"] == "dense"]
    assert min(dense) > 0
    assert {float(row["measured"]) for row in rows} - set(dense), "pruned models answer otherwise"
