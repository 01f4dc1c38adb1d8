"""Zeros that are in a checkpoint before it is pruned: one that was pruned before is noticed, and said to be."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from lvlm_prune.blocks import StreamedWeights, Weights
from lvlm_prune.output.base_record import NOTICED_ZEROS
from lvlm_prune.output.units import readable_percent
from lvlm_prune.packed.selection import estimated_zeros

if TYPE_CHECKING:
    from lvlm_prune.methods.solvers import Solver
    from lvlm_prune.module import LVLMModule


def zeros_of_input(module: LVLMModule, weights: Weights, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Share of zeros, before anything is pruned, of the weights that are going to be; estimated from 64 KiB of each.

    Args:
        module: The opened model.
        weights: Its weights.
        shapes: Full name of each matrix that is going to be pruned -> (C_out, C_in).
    """
    if module.folder is None or not isinstance(weights, StreamedWeights):
        return 0.0
    experts = {name: matrix.parameter_of(name) for name, matrix in module.expert_matrices().items()}
    parameters = (experts.get(name, f"{name}.weight") for name in shapes)
    keys = {key for parameter in parameters if weights.has(parameter) for key in weights.keys_of(parameter)}
    sizes = {key: prod(module.folder[key].shape) for key in keys}
    zeros = sum(estimated_zeros(module.folder, key) * size for key, size in sorted(sizes.items()))
    return zeros / max(sum(sizes.values()), 1)


def zeros_line(share: float, target: float, solver: Solver, path: str = "pruning.scorer") -> str:
    """What a user is told of it; empty where there are next to none.

    Args:
        share: Of zeros in the input.
        target: Of zeros that is asked for.
        solver: What prunes: whether those zeros stay zeros, see `Solver.keeps_zeros`, and whether it can be told to.
        path: Option that the solver is given by.

    Example:
        >>> from lvlm_prune.methods.solvers import SparseGPTSolver
        >>> print(zeros_line(0.5, 0.6, SparseGPTSolver(keep_zeros=True)))
        the input was pruned before: about 50% of these weights are zero already, and count among the 60% asked for
        >>> print(zeros_line(0.5, 0.6, SparseGPTSolver(), "pruning.solver").partition("already, ")[2])
        but may get values again (--pruning.solver.keep_zeros true keeps them zero)
        >>> zeros_line(0.001, 0.6, SparseGPTSolver())
        ''
    """
    if share < NOTICED_ZEROS:
        return ""
    option = f"{path}.keep_zeros" if hasattr(solver, "keep_zeros") else ""
    told = f"the input was pruned before: about {share:.0%} of these weights are zero already"
    if not solver.keeps_zeros():
        return f"{told}, but may get values again" + (f" (--{option} true keeps them zero)" if option else "")
    if share >= target:
        return f"{told}, no fewer than the {readable_percent(target)} asked for: little or nothing will change"
    return f"{told}, and count among the {readable_percent(target)} asked for"
