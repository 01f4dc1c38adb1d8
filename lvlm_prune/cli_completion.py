"""What completes commands and options in a shell: a script that shtab makes of the parser of all commands."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from lvlm_prune.cli_errors import ALONE
from lvlm_prune.recipes import AUTO, recipe_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SHELLS = ("bash", "zsh", "tcsh", "fish")
"""Those that there is a script for."""

WRITES_COMPLETION = "JSONARGPARSE_ADD_PRINT_COMPLETION_ARGUMENT"
"""Environment variable with which jsonargparse prints a script for a shell, and does nothing else."""


def completion_problem(arguments: Sequence[str]) -> str:
    """What is wrong with a request for a script; empty where nothing is.

    Args:
        arguments: What follows `completion`.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        close = get_close_matches(" ".join(arguments), SHELLS, n=1, cutoff=0.75)  # ksh is no zsh
        return f"name one shell of {', '.join(SHELLS)}" + "".join(f"; is {shell} meant?" for shell in close)
    if importlib.util.find_spec("shtab") is None:
        return "needs shtab, which is not installed: pip install 'lvlm-prune[completion]'"
    return ""


def parsers_of_alone(kind: type[ArgumentParser]) -> dict[str, ArgumentParser]:
    """Parsers of the commands that are dealt with before there is one, by their names.

    Args:
        kind: Class of the parser.
    """
    taken = {"methods": [*recipe_names(), *recipe_names("recover")], "completion": SHELLS}
    parsers = {name: kind() for name in ALONE}
    for name, values in taken.items():
        parsers[name].add_argument("name", choices=values, nargs="?")
    return parsers


def add_recipes(parsers: Mapping[str, ArgumentParser]) -> None:
    """Let `--method` take names of recipes, which are written out before a parser is asked.

    Args:
        parsers: Of `prune` and `recover`, among others.
    """
    parsers["prune"].add_argument("--method", choices=[*recipe_names(), AUTO], help="Recipe to start from.")
    (method,) = (one for one in parsers["recover"]._actions if one.dest == "method")
    setattr(method, "_typehint", Literal[tuple(recipe_names("recover"))])  # noqa: B010  # of jsonargparse alone
