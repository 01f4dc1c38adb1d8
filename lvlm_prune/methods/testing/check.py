"""`check_plugin`: which checks a plugin goes through, and what all plugins have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.contract import PluginFault, name_of
from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.solvers.base import Solver
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.testing.allocations import check_allocation
from lvlm_prune.methods.testing.scorers import check_pattern, check_scorer, check_statistic
from lvlm_prune.methods.testing.selections import check_pool, check_saliency
from lvlm_prune.methods.testing.solvers import check_solver

Again = Callable[[], Any]

_CHECKS: dict[type, Callable[[Again], None]] = {
    Saliency: check_saliency,
    Pool: check_pool,
    Scorer: check_scorer,
    Solver: check_solver,
    Allocation: check_allocation,
    Pattern: check_pattern,
}


def check_plugin(plugin: Any) -> None:
    """Hold a saliency, pool, scorer, solver, allocation, pattern, or the class of a statistic, against its contract.

    Small tensors only, on the CPU: it takes a second, and belongs into the tests of whoever writes a plugin. Checked
    are, as far as they apply: constructor arguments kept under their own names; shapes and dtypes of what is returned,
    for float32, bfloat16 and float16; the same answer to the same question, whatever was asked before, however the
    sample was padded, and on any number of processes; inputs left as they are; N:M and the zeros that are promised;
    scores that depend on no other row where `by_row` says so; numbers for the plan that are large enough.

    Args:
        plugin: An object, made with arguments that can be used; the class itself for a `Statistic`.

    Raises:
        PluginFault: A check failed; one line says which, what was found, and what is expected.

    Example:
        >>> import torch
        >>> from lvlm_prune.methods import Scorer
        >>> class ColumnScorer(Scorer):
        ...     def score(self, weight, statistic):
        ...         return weight.float().abs().mean(0)
        >>> check_plugin(ColumnScorer())
        Traceback (most recent call last):
        ...
        lvlm_prune.methods.contract.PluginFault: ColumnScorer.score: float32 of shape (24,), expected ...
    """
    if isinstance(plugin, type):
        if not issubclass(plugin, Statistic):
            raise TypeError(f"{plugin.__name__} is a class: give an object of it, made with its arguments")
        with _on_small_examples(plugin.__name__):
            check_statistic(plugin)
        return
    check = next((check for kind, check in _CHECKS.items() if isinstance(plugin, kind)), None)
    if check is None:
        kinds = ", ".join(kind.__name__ for kind in _CHECKS)
        raise TypeError(f"{name_of(plugin)} is none of {kinds}; a Statistic is given as its class")
    arguments = check_arguments(plugin)
    for value in arguments.values():
        if isinstance(value, tuple(_CHECKS)):
            check_plugin(value)
    with _on_small_examples(name_of(plugin)):
        check(lambda: type(plugin)(**arguments))


@contextmanager
def _on_small_examples(name: str) -> Iterator[None]:
    """Within, a plugin is asked as in a run, without gradients; any error of it is a fault in one line."""
    try:
        with torch.no_grad():
            yield
    except PluginFault:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise PluginFault(f"{name}: fails on a small example ({type(error).__name__}: {said})") from error


def check_arguments(plugin: Any) -> dict[str, Any]:
    """Name of each constructor argument -> its value, which the plugin keeps under that name.

    Raises:
        PluginFault: It does not, so that no manifest and no `config.yaml` would tell what it was made with.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(plugin)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PluginFault(f"{name_of(plugin)}: `{parameter}` in the constructor; name each argument")
        if not _keeps(plugin, name):
            problem = f"the constructor's argument `{name}` is not kept as an attribute of that name"
            raise PluginFault(f"{name_of(plugin)}: {problem}, so no manifest would tell it; write self.{name} = {name}")
        arguments[name] = getattr(plugin, name)
    try:
        again = type(plugin)(**arguments)
    except Exception as error:
        problem = f"cannot be made again with the arguments that it keeps ({error})"
        raise PluginFault(f"{name_of(plugin)}: {problem}") from error
    for name, value in arguments.items():
        if (given := _told(value)) != (kept := _told(getattr(again, name))):
            problem = f"made with `{name}` {given!r}, it keeps {kept!r}"
            raise PluginFault(f"{name_of(plugin)}: {problem}; keep an argument as it was given")
    return arguments


def _keeps(plugin: Any, name: str) -> bool:
    """Whether an object keeps a value of its own under a name; what its class has under it stands for no argument."""
    own = inspect.isdatadescriptor(inspect.getattr_static(type(plugin), name, None))  # a property, or a slot
    return hasattr(plugin, name) and (own or name in getattr(plugin, "__dict__", {}))


def _told(value: Any) -> Any:
    """What a manifest would tell of an argument: plain data as they are, a plugin by its class and arguments."""
    if isinstance(value, (list, tuple)):
        return [_told(item) for item in value]
    if isinstance(value, dict):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, tuple(_CHECKS)):
        given = inspect.signature(type(value)).parameters
        return (name_of(value), {name: _told(getattr(value, name, None)) for name in given})
    return value if isinstance(value, (bool, int, float, str)) else type(value)
