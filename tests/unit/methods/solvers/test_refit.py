"""A refit is the least squares solution of its mask, row by row."""

import pytest
import torch

from lvlm_prune.methods.scorers import MagnitudeScorer, MaskSolver, WandaScorer
from lvlm_prune.methods.solvers import RefitSolver, SparseGPTSolver
from tests.unit.methods.solvers.conftest import CASES, best_on, loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", [MaskSolver(MagnitudeScorer()), SparseGPTSolver()])
def test_the_solution_of_the_normal_equations_of_each_row(case, start, make_problem):
    problem = make_problem(case)
    found = RefitSolver(start, tolerance=1e-7).solve(problem)
    assert torch.equal(found.mask, start.solve(problem).mask)
    torch.testing.assert_close(found.weight.double(), best_on(found.mask, problem), rtol=1e-5, atol=1e-6)
    assert "residual" not in found.notes


@pytest.mark.parametrize("case", CASES)
def test_no_other_values_on_the_mask_are_better(case, make_problem):
    problem = make_problem(case)
    found = RefitSolver(MaskSolver(MagnitudeScorer())).solve(problem)
    least = loss(found.weight, problem)
    assert least < 0.9 * loss(MaskSolver(MagnitudeScorer()).solve(problem).weight, problem)
    for seed in range(20):
        change = 0.01 * torch.randn(found.weight.shape, generator=torch.Generator().manual_seed(seed))
        assert loss(found.weight + change.masked_fill(found.mask, 0.0), problem) > least


def test_it_makes_up_for_the_columns_order_that_sparsegpt_follows(make_problem):
    problem = make_problem("0.7", columns=64)
    assert loss(RefitSolver(SparseGPTSolver()).solve(problem).weight, problem) < loss(
        SparseGPTSolver().solve(problem).weight, problem
    )


def test_a_mask_that_no_scorer_named_is_that_of_the_scorers_own_solver(make_problem):
    problem = make_problem()
    own = MaskSolver(MagnitudeScorer())
    assert torch.equal(RefitSolver().starting_from(own).solve(problem).weight, RefitSolver(own).solve(problem).weight)
    given = RefitSolver(SparseGPTSolver())
    assert given.starting_from(own) is given


def test_a_nearly_singular_gram_matrix_is_reported(make_problem):
    """Fewer tokens than channels and no damping: the products with H run out before the residual is small."""
    problem = make_problem(tokens=8)
    solver = RefitSolver(MaskSolver(MagnitudeScorer()), damping=0.0, iterations=2)
    notes = solver.solve(problem).notes
    assert notes["residual"] > 1e-5
    assert notes["singular"]
    line = solver.summary({"layers.0.up": notes, "layers.1.up": {}})
    assert "nearly singular Gram matrix at 1 Linears" in line
    assert "not exact at 1 Linears" in line
    assert "layers.0.up" in line


def test_dead_channels_are_reported_and_keep_nothing_from_being_solved(make_problem):
    for damping in (0.0, 0.01):
        found = RefitSolver(MaskSolver(MagnitudeScorer()), damping=damping).solve(make_problem(dead=3))
        assert found.notes["dead_columns"] == 3
        assert torch.isfinite(found.weight).all()


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"tolerance": 0.0}, {"damping": -1.0}, {"damping": float("nan")}]
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        RefitSolver(**options)


def test_bytes_are_those_of_any_start(make_problem):
    """Wanda sees the diagonal of the Gram matrix where the refit needs all of it."""
    found = RefitSolver(MaskSolver(WandaScorer())).solve(make_problem())
    assert loss(found.weight, make_problem()) < loss(
        MaskSolver(WandaScorer()).solve(make_problem()).weight, make_problem()
    )
