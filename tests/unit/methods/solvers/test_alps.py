"""ALPS finds masks and values whose loss is near the least there is, and says what it met."""

from itertools import combinations

import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured, Unstructured
from lvlm_prune.methods.solvers import ALPSSolver, RefitSolver, SparseGPTSolver
from tests.unit.methods.solvers.conftest import CASES, best_on, damped, loss


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


def admm(problem, relaxation, schedule):
    """The published iteration as its equations stand, in float64, with the mask after each; D starts as W."""
    gram = damped(problem)
    lengths = gram.diagonal().sqrt()
    gram, weight = gram / lengths / lengths[:, None], problem.weight.double() * lengths
    keep = lambda values: values.masked_fill(problem.pattern.mask(values.abs().float(), problem.sparsity, "layer"), 0.0)  # noqa: E731
    sparse, dual = keep(weight), weight - keep(weight)
    for number, rho in enumerate(schedule):
        if number == 0:
            dual = dual * rho
            continue
        right = weight @ gram - dual + rho * sparse
        free = right @ torch.linalg.inv(gram + rho * torch.eye(len(gram)).double())
        moved = relaxation * free + (1 - relaxation) * sparse
        sparse, dual = keep(moved + dual / rho), dual + rho * (moved - keep(moved + dual / rho))
    return sparse == 0


@pytest.mark.parametrize("case", CASES)
def test_the_iteration_is_the_published_one(case, make_problem):
    """Three iterations at the first rho: the mask is that of the equations as they stand."""
    problem = make_problem(case, rows=24, columns=64)
    found = ALPSSolver(iterations=3, schedule="paper").solve(problem).mask
    assert (found != admm(problem, 1.0, [0.1] * 3)).float().mean() < 0.002


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("iterations", "most"), [(None, 1.15), (16, 1.1)])
def test_the_fast_schedule_is_near_a_long_run(iterations, most, case, make_problem):
    """And nearer with more iterations than by default, which are for speed."""
    problem = make_problem(case, rows=32, columns=96)
    long = loss(ALPSSolver(schedule="paper").solve(problem).weight, problem)
    assert loss(ALPSSolver(iterations).solve(problem).weight, problem) <= most * long


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


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"iterations": 2**31}, {"schedule": "slow"}, {"damping": -0.1}, {"damping": 1e308}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        ALPSSolver(**options)
