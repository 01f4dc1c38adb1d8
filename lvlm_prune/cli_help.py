"""What `--help` prints: one line for each command, and a sentence for each option of a command, our own first.

lvlm-prune --help                 the commands; nothing is imported for it
lvlm-prune prune --help           the command's own options, with the classes that they take; stored in `help/`,
                                  since it takes all libraries to find them out (`python -m tests.help_texts`)
lvlm-prune prune --help-trainer   the options of Lightning's Trainer
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from lvlm_prune.cli_errors import ALONE, VERBS, explain, hint
from lvlm_prune.errors import meant

TRAINER_HELP = "--help-trainer"

STORED_HELP = Path(__file__).parent / "help"
"""The folder of what `lvlm-prune COMMAND --help` prints, a text for each command."""

_WIDTH = 118
_COLUMN = 34
_TRAINER = "trainer"


def commands_help(version: str) -> str:
    """The commands, each with the first sentence of what it does; read from the source, which is not run.

    Args:
        version: Of this package.
    """
    tree = ast.parse((Path(__file__).parent / "trainer.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    said = {verb: _first_sentence(ast.get_docstring(functions[verb]) or "") for verb in VERBS} | ALONE
    lines = [f"  {verb:12}{text}" for verb, text in said.items()]
    return "\n".join(
        [
            f"lvlm-prune {version}: make a large vision-language model sparse after training, and see what it cost.",
            "",
            "usage: lvlm-prune COMMAND [--option VALUE ...]",
            "",
            *lines,
            "",
            "lvlm-prune COMMAND --help says what a command takes; lvlm-prune --version prints the version.",
        ]
    )


def stored_help(verb: str) -> str:
    """What `lvlm-prune VERB --help` prints; empty for no command, and where variables of the environment set options.

    Args:
        verb: Name of a command.

    Example:
        >>> print(stored_help("kernels"), end="")
        usage: lvlm-prune kernels
        <BLANKLINE>
        Say which kernels for packed weights this machine has.
    """
    if verb in ALONE:
        takes = {"methods": " [NAME]", "completion": " SHELL"}.get(verb, "")
        return f"usage: lvlm-prune {verb}{takes}\n\n{ALONE[verb]}\n"
    if verb not in VERBS or any(name.startswith("LVLM_") for name in os.environ):
        return ""
    return (STORED_HELP / f"{verb}.txt").read_text(encoding="utf-8")


def misspelt(arguments: Sequence[str]) -> str:
    """A command that there is not, or an option that comes close to one of the command, in a line; else empty.

    Options are looked for in the stored help, since the parser that knows all options takes all libraries. Only the
    parser tells of options of classes (`--pruning.pool.beta`), of Lightning's and of those without a section.

    Args:
        arguments: The command and what follows it.

    Example:
        >>> misspelt(["prune", "--pruning.sparsty", "0.5"])
        '--pruning.sparsty: unknown option; is --pruning.sparsity meant?'
        >>> misspelt(["prune", "--pruning.sparsity", "0.5", "--trainer.devces", "2"])
        ''
        >>> misspelt(["kernels", "atv"])
        'kernels atv: `kernels` takes nothing'
    """
    if arguments and arguments[0].startswith("-"):
        close = meant(arguments[0], ("--help", "--version"))
        return f"{arguments[0]}: unknown option{close}" if close else ""
    if arguments and arguments[0] not in VERBS:
        return explain("subcommand", arguments)
    known = re.findall(r"^  (--[\w.]+)", stored_help(arguments[0]) if arguments else "", re.MULTILINE)
    if not known or TRAINER_HELP in arguments:
        return ""
    # With a plus, jsonargparse appends to a list.
    for option in (one.partition("=")[0].removesuffix("+") for one in arguments if one.startswith("--")):
        section, dot, name = option.partition(".")
        # Where the section itself takes a class, what it has depends on that.
        if not dot or "." in name or option in known or section in (*known, f"--{_TRAINER}"):
            continue
        if close := hint(option, known, {}):
            return f"{option}: unknown option{close}"
    return ""


def command_help(parser: Any, verb: str, trainer: bool) -> str:
    """Options of a command, a sentence each.

    Args:
        parser: jsonargparse's parser of the command.
        verb: Its name.
        trainer: Whether the options of Lightning's Trainer are asked for, instead of all others.
    """
    groups = [(group, list(_options(group))) for group in parser._action_groups]
    groups = [(group, options) for group, options in groups if options]
    of_trainer = [options for group, options in groups if _section(options) == _TRAINER]
    if trainer:
        lines = [f"Options of Lightning's Trainer that `lvlm-prune {verb}` has:", ""]
        return "\n".join([*lines, *(line for options in of_trainer for line in _lines(options))]) + "\n"
    own = [(group, options) for group, options in groups if _section(options) != _TRAINER]
    # What is the command's alone comes first, what every parser has last.
    own.sort(key=lambda entry: _rank(entry[0].title, _section(entry[1])))
    lines = [f"usage: lvlm-prune {verb} [--option VALUE ...]"]
    if verb == "prune":
        lines += ["", _line("--method NAME", "Recipe to start from; `lvlm-prune methods` lists them.")]
    for group, options in own:
        title = {"options": "Every command", "positional arguments": "Arguments"}.get(group.title, group.title)
        lines += ["", *textwrap.wrap(f"{title}:", _WIDTH), *_lines(options)]
    plugins = [name.removesuffix(".help") for name in parser._option_string_actions if name.endswith(".help")]
    own_plugins = [name for name in plugins if not name.startswith(f"--{_TRAINER}.")]
    if own_plugins:
        lines += ["", f"Options of a class: lvlm-prune {verb} {own_plugins[0]}.help CLASS, and so on."]
    if of_trainer:
        count = sum(map(len, of_trainer))
        more = f"lvlm-prune {verb} {TRAINER_HELP}"
        lines += ["", f"Lightning's Trainer: {count} options as --trainer.NAME; `{more}` lists them."]
    return "\n".join(lines) + "\n"


def asks_for_trainer(arguments: Sequence[str]) -> bool:
    """Whether a command line wants the options of Lightning's Trainer.

    Example:
        >>> asks_for_trainer(["prune", "--help-trainer"])
        True
    """
    return TRAINER_HELP in arguments


def _options(group: Any) -> Iterator[Any]:
    """Options of a group that a user may give, without those that only show help or load a file for the group."""
    for action in group._group_actions:
        kind = type(action).__name__
        if kind not in ("_ActionConfigLoad", "_ActionHelpClassPath", "_HelpAction"):
            yield action


def _section(options: Sequence[Any]) -> str:
    """First part of the options' names where they have several: `trainer`, `pruning`."""
    return options[0].dest.split(".")[0] if "." in options[0].dest else ""


def _rank(title: str, section: str) -> int:
    if title in ("options", "positional arguments"):
        return 3
    return {"": 0, "model": 2, "data": 2}.get(section, 1)


def _lines(options: Sequence[Any]) -> Iterator[str]:
    """A sentence for each option, and below it the classes that it takes."""
    for action in options:
        yield _line(_signature(action), _first_sentence(action.help or ""))
        names = ", ".join(_classes(getattr(action, "_typehint", None)))
        yield from textwrap.wrap(names, _WIDTH, initial_indent=" " * _COLUMN, subsequent_indent=" " * _COLUMN)


def _line(signature: str, text: str) -> str:
    """Name and text, which goes on below itself where the line is full."""
    column = max(_COLUMN, len(signature) + 4)
    first, *more = textwrap.wrap(text, max(_WIDTH - column, 40), break_on_hyphens=False) or [""]
    below = textwrap.wrap(" ".join(more), _WIDTH - _COLUMN, break_on_hyphens=False)
    return "\n".join([f"  {signature:{column - 2}}{first}", *(f"{'':{_COLUMN}}{line}" for line in below)])


def _signature(action: Any) -> str:
    """Name and default of an option."""
    long = [name for name in action.option_strings if name.startswith("--")]
    name, default = long[0] if long else action.dest, action.default
    if isinstance(default, dict) and "class_path" in default:
        default = default["class_path"].rpartition(".")[2]
    shown = isinstance(default, (str, int, float)) and 0 < len(str(default)) < 24 and default != "==SUPPRESS=="
    written = str(default).lower() if isinstance(default, bool) else default
    return f"{name} {written}" if shown else name


def _classes(hint: Any) -> list[str]:
    """Names of this package's classes that an option takes; empty for options that take values."""
    names = set()
    for kind in (hint, *get_args(hint)):
        if not (isinstance(kind, type) and inspect.isabstract(kind) and kind.__module__.startswith("lvlm_prune.")):
            continue
        for one in classes_below(kind):
            # Of Python alone is what takes samples from memory.
            ours = one.__module__.startswith("lvlm_prune.") and one.__module__ != "lvlm_prune.api"
            if ours and not getattr(one, "__abstractmethods__", ()) and not one.__name__.startswith(("_", "Lazy")):
                names.add(one.__name__)
    return sorted(names)


def classes_below(kind: Any) -> Iterator[Any]:
    """Every subclass of a class that is loaded, and theirs; not one in whose place a notebook has defined another."""
    for one in kind.__subclasses__():
        if getattr(sys.modules.get(one.__module__), one.__name__, None) is one:
            yield one
        yield from classes_below(one)


def options_of_classes(kinds: Iterable[type]) -> dict[str, list[str]]:
    """Name of each class that is of one of these kinds, the user's own among them -> options of its own.

    Args:
        kinds: Base classes of plugins.
    """
    classes = [one for kind in kinds for one in classes_below(kind)]
    return {one.__name__: list(inspect.signature(one).parameters) for one in classes if not inspect.isabstract(one)}


def options_of_lightning(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Name of each logger and callback -> options of its own, where a command line names it; else none.

    Args:
        arguments: The command line.
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    named = " ".join(arguments)
    classes = {one.__name__: one for kind in (Logger, Callback) for one in classes_below(kind)}
    return {
        name: list(inspect.signature(one).parameters) if name in named else []
        for name, one in classes.items()
        if not name.startswith("_")
    }


def _first_sentence(text: str) -> str:
    r"""Up to the first full stop that ends a sentence.

    Example:
        >>> _first_sentence("Say `a.b`, e.g. this.\nAnd more.")
        'Say `a.b`, e.g. this.'
    """
    joined = " ".join(text.split("\n\n")[0].split())
    for place, sign in enumerate(joined):
        ends = sign == "." and joined[place + 1 : place + 2] in ("", " ") and joined[place + 2 : place + 3].isupper()
        if ends:
            return joined[: place + 1]
    return joined
