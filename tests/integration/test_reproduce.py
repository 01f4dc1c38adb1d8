"""Tables of the papers, end to end on a tiny model: everything but the download and the real benchmarks."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import lvlm_prune
from lvlm_prune.cli import main
from lvlm_prune.runs.reproduce.published import PAPERS, published_table
from lvlm_prune.runs.reproduce.tables import calibration_sets, load_table, table_names
from tests.conftest import GOLDEN_ARGUMENTS

MODEL = next(argument for argument in GOLDEN_ARGUMENTS if argument.startswith("--model.path="))
SAMPLES = next(argument for argument in GOLDEN_ARGUMENTS if "calib.safetensors" in argument).partition("=")[2]
TINY = {"source": {"class_path": "lvlm_prune.data.TensorSource", "init_args": {"path": SAMPLES}}, "num_samples": 3}
PUBLISHED = Path(lvlm_prune.__file__).parent / "runs" / "reproduce" / "published"
OTHER_LINES = [argument for argument in GOLDEN_ARGUMENTS if argument.startswith("--trainer")]


def arguments(table: str, out: Path) -> list[str]:
    """The command on stand-ins: the tiny model, its samples, and what is left of two kinds of weights as benchmarks."""
    columns = list(dict.fromkeys(one.name for part in load_table(table).parts for one in part.benchmarks))
    tasks = {name: ("q_proj", "down_proj")[place % 2] for place, name in enumerate(columns)}
    calibration = dict.fromkeys(calibration_sets(), TINY)
    return [
        "reproduce",
        table,
        MODEL,
        f"--output={out}",
        f"--calibration={json.dumps(calibration)}",
        "--engine=tests.engines.ShareLeft",
        f"--tasks={json.dumps(tasks)}",
        *OTHER_LINES,
    ]


def numbers(out: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """What stands in the CSV, by model, row and column; empty cells left out."""
    with (out / "table.csv").open() as file:
        return {
            (row["model"], row["row"], row["column"]): {
                name: float(row[name]) for name in ("published", "measured", "difference") if row[name]
            }
            for row in csv.DictReader(file)
        }


def check(table: str, out: Path) -> None:
    """Every published number is in the output, every row was measured, and retention is counted as in the papers."""
    found = numbers(out)
    for part in load_table(table).parts:
        model = part.model.path
        dense = {one.name: found[model, "dense", one.name]["measured"] for one in part.benchmarks}
        assert part.rows
        for row in part.rows:
            printed = part.published.rows.get(row.labels)
            cells = {column: found[model, row.label, column] for column in part.published.columns}
            if printed is not None:
                values = {column: cell["published"] for column, cell in cells.items() if "published" in cell}
                assert values == {column: value for column, value in printed.values.items() if value is not None}
            average = found[model, row.label, "average"]
            measured = {one.name: found[model, row.label, one.name]["measured"] for one in part.benchmarks}
            kept = sum(100 * measured[name] / dense[name] for name in dense) / len(dense)
            assert average["measured"] == pytest.approx(kept)
            assert 20 < kept < 100
            if printed is not None and printed.average is not None:
                assert average["published"] == printed.average
                check_difference(
                    part, printed, {name: measured[name] / dense[name] for name in dense}, found, row.label
                )
    page, text = (out / "report.html").read_text(), (out / "table.md").read_text()
    for one in (page, text):
        assert all(head in one for head in ("published", "measured", "difference"))
    labels, runs = re.escape(load_table(table).labels), load_table(table).runs
    assert re.search(rf"\| {labels} \| published \|( published, same columns \|)? measured \| difference \|", text)
    assert f"each run in <code>{runs}</code> of its model's folder" in page
    assert {path.relative_to(out).parts[0] for path in out.rglob(runs.replace(".", "*."))} == {
        part.model.path.rpartition("/")[2] for part in load_table(table).parts
    }
    assert (out / "report").is_dir()


def check_difference(part, printed, kept: dict[str, float], found: dict, label: str) -> None:
    """The difference is of the columns that the paper prints too, where it prints any."""
    shown = {name: value for name, value in printed.values.items() if value is not None and part.dense.get(name)}
    ratios = {name: value / part.dense[name] for name, value in shown.items()}
    both = ratios.keys() & kept.keys()
    if not ratios or both == ratios.keys() == kept.keys():
        difference = 100 * sum(kept.values()) / len(kept) - printed.average
        assert found[part.model.path, label, "average"]["difference"] == pytest.approx(difference)
        return
    difference = 100 * sum(kept[name] - ratios[name] for name in both) / len(both)
    assert found[part.model.path, label, "average of the same columns"]["difference"] == pytest.approx(difference)


@pytest.mark.parametrize("table", ["atv/table_3", "tamp/table_1", "mllm_pruner/table_4"])
def test_a_table_of_each_paper_runs_end_to_end(table, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(table, out)) == 0
    check(table, out)


@pytest.mark.slow
@pytest.mark.parametrize("table", table_names())
def test_every_table_runs_end_to_end(table, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(table, out)) == 0
    check(table, out)


def test_a_finished_table_is_only_written_again_and_parts_make_the_whole(tmp_path, monkeypatch):
    table, out = "mllm_pruner/table_4", tmp_path / "out"
    assert main([*arguments(table, out), "--part=1/2"]) == 0
    assert "1 of 2 rows are still to be done" in (out / "table.md").read_text()
    assert main([*arguments(table, out), "--part=2/2"]) == 0
    check(table, out)
    before = (out / "table.csv").read_text()
    monkeypatch.setattr("lvlm_prune.runs.sweep.run.SweepRun._prune", None)  # nothing may be run again
    assert main(arguments(table, out)) == 0
    assert (out / "table.csv").read_text() == before


def test_a_task_that_the_engine_does_not_score_is_refused_before_anything_is_pruned(tmp_path, capsys):
    command = [*arguments("tamp/table_1", tmp_path / "out"), "--tasks={ChartQA: k_projj}"]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "--tasks k_projj: is not scored by the engine, which scores " in said.err
    assert "retained" not in said.out


def test_a_task_that_no_pathway_can_be_scored_on_is_refused_before_the_survey(tmp_path, capsys, monkeypatch):
    """The engine of the test knows its tasks only once it has scored a model."""
    monkeypatch.setattr("lvlm_prune.runs.prune.stream.CalibrationStream.survey", None)
    command = [*arguments("atv/table_1", tmp_path / "out"), "--tasks={MMB: k_projj}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "error: --tasks k_projj: is not scored by the engine, which scores down_proj, q_proj; is q_p"
    )


def test_a_difference_is_of_the_columns_that_were_measured(tmp_path):
    """One of three benchmarks is measured: the paper's average over the three says nothing about it."""
    out = tmp_path / "out"
    assert main([*arguments("atv/table_3", out), "--tasks={MMB: q_proj}"]) == 0
    (part,), found = load_table("atv/table_3").parts, numbers(out)
    for row in part.rows:
        printed, kept = part.published.rows[row.labels], found[part.model.path, row.label, "average"]["measured"]
        of_column = 100 * printed.values["MMB"] / part.dense["MMB"]
        same = found[part.model.path, row.label, "average of the same columns"]
        assert same == pytest.approx({"published": of_column, "measured": kept, "difference": kept - of_column})
        assert "difference" not in found[part.model.path, row.label, "average"]
    for name in ("table.md", "report.html"):
        text = (out / name).read_text()
        assert "published, same columns" in text
        assert "The published retention is over all columns of the paper." in text
        assert f"{kept - of_column:+.2f}" in text


def test_what_is_not_as_in_the_paper_is_said(tmp_path):
    out = tmp_path / "out"
    assert main([*arguments("tamp/table_1", out), "--tasks={ChartQA: q_proj}"]) == 0
    for name in ("table.md", "report.html"):
        text = (out / name).read_text()
        assert "ChartQA is" in text
        assert "of ShareLeft" in text
        assert ("the paper prints none" in text) == (name == "report.html")
        assert "Calibrated on samples that --calibration names in the place of sharegpt4v." in text
        assert "ShareLeft scores 2 tasks, of which 1 stands here" in text
    assert "ChartQA is <code>q_proj</code> of ShareLeft" in (out / "report.html").read_text()


def test_what_a_page_says_repeats_the_table_does(tmp_path, capsys):
    """The page of the table and that of each model's sweep; neither is of a part."""
    out = tmp_path / "out"
    assert main([*arguments("tamp/table_1", out), "--part=1/1"]) == 0
    (sweep,) = out.glob("*/sweep.md")
    for folder in (out, sweep.parent):
        page = re.sub("</?span>", "", (folder / "report.html").read_text())
        assert "lvlm-prune reproduce --config config.yaml --output NEW_FOLDER" in page
        again = tmp_path / f"again-{folder.name}"
        assert main(["reproduce", f"--config={folder / 'config.yaml'}", f"--output={again}"]) == 0
        assert (again / "table.csv").read_bytes() == (out / "table.csv").read_bytes()


def test_several_seeds_give_a_spread(tmp_path):
    out = tmp_path / "out"
    assert main([*arguments("mllm_pruner/table_4", out), "--seeds=[0, 1]"]) == 0
    assert " ± " in (out / "table.md").read_text()
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {row["seeds"] for row in rows if row["row"] == "Wanda"} == {"2"}


BAD = {
    "table": (
        ["reproduce", "atv/table_9"],
        ["error: atv/table_9: no such table; there are ", "atv/table_2", "; is atv/table_"],
    ),
    "no checkpoint": (["reproduce", "tamp/table_3"], ["--model.path VideoLLaMA2-7B", "transformers has no"]),
    "calibration": (
        ["reproduce", "atv/table_3", MODEL, "--calibration={nothing: {}}"],
        ["--calibration nothing", "sharegpt4v"],
    ),
    "no calibration set": (
        ["reproduce", "atv/table_3", MODEL, "--calibration={sharegpt4v: 5}"],
        ["--calibration sharegpt4v: expected options", "not 5"],
    ),
    "a tower": (["reproduce", "atv/table_3", MODEL, "--model.targets=[vision]"], ["--model.targets"]),
    "engine without tasks": (
        ["reproduce", "atv/table_3", MODEL, "--engine=tests.engines.ShareLeft"],
        ["--tasks {}", "for no column"],
    ),
    "no seed": (["reproduce", "atv/table_3", MODEL, "--seeds=[]"], ["--seeds []"]),
    "tasks without engine": (["reproduce", "atv/table_3", MODEL, "--tasks={MMB: mine}"], ["--tasks", "--engine"]),
    "task of a harness": (
        [
            "reproduce",
            "atv/table_1",
            MODEL,
            "--engine=LMEvalEngine",
            "--engine.tasks=[gqa, pope]",
            f"--engine.python={sys.executable}",
            "--tasks={MMB: gqaa}",
        ],
        ["--tasks gqaa: is not scored by the engine, which scores gqa, pope; is gqa meant?"],
    ),
    "task of a benchmark": (
        ["reproduce", "atv/table_1", "--model.path=demo", "--engine=BuiltinEngine", "--tasks={MMB: colour}"],
        ["--tasks colour: is not scored by the engine, which scores ", "is color meant?"],
    ),
    "parts of the probe": (
        ["reproduce", "atv/table_1", MODEL, "--engine=tests.engines.ShareLeft", "--part=1/2"],
        ["--part 1/2", "in one piece"],
    ),
    "column": (
        ["reproduce", "atv/table_3", MODEL, "--engine=tests.engines.ShareLeft", "--tasks={GQA: q_proj}"],
        ["--tasks GQA", "MMB"],
    ),
    "misspelt column": (
        ["reproduce", "tamp/table_1", MODEL, "--engine=tests.engines.ShareLeft", "--tasks={ChartQ: q_proj}"],
        ["--tasks ChartQ: is no column", "is ChartQA meant?"],
    ),
    "misspelt calibration set": (
        ["reproduce", "atv/table_3", MODEL, "--calibration={sharegpt4: {}}"],
        ["--calibration sharegpt4: no such set", "is sharegpt4v meant?"],
    ),
    "no samples": (
        ["reproduce", "atv/table_3", MODEL, "--engine=tests.engines.ShareLeft", "--tasks={MMB: q_proj}"],
        ["--calibration.sharegpt4v.source.", "--calibration '{sharegpt4v: {source:", "names what you have"],
    ),
    "harness": (
        ["reproduce", "atv/table_3", MODEL, "--harness.python=nowhere/python"],
        ["--harness.python nowhere/python"],
    ),
}


@pytest.mark.parametrize(("command", "expected"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(command, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lvlm_prune.evaluation.harness.LMEvalEngine.package", "torch")  # a harness that is installed
    out = tmp_path / "out"
    assert main([*command, f"--output={out}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(text in line for text in expected), line
    assert not out.exists()


def test_every_published_table_is_in_the_list():
    """By its number; some stand in two tables of benchmarks, and Table 9 of MLLM-Pruner is a column of its Table 8."""
    for paper, content in ((name, yaml.safe_load((PUBLISHED / f"{name}.yaml").read_text())) for name in PAPERS):
        printed = {"_".join(name.split("_")[:2]) for name in content if name.startswith(("table_", "figure_"))}
        known = {name.partition("/")[2] for name in table_names() if name.startswith(f"{paper}/")}
        assert printed - {"figure_6"} == known, paper


def test_without_a_table_all_are_listed_with_what_they_take(capsys):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    for name in table_names():
        entry = listed.partition(f"\n{name}\n")[2].partition("\n\n")[0]
        assert all(what in entry for what in ("GPU memory", "disk", " h")), name
        assert all(part.model.path in entry for part in load_table(name).parts)


def test_every_row_of_a_published_table_is_reproduced():
    """But for rows of the dense model."""
    for name in table_names():
        for part in load_table(name).parts:
            assert set(part.published.rows) <= {row.labels for row in part.rows}, name


def test_published_values_are_read_as_printed():
    table = published_table("atv/table_2_main", "llava-hf/llama3-llava-next-8b-hf")
    assert table.rows["ATV", 0.6].values["MME"] == 1474.65
    assert table.rows["ATV", 0.6].average == 77.01
    assert table.dense["MME"] == 1965.12
    cost = published_table("atv/table_4_cost").rows["ATV",]
    assert cost.values == {"seconds": 99.6, "relative": 1.35, "gain": 5.64}
    assert cost.average is None
