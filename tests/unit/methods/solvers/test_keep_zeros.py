"""What was pruned before stays pruned where it is asked for, whatever the solver makes of the rest."""

from dataclasses import replace

import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured
from lvlm_prune.methods.scorers import MagnitudeScorer, MaskSolver, SparseGPTScorer
from lvlm_prune.methods.solvers import (
    ALPSSolver,
    DenseTargetSolver,
    RefitSolver,
    SparseGPTSolver,
    SparseSwapsSolver,
)
from tests.unit.methods.solvers.conftest import CASES, loss

BY_SIZE = MaskSolver(MagnitudeScorer())
UPDATING = [SparseGPTSolver, ALPSSolver, lambda **options: ALPSSolver(schedule="paper", **options)]
UPDATING += [lambda **options: RefitSolver(SparseGPTSolver(), **options)]
UPDATING += [lambda **options: SparseGPTScorer(**options).solver()]
UPDATING += [lambda **options: DenseTargetSolver(ALPSSolver(**options))]


def pruned_before(problem, share=0.4):
    """The problem with weights at random gone already; with N:M the first of every four."""
    gone = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(3)) < share
    if isinstance(problem.pattern, SemiStructured):
        gone = torch.arange(problem.weight.shape[1]).expand_as(problem.weight) % 4 == 0
    return replace(problem, weight=problem.weight.masked_fill(gone, 0.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", UPDATING)
def test_zeros_stay_where_asked_and_count_among_those_asked_for(case, make, make_problem):
    problem = pruned_before(make_problem(case))
    free, kept = make().solve(problem), make(keep_zeros=True).solve(problem)
    assert not kept.weight[problem.zeros].any()
    assert kept.mask[problem.zeros].all()
    assert int(kept.mask.sum()) <= int(free.mask.sum()) + problem.weight.numel() // 50
    assert loss(kept.weight, problem) < loss(BY_SIZE.solve(problem).weight, problem)
    assert make(keep_zeros=True).keeps_zeros()
    assert not make().keeps_zeros()


@pytest.mark.parametrize("make", UPDATING)
def test_more_zeros_than_asked_for_all_stay(make, make_problem):
    problem = pruned_before(make_problem("0.5"), share=0.8)
    solver = make(keep_zeros=True)
    found = solver.solve(problem)
    assert found.mask[problem.zeros].all()
    for count in solver.expected_zeros(tuple(problem.weight.shape), 0.5, problem.pattern):
        assert (count.of(found.weight) >= count.least).all()


def test_a_solver_that_is_not_asked_to_may_give_them_values(make_problem):
    problem = pruned_before(make_problem("2:4"))
    assert ALPSSolver().solve(problem).weight[problem.zeros].any()
    assert not ALPSSolver(keep_zeros=True).solve(problem).weight[problem.zeros].any()


@pytest.mark.parametrize("make", UPDATING)
def test_without_zeros_the_option_changes_nothing(make, make_problem):
    problem = make_problem("0.5")
    assert torch.equal(make(keep_zeros=True).solve(problem).weight, make().solve(problem).weight)


@pytest.mark.parametrize("solver", [BY_SIZE, SparseSwapsSolver(BY_SIZE)])
def test_solvers_that_leave_weights_as_they_are_keep_zeros_by_themselves(solver, make_problem):
    problem = pruned_before(make_problem("0.5"))
    assert not DenseTargetSolver(solver).keeps_zeros()
    assert solver.keeps_zeros()
    assert not solver.solve(problem).weight[problem.zeros].any()
