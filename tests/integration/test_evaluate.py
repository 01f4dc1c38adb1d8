"""`evaluate`: scores, retention and likelihoods are those of plain transformers; harnesses are run and read."""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_prune.cli import main
from lvlm_prune.data import LlavaJsonSource, load_processor
from lvlm_prune.data.labels import IGNORED, encode_with_labels
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.harness import PAPER_TASKS, LMEvalEngine
from lvlm_prune.evaluation.local import LocalBenchmark
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.report.pruning import summarise
from tests.conftest import REPOSITORY
from tests.hub_folders import write_captions, write_folder, write_sounds
from tests.pages import Page, refuse_other_numbers

SMALL = ["--engine.benchmark.num_images=3", "--engine.benchmark.num_text=8", "--engine.batch_size=16"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """The embedded model, pruned by magnitude, with its report."""
    folder = tmp_path_factory.mktemp("evaluate") / "pruned"
    config = f"--config={REPOSITORY / 'configs' / 'prune' / 'magnitude.yaml'}"
    assert main(["prune", config, "--pruning.sparsity=0.6", "--evaluate=false", f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(pruned) -> dict:
    """What `evaluate` finds of it; written where its report is."""
    assert main(["evaluate", f"--model.path={pruned}", "--baseline=demo", *SMALL]) == 0
    return json.loads((pruned / "evaluation.json").read_text())


def answer_logits(model, processor, questions) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits before the tokens of each right answer, and these tokens: one plain forward per question."""
    found = []
    for question in questions:
        inputs = encode_with_labels(processor, question.answered)
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1].double()
        found.append((logits[labels != IGNORED], labels[labels != IGNORED]))
    return found


def perplexity(answers) -> float:
    losses = torch.cat([torch.nn.functional.cross_entropy(*one, reduction="none") for one in answers])
    return math.exp(losses.mean())


def divergence(dense, sparse) -> float:
    pairs = [(p.log_softmax(-1), q.log_softmax(-1)) for (p, _), (q, _) in zip(dense, sparse, strict=True)]
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()


def test_scores_and_likelihoods_are_those_of_plain_transformers(pruned, evaluated):
    questions = EmbeddedBenchmark(num_images=3, num_text=8).questions
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    answers = {}
    for name, folder in (("baseline", CHECKPOINT), ("score", pruned)):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        expected = score(model, processor, questions).tasks
        assert {task: entry[name] for task, entry in evaluated["tasks"].items()} == expected
        answers[name] = answer_logits(model, processor, questions)
    assert evaluated["perplexity"] == pytest.approx(perplexity(answers["score"]), rel=1e-4)
    assert evaluated["baseline_perplexity"] == pytest.approx(perplexity(answers["baseline"]), rel=1e-4)
    assert evaluated["kl"] == pytest.approx(divergence(answers["baseline"], answers["score"]), rel=1e-3)
    assert evaluated["kl"] > 0.01


def test_retention_is_the_mean_over_tasks(evaluated):
    tasks = evaluated["tasks"].values()
    for task in tasks:
        assert task["retention"] == (task["score"] / task["baseline"] if task["baseline"] else None)
    kept = [task["retention"] for task in tasks if task["retention"] is not None]
    assert evaluated["retention"] == pytest.approx(sum(kept) / len(kept))
    assert evaluated["average"] == pytest.approx(sum(task["score"] for task in tasks) / len(tasks))
    assert 0 < evaluated["retention"] < 1


def test_table_and_report_show_it(pruned, evaluated):
    table = (pruned / "evaluation.md").read_text()
    assert f"| {100 * evaluated['retention']:.1f}% |" in table.splitlines()[len(evaluated["tasks"]) + 2]
    manifest = json.loads((pruned / "pruning.json").read_text())
    assert "evaluation" not in manifest
    page = Page((pruned / "report.html").read_text())
    record = manifest | {"summary": json.loads(json.dumps(summarise(manifest))), "evaluated": evaluated}
    refuse_other_numbers(page, record)
    shown = {path for path, *_ in page.numbers}
    assert {"evaluated/retention", "evaluated/kl", "evaluated/tasks/counting/score"} <= shown


def test_records_of_an_evaluation_do_not_go_on_to_the_next_checkpoint(pruned, evaluated, tmp_path):
    config = f"--config={REPOSITORY / 'configs' / 'prune' / 'magnitude.yaml'}"
    arguments = [f"--model.path={pruned}", "--pruning.sparsity=0.7", "--report=false", f"--output={tmp_path / 'out'}"]
    assert main(["prune", config, *arguments]) == 0
    assert not list((tmp_path / "out").glob("evaluation.*"))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(pruned, evaluated, run_cli, tmp_path):
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments = [f"--model.path={pruned}", "--baseline=demo", *SMALL, f"--output={tmp_path / 'two'}"]
    finished = run_cli("evaluate", *arguments, *devices)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["tasks"] == evaluated["tasks"]
    assert found["retention"] == evaluated["retention"]
    for name in ("perplexity", "baseline_perplexity", "kl"):
        assert found[name] == pytest.approx(evaluated[name], rel=1e-5)


# ---- data of one's own -----------------------------------------------------------------------------------------------
def write_questions(folder: Path, count: int = 4) -> Path:
    """Questions of the embedded benchmark as LLaVA's JSONL, with their images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, images = [], {}
    for number, question in enumerate(EmbeddedBenchmark(num_images=count, num_text=6).questions):
        text = question.question
        line = {"id": f"q{number}", "task": question.task}
        if question.image is not None:
            name = images.setdefault(id(question.image), f"{len(images)}.png")
            question.image.save(folder / name)
            text, line["image"] = f"<image>\n{text}", name
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
        lines.append(json.dumps(line | {"conversations": turns}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder / "questions.jsonl"


def local(path: Path, *options: str) -> list[str]:
    arguments = ["--engine.benchmark=LocalBenchmark", "--engine.benchmark.source=LlavaJsonSource"]
    return [*arguments, f"--engine.benchmark.source.path={path}", *options]


def test_a_local_data_set_gives_the_scores_of_the_same_questions(pruned, tmp_path):
    path = write_questions(tmp_path / "data")
    arguments = [f"--model.path={pruned}", "--engine.likelihood=false", f"--output={tmp_path / 'out'}"]
    exact = "--engine.benchmark.metric=exact_match"
    assert main(["evaluate", *arguments, *local(path, exact), "--engine.batch_size=16"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(pruned, dtype=torch.float32)
    questions = EmbeddedBenchmark(num_images=4, num_text=6).questions
    expected = score(model, AutoProcessor.from_pretrained(pruned), questions)
    assert {task: entry["score"] for task, entry in found["tasks"].items()} == expected.tasks
    assert {task: entry["questions"] for task, entry in found["tasks"].items()} == expected.counts
    assert found["retention"] is None
    assert all(entry["retention"] is None for entry in found["tasks"].values())
    assert "perplexity" not in found


def test_questions_that_want_yes_or_no_are_scored_by_the_first_word(tmp_path):
    benchmark = LocalBenchmark(LlavaJsonSource(str(write_questions(tmp_path))))
    benchmark.check()
    metrics = {question.task: question.metric for question in benchmark.questions}
    assert metrics.pop("existence") == "yes_no"
    assert set(metrics.values()) == {"exact_match"}
    chosen = LocalBenchmark(LlavaJsonSource(str(tmp_path / "questions.jsonl")), num_samples=5, seed=1)
    assert len(chosen.questions) == 5


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "qwen2_5_omni"])
def test_any_familys_folder(family, tmp_path):
    """Random models: perplexity and divergence are those of plain forwards, one by one."""
    write = write_sounds if family == "qwen2_5_omni" else write_captions
    path, folder, halved = write(tmp_path / "data", 4), tmp_path / "dense", tmp_path / "halved"
    dense = write_folder(folder, family).eval()
    with torch.no_grad():
        dense.get_output_embeddings().weight *= 30
        dense.save_pretrained(folder, max_shard_size="60KB")
        for name, weight in dense.named_parameters():
            if "down_proj" in name and "visual" not in name:
                weight[:, ::2] = 0
    dense.save_pretrained(halved)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        (halved / name).write_bytes((folder / name).read_bytes())
    for name in folder.glob("*.jinja"):
        (halved / name.name).write_bytes(name.read_bytes())
    arguments = [f"--model.path={halved}", f"--baseline={folder}", *local(path), "--engine.batch_size=3"]
    assert main(["evaluate", *arguments, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    questions = LocalBenchmark(LlavaJsonSource(str(path))).questions
    processor, answers = load_processor(folder), []
    for where in (folder, halved):
        model = type(dense).from_pretrained(where, dtype=torch.float32).eval()
        answers.append(answer_logits(model, processor, questions))
    assert found["baseline_perplexity"] == pytest.approx(perplexity(answers[0]), rel=1e-4)
    assert found["perplexity"] == pytest.approx(perplexity(answers[1]), rel=1e-4)
    assert found["kl"] == pytest.approx(divergence(*answers), rel=1e-3)
    assert found["kl"] > 0
    # Noise is answered with noise: nothing is right, and of nothing nothing can be retained.
    task = {"score": 0, "baseline": 0, "retention": None, "questions": 4, "metric": "exact_match"}
    assert found["tasks"] == {path.stem: task}
    assert found["retention"] is None


BAD_DATA = {
    "no answer": ({"conversations": [{"from": "human", "value": "Why?"}]}, "does not end with a turn"),
    "empty answer": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": " "}]},
        "has an empty answer",
    ),
    "no turns": ({"text": "Why?"}, "no list `conversations`"),
    "no image": (
        {"image": "none.png", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        "is missing",
    ),
}


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()  # what making a checkpoint said
    assert main(["evaluate", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("row", "said"), BAD_DATA.values(), ids=BAD_DATA)
def test_a_bad_line_is_named_before_a_model_is_loaded(row, said, tmp_path, capsys):
    path = write_questions(tmp_path / "data")
    path.write_text(path.read_text() + "\n" + json.dumps(row))
    last = len(path.read_text().splitlines()) - 1
    line = refused(capsys, *local(path), f"--output={tmp_path / 'out'}")
    assert said in line
    assert "--engine.benchmark.source" in line
    assert f"sample {last}" in line
    assert not (tmp_path / "out").exists()


BAD = {
    "no such model": (["--model.path=nowhere"], "--model.path nowhere"),
    "no such baseline": (["--baseline=nowhere"], "--baseline nowhere"),
    "dtype of the model": (["--model.dtype=bfloat16"], "--model.dtype bfloat16"),
    "target": (["--model.targets=[vision]"], "--model.targets vision"),
    "batch size": (["--engine.batch_size=0"], "--engine.batch_size 0"),
    "top_k": (["--engine.top_k=0"], "--engine.top_k 0"),
    "no such engine": (["--engine=NoEngine"], "--engine NoEngine"),
    "no such data": (local(Path("none.json")), "--engine.benchmark.source.path none.json"),
    "interpreter": (["--engine=LMMSEvalEngine", "--engine.python=/no/python"], "--engine.python /no/python"),
    "package": (["--engine=LMMSEvalEngine", f"--engine.python={sys.executable}"], "has no package lmms_eval"),
    "metric of no task": (
        ["--engine=LMMSEvalEngine", "--engine.tasks=[mme]", "--engine.metrics={pope: accuracy}"],
        "--engine.metrics pope",
    ),
    "no tasks": (["--engine=LMMSEvalEngine", "--engine.tasks=[]"], "--engine.tasks []"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert said in refused(capsys, *arguments, f"--output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds no evaluation" in refused(capsys, *SMALL, f"--output={tmp_path}")


def test_a_baseline_with_other_tokens_is_refused(tmp_path, capsys):
    write_folder(tmp_path / "other", "llava")
    said = refused(capsys, f"--baseline={tmp_path / 'other'}", *SMALL, f"--output={tmp_path / 'out'}")
    assert "--baseline" in said
    assert "vocabulary" in said


# ---- harnesses -------------------------------------------------------------------------------------------------------
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


SKIPPED = "lm_eval is not installed here, and LM_EVAL_PYTHON names no interpreter that has it"
LM_EVAL = os.environ.get("LM_EVAL_PYTHON", "") or (sys.executable if importlib.util.find_spec("lm_eval") else "")


@pytest.mark.skipif(
    not LM_EVAL, reason="lm_eval is not installed here, and LM_EVAL_PYTHON names no interpreter with it"
)
def test_lm_eval_gives_the_same_exact_match(pruned, tmp_path):
    """The same questions of a pruned model, asked by both."""
    from datasets import Dataset, Image

    source = LlavaJsonSource(str(write_questions(tmp_path / "data", 6)))
    source.setup()
    rows = [source[index] for index in range(len(source))]
    rows = [row for row in rows if row.images]
    table = Dataset.from_dict(
        {
            "image": [str(row.images[0]) for row in rows],
            "question": [row.messages[0]["content"][-1]["text"] for row in rows],
            "answer": [row.messages[1]["content"][0]["text"] for row in rows],
        }
    ).cast_column("image", Image())
    table.to_parquet(tmp_path / "questions.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        f"""task: mine
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.parquet"}}}}}
test_split: test
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs: {{until: ["</s>"], do_sample: false, max_gen_toks: 12}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
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
    assert found["lm_eval"]["questions"] == found["builtin"]["questions"] == len(rows)
    assert 0 < found["builtin"]["score"] < 1
