"""Every number of every command, with what people type in its place: no traceback, and nothing is begun on bad ground.

Commands run up to where their work would begin, so a value is either refused in one line or passes all checks.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from lvlm_prune.cli import main
from lvlm_prune.cli_parser import LVLMCLI, LVLMParser
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.solvers.base import Solver
from lvlm_prune.runs.evaluate.run import EvaluationRun
from lvlm_prune.runs.probe.run import ProbeRun
from lvlm_prune.runs.prune.run import PruneRun
from lvlm_prune.runs.recover.run import RecoveryRun
from lvlm_prune.runs.reproduce.run import ReproductionRun
from lvlm_prune.runs.sweep.run import SweepRun
from tests.conftest import GOLDEN_ARGUMENTS
from tests.options import VALUES, is_number, numbers_of, plugins

MODEL_AND_DATA = [argument for argument in GOLDEN_ARGUMENTS if argument.startswith(("--model", "--data"))]
COMMANDS = {
    "prune": MODEL_AND_DATA,
    "probe": MODEL_AND_DATA,
    "recover": [],
    "evaluate": [],
    "sweep": [],
    "reproduce": [
        "--table=atv/table_2",
        "--engine=BuiltinEngine",
        '--tasks={"GQA": "place"}',
        '--calibration={"sharegpt4v": {"source": {"class_path": "EmbeddedSource"}, "num_samples": 2}}',
    ],
}
# What a plugin needs to be tried; files of texts are made by the test.
REQUIRED = {
    "TextSource": ["--{}.path=texts.txt"],
    "HFDatasetSource": ["--{}.path=texts.jsonl"],
    "LMEvalEngine": ["--{}.tasks=[task]"],
}
BASES = (CalibrationSource, Engine, Pool, Scorer, Allocation, Solver)
# What `recover` alone makes use of; the other commands have Lightning's options too.
TRAINS = tuple(
    f"trainer.{name}"
    for name in (
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches", "val_check_interval"),
        *("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "accumulate_grad_batches"),
        *("gradient_clip_val", "reload_dataloaders_every_n_epochs", "limit_train_batches", "limit_val_batches"),
    )
)


@pytest.fixture(scope="module")
def up_to_the_work() -> Iterator[None]:
    """Commands end where their work would begin."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PruneRun, "_carry_out", lambda run, finished: None)
        patched.setattr(ProbeRun, "_measure", lambda *arguments: None)
        patched.setattr(RecoveryRun, "_recover", lambda run, earlier: None)
        for run in (EvaluationRun, SweepRun, ReproductionRun):
            patched.setattr(run, "__call__", lambda run: {})
        yield


def options_of(verb: str) -> Iterator[tuple[str, list[str]]]:
    """Every option of a command that takes a number, and what has to be chosen for it to exist."""
    parser = parser_of(verb)
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if is_number(hint) or is_number(hint, many=True):
            yield action.dest, []
        for base in BASES:
            if not action.dest.endswith(".help") and (hint is base or base in get_args(hint)):
                for plugin in plugins(base):
                    needed = [f"--{action.dest}={plugin.__name__}", *REQUIRED.get(plugin.__name__, [])]
                    for option in numbers_of(plugin):
                        if not option.many:
                            yield f"{action.dest}.{option.name}", [one.format(action.dest) for one in needed]


def parser_of(verb: str) -> LVLMParser:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LVLMCLI, "parse_arguments", lambda cli, parser, arguments: stop(cli))
        try:
            main([verb, "--table=none"])
        except Stopped as stopped:
            return stopped.cli._subcommand_parsers[verb]
    raise AssertionError


class Stopped(Exception):
    def __init__(self, cli: LVLMCLI) -> None:
        self.cli = cli


def stop(cli: LVLMCLI) -> None:
    raise Stopped(cli)


def fault(arguments: list[str], option: str, value: str, capsys) -> str:
    """What is wrong with how a command takes a value; an empty text where nothing is."""
    capsys.readouterr()
    try:
        status = main([*arguments, f"--{option}={value}"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    said = capsys.readouterr().err.strip()
    if status == 0:
        return "is taken" if value in ("", "abc", "nan") else ""
    if status != 2 or len(said.splitlines()) != 1:
        return f"status {status}, says {said}"
    return "" if f"--{option} " in said or "has no package" in said else f"says {said}"


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("values", [("-1", "nan"), pytest.param(VALUES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_numbers_are_refused_in_one_line_or_pass_all_checks(
    values, verb, up_to_the_work, bases, labelled, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by Lightning
        monkeypatch.setenv(name, "0")
    arguments = [verb, *COMMANDS[verb]]
    if verb == "recover":
        data = ["--data.source=TensorSource", f"--data.source.path={labelled}", "--data.validation_samples=2"]
        arguments += [f"--model.path={bases / 'unstructured-float32'}", *data]
    Path("texts.txt").write_text("Some words.\n\nSome more words.\n")
    Path("texts.jsonl").write_text('{"text": "Some words."}\n')
    faults = []
    for option, needed in options_of(verb):
        if "EmbeddedQuestions" in str(needed):
            continue  # asks about the embedded model's world, and this is another model
        if option.startswith("trainer.") and verb != "recover" and option in TRAINS:
            continue
        for value in values:
            if said := fault([*arguments, *needed], option, value, capsys):
                faults.append(f"{verb} {' '.join(needed)} --{option}={value}: {said}")
    assert not faults, "\n".join(faults)
    assert sorted(path.name for path in Path().iterdir()) == ["texts.jsonl", "texts.txt"]


@pytest.mark.parametrize("verb", [*COMMANDS, "compare", "pack", "unpack"])
@pytest.mark.parametrize("option", ["optimizer", "lr_scheduler"])
def test_there_is_no_option_for_what_no_command_takes(option, verb, up_to_the_work, capsys):
    """Lightning's command line has these two where it configures optimizers itself."""
    assert main([verb, *COMMANDS.get(verb, []), f"--{option}=Adam"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --{option}")


def test_the_environment_gives_options_that_the_command_line_leaves_open(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LVLM_PRUNE__PRUNING__SPARSITY", "0.25")
    plan = [*GOLDEN_ARGUMENTS, "--plan=true", f"--output={tmp_path / 'out'}"]
    for given, sparsity in (([], "25%"), (["--pruning.sparsity=0.75"], "75%")):
        assert main([*plan, *given]) == 0
        assert f"{sparsity} unstructured" in capsys.readouterr().out


@pytest.mark.parametrize("verb", COMMANDS)
def test_null_in_a_file_is_refused_for_every_option_or_taken(verb, up_to_the_work, tmp_path, monkeypatch, capsys):
    """On the command line the parser refuses it; what stands in a file it hands on."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    for action in parser_of(verb)._actions:
        section, _, name = action.dest.partition(".")
        if not name or "." in name or section == "trainer" or name == "help":
            continue
        (tmp_path / "null.yaml").write_text(f"{section}: {{{name}: null}}\n")
        arguments = [one for one in COMMANDS[verb] if not one.startswith(f"--{action.dest}")]
        capsys.readouterr()
        status = main([verb, "--config=null.yaml", *arguments, f"--output={tmp_path / 'out'}"])
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert status in (0, 2), action.dest
        assert (status == 0) == (not lines), (action.dest, lines)
        assert len(lines) <= 1 or lines[0].startswith("error: "), (action.dest, lines)
        refused += any(f"--{action.dest} null: expected" in line for line in lines)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > (0 if verb in ("evaluate", "reproduce") else 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pruning:\n  pattern: 2:4\n", '--pruning.pattern 2:4: YAML reads this as the number 124; write "2:4"'),
        ("data:\n  num_samples: 1:30\n", '--data.num_samples 1:30: YAML reads this as the number 90; write "1:30"'),
        ("--pruning.exclude=[a, 1:30]", '--pruning.exclude 1:30: YAML reads this as the number 90; write "1:30"'),
        (
            "--data.num_samples=1:30",
            "--data.num_samples 1:30: YAML reads this as the number 90; expected a whole number",
        ),
    ],
)
def test_numbers_that_yaml_counts_in_sixties(given, said, tmp_path, capsys):
    if not given.startswith("--"):
        (tmp_path / "config.yaml").write_text(given)
        given = f"--config={tmp_path / 'config.yaml'}"
    assert main([*GOLDEN_ARGUMENTS, given, f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["--keep={}", "--keep={}.", "--pruning.exclude=[{}]", "keep: {}\n"])
@pytest.mark.parametrize("number", ["9" * 400, "-0x" + "f" * 300])
def test_whole_numbers_beyond_all_others_are_one_line(given, number, tmp_path, capsys):
    """They cannot be made a number with a point."""
    given = given.format(number)
    if not given.startswith("--"):
        (tmp_path / "config.yaml").write_text(given)
        given = f"--config={tmp_path / 'config.yaml'}"
    assert main([*GOLDEN_ARGUMENTS, given, f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: --keep ", "error: --pruning.exclude "))
    assert not (tmp_path / "out").exists()


def test_modalities_of_probe_are_its_own(tmp_path, capsys):
    assert main(["probe", *MODEL_AND_DATA, "--probing.visual=[foo]", f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("error: --probing.visual foo: must be one of ")
