"""`evaluate`: scores, retention and likelihoods are those of plain transformers; harnesses are run and read."""

import base64
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_prune.cli import main
from lvlm_prune.data import LlavaJsonSource, load_processor
from lvlm_prune.data.labels import IGNORED, encode_with_labels
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.local import LocalBenchmark
from lvlm_prune.report.pruning import summarise
from tests.conftest import REPOSITORY
from tests.documented import undocumented
from tests.hub_folders import write_captions, write_folder, write_sounds
from tests.local_questions import local, write_questions
from tests.pages import Page, refuse_other_numbers

SMALL = ["--engine.benchmark.num_images=3", "--engine.benchmark.num_text=8", "--engine.batch_size=16"]


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
    arguments = [
        f"--model.path={pruned}",
        "--pruning.sparsity=0.7",
        "--report=false",
        "--evaluate=false",
        f"--output={tmp_path / 'out'}",
    ]
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


def test_questions_about_other_pictures_of_the_same_names_are_others(tmp_path):
    """Also those that a record holds itself; where the files are does not matter."""
    path = write_questions(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    inside = tmp_path / "inside.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]

    def prints(*files: Path) -> list[str]:
        return [LocalBenchmark(LlavaJsonSource(str(file))).fingerprint() for file in files]

    def with_data_uris() -> None:
        encoded = {name: base64.b64encode((path.parent / name).read_bytes()).decode() for name in ("0.png", "1.png")}
        lines = [one | {"image": f"data:image/png;base64,{encoded[one['image']]}"} for one in records[:9]]
        inside.write_text("\n".join(map(json.dumps, lines)))

    with_data_uris()
    before = prints(path, tmp_path / "moved" / "questions.jsonl", inside)
    assert before[0] == before[1] == prints(path)[0]
    Image.new("RGB", Image.open(path.parent / "0.png").size, "teal").save(path.parent / "0.png")
    with_data_uris()
    after = prints(path, tmp_path / "moved" / "questions.jsonl", inside)
    assert [first == second for first, second in zip(before, after)] == [False, True, False]


def test_a_question_that_asks_nothing_is_refused(tmp_path):
    turns = [{"from": "human", "value": "\n"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(ValueError, match="sample 0 asks nothing"):
        LocalBenchmark(LlavaJsonSource(str(tmp_path / "a.jsonl"))).check()


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


def test_likelihoods_leave_out_the_questions_whose_answers_cannot_be_located(tmp_path, capsys):
    """A template that renders some conversations otherwise as a whole, which the first question does not show."""
    path, folder = write_captions(tmp_path / "data", 4), tmp_path / "dense"
    write_folder(folder, "llava")
    (template,) = folder.glob("chat_template.jinja")
    some = "{% if 'Please say. Please' in messages[0]['content'][-1]['text'] %}{{ messages | length }}{% endif %}"
    template.write_text(some + template.read_text())
    arguments = [f"--model.path={folder}", f"--baseline={folder}", *local(path), f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"][path.stem]["questions"] == 4
    assert found["likelihood_without"] == 1
    assert found["perplexity"] == found["baseline_perplexity"]
    assert "without 1 questions, where the right answer is not found: the chat template" in capsys.readouterr().out


def test_answers_that_cannot_be_located_are_still_compared_as_text(tmp_path, capsys):
    """Of a template that renders the beginning of a conversation otherwise than the whole."""
    path, folder = write_captions(tmp_path / "data", 3), tmp_path / "dense"
    write_folder(folder, "llava")
    (template,) = folder.glob("chat_template.jinja")
    template.write_text("{{ messages | length }}" + template.read_text())
    arguments = [f"--model.path={folder}", f"--baseline={folder}", *local(path), f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"][path.stem]["questions"] == 3
    assert not {"perplexity", "kl"} & found.keys()
    assert "renders the beginning of a conversation otherwise" in found["no_likelihood"]
    assert "without perplexity and KL" in capsys.readouterr().out


def test_a_picture_that_is_none_is_named_with_its_record_before_a_model_is_loaded(tmp_path, capsys):
    path, folder = write_captions(tmp_path / "data", 3), tmp_path / "dense"
    write_folder(folder, "llava")
    (path.parent / "1.png").write_text("no picture")
    line = refused(capsys, f"--model.path={folder}", *local(path), f"--output={tmp_path / 'out'}")
    assert line.startswith(
        f"error: --engine.benchmark.source {path}: sample noise-1: {path.parent / '1.png'}: cannot be"
    )
    assert "take the record out" in line
    assert not (tmp_path / "out").exists()


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


def test_a_baseline_that_cannot_be_used_is_its_own_fault(tmp_path, capsys):
    path, folder, other = write_questions(tmp_path / "data"), tmp_path / "model", tmp_path / "other"
    write_folder(folder, "llava")
    shutil.copytree(folder, other)
    (other / "processor_config.json").write_text("{}")
    (other / "tokenizer.json").write_text("[]")
    said = refused(
        capsys, f"--model.path={folder}", f"--baseline={other}", *local(path), f"--output={tmp_path / 'out'}"
    )
    assert f"--baseline {other}: " in said


@pytest.mark.parametrize("name", ["pruning.json", "evaluation.json"])
def test_every_entry_of_its_record_is_documented(name, evaluated, pruned):
    assert not undocumented(pruned / name)
