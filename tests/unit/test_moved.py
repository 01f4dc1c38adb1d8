"""What was written for version 0.1 ends in one line that says where its base class is now."""

import importlib

import pytest

from lvlm_prune.cli import main
from lvlm_prune.moved import _FACE, _MOVED, ModuleMoved

OLD = "lvlm_prune."
"""Put before names, so that nothing that renames modules in this repository finds the old ones here."""


@pytest.mark.parametrize("name", _MOVED)
def test_every_module_that_moved_says_where_it_is(name):
    with pytest.raises(ModuleMoved) as error:
        importlib.import_module(OLD + name)
    assert str(error.value).startswith(f"{OLD}{name} of version 0.1 is now {OLD}{_MOVED[name]}")
    importlib.import_module(OLD + _MOVED[name])


@pytest.mark.parametrize("name", _FACE)
def test_base_classes_are_where_the_line_says(name):
    methods = importlib.import_module("lvlm_prune.methods")
    assert all(hasattr(methods, base) for base in _FACE[name].split(", "))
    with pytest.raises(ModuleMoved, match=f"; base classes: from lvlm_prune.methods import {_FACE[name]}$"):
        importlib.import_module(OLD + name)


def test_a_module_that_never_was_is_not_found_as_ever():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lvlm_prune.nothing_of_the_kind")


def one_line(arguments, capsys) -> str:
    assert main(["prune", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_plugin_of_version_01_gets_one_line_on_the_command_line(golden_arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "written_for_01.py").write_text(
        f"from {OLD}scorers import Scorer\n\n\nclass Mine(Scorer):\n"
        "    def score(self, weight, statistic):\n        return weight.float().abs()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = one_line([*golden_arguments[1:], "--pruning.scorer=written_for_01.Mine", "--output=out"], capsys)
    assert f"{OLD}scorers of version 0.1 is now lvlm_prune.methods.scorers" in line
    assert "from lvlm_prune.methods import Scorer" in line
    assert not (tmp_path / "out").exists()


def test_an_old_class_path_in_yaml_gets_one_line(golden_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(f"pruning:\n  scorer:\n    class_path: {OLD}scorers.WandaScorer\n")
    line = one_line([*golden_arguments[1:], "--config=old.yaml", "--output=out"], capsys)
    assert f"{OLD}scorers of version 0.1 is now lvlm_prune.methods.scorers" in line
