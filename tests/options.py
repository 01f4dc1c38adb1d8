"""Every option of the command line that takes a number: which class it belongs to, and how it is given."""

import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

VALUES = ("0", "-1", "nan", "inf", "1e308", "", "abc", "null")
"""What people type where a number belongs, and what a script leaves there."""


@dataclass(frozen=True)
class Option:
    """A number among the arguments of a class.

    Args:
        owner: The class.
        name: The argument.
        many: Whether it takes a list of numbers.
    """

    owner: type
    name: str
    many: bool

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def given(self, value: str) -> str:
        """A value, as it is written behind the option."""
        return f"[{value or chr(39) * 2}]" if self.many else value


def numbers_of(owner: type) -> Iterator[Option]:
    """The numbers among the arguments of a class."""
    hints = get_type_hints(owner.__init__)
    for name in inspect.signature(owner).parameters:
        if is_number(hints.get(name)):
            yield Option(owner, name, many=False)
        elif is_number(hints.get(name), many=True):
            yield Option(owner, name, many=True)


def is_number(hint: Any, many: bool = False) -> bool:
    """Whether an annotation allows a number, or a list of numbers."""
    kinds = _kinds(hint)
    if many:
        return any(get_origin(kind) is list and is_number(get_args(kind)[0]) for kind in kinds)
    return any(kind in (int, float) for kind in kinds)


def _kinds(hint: Any) -> Iterator[Any]:
    """The members of a union; a choice between given numbers is none of them."""
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _kinds(member)
    elif get_origin(hint) is not Literal:
        yield hint


def plugins(base: type) -> list[type]:
    """Concrete classes of this package that can be chosen where a base class is expected, by name."""
    for package in ("callbacks", "data", "evaluation", "methods", "recovery"):
        folder = importlib.import_module(f"lvlm_prune.{package}").__path__
        for module in pkgutil.walk_packages(folder, f"lvlm_prune.{package}."):
            importlib.import_module(module.name)
    found, waiting = set(), [base]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("lvlm_prune.") and not inspect.isabstract(kind) and kind.__name__[0] != "_":
            found.add(kind)
    return sorted((kind for kind in found if "LazyInstance" not in kind.__name__), key=lambda kind: kind.__name__)
