"""Fixtures that every test may use."""

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markupsafe import Markup
from safetensors.torch import load_file, save_file

from tests import warm
from tests.documented import hold_records_against_types

GOLDEN = Path(__file__).parent / "golden" / "qwen2_vl"
MODEL = GOLDEN.parent / "qwen2_vl_two_blocks" / "model"
"""The golden model without its last two blocks: as sharp in most tests, and done sooner."""
REPOSITORY = Path(__file__).parents[1]
GOLDEN_ARGUMENTS = [
    "prune",
    f"--model.path={MODEL}",
    "--data.source=TensorSource",
    f"--data.source.path={GOLDEN / 'calib.safetensors'}",
    # Figures take seconds, and holding the model against the dense one a third of the time: who tests them asks for it.
    "--report=false",
    "--evaluate=false",
    # Most tests are as sharp with two samples as with all eight.
    "--data.num_samples=2",
]
ALL_BLOCKS = f"--model.path={GOLDEN / 'model'}"
ALL_SAMPLES = "--data.num_samples=8"
"""For tests whose numbers are those of the whole model and calibration set."""

GOLDEN_MODEL = GOLDEN_ARGUMENTS[1:4]
"""The model and its calibration set, for other verbs."""


# Sums come out in another order with another number of threads; what tests compare byte by byte is made with one.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, one process runs all tests of a file, so that what they share is made once.

    The order stays as it is: integration tests take longest, and come first.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Keep a process as it is before the first test, of which commands are forks."""
    _make_options_once()
    _find_options_at_once()
    _split_keys_once()
    _read_signatures_once()
    _read_entry_points_once()
    _forget_classes_of_other_tests()
    hold_records_against_types()
    os.fsync = lambda descriptor: None  # no test has a power cut, and each run would wait for the disk forty times
    gc.freeze()  # millions of objects of libraries, none of which is ever garbage
    if session.items and sys.platform == "linux":
        warm.template = warm.Template()


def _make_options_once() -> None:
    """The options of a command are made from the signatures of its classes, which takes half of a command's time.

    Here that is done once for each command, and once for all commands in processes of their own (`tests.warm`); those
    for which Python starts anew make theirs.
    """
    from lvlm_prune.cli_parser import LVLMCLI

    made: dict[tuple[object, ...], dict[str, object]] = {}
    setup_parser = LVLMCLI.setup_parser

    def remembered(cli: LVLMCLI, has_verbs: bool, options: dict[str, object], *others) -> None:
        asked = (options["default_env"], *cli.subcommands())
        if asked not in made:
            setup_parser(cli, has_verbs, options, *others)
            made[asked] = dict(vars(cli))
        vars(cli).update(made[asked])

    LVLMCLI.setup_parser = remembered


def _find_options_at_once() -> None:
    """To parse one command line jsonargparse looks for an option a thousand times, each time among all of them."""
    from jsonargparse import _core, _subcommands
    from jsonargparse._actions import ActionFail, _ActionConfigLoad, filter_non_parsing_actions

    really = _subcommands.find_action_and_subcommand

    def named(parser) -> tuple[list, dict[str, list]]:
        """Commands of a parser, and its options by each of their names; kept at the parser until it gets more."""
        number, *found = vars(parser).get("_named", (-1, [], {}))
        if number != len(parser._actions):
            found = [action for action in parser._actions if isinstance(action, _subcommands.ActionSubCommands)], {}
            for action in filter_non_parsing_actions(parser._actions):
                names = {action.dest, *(name[2:] for name in action.option_strings if name.startswith("--"))}
                for name in names:
                    found[1].setdefault(name, []).append(action)
            parser._named = (len(parser._actions), *found)
        return found

    def find(parser, dest, exclude=()):
        commands, options = named(parser)
        if commands:
            command, _, rest = dest.partition(".")
            for action in commands:
                if isinstance(action, exclude or ()):
                    continue
                if dest in action._name_parser_map:
                    return action, None
                if command in action._name_parser_map:
                    option, inner = find(action._name_parser_map[command], rest, exclude)
                    return option, command if inner is None else f"{command}.{inner}"
        found = [action for action in options.get(dest, ()) if not isinstance(action, exclude or ())]
        least = (_ActionConfigLoad, ActionFail)
        return next((action for action in found if not isinstance(action, least)), found[-1] if found else None), None

    for module in [module for name, module in sys.modules.items() if name.startswith(_core.__package__)]:
        if vars(module).get(really.__name__) is really:
            setattr(module, really.__name__, find)


def _split_keys_once() -> None:
    """jsonargparse takes each key of a configuration apart thousands of times for one command line."""
    from jsonargparse import Namespace

    really, known = Namespace._parse_key, {}

    def parse(namespace: Namespace, key: str):
        parts = known.get(key)
        if parts is None:  # the first time, with its checks
            leaf, _, parent = really(Namespace(), key)
            parts = known[key] = (tuple(parent.split(".")) if parent else (), leaf, parent)
        parents, leaf, parent = parts
        inner = namespace
        for name in parents:
            values = inner if isinstance(inner, dict) else vars(inner)
            if name not in values:
                return leaf, None, parent
            inner = values[name]
            if not isinstance(inner, (Namespace, dict)):
                return leaf, None, parent
        return leaf, inner, parent

    Namespace._parse_key = parse


def _read_signatures_once() -> None:
    """Lightning looks at the signature of each callback's hook each time that it is raised, a thousand times a run."""
    from lightning.fabric import Fabric

    really, accepted = Fabric._filter_kwargs_for_callback, {}

    def remembered(fabric: Fabric, method, kwargs: dict[str, object]) -> dict[str, object]:
        function = getattr(method, "__func__", None)
        if function is None:  # a test's own
            return really(fabric, method, kwargs)
        key = (function, *kwargs)
        if key not in accepted:
            accepted[key] = tuple(really(fabric, method, kwargs))
        return {name: kwargs[name] for name in accepted[key]}

    Fabric._filter_kwargs_for_callback = remembered


def _read_entry_points_once() -> None:
    """For each list of folders in which packages are looked for; Lightning looks twice in each command."""
    from lightning.fabric.utilities import registry

    from lvlm_prune import plugins

    read, really = {}, plugins.entry_points

    def remembered(group: str):
        key = (group, *sys.path)
        if key not in read:
            read[key] = really(group=group)
        return read[key]

    plugins.entry_points = registry.entry_points = remembered


def _forget_classes_of_other_tests() -> None:
    """A class is found by its bare name as long as the process lives, also when the module of its test is gone."""
    from jsonargparse import _typehints

    really = _typehints.get_all_subclass_paths

    def of_modules_that_are_there(*arguments, **options) -> list[str]:
        return [path for path in really(*arguments, **options) if path.rpartition(".")[0] in sys.modules]

    _typehints.get_all_subclass_paths = of_modules_that_are_there


@pytest.fixture(autouse=True)
def _no_leaks():
    """A test that leaves a process group or an environment variable behind fails."""
    before = dict(os.environ)
    yield
    assert not torch.distributed.is_initialized()
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    # KMP_: scikit-learn sets one when it is imported.
    allowed = ("PYTEST_", "TRANSFORMERS_", "TOKENIZERS_", "HF_", "DATASETS_", "KMP_", "KINETO_")
    assert not {name for name in changed if not name.startswith(allowed)}


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `lvlm-prune` as a user does, in a process of its own, in an empty working directory; see `tests.warm.run`."""
    return functools.partial(warm.run, cwd=tmp_path)


@pytest.fixture
def golden_arguments() -> list[str]:
    """Model and calibration set of the reference numbers, on the command line."""
    return list(GOLDEN_ARGUMENTS)


@pytest.fixture
def keep_packed(monkeypatch: pytest.MonkeyPatch):
    """Small packed matrices stay packed in memory, also where a dense product is faster."""
    monkeypatch.setenv("LVLM_PRUNE_KERNELS", "avx512")


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_figures_blank(monkeypatch)


def leave_figures_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read words and numbers of a page: to draw its figures takes longer than a run."""
    monkeypatch.setattr("lvlm_prune.report.page.inline_svg", lambda figure, description: Markup("<svg></svg>"))
    monkeypatch.setattr("lvlm_prune.report.page.png_bytes", lambda figure: b"a picture")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """The calibration samples with the last tokens of each as its answer."""
    samples = load_file(GOLDEN / "calib.safetensors")
    for name in [name for name in samples if name.endswith(".input_ids")]:
        labels = samples[name].clone()
        labels[..., : -5 - int(name[1]) % 3] = -100
        samples[name.replace("input_ids", "labels")] = labels
    path = tmp_path_factory.mktemp("data") / "labelled.safetensors"
    save_file(samples, path)
    return path
