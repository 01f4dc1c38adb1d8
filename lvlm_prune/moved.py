"""Where modules of version 0.1 are now: what was written against it ends in one line that says so."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from lvlm_prune.errors import LVLMPruneError

_FACE = {
    "allocation": "Allocation",
    "patterns": "Pattern",
    "pools": "Pool",
    "saliency": "Saliency",
    "scorers": "Scorer",
    "statistics": "Statistic",
    "tokens": "Tokens, Selection",
}
"""Modules of base classes -> what is written instead, out of `lvlm_prune.methods`."""

_MOVED = {name: f"methods.{name}" for name in (*_FACE, "diversity", "products", "survey")} | {
    "activations": "loop.activations",
    "attention": "blocks.attention",
    "blocks.checkpoint": "checkpoints.checkpoint",
    "blocks.skeleton": "checkpoints.skeleton",
    "blocks.sources": "checkpoints.sources",
    "blocks.tail": "blocks.remaining",
    "calibration": "pruning.calibration",
    "demo.benchmark": "evaluation.embedded",
    "figures": "report.figures",
    "footprint": "memory.footprint",
    "interruption": "distributed.interruption",
    "launching": "distributed.launching",
    "manifest": "output.manifest",
    "output_folder": "output.folder",
    "probing": "runs.probe",
    "processes": "distributed.processes",
    "provenance": "output.provenance",
    "sweep": "runs.sweep",
    "verification": "output.verification",
}


class ModuleMoved(LVLMPruneError):
    """Code or a configuration file names a module by the place that it had in version 0.1."""


class MovedModules(MetaPathFinder):
    """Comes last: asked only for modules that there are not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Nothing, for a module that never was.

        Raises:
            ModuleMoved: There was one; says where it is.
        """
        name = fullname.removeprefix("lvlm_prune.")
        if name in _MOVED and name != fullname:
            line = f"{fullname} of version 0.1 is now lvlm_prune.{_MOVED[name]}"
            if name in _FACE:
                line += f"; base classes: from lvlm_prune.methods import {_FACE[name]}"
            raise ModuleMoved(line)


def point_to_new_places() -> None:
    """Let imports of modules that have moved say where they are."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
