"""Questions, templates and saved defaults that `evaluate` and `compare` meet: one line, or no difference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm_prune.cli import main
from tests.families import tiny_model
from tests.hub_folders import write_captions, write_folder


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


ROLES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# With the right answer only; a question is asked without one.
ROLES += "{% if 'Bless you' in messages[-1].content|string %}{{ 1 / 0 }}{% endif %}"
ROLES += "{% if 'Bless me' in messages[-1].content|string %}{{ raise_exception('No blessings') }}{% endif %}"


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_folder(folder, "llava")
    return folder


def asked(folder: Path, output: Path, change: Callable[[dict[str, Any]], object] = lambda row: None) -> list[str]:
    """An evaluation of questions, the third of which is changed."""
    output.parent.mkdir(exist_ok=True)
    rows = json.loads(write_captions(output.parent / "data", 4).read_text())
    change(rows[2])
    (output.parent / "data" / "data.json").write_text(json.dumps(rows))
    source = "--engine.benchmark.source"
    local = ["--engine.benchmark=LocalBenchmark", f"{source}=LlavaJsonSource"]
    local += [f"{source}.path={output.parent / 'data' / 'data.json'}"]
    return ["evaluate", f"--model.path={folder}", *local, f"--output={output}"]


def system_turn(row: dict[str, Any]) -> None:
    row["conversations"].insert(0, {"from": "system", "value": "Be kind."})


def long_question(row: dict[str, Any]) -> None:
    row["conversations"][0]["value"] += " why" * 600


def answer_with(text: str) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        row["conversations"][-1]["value"] = text

    return change


REFUSALS = {
    "the template": (system_turn, "System role not supported"),
    "the template, of the answer": (answer_with("Bless me"), "No blessings"),
    "an error in the template, of the answer": (answer_with("Bless you"), "division by zero"),
    "the model's context": (long_question, "tokens, the model's context is "),
}


@pytest.mark.parametrize(("change", "problem"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_template_or_model_refuse_of_a_question_is_one_line(change, problem, hub_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(hub_folder, folder)
    for name in folder.glob("chat_template*"):
        written = json.loads(name.read_text())["chat_template"] if name.suffix == ".json" else name.read_text()
        name.unlink()
    (folder / "chat_template.jinja").write_text(ROLES + written)
    arguments = asked(folder, tmp_path / "out", change)
    assert main(arguments) == 2
    line = one_line(capsys)
    assert problem in line
    assert "question" in line
    assert not (tmp_path / "out").exists()


def test_what_was_saved_for_generation_changes_no_answer_or_is_one_line(hub_folder, tmp_path, capsys):
    """Answers are greedy ones, also of a model that was saved with a beam search."""
    found = []
    for number, saved in enumerate(({}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": True})):
        folder, output = tmp_path / f"model-{number}", tmp_path / str(number) / "out"
        shutil.copytree(hub_folder, folder)
        (folder / "generation_config.json").write_text(json.dumps(saved))
        assert main(asked(folder, output)) == 0
        found.append(json.loads((output / "evaluation.json").read_text())["tasks"])
    assert found[0] == found[1]
    for broken in (
        '{"eos_token_id": "x"}',
        "5",
        '{"max_new_tokens": "x"}',
        '{"watermarking_config": {"x": 1}}',
        "[" * 99999,
    ):
        (folder / "generation_config.json").write_text(broken)
        capsys.readouterr()
        assert main(asked(folder, tmp_path / "broken" / "out")) == 2
        assert "generation_config.json" in one_line(capsys)


def test_a_model_that_cannot_run_as_its_configuration_says_is_one_line(hub_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(hub_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    assert main(asked(folder, tmp_path / "out")) == 2
    assert "the model cannot answer: tuple index out of range" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("saved", ["truncation", "padding"])
def test_what_training_left_in_a_tokenizer_changes_no_answer(saved, hub_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hub_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    kinds = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 300}, "direction": "Right", "pad_to_multiple_of": None}
        | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | {saved: kinds[saved]}))
    found = []
    for number, model in enumerate((hub_folder, folder)):
        output = tmp_path / str(number) / "out"
        assert main(asked(model, output)) == 0
        record = json.loads((output / "evaluation.json").read_text())
        found.append((record["tasks"], record["perplexity"]))
    assert found[0] == found[1]


# ---- comparison ------------------------------------------------------------------------------------------------------
def test_a_comparison_of_two_models_says_so_first(tmp_path, capsys, blank_figures):
    for name, family in (("one", "llava"), ("other", "qwen2_vl")):
        tiny_model(family).save_pretrained(tmp_path / f"dense-{name}")
        magnitude = ["--pruning.scorer=MagnitudeScorer", "--report=false", "--evaluate=false"]
        output = f"--output={tmp_path / name}"
        assert main(["prune", f"--model.path={tmp_path / f'dense-{name}'}", *magnitude, output]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "other"), f"--output={tmp_path / 'page'}"]) == 0
    assert capsys.readouterr().out.startswith("warning: the folders come from different models")
    assert (tmp_path / "page" / "compare.md").read_text().startswith("warning: ")
    assert "the folders come from different models" in (tmp_path / "page" / "report.html").read_text()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    assert "different models" not in capsys.readouterr().out
