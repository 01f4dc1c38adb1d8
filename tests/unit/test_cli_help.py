"""Help: quick where nothing has to be known but the commands, and our own options first."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest

from lvlm_prune.cli import main
from lvlm_prune.cli_errors import ALONE, VERBS
from lvlm_prune.cli_help import misspelt, stored_help
from tests import warm
from tests.conftest import REPOSITORY

HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "peft", "datasets", "numpy", "PIL", "huggingface_hub")


def run_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which says at its end which libraries it has loaded."""
    code = (
        "import sys; from lvlm_prune.cli import main; status = main(sys.argv[1:]); "
        f"print('loaded', *(name for name in {HEAVY!r} if name in sys.modules)); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments", ["--version", "--help", "methods", "methods wanda", "methods --help", "prune --help", "evaluate -h"]
)
def test_what_needs_no_library_loads_none(arguments):
    shown = run_alone(*arguments.split())
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[-1] == "loaded"
    assert len(lines) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("prune --model.path=demo --pruning.sparsty 0.5", "--pruning.sparsty: .* is --pruning.sparsity meant"),
        ("prun --pruning.sparsity 0.5", "prun: no such command, .* is prune meant"),
        ("kernels atv", "kernels atv: `kernels` takes nothing"),
    ],
)
def test_what_is_misspelt_is_refused_before_any_library_is_loaded(arguments, said):
    shown = run_alone(*arguments.split())
    assert shown.returncode == 2
    assert re.fullmatch(rf"error: {said}\??\n", shown.stderr)
    assert shown.stdout == "loaded\n"


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_of_a_command_counts_as_misspelt(verb, monkeypatch):
    import lvlm_prune.cli_parser

    found = []
    monkeypatch.setattr(lvlm_prune.cli_parser, "explain", lambda *given: found.extend(given[3]) or "")
    assert main([verb, "--nonsense", "1"]) == 2
    assert len(found) > 2
    for option in found:
        assert misspelt([verb, f"{option}=1"]) == ""
        assert misspelt([verb, option, "1", "--pruning.pool.betta", "2", "--trainer.devces=2"]) == ""


def test_every_command_is_listed_with_what_it_does(capsys):
    assert main(["--help"]) == 0
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[4:] if line}
    assert {*VERBS, "methods", "kernels", "completion"} <= said.keys()
    assert all(said[verb].endswith(".") and len(said[verb]) > 20 for verb in VERBS)


@pytest.mark.parametrize("name", [*VERBS, *ALONE])
def test_every_command_has_a_help_of_its_own(name, capsys):
    for asked in ("--help", "-h"):
        assert main([name, asked]) == 0
        assert capsys.readouterr().out.startswith(f"usage: lvlm-prune {name}")


@pytest.mark.parametrize("shell", [[], ["ksh"], ["bash", "zsh"]])
def test_completion_is_for_one_shell(shell, capsys):
    assert main(["completion", *shell]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: completion ")
    assert line.endswith("name one shell of bash, zsh, tcsh, fish")


def test_completion_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "error: completion bash: needs shtab, which is not installed: pip install 'lvlm-prune[completion]'\n"
    )


@pytest.mark.slow
def test_the_shell_completes_commands_options_and_classes(tmp_path):
    pytest.importorskip("shtab")
    command = [sys.executable, "-m", "lvlm_prune", "completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert script.returncode == 0, script.stderr
    (tmp_path / "script").write_text(script.stdout)
    for words, expected in (
        ("prune --pruning.spar", ["--pruning.sparsity"]),
        ("prune --method sparsegpt_d", ["sparsegpt_das"]),
        ("meth", ["methods"]),
        ("methods lora_", ["lora_distill"]),
        ("recover --method block", ["blockwise"]),
        ("completion ba", ["bash"]),
    ):
        asked = (
            f"source ./script; COMP_WORDS=(lvlm-prune {words}); COMP_CWORD={len(words.split())}; "
            "_shtab_lvlm_prune; echo ${COMPREPLY[@]}"
        )
        found = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert found.stdout.split() == expected, found.stderr


def test_the_stored_help_is_what_the_parser_says():
    """`python -m tests.help_texts` stores it anew. In a process of its own, which knows no other plugins."""
    checking = warm.start("--check", cwd=REPOSITORY, module="tests.help_texts")
    others, errors = checking.communicate(timeout=600)
    assert checking.returncode == 0, f"other help is stored of: {others}{errors[-2000:]}"


def test_where_the_environment_sets_options_the_parser_is_asked(monkeypatch):
    monkeypatch.setenv("LVLM_PRUNE__OUTPUT", "elsewhere")
    assert stored_help("prune") == ""


def shown(capsys, *arguments: str) -> list[str]:
    """What a command prints that does nothing else; argparse ends the process after its own help."""
    with suppress(SystemExit):
        assert main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_our_options_come_first_with_a_line_and_the_classes_that_they_take(capsys):
    lines = shown(capsys, "prune", "--help")
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert options[:2] == ["--method", "--output"]
    assert {"--pruning.sparsity", "--model.path", "--data.source", "--held_back", "--push"} <= set(options)
    assert not [option for option in options if option.startswith("--trainer")]
    assert len(options) == len(set(options))
    text = "\n".join(lines)
    for name in ("AsymmetricPool", "SparseGPTScorer", "OWLAllocation", "LlavaJsonSource", "ALPSSolver"):
        assert name in text
    assert "--help-trainer" in text
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line.endswith(" ...")]
    (start,) = [place for place, line in enumerate(lines) if line.startswith("  --publishable")]
    said = " ".join(" ".join(lines[start : start + 3]).split())
    assert "beside it in `OUTPUT.private`: local paths, ids of samples, and the picture of one." in said


def test_help_has_no_markup(capsys):
    assert ":math:" not in "\n".join(shown(capsys, "recover", "--help"))


def test_the_options_of_the_trainer_are_asked_for(capsys):
    lines = shown(capsys, "recover", "--help-trainer")
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert "--trainer.max_epochs" in options
    assert all(option.startswith("--trainer.") for option in options)


@pytest.mark.parametrize("verb", ["prune", "evaluate"])
def test_options_of_training_are_refused_where_nothing_is_trained(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--trainer.max_epochs=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --trainer.max_epochs 3: does nothing with {verb}, which trains nothing"
    assert not list(tmp_path.iterdir())
