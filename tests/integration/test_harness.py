"""`evaluate` with a harness: it is called as asked, and what it wrote is read."""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.evaluation.harness import PAPER_TASKS, LMEvalEngine
from lvlm_prune.evaluation.scores import Scores
from tests.local_questions import LM_EVAL, WITHOUT_LM_EVAL, local, write_lm_eval_task, write_questions

FAKE = '''
"""Writes what the harness of this name would write; the test says what."""
import json, os, pathlib, sys

plan = json.loads(os.environ["HARNESS_PLAN"])
arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
tasks = arguments["--tasks"].split(",")
pretrained = dict(part.split("=", 1) for part in arguments["--model_args"].split(","))["pretrained"]
with open(plan["calls"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
print("a line of noise")
print(plan.get("words", "the end"), file=sys.stderr)
groups = {"ok_vqa": ["ok_vqa_val2014"]}
members = [member for task in tasks for member in groups.get(task, [task])]
results = {task: plan["results"][task] for task in members if task in plan["results"]}
if (pathlib.Path(pretrained) / "pruning.json").exists():
    results = {task: {key: value / 2 for key, value in entry.items()} for task, entry in results.items()}
folder = pathlib.Path(arguments["--output_path"]) / "a__model"
folder.mkdir(parents=True)
samples = {task: {"original": 10, "effective": 8} for task in members}
text = json.dumps({"results": results, "n-samples": samples, "group_subtasks": groups})
(folder / plan["file"]).write_text(text)
sys.exit(plan.get("status", 0))
'''


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """An interpreter with a package that writes the results that the test wants."""
    packages = tmp_path / "packages"
    for name in ("lm_eval", "lmms_eval"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text("")
        (packages / name / "__main__.py").write_text(FAKE)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)

    def run(package: str, results: dict, *arguments: str, **plan) -> int:
        file = {"lm_eval": "results_2026-11-21.json", "lmms_eval": "20261121_results.json"}[package]
        plan = {"results": results, "calls": str(tmp_path / "calls"), "file": file} | plan
        monkeypatch.setenv("HARNESS_PLAN", json.dumps(plan))
        engine = {"lm_eval": "LMEvalEngine", "lmms_eval": "LMMSEvalEngine"}[package]
        options = [f"--engine={engine}", f"--engine.python={interpreter}", f"--output={tmp_path / 'out'}"]
        status = main(["evaluate", *options, *arguments])
        monkeypatch.delenv("HARNESS_PLAN")
        return status

    return run


NINE = {
    "gqa": {"exact_match,none": 0.64},
    "mmbench_en_dev": {"gpt_eval_score,none": 70.0},
    "mme": {"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1500.0},
    "mmmu_val": {"mmmu_acc,none": 0.4},
    "ok_vqa_val2014": {"exact_match,none": 0.6},
    "pope": {"pope_accuracy,none": 0.8, "pope_f1_score,none": 0.86},
    "scienceqa_img": {"exact_match,none": 0.7},
    "textvqa_val": {"exact_match,none": 0.65},
    "vizwiz_vqa_val": {"exact_match,none": 0.6},
}


def test_the_papers_tasks_from_lmms_eval(harness, pruned, tmp_path):
    assert harness("lmms_eval", NINE, f"--model.path={pruned}", "--baseline=demo") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"]["mme"] == {
        "score": 900.0,
        "baseline": 1800.0,
        "retention": 0.5,
        "questions": 8,
        "metric": "mme_perception_score+mme_cognition_score",
        "full_mark": 2800.0,
    }
    assert found["tasks"]["pope"]["baseline"] == 0.86
    assert found["retention"] == 0.5
    shares = [0.64, 0.70, 1800 / 2800, 0.4, 0.6, 0.86, 0.7, 0.65, 0.6]
    assert found["baseline_average"] == pytest.approx(sum(shares) / 9)
    assert (
        "| mme | 8 | mme_perception_score+mme_cognition_score | 900.0 | 1800.0 | 50.0% |"
        in (tmp_path / "out" / "evaluation.md").read_text()
    )
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 2
    for call, folder in zip(calls, (CHECKPOINT, pruned)):
        options = dict(zip(call[::2], call[1::2]))
        assert options["--tasks"] == ",".join(PAPER_TASKS)
        assert options["--model_args"].split(",")[0] == f"pretrained={Path(folder).resolve()}"


def test_lm_eval_is_called_as_asked(harness, tmp_path):
    results = {"mine": {"alias": "mine", "exact_match,none": 0.25, "exact_match_stderr,none": 0.1, "f1,none": 0.5}}
    options = ["--engine.tasks=[mine]", f"--engine.include_path={tmp_path}", "--engine.limit=8"]
    options += [
        "--engine.model_args={max_images: '1'}",
        "--engine.arguments=[--batch_size, '4']",
        "--model.attn_implementation=eager",
    ]
    assert harness("lm_eval", results, *options) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"]["mine"]["score"] == 0.25
    assert found["tasks"]["mine"]["metric"] == "exact_match"
    (call,) = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    text = " ".join(call)
    for part in ("--model hf-multimodal", "--limit 8", "--batch_size 4", "--device cpu", "--apply_chat_template"):
        assert part in text
    assert ",attn_implementation=eager,max_images=1 " in text
    assert harness("lm_eval", results, *options, "--engine.metrics={mine: f1}") == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["mine"]["score"] == 0.5


def test_several_processes_deal_the_tasks_out(harness, tmp_path, monkeypatch):
    """Each process runs its own child with its own tasks, and all know all scores."""
    results = {name: {"exact_match,none": score} for name, score in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    plan = {"results": results, "calls": str(tmp_path / "calls"), "file": "results_1.json"}
    monkeypatch.setenv("HARNESS_PLAN", json.dumps(plan))
    engine = LMEvalEngine(["a", "b", "c"], python=str(tmp_path / "python"))

    class Two(Processes):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.count = rank, 2

        def gather(self, value):
            other = Scores({"b": 0.2}, {"b": 8}, {"b": "lm_eval"}, {"b": "exact_match"})
            return [value, other] if self.rank == 0 else [value]

    scores = engine.score(CHECKPOINT, Two(0))
    assert scores.tasks == {"a": 0.1, "b": 0.2, "c": 0.3}
    (call,) = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert call[call.index("--tasks") + 1] == "a,c"


FAILURES = {
    "status": (NINE, {"status": 3, "words": "CUDA out of memory"}, ["status 3", "CUDA out of memory"]),
    "a task is missing": ({"mme": NINE["mme"]}, {}, ["no results for the task gqa", "the end"]),
    "a score is no number": (NINE | {"gqa": {"exact_match,none": "N/A"}}, {}, ["exact_match", "task gqa", "N/A"]),
    "half of MME": (NINE | {"mme": {"mme_perception_score,none": 1.0}}, {}, ["task mme", "mme_perception_score 1.0"]),
    "no results": (NINE, {"file": "nothing.txt"}, ["wrote no results"]),
    "colours": (
        NINE,
        {"status": 1, "words": "\x1b[31m\x1b[1mno such model\x1b[0m"},
        ["last words: no such model (all"],
    ),
}


@pytest.mark.parametrize(("results", "plan", "said"), FAILURES.values(), ids=FAILURES)
def test_a_harness_that_fails_is_an_error(results, plan, said, harness, tmp_path, capsys):
    assert harness("lmms_eval", results, **plan) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(text in line for text in said), line
    log = Path(re.search(r"all of them in (.*)\)", line)[1])
    assert "a line of noise" in log.read_text()
    log.unlink()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "plan"),
    [
        ("lm_eval", {"status": 1, "words": "ValueError: Tasks not found: gqa"}),
        ("lmms_eval", {"words": "\x1b[31mTasks were not found: gqa\x1b[0m"}),
    ],
)
def test_a_task_that_the_harness_does_not_know_is_an_option_of_its_own(package, plan, harness, tmp_path, capsys):
    """Whether it ends or goes on without it; nothing else that it said is left behind."""
    logs = set(Path(tempfile.gettempdir()).glob(f"{package}-*.log"))
    assert harness(package, {}, "--engine.tasks=[pope, gqa]", f"--model.path={CHECKPOINT}", **plan) == 2
    said = capsys.readouterr().err
    assert said == f"error: --engine.tasks gqa: is no task of the {package} that ran\n"
    assert set(Path(tempfile.gettempdir()).glob(f"{package}-*.log")) == logs
    assert not (tmp_path / "out").exists()


def test_a_task_of_a_table_that_the_harness_does_not_know_is_the_harness(harness, tmp_path, monkeypatch, capsys):
    """Nobody named the task: the release of the harness is another one than the table was declared for."""
    plan = {"results": {}, "calls": str(tmp_path / "calls"), "file": "results.json", "words": "Tasks not found: mme"}
    monkeypatch.setenv("HARNESS_PLAN", json.dumps(plan | {"status": 1}))
    captions = {"sharegpt4v": {"source": {"class_path": "EmbeddedSource"}, "num_samples": 2}}
    command = ["reproduce", "tamp/table_1", "--model.path=demo", f"--calibration={json.dumps(captions)}"]
    assert main([*command, f"--harness.python={tmp_path / 'python'}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --harness.python {tmp_path / 'python'}: its lmms_eval has no task mme; ")


@pytest.mark.skipif(not LM_EVAL, reason=WITHOUT_LM_EVAL)
def test_lm_eval_gives_the_same_exact_match(pruned, tmp_path):
    """The same questions of a pruned model, asked by both."""
    count = write_lm_eval_task(tmp_path / "tasks", write_questions(tmp_path / "data", 6))
    keep = [json.loads(line) for line in (tmp_path / "data" / "questions.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "task": "mine"}) for row in keep if "image" in row]
    (tmp_path / "data" / "images.jsonl").write_text("\n".join(lines))
    exact = "--engine.benchmark.metric=exact_match"
    harness = ["--engine=LMEvalEngine", f"--engine.python={LM_EVAL}", "--engine.tasks=[mine]"]
    harness += [f"--engine.include_path={tmp_path / 'tasks'}", "--engine.model_args={dtype: float32, max_images: '1'}"]
    builtin = local(tmp_path / "data" / "images.jsonl", exact, "--engine.likelihood=false")
    found = {}
    for name, options in (("builtin", builtin), ("lm_eval", harness)):
        output = tmp_path / name
        assert main(["evaluate", f"--model.path={pruned}", *options, f"--output={output}"]) == 0
        found[name] = json.loads((output / "evaluation.json").read_text())["tasks"]["mine"]
    assert found["lm_eval"]["score"] == pytest.approx(found["builtin"]["score"])
    assert found["lm_eval"]["questions"] == found["builtin"]["questions"] == count
    assert 0 < found["builtin"]["score"] < 1
