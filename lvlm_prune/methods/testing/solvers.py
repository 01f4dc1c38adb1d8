"""Checks of solvers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch

from lvlm_prune.methods.contract import PluginFault, checked, name_of, said
from lvlm_prune.methods.patterns import Pattern, SemiStructured, Unstructured
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver
from lvlm_prune.methods.testing.samples import CHANNELS, make_weight
from lvlm_prune.methods.testing.scorers import check_statistic, filled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PATTERNS: tuple[tuple[Pattern, float], ...] = (
    (Unstructured(), 0.5),
    (Unstructured(), 0.3),
    (SemiStructured(2, 4), 0.5),
    (SemiStructured(4, 8), 0.5),
)


def check_solver(make: Callable[[], Solver]) -> None:
    """See `check_plugin`; one that continues what another one found gets Wanda's mask."""

    def made() -> Solver:
        return make().starting_from(WandaScorer().solver())

    if (kind := made().statistic) is not None:
        check_statistic(kind)
    for pattern, sparsity in _PATTERNS:
        try:
            made().check(pattern)
        except ValueError:
            continue
        for dtype in _DTYPES:
            weight = make_weight(8, CHANNELS, dtype)
            problem = LinearProblem(weight, filled(kind), sparsity, pattern, name="layers.0.up_proj")
            _check_solution(made, problem)
            _check_solution(lambda: made().quick(), problem)


def _check_solution(make: Callable[[], Solver], problem: LinearProblem) -> None:
    solver, before = make(), problem.weight.clone()
    where = f"{name_of(solver)}.solve"
    solution = solver.solve(problem)
    if not isinstance(solution, Solution):
        raise PluginFault(f"{where}: {said(solution)}, expected a Solution")
    checked(solution.weight, before, f"{where}, weight", (before.dtype,))
    checked(solution.mask, before, f"{where}, mask", (torch.bool,))
    if not torch.equal(problem.weight, before):
        raise PluginFault(f"{where}: the dense weight was changed, expected it to stay as it is")
    if not torch.isfinite(solution.weight).all():
        raise PluginFault(f"{where}: NaN or infinity in the weight")
    zeros = solution.weight[solution.mask]
    if (zeros != 0).any() or torch.signbit(zeros).any():
        raise PluginFault(f"{where}: weights under the mask are not all +0.0")
    if not solver.updates_weights and not torch.equal(solution.weight[~solution.mask], before[~solution.mask]):
        raise PluginFault(f"{where}: remaining weights changed, but `updates_weights` is False")
    for count in solver.expected_zeros((before.shape[0], before.shape[1]), problem.sparsity, problem.pattern):
        found = count.of(solution.weight)
        if (found < count.least).any() or (count.most is not None and (found > count.most).any()):
            raise PluginFault(f"{where}: {found.tolist()} zeros, `expected_zeros` promises {count.least} and more")
    json.dumps(solution.notes)
    again = make().solve(problem)
    if not (torch.equal(again.weight, solution.weight) and torch.equal(again.mask, solution.mask)):
        raise PluginFault(f"{where}: another answer to the same question")
    if solver.working_bytes((before.shape[0], before.shape[1]), before.element_size()) <= 0:
        raise PluginFault(f"{name_of(solver)}.working_bytes: nothing, expected the bytes that `solve` takes")
    if isinstance(problem.pattern, SemiStructured):  # which gives the sparsity
        return
    kept = make().solve(replace(problem, sparsity=0.0))
    if kept.mask.any() or not torch.equal(kept.weight, before):
        raise PluginFault(f"{where}: weights changed at a target of 0")
