"""Plugins of a run that break the contract of their kind: refused before the run, or the end of it, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lvlm_prune.errors import RunError
from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Solver
from lvlm_prune.methods.contract import PluginFault, refuse_misdeclared, try_scorer
from lvlm_prune.plugins import plugin_class

_KINDS = (Saliency, Pool, Scorer, Solver, Allocation)


def refuse_faulty(**plugins: Any) -> None:
    """Refuse plugins that say of themselves what there is not, and scores that would not be one for each weight.

    Args:
        plugins: Name of the argument -> the plugin; the saliency of a pool is looked at, too.

    Raises:
        ValueError: One does; names the argument.
    """
    for argument, plugin in plugins.items():
        if isinstance(saliency := getattr(plugin, "saliency", None), Saliency):
            refuse_faulty(**{f"{argument}.saliency": saliency})
        try:
            refuse_misdeclared(plugin, next(kind for kind in _KINDS if isinstance(plugin, kind)))
            if isinstance(plugin, Scorer):
                try_scorer(plugin)
        except PluginFault as fault:
            raise ValueError(f"`{argument}` {plugin_class(plugin).__name__}: {fault}") from None


@contextmanager
def faults_end_the_run() -> Iterator[None]:
    """A plugin that breaks its contract ends the run in one line, before its block is written."""
    try:
        yield
    except PluginFault as fault:
        raise RunError(str(fault)) from None
