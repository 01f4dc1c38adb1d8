"""What a class that there is not may be meant to be: of this package, of a module, of a file where the user works."""

import re
import sys
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

CLASS_KINDS = ("allocation", "benchmark", "engine", "pool", "saliency", "scorer", "solver", "source")
"""Last parts of the names of options that take a class."""

_MOST_FILES = 200


def close_in_files(name: str, kind: str, folder: Path) -> list[str]:
    """Import paths of the classes that are meant by a file, or by the bare name of a class in one.

    Args:
        name: As it was given: `mine.py`, `mine`, `MyScorer` or `mine:MyScorer`.
        kind: Last part of the option's name, which the names of its base classes end with.
        folder: Where the command was given.
    """
    wanted = re.split(r"[:/]", name.removesuffix(".py"))[-1]
    found = []
    for file in sorted(folder.glob("*.py"))[:_MOST_FILES]:
        try:
            classes = re.findall(r"^class (\w+)\((.*)\):", file.read_text(encoding="utf-8"), re.MULTILINE)
        except (OSError, ValueError):
            continue
        of_kind = [one for one, bases in classes if kind in f"{one} {bases}".lower()] if wanted == file.stem else []
        found += [f"{file.stem}.{one}" for one in of_kind or [one for one, _ in classes if one == wanted]]
    return found


def close_classes(name: str, kind: str, plugins: Collection[str]) -> list[str]:
    """The class that a misspelt name comes closest to, with the word for its kind or without; at most one.

    Args:
        name: As it was given, without its module.
        kind: Last part of the option's name, which classes of its kind end with.
        plugins: Names of classes.

    Example:
        >>> close_classes("Wnda", "scorer", ["WandaScorer", "RIAScorer"])
        ['WandaScorer']
        >>> close_classes("SparseGPT", "solver", ["SparseGPTSolver", "SparseGPTScorer"])
        ['SparseGPTSolver']
    """
    # Of two with the same stem the last one counts.
    whole = {
        re.sub(r"[A-Z][a-z]+$", "", one): one for one in sorted(plugins, key=lambda one: one.lower().endswith(kind))
    }
    found = get_close_matches(name, [*plugins, *filter(None, whole)], n=1, cutoff=0.8)
    return [whole.get(one, one) for one in found]


def close_in_module(problem: str) -> str:
    """What a class may be meant to be that a module has not, to go on with a sentence; empty where nothing is close.

    Args:
        problem: What Python says.

    Example:
        >>> close_in_module("module 'pathlib' has no attribute 'Paht'")
        '; is pathlib.Path meant?'
    """
    lacks = re.fullmatch(r"module '([\w.]+)' has no attribute '(\w+)'", problem)
    if not lacks or lacks[1] not in sys.modules:
        return ""
    classes = [name for name, value in vars(sys.modules[lacks[1]]).items() if isinstance(value, type)]
    return "".join(f"; is {lacks[1]}.{name} meant?" for name in get_close_matches(lacks[2], classes, n=1))
