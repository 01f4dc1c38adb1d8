"""Checks of solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lvlm_prune.methods.contract import FLOATS, PluginFault, checked, name_of, refuse_misdeclared, said
from lvlm_prune.methods.patterns import SemiStructured
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver
from lvlm_prune.methods.testing.promises import check_notes, check_numbers, check_zeros
from lvlm_prune.methods.testing.samples import CHANNELS, DTYPES, make_weight
from lvlm_prune.methods.testing.scorers import check_pruned, check_statistic, filled, left_alone, taken_patterns


def check_solver(make: Callable[[], Solver]) -> None:
    """See `check_plugin`; one that continues what another one found gets Wanda's mask."""

    def made() -> Solver:
        return make().starting_from(WandaScorer().solver())

    refuse_misdeclared(made(), Solver)
    if (kind := made().statistic) is not None:
        check_statistic(kind)
    for pattern, sparsity in taken_patterns(made):
        for dtype in DTYPES:
            weight = make_weight(8, CHANNELS, dtype)
            problem = LinearProblem(weight, filled(kind), sparsity, pattern, name="layers.0.up_proj")
            _check_solution(made, problem)
            _check_solution(lambda: made().quick(), problem)
            _check_zeros_kept(made, problem)
    check_numbers(made(), {"cost": made().cost(64, CHANNELS), "statistic_bytes": made().statistic_bytes(CHANNELS)})


def _check_solution(make: Callable[[], Solver], problem: LinearProblem) -> None:
    solver, dense = make(), problem.weight
    where = f"{name_of(solver)}.solve"
    with left_alone(where, dense, problem.statistic):
        solution = solver.solve(problem)
    if not isinstance(solution, Solution):
        raise PluginFault(f"{where}: {said(solution)}, expected a Solution")
    check_pruned(solver, where, dense, solution.weight, solution.mask)
    shape, under = (dense.shape[0], dense.shape[1]), f"under {problem.pattern} at {problem.sparsity:g}"
    check_zeros(where, solution.weight, solver.expected_zeros(shape, problem.sparsity, problem.pattern), under)
    check_notes(solver, f"{where}, notes", solution.notes)
    again = make().solve(problem)
    if not (torch.equal(again.weight, solution.weight) and torch.equal(again.mask, solution.mask)):
        raise PluginFault(f"{where}: another answer to the same question")
    checked(solver.score(problem, slice(2, 5)), dense[2:5], f"{name_of(solver)}.score", FLOATS)
    check_numbers(solver, {"working_bytes": solver.working_bytes(shape, dense.element_size())}, least=1)
    if isinstance(problem.pattern, SemiStructured):  # which gives the sparsity
        return
    kept = make().solve(replace(problem, sparsity=0.0))
    if kept.mask.any() or not torch.equal(kept.weight, dense):
        raise PluginFault(f"{where}: weights changed at a target of 0")


def _check_zeros_kept(make: Callable[[], Solver], problem: LinearProblem) -> None:
    """Weights that are zero before stay zero, where that is promised."""
    if not make().keeps_zeros():
        return
    weight = problem.weight.clone()
    weight[:, ::2] = 0.0
    if make().solve(replace(problem, weight=weight)).weight[:, ::2].any():
        raise PluginFault(f"{name_of(make())}.solve: fills weights that were zero, but `keeps_zeros` is True")
