"""Exchanges never raise the loss, keep every row's number of zeros, and find what all pairs have to offer."""

from itertools import product

import pytest
import torch

from lvlm_prune.methods.scorers import MagnitudeScorer, MaskSolver, WandaScorer
from lvlm_prune.methods.solvers import RefitSolver, SparseGPTSolver, SparseSwapsSolver
from lvlm_prune.methods.solvers.swaps import _places_of_lowest
from tests.unit.methods.solvers.conftest import CASES, loss

WANDA = MaskSolver(WandaScorer())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", [WANDA, MaskSolver(MagnitudeScorer())])
def test_no_round_raises_the_loss_of_any_row(case, start, make_problem):
    problem = make_problem(case)
    gram, before = problem.gram.value, None
    for rounds in range(1, 12):
        found = SparseSwapsSolver(start, rounds).solve(problem)
        error = found.weight.double() - problem.weight.double()
        losses = ((error @ gram) * error).sum(dim=1)
        if before is not None:
            assert (losses <= before * (1 + 1e-6)).all()
        before = losses
    assert loss(found.weight, problem, 0.0) < 0.9 * loss(start.solve(problem).weight, problem, 0.0)


@pytest.mark.parametrize("case", CASES)
def test_rows_and_groups_keep_their_number_of_zeros(case, make_problem):
    problem = make_problem(case)
    size = 4 if case == "2:4" else problem.weight.shape[1]
    begun, found = WANDA.solve(problem).mask, SparseSwapsSolver(WANDA).solve(problem)
    assert torch.equal(begun.view(-1, size).sum(1), found.mask.view(-1, size).sum(1))
    assert torch.equal(found.weight[~found.mask], problem.weight[~found.mask])
    assert found.notes["exchanges"] > 0


@pytest.mark.parametrize("case", CASES)
def test_where_it_ends_no_exchange_of_any_pair_lowers_the_loss(case, make_problem):
    """With all weights as candidates; every pair of each row is tried in float64."""
    problem = make_problem(case, rows=4, columns=16)
    group = 4 if case == "2:4" else 16
    found = SparseSwapsSolver(WANDA, rounds=200, candidates=16).solve(problem)
    gram = problem.gram.value
    for weight, gone in zip(problem.weight.double(), found.mask):
        least = (weight * gone) @ gram @ (weight * gone)
        for leaving, coming in product((~gone).nonzero().flatten().tolist(), gone.nonzero().flatten().tolist()):
            if leaving // group == coming // group:
                other = gone.clone()
                other[leaving], other[coming] = True, False
                assert (weight * other) @ gram @ (weight * other) >= least * (1 - 1e-5)


def test_of_equal_candidates_those_with_the_lowest_index_are_looked_at():
    """`topk` takes any of them, and on another device others."""
    values = torch.full((3, 5000), 2.0)
    values[1, 4000] = 1.0
    values[2, ::2] = torch.inf
    found = _places_of_lowest(values, 3)
    assert found.tolist() == [[0, 1, 2], [0, 1, 4000], [1, 3, 5]]


def test_the_first_exchange_is_the_best_of_all(make_problem):
    problem = make_problem("0.5", rows=1, columns=12)
    start = MaskSolver(MagnitudeScorer())
    begun, gram, weight = start.solve(problem).mask[0], problem.gram.value, problem.weight[0].double()
    losses = []
    for leaving, coming in product((~begun).nonzero().flatten().tolist(), begun.nonzero().flatten().tolist()):
        other = begun.clone()
        other[leaving], other[coming] = True, False
        losses.append(((weight * other) @ gram @ (weight * other)).item())
    found = SparseSwapsSolver(start, rounds=1, candidates=12).solve(problem)
    assert found.notes["exchanges"] == 1
    assert loss(found.weight, problem, 0.0) == pytest.approx(min(losses), rel=1e-5)


def test_few_candidates_find_nearly_what_all_find(make_problem):
    problem = make_problem("0.5", rows=16, columns=64)
    few, every = (SparseSwapsSolver(WANDA, 100, count).solve(problem).weight for count in (8, 64))
    assert loss(few, problem, 0.0) < 1.1 * loss(every, problem, 0.0)


def test_the_values_on_its_mask_can_be_refit(make_problem):
    problem = make_problem("0.7")
    chain = RefitSolver(SparseSwapsSolver()).starting_from(WANDA)
    assert torch.equal(chain.solve(problem).mask, SparseSwapsSolver(WANDA).solve(problem).mask)
    assert loss(chain.solve(problem).weight, problem) < loss(RefitSolver(WANDA).solve(problem).weight, problem)


def test_a_start_that_updates_weights_is_refused():
    with pytest.raises(ValueError, match="start"):
        SparseSwapsSolver(SparseGPTSolver())
    with pytest.raises(ValueError, match="SparseGPT"):
        SparseSwapsSolver().starting_from(SparseGPTSolver()).check(None)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"candidates": 0}])
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        SparseSwapsSolver(**options)
