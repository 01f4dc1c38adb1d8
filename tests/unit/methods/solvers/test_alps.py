"""ALPS finds masks and values whose loss is near the least there is, and says what it met."""

from itertools import combinations

import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured, Unstructured
from lvlm_prune.methods.solvers import ALPSSolver, RefitSolver, SparseGPTSolver
from tests.unit.methods.solvers.conftest import CASES, best_on, loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", ["fast", "paper"])
def test_the_loss_is_never_above_sparsegpts(case, seed, schedule, make_problem):
    problem = make_problem(case, rows=24, columns=64, seed=seed)
    found = ALPSSolver(schedule=schedule).solve(problem)
    assert loss(found.weight, problem) <= 1.01 * loss(SparseGPTSolver().solve(problem).weight, problem)


@pytest.mark.parametrize("seed", range(3))
def test_small_problems_against_the_best_of_all_masks(seed, make_problem):
    """One row of 10 weights, half of them to go: 252 masks, each with its own best values."""
    problem = make_problem("0.5", rows=1, columns=10, seed=seed)
    losses = []
    for kept in combinations(range(10), 5):
        mask = torch.ones(1, 10, dtype=torch.bool)
        mask[0, list(kept)] = False
        losses.append(loss(best_on(mask, problem), problem))
    losses.sort()
    found = loss(ALPSSolver(schedule="paper").solve(problem).weight, problem)
    assert found >= 0.9999 * losses[0]
    assert found <= losses[4]  # among the best five


@pytest.mark.parametrize("case", CASES)
def test_the_fast_schedule_is_near_a_long_run(case, make_problem):
    problem = make_problem(case, rows=32, columns=96)
    long = loss(ALPSSolver(schedule="paper").solve(problem).weight, problem)
    assert loss(ALPSSolver().solve(problem).weight, problem) <= 1.1 * long


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_nearly_the_best_ones_for_the_mask(case, make_problem):
    problem = make_problem(case)
    found = ALPSSolver().solve(problem)
    assert loss(found.weight, problem) <= 1.001 * loss(best_on(found.mask, problem), problem)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_as_many_weights_go_as_were_asked(case, dtype, make_problem):
    problem = make_problem(case)
    problem = type(problem)(problem.weight.to(dtype), problem.statistic, problem.sparsity, problem.pattern)
    found = ALPSSolver().solve(problem)
    assert found.weight.dtype == dtype
    assert int(found.mask.sum()) == int(problem.weight.numel() * problem.sparsity)
    assert (found.weight[found.mask] == 0).all()
    assert not torch.signbit(found.weight[found.weight == 0]).any()
    for count in ALPSSolver().expected_zeros((12, 32), problem.sparsity, problem.pattern):
        assert (count.of(found.weight) >= count.least).all()
    if isinstance(problem.pattern, SemiStructured):
        assert set(found.mask.unflatten(1, (-1, 4)).sum(dim=2).flatten().tolist()) == {2}


def test_a_run_of_float32_is_as_good_as_one_of_float64(make_problem, monkeypatch):
    problem = make_problem("0.6", rows=48, columns=128, tokens=100)  # fewer tokens than channels
    single = loss(ALPSSolver(schedule="paper").solve(problem).weight, problem)
    refit = loss(
        RefitSolver(ALPSSolver(schedule="paper"), iterations=1000, tolerance=1e-7).solve(problem).weight, problem
    )
    assert single <= 1.02 * refit


def test_dead_channels_and_a_nearly_singular_gram_matrix_are_reported(make_problem):
    assert ALPSSolver().solve(make_problem(dead=3)).notes == {"dead_columns": 3}
    singular = ALPSSolver(damping=0.0).solve(make_problem(tokens=8, dead=2))
    assert singular.notes == {"dead_columns": 2, "singular": True}
    assert torch.isfinite(singular.weight).all()
    assert "nearly singular Gram matrix at 1 Linears" in ALPSSolver().summary({"up": singular.notes, "down": {}})


def test_a_target_of_zero_leaves_the_weight_alone(make_problem):
    problem = make_problem("0.5")
    problem = type(problem)(problem.weight, problem.statistic, 0.0, Unstructured())
    found = ALPSSolver().solve(problem)
    assert torch.equal(found.weight, problem.weight)
    assert not found.mask.any()


def test_the_published_schedule_ends_where_nothing_changes(make_problem):
    notes = ALPSSolver(schedule="paper").solve(make_problem("0.5")).notes
    assert 10 < notes["iterations"] < 300


@pytest.mark.parametrize("options", [{"iterations": 0}, {"schedule": "slow"}, {"damping": -0.1}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        ALPSSolver(**options)
