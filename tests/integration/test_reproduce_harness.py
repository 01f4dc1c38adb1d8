"""Tables of the papers, scored by lm-eval or lmms-eval in an interpreter of its own on a task in its own format."""

import csv
import json
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.runs.reproduce.tables import calibration_sets, load_table
from tests.local_questions import (
    LM_EVAL,
    LMMS_EVAL,
    WITHOUT_LM_EVAL,
    WITHOUT_LMMS_EVAL,
    write_lm_eval_task,
    write_lmms_eval_task,
    write_questions,
)

CAPTIONS = {"source": {"class_path": "lvlm_prune.data.EmbeddedSource"}, "num_samples": 4}


def refuse_unscored(table: str, out: Path, *engine: str) -> None:
    """Reproduce a table on the embedded model, and see that every row of it was scored."""
    parts = load_table(table).parts
    columns = list(dict.fromkeys(one.name for part in parts for one in part.benchmarks))
    command = ["reproduce", table, "--model.path=demo", "--model.dtype=float32", f"--output={out}"]
    command.append(f"--calibration={json.dumps(dict.fromkeys(calibration_sets(), CAPTIONS))}")
    command += [f"--tasks={json.dumps(dict.fromkeys(columns, 'mine'))}", "--trainer.accelerator=cpu"]
    assert main([*command, *engine, "--engine.tasks=[mine]"]) == 0
    with (out / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["column"] in columns]
    asked = {(row["model"], row["row"]) for row in rows}
    assert asked >= {(part.model.path, row.label) for part in parts for row in part.rows}
    assert all(row["measured"] for row in rows)
    dense = [float(row["measured"]) for row in rows if row["row"] == "dense"]
    assert min(dense) > 0
    assert {float(row["measured"]) for row in rows} - set(dense), "pruned models answer otherwise"


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL, reason=WITHOUT_LM_EVAL)
@pytest.mark.parametrize("table", ["atv/table_3", "tamp/table_1", "mllm_pruner/table_4", "atv/table_1"])
def test_lm_eval_scores_a_table_of_each_paper_and_the_pathways(table, tmp_path):
    write_lm_eval_task(tmp_path / "tasks", write_questions(tmp_path / "data", 2))
    engine = ["--engine=LMEvalEngine", f"--engine.python={LM_EVAL}", f"--engine.include_path={tmp_path / 'tasks'}"]
    refuse_unscored(table, tmp_path / "out", *engine, "--engine.model_args={dtype: float32, max_images: '1'}")


@pytest.mark.slow
@pytest.mark.skipif(not LMMS_EVAL, reason=WITHOUT_LMMS_EVAL)
@pytest.mark.parametrize("table", ["atv/table_3", "atv/table_1"])
def test_lmms_eval_scores_a_table_and_the_pathways(table, tmp_path):
    write_lmms_eval_task(tmp_path / "tasks", write_questions(tmp_path / "data", 2))
    engine = ["--engine=LMMSEvalEngine", f"--engine.python={LMMS_EVAL}", "--engine.model_args={device_map: cpu}"]
    own = f"--engine.arguments=[--include_path, '{tmp_path / 'tasks'}']"
    refuse_unscored(table, tmp_path / "out", *engine, own)
