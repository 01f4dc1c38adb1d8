"""A sweep: what its runs share changes nothing, and nothing finished is done twice."""

import csv
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lvlm_prune.callbacks import PluginSurvey, SparseCheckpointWriter
from lvlm_prune.cli import main
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.loop import catching
from lvlm_prune.output.locking import FolderLock
from lvlm_prune.runs.prune.run import PruneRun
from tests.conftest import GOLDEN, GOLDEN_MODEL, MODEL, REPOSITORY

RECIPES = REPOSITORY / "configs" / "prune"
BASE = ["sweep", *GOLDEN_MODEL, "--data.num_samples=3", "--engine=tests.engines.ShareLeft"]
QUICK = ["--report=false", "--evaluate=false"]


def recipes(*names: str) -> str:
    return "--recipes=" + json.dumps([str(RECIPES / f"{name}.yaml") for name in names])


def grid(**options) -> str:
    return "--grid=" + json.dumps({name.replace("__", "."): values for name, values in options.items()})


def records(folder: Path) -> dict[tuple, dict]:
    """Runs by recipe, options and seed, without what differs between two equal runs."""
    lines = [json.loads(line) for file in sorted(folder.glob("sweep*.jsonl")) for line in file.read_text().splitlines()]
    found = {
        (line["recipe"], json.dumps(line["options"]), line["seed"]): line
        for line in lines
        if not line["identity"].startswith("dense")
    }
    assert len(found) + 1 == len({line["identity"] for line in lines})
    for line in found.values():
        del line["seconds"], line["cost"]["seconds"], line["digest"]
    return found


@pytest.fixture
def count(monkeypatch):
    """How often samples were caught, the dense model surveyed, and a run made."""
    counts = dict.fromkeys(("catch", "survey", "run"), 0)

    def counted(owner, name, key):
        original = getattr(owner, name)

        @functools.wraps(original)  # the command line looks at the signature
        def wrapper(*arguments, **options):
            counts[key] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapper)

    counted(catching, "catch_batch", "catch")
    counted(PluginSurvey, "on_survey_end", "survey")
    counted(PruneRun, "__call__", "run")
    return counts


def test_runs_share_catching_and_survey_and_equal_single_runs(tmp_path, count, no_pages):
    out = tmp_path / "sweep"
    sparsities = grid(pruning__sparsity=[0.5, 0.6])
    assert main([*BASE, recipes("atv", "das"), sparsities, "--seeds=[0, 1]", "--keep=true", f"--output={out}"]) == 0
    assert count == {"catch": 2 * 3, "survey": 2, "run": 8}
    assert len(records(out)) == 8
    folders = sorted(folder for folder in (out / "checkpoints").iterdir() if folder.suffix != ".private")
    assert len(folders) == 8
    for folder in folders:
        # Kept checkpoints are finished ones: what is private lies beside them.
        assert str(GOLDEN) not in (folder / "pruning.json").read_text() + (folder / "config.yaml").read_text()
        assert str(GOLDEN) in Path(f"{folder}.private", "pruning.json").read_text()
        recipe, sparsity, seed, _ = re.fullmatch(r"(\w+?)_sparsity-([\d.]+)_seed-(\d)-(\w+)", folder.name).groups()
        if seed == "1":
            arguments = [f"--pruning.sparsity={sparsity}", "--data.seed=1", "--data.num_samples=3", *QUICK]
            config, single = f"--config={RECIPES / f'{recipe}.yaml'}", tmp_path / folder.name
            assert main(["prune", config, *GOLDEN_MODEL, *arguments, f"--output={single}"]) == 0
            for name in ("model.safetensors", "config.json"):
                assert (folder / name).read_bytes() == (single / name).read_bytes(), folder.name
    assert main(["prune", f"--config={folders[0] / 'config.yaml'}", *QUICK, f"--output={tmp_path / 'again'}"]) == 0
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (folders[0] / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_repeated_and_a_changed_grid_keeps_what_applies(tmp_path, count, capsys):
    out = tmp_path / "sweep"
    assert main([*BASE, recipes("wanda"), grid(pruning__sparsity=[0.5, 0.6]), f"--output={out}"]) == 0
    assert count["run"] == 2
    table = (out / "sweep.md").read_text()
    with (out / "sweep.jsonl").open("a") as file:
        file.write('{"identity": "cut off by a cra')
    assert main([*BASE, recipes("wanda"), grid(pruning__sparsity=[0.5, 0.6]), f"--output={out}"]) == 0
    assert count["run"] == 2
    assert (out / "sweep.md").read_text() == table
    assert main([*BASE, recipes("wanda"), grid(pruning__sparsity=[0.6, 0.7]), f"--output={out}"]) == 0
    assert count["run"] == 3
    assert "| method | 60% | 70% |" in (out / "sweep.md").read_text()
    assert main([*BASE, recipes("wanda"), grid(pruning__sparsity=[0.5, 0.6, 0.7]), f"--output={out}"]) == 0
    assert count["run"] == 3
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "report", "report.html", "sweep.csv", "sweep.jsonl", "sweep.md",
    }  # fmt: skip
    assert "% retained · pruned in " in capsys.readouterr().out, "seconds without scoring are not those of the run"


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch, capsys, count):
    """But not as long as another process is at its next run."""
    out = tmp_path / "sweep"
    arguments = [*BASE, recipes("wanda"), grid(pruning__sparsity=[0.5, 0.6, 0.7]), f"--output={out}"]
    original = SparseCheckpointWriter.on_block_end

    def interrupted(self, trainer, pl_module, block):
        if count["run"] == 2:
            raise KeyboardInterrupt
        original(self, trainer, pl_module, block)

    with monkeypatch.context() as patch:
        patch.setattr(SparseCheckpointWriter, "on_block_end", interrupted)
        assert main(arguments) == 130
    assert len(records(out)) == 1
    (unfinished,) = (out / "unfinished").iterdir()
    lock = FolderLock(unfinished)
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: --output {unfinished}: is being written by another run\n"
    assert (unfinished / "pruning.json").is_file()
    lock.release()
    assert main(arguments) == 0
    assert count["run"] == 4
    assert len(records(out)) == 3
    assert not (out / "unfinished").exists()


def test_two_parts_make_the_table_of_the_whole(tmp_path):
    arguments = [*BASE, recipes("atv", "magnitude"), "--seeds=[0, 1]"]
    assert main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    assert main([*arguments, "--part=1/2", f"--output={tmp_path / 'parts'}"]) == 0
    half = len(records(tmp_path / "parts"))
    assert 0 < half < 3
    assert f"{3 - half} of 3 runs are still to be done" in (tmp_path / "parts" / "sweep.md").read_text()
    assert main([*arguments, "--part=2/2", f"--output={tmp_path / 'parts'}"]) == 0
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert (tmp_path / "parts" / "sweep.md").read_text() == (tmp_path / "whole" / "sweep.md").read_text()
    assert "part" not in yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text()), "it repeats the whole"


def test_table_csv_and_page_tell_the_same(tmp_path):
    out = tmp_path / "sweep"
    arguments = [*BASE, recipes("atv"), grid(pruning__pool__alpha=[0.5, 2]), "--seeds=[0, 1]", f"--output={out}"]
    assert main([*arguments, "--across=pruning.pool.alpha"]) == 0
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(row["pruning.pool.alpha"], row["seed"]) for row in rows] == [
        ("0.5", "0"),
        ("2", "0"),
        ("0.5", "1"),
        ("2", "1"),
    ]
    for row in rows:
        tasks = [float(row[f"accuracy {task}"]) for task in ("q_proj", "down_proj")]
        assert float(row["accuracy"]) == pytest.approx(sum(tasks) / 2)
        assert float(row["retention"]) == pytest.approx(float(row["accuracy"]))  # nothing of the dense model is zero
    mean = 50 * sum(float(row["retention"]) for row in rows if row["pruning.pool.alpha"] == "2")
    assert f"({mean:.1f} ± 0.0)" in (out / "sweep.md").read_text()
    page = (out / "report.html").read_text()
    assert f"({mean:.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.0)" in page
    assert "<svg" in page
    assert (out / "report" / "retention.png").stat().st_size > 1000


BAD = {
    "unknown recipe": ([recipes("nothing")], ["--recipes", "nothing.yaml", "no such file"]),
    "option of another kind": ([grid(model__dtype=["float32"])], ["--grid model.dtype"]),
    "nested option": (["--grid.pruning.sparsity=[0.5]"], ["--grid pruning", "--grid '{pruning.sparsity: [...]}'"]),
    "seed as option": ([grid(data__seed=[1])], ["--grid data.seed", "--seeds"]),
    "option of nobody": (
        [recipes("wanda"), grid(pruning__pool__alpha=[1])],
        ["--grid pruning.pool.alpha", "no recipe"],
    ),
    "value out of range": ([grid(pruning__sparsity=[0.5, 1.5])], ["--pruning.sparsity 1.5"]),
    "value of the wrong kind": ([grid(pruning__pool__alpha=["x"])], ["--grid pruning.pool.alpha", "x"]),
    "exclude matches nothing": ([grid(pruning__exclude=["*.nothing"])], ["--pruning.exclude *.nothing"]),
    "a name that is none": (["--grid={5: [1]}"], ["--grid 5: is no option"]),
    "seed twice": (["--seeds=[1, 1]"], ["--seeds [1, 1]"]),
    "two ways to give a seed": (["--seeds=[1]", "--data.seed=3"], ["--data.seed 3"]),
    "null for a plugin": (["--grid={pruning.scorer: [null]}"], ["--pruning.scorer"]),
    "the parser's own option": (["--grid={pruning.scorer.help: [WandaScorer]}"], ["--grid pruning.scorer.help"]),
    "options of a class that are none": (
        ["--grid={pruning.scorer: [{class_path: WandaScorer, init_args: 5}]}"],
        ["--grid.pruning.scorer.init_args 5"],
    ),
    "no class": (["--grid={pruning.scorer: [{class_path: os.system}]}"], ["--pruning.scorer os.system", "no Scorer"]),
    "too many runs": (
        [grid(pruning__sparsity=[n / 999 for n in range(1, 200)], pruning__pool__alpha=[*range(99)])],
        [],
    ),
    "misspelt recipe": (["--recipes=[wandaa]"], ["--recipes wandaa", "is wanda meant?"]),
    "folder for a recipe": (["--recipes=[tests]"], ["--recipes tests", "is no file"]),
    "a recipe without an end": (["--recipes=[{anchor}]"], ["anchor.yaml", "nested too deeply, or in itself"]),
    "a date in a recipe": (["--recipes=[{date}]"], ["date.yaml", "cannot be read"]),
    "part": (["--part=3/2"], ["--part 3/2"]),
    "across": (["--across=pruning.pool.alpha"], ["--across pruning.pool.alpha", "not swept"]),
    "too many samples": (["--data.num_samples=9"], ["--data.num_samples 9"]),
    "no engine": (["--engine=NoEngine"], ["--engine NoEngine"]),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_the_first_run(arguments, expected, tmp_path, capsys):
    out = tmp_path / "out"
    for name, text in (("anchor", "pruning: &a {name: *a}"), ("date", "pruning: {name: 2020-13-45}")):
        (tmp_path / f"{name}.yaml").write_text(text)
        arguments = [one.replace(f"{{{name}}}", str(tmp_path / f"{name}.yaml")) for one in arguments]
    assert main([*BASE, *arguments, f"--output={out}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(text in line for text in expected), line
    assert not out.exists()


def test_a_dense_model_that_answers_nothing_is_one_line_before_the_first_run(tmp_path, capsys, count, monkeypatch):
    nothing = Scores({"color": 0.0}, {"color": 4}, {"color": "vision"})
    monkeypatch.setattr("tests.engines.ShareLeft.score", lambda *_: nothing)
    assert main([*BASE, recipes("magnitude"), f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the dense model gets none of the questions right")
    assert count["run"] == 0
    assert not (tmp_path / "out").exists()


def test_an_engine_without_tasks_is_one_line(tmp_path, capsys):
    assert main([*BASE, recipes("magnitude"), "--engine.files=nothing*", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing was scored" in line


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert main([*BASE, f"--output={tmp_path}"]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_samples_that_changed_meanwhile_are_refused(tmp_path, count, capsys):
    """Runs on other samples would stand beside the finished ones as if they could be compared."""
    samples = load_file(GOLDEN / "calib.safetensors")
    save_file(samples, tmp_path / "calib.safetensors")
    model, *_ = GOLDEN_MODEL
    data = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'calib.safetensors'}"]
    arguments = ["sweep", model, *data, *BASE[-2:], recipes("wanda"), f"--output={tmp_path / 'out'}"]
    assert main([*arguments, grid(pruning__sparsity=[0.5])]) == 0
    changed = {name: -tensor if name.endswith("pixel_values") else tensor for name, tensor in samples.items()}
    save_file(changed, tmp_path / "calib.safetensors")
    more = [*arguments, grid(pruning__sparsity=[0.5, 0.6])]
    assert main(more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --data.source TensorSource: gives other calibration samples now")
    assert len(records(tmp_path / "out")) == 1
    save_file(samples, tmp_path / "calib.safetensors")
    assert main(more) == 0
    assert count["run"] == 3


def test_runs_of_other_questions_or_of_another_version_are_made_again(tmp_path, count, monkeypatch, no_pages):
    questions, out = tmp_path / "questions", tmp_path / "out"
    arguments = [*BASE, recipes("magnitude"), grid(pruning__sparsity=[0.5]), f"--output={out}"]
    arguments.append(f"--engine.questions={questions}")
    for text, version, runs in (("a", "1", 1), ("a", "1", 1), ("b", "1", 2), ("b", "2", 3)):
        questions.write_text(text)
        monkeypatch.setattr("lvlm_prune.__version__", version)
        assert main(arguments) == 0
        assert count["run"] == runs
        assert len((out / "sweep.csv").read_text().splitlines()) == 2
    assert len((out / "sweep.jsonl").read_text().splitlines()) == 3 * 2


def test_classes_are_swept_with_their_import_paths_and_options(tmp_path):
    """The command line makes objects of what names a class in full."""
    scorer = "lvlm_prune.methods.scorers.RIAScorer"
    scorers = [{"class_path": scorer, "init_args": {"exponent": exponent}} for exponent in (0.5, 1.0)]
    out = tmp_path / "out"
    arguments = [*BASE, recipes("wanda"), grid(pruning__scorer=scorers), "--across=pruning.scorer"]
    assert main([*arguments, f"--output={out}"]) == 0
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [json.loads(row["pruning.scorer"])["init_args"]["exponent"] for row in rows] == [0.5, 1.0]


def test_nothing_is_written_into_the_model(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    before = sorted(path.name for path in model.iterdir())
    assert main([*BASE, f"--model.path={model}", f"--output={model / 'sweep'}"]) == 2
    assert "lies inside the input checkpoint" in capsys.readouterr().err
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.slow
def test_two_processes_sweep_and_score_like_one(run_cli, tmp_path):
    """The embedded model: every question is asked once, by one of them."""
    arguments = ["sweep", recipes("atv", "magnitude"), "--seeds=[0, 1]", "--data.num_samples=3"]
    arguments += ["--engine.benchmark.num_images=6", "--engine.benchmark.num_text=8", "--engine.batch_size=8"]
    assert main([*arguments, f"--output={tmp_path / 'one'}"]) == 0
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    finished = run_cli(*arguments, *devices, f"--output={tmp_path / 'two'}", timeout=400)
    assert finished.returncode == 0, finished.stderr
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert len(records(tmp_path / "two")) == 3
    assert (tmp_path / "one" / "sweep.md").read_text() == (tmp_path / "two" / "sweep.md").read_text()
