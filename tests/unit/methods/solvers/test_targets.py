"""Another target, and other weights of tokens: against float64, and against the solver that gets the problem."""

from dataclasses import replace

import pytest
import torch

from lvlm_prune.methods.paired_statistics import ByModality, CrossGram
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.scorers import MagnitudeScorer, WandaScorer
from lvlm_prune.methods.solvers import (
    ALPSSolver,
    DenseTargetSolver,
    LinearProblem,
    RefitSolver,
    SparseGPTSolver,
    VisualWeightSolver,
)
from lvlm_prune.methods.statistics import Gram
from tests.unit.methods.solvers.conftest import CASES, best_on, damped

STARTS = [SparseGPTSolver(), ALPSSolver(), RefitSolver(WandaScorer().solver()), WandaScorer().solver()]


def target_of(problem: LinearProblem, damping: float = 0.01) -> torch.Tensor:
    """The weight whose outputs on the pruned model's inputs are nearest to the dense ones, in float64."""
    gram = damped(problem, damping)
    return problem.weight.double() @ torch.linalg.solve(gram, (gram + problem.statistic.drift).T).T


def distance(weight: torch.Tensor, problem: LinearProblem) -> float:
    """Squared distance of the outputs from those of the dense model, up to a constant."""
    weight, dense, gram = weight.double(), problem.weight.double(), problem.gram.value
    return (((weight @ gram) * weight).sum() - 2 * ((dense @ (gram + problem.statistic.drift)) * weight).sum()).item()


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_target_is_that_of_the_normal_equations(damping, make_problem):
    problem = make_problem("0.5", drift=0.3)
    found = DenseTargetSolver(SparseGPTSolver(), damping=damping).changed(problem)
    torch.testing.assert_close(found.weight.double(), target_of(problem, damping), rtol=1e-4, atol=1e-5)
    half = DenseTargetSolver(SparseGPTSolver(), share=0.5, damping=damping).changed(problem).weight
    torch.testing.assert_close(half, (found.weight + problem.weight) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", STARTS, ids=lambda start: type(start).__name__)
def test_outputs_come_nearer_to_the_dense_models(case, start, make_problem):
    problem = make_problem(case, drift=0.3)
    own, nearer = start.solve(problem), DenseTargetSolver(start).solve(problem)
    assert distance(nearer.weight, problem) < distance(own.weight, problem)
    assert not nearer.weight[nearer.mask].any()


def test_values_are_the_best_that_the_mask_allows(make_problem):
    problem = make_problem("0.5", drift=0.3)
    found = DenseTargetSolver(RefitSolver(WandaScorer().solver(), tolerance=1e-6)).solve(problem)
    best = best_on(found.mask, replace(problem, weight=target_of(problem)))
    torch.testing.assert_close(found.weight.double(), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: type(start).__name__)
def test_without_drift_it_is_the_other_solver(start, make_problem):
    problem = make_problem("0.5")
    assert torch.equal(DenseTargetSolver(start).solve(problem).weight, start.solve(problem).weight)


def test_weights_of_two_bytes_stay_such(make_problem):
    problem = make_problem("0.5", drift=0.3)
    problem = replace(problem, weight=problem.weight.bfloat16())
    found = DenseTargetSolver(ALPSSolver()).solve(problem)
    assert found.weight.dtype == torch.bfloat16
    assert (found.weight == 0).sum() >= found.mask.sum()


def tokens(count: int = 200, channels: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, generator=generator), torch.rand(count, generator=generator) < 0.7


@pytest.mark.parametrize("visual_weight", [0.0, 0.3, 1.0, 4.0])
def test_a_visual_token_counts_as_much_as_asked(visual_weight):
    inputs, visual = tokens()
    apart, together = ByModality.of(Gram)(16), Gram(16)
    apart.add(inputs, torch.ones(200, dtype=torch.bool), visual=visual)
    together.add(inputs, torch.where(visual, visual_weight**0.5, 1.0))
    torch.testing.assert_close(apart.weighted(visual_weight).value, together.value, rtol=1e-5, atol=1e-4)
    problem = LinearProblem(torch.randn(8, 16, generator=torch.Generator().manual_seed(2)), apart, 0.5, Unstructured())
    found = VisualWeightSolver(SparseGPTSolver(), visual_weight).solve(problem)
    expected = SparseGPTSolver().solve(replace(problem, statistic=together))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-4)


def test_linears_of_a_site_share_what_is_put_together():
    inputs, visual = tokens()
    sums = ByModality.of(CrossGram)(16)
    sums.add(inputs, torch.ones(200), dense=inputs + 1, visual=visual)
    first = sums.weighted(0.5)
    assert sums.weighted(0.5) is first
    sums.add(inputs, torch.ones(200), visual=visual)
    assert sums.weighted(0.5) is not first
    assert isinstance(first, CrossGram)
    assert first.drift.any()


def test_a_survey_weighs_tokens_as_the_run_does():
    inputs, visual = tokens()
    sums = ByModality.of(Gram)(16)
    sums.add(inputs, torch.ones(200), visual=visual)
    problem = LinearProblem(torch.randn(8, 16, generator=torch.Generator().manual_seed(2)), sums, 0.5, Unstructured())
    solver = VisualWeightSolver(ALPSSolver(), 0.0)
    expected = SparseGPTSolver().solve(replace(problem, statistic=sums.others))
    assert torch.equal(solver.quick().solve(problem).weight, expected.weight)


def test_the_solver_that_does_the_work_is_found_through_all_others():
    assert type(VisualWeightSolver(DenseTargetSolver(ALPSSolver())).innermost) is ALPSSolver
    assert type(SparseGPTSolver().innermost) is SparseGPTSolver


def test_what_cannot_be_chained_is_refused():
    pattern = Unstructured()
    with pytest.raises(ValueError, match="`start` VisualWeightSolver: weighs tokens itself"):
        DenseTargetSolver(VisualWeightSolver(ALPSSolver())).check(pattern)
    with pytest.raises(ValueError, match="`start` MaskSolver: looks at no calibration token"):
        VisualWeightSolver(MagnitudeScorer().solver()).check(pattern)
    with pytest.raises(ValueError, match="`visual_weight` -1"):
        VisualWeightSolver(ALPSSolver(), -1)
    VisualWeightSolver(DenseTargetSolver(ALPSSolver())).check(pattern)
