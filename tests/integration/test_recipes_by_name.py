"""Recipes by their names: listed, pruned with, swept, and refused in one line where there is none."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lvlm_prune.cli import main
from lvlm_prune.recipes import CONFIGS, recipe_file, recipe_names, recipes_table


def test_every_recipe_is_listed_with_what_it_is(capsys):
    assert main(["methods"]) == 0
    table, where_to_begin = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert set(re.findall(r"`(\w+)`", where_to_begin)) <= set(recipe_names())
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (CONFIGS / "prune").glob("*.yaml"))
    assert all(len(line.split(maxsplit=1)[1]) > 10 and "(" not in line.rpartition(")")[2] for line in lines)
    assert "ATV-Pruning (Mostly Text, Smart Visuals; arXiv 2603.16001, Table 1)" in recipes_table()


@pytest.mark.parametrize("name", [*recipe_names(), *recipe_names("recover")])
def test_a_recipe_is_printed_as_it_can_be_given(name, capsys):
    assert main(["methods", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# ")
    assert yaml.safe_load(text).keys() & {"pruning", "method"}


@pytest.mark.parametrize("written", [["--method", "wanda"], ["--method=wanda"]])
def test_a_recipe_by_name_is_its_file(written, golden_arguments, tmp_path):
    by_name, by_file = tmp_path / "name", tmp_path / "file"
    options = ["--pruning.sparsity=0.6", "--data.num_samples=2"]
    assert main([*golden_arguments, *options, *written, f"--output={by_name}"]) == 0
    assert main([*golden_arguments, f"--config={recipe_file('wanda')}", *options, f"--output={by_file}"]) == 0
    assert (by_name / "model.safetensors").read_bytes() == (by_file / "model.safetensors").read_bytes()
    record = json.loads((by_name / "pruning.json").read_text())
    assert record["method"]["init_args"]["name"] == "Wanda"
    assert record["sparsity"]["target"] == 0.6
    repeated = tmp_path / "repeated"
    assert main(["prune", f"--config={by_name / 'config.yaml'}", f"--output={repeated}"]) == 0
    assert (repeated / "model.safetensors").read_bytes() == (by_name / "model.safetensors").read_bytes()


def test_no_such_recipe_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "--method", "wnda"]) == 2
    said = capsys.readouterr().err
    assert said == "error: --method wnda: no such recipe; is wanda meant? (`lvlm-prune methods` lists them)\n"
    assert not list(Path(tmp_path).iterdir())


def test_recover_takes_its_recipes_by_name_with_what_they_set(capsys):
    def configuration(*options: str) -> dict:
        with pytest.raises(SystemExit) as ended:
            main(["recover", *options, "--print_config"])
        assert ended.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)

    full = configuration("--method", "full")
    assert (full["method"], full["optimization"]["learning_rate"]) == ("full", 0.0002)
    distilled = configuration("--method=lora_distill", "--distillation.top_k=8")
    assert distilled["method"] == "lora"
    assert distilled["distillation"] == {"weight": 0.5, "temperature": 2.0, "top_k": 8}
    # A file before it changes parts of the recipe, but not the method.
    own = configuration(f"--config={recipe_file('lora', 'recover')}", "--method=blockwise")
    assert own["method"] == "blockwise"
    assert main(["recover", "--method", "blockwize"]) == 2
    said = "no such recipe; is blockwise meant? (there are blockwise, full, lora, lora_distill)"
    assert capsys.readouterr().err == f"error: --method blockwize: {said}\n"


def test_recipes_are_named_once():
    assert len(set(recipe_names())) == len(recipe_names())
