"""`check_plugin` finds plugins that change what is not theirs, or say of themselves or their sums what is not so."""

import re

import pytest
import torch

from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Selection, Solution, Solver
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.pools import TextOnlyPool
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from lvlm_prune.methods.testing import PluginFault, check_plugin


class Magnitude(Scorer):
    def score(self, weight, statistic):
        return weight.float().abs()


class MagnitudeSolver(Solver):
    statistic, updates_weights, noted = None, False, {}

    def solve(self, problem):
        mask = torch.zeros_like(problem.weight, dtype=torch.bool)
        if problem.sparsity > 0:
            mask = problem.pattern.mask(problem.weight.float().abs(), problem.sparsity, self.group)
        return Solution(problem.weight.masked_fill(mask, 0.0), mask, self.noted)


class Uniform(Allocation):
    def allocate(self, shapes, sparsity):
        return dict.fromkeys(shapes, sparsity)


class PositiveSums(MagnitudeSolver):
    statistic = Gram

    def solve(self, problem):
        problem.statistic.tensors()[0].clamp_(min=0.0)
        return super().solve(problem)


class NaNNotes(MagnitudeSolver):
    noted = {"damping": float("nan")}


class AllRowsScore(MagnitudeSolver):
    def score(self, problem, rows):
        return problem.weight.float().abs()


class VagueSolver(MagnitudeSolver):
    def check(self, pattern):
        if str(pattern) == "2:4":
            raise ValueError("not with this pattern")


class TakesNothing(MagnitudeSolver):
    def check(self, pattern):
        raise ValueError(f"`pattern` {pattern}: not with this solver")


class Refilling(MagnitudeSolver):
    updates_weights = True

    def keeps_zeros(self):
        return True

    def solve(self, problem):
        solution = super().solve(problem)
        return Solution(solution.weight.where(solution.mask | (solution.weight != 0), 1.0), solution.mask)


class RectifyingSaliency(Saliency):
    def __call__(self, tokens):
        return tokens.hidden_out.clamp_(min=0.0)[tokens.visual].float().norm(dim=-1)


class RectifyingPool(TextOnlyPool):
    def select(self, tokens, linear=None):
        tokens.hidden_in.clamp_(min=0.0)
        return super().select(tokens, linear)


class CountsElsewhere(Pool):
    def select(self, tokens, linear=None):
        return Selection(tokens.text, counted=slice(0, 3))


class TwoMinds(Pool):
    per_linear = True

    def select(self, tokens, linear=None):
        return Selection(tokens.text)

    def select_each(self, tokens, linears):
        return {linear: Selection(tokens.visual) for linear in linears}


class ScalesTheModel(Uniform):
    wants_survey = True

    def survey_block_start(self, block, linears, remaining):
        for linear in linears.values():
            linear.weight.data.mul_(1.5)


class EmptiesShapes(Uniform):
    def allocate(self, shapes, sparsity):
        return {name: sparsity for name in list(shapes) if shapes.pop(name)}


class Unplaced(ChannelNorm):
    def __init__(self, channels, device="cpu"):
        super().__init__(channels)


class Norms(ChannelNorm):
    def squared_norms(self):
        return self.value.sqrt()


class WrongEnergy(ChannelNorm):
    def output_energy(self, weight):
        return weight.abs().sum(0).double() @ self.value


class NamedStatistic(Magnitude):
    statistic = "Gram"


class ColumnGroup(Magnitude):
    group = "column"


class TextFlag(Magnitude):
    by_row = "no"


class TextNeeds(RectifyingSaliency):
    needs = "outputs"


class MisspeltNeeds(Uniform):
    wants_survey, survey_needs = True, frozenset({"attention_lst"})


class Highest(Unstructured):
    def mask(self, score, sparsity, group="row"):
        return super().mask(-score, sparsity, group)


class WrongProduct(Scorer):
    def score(self, weight, statistic):
        return weight.float() @ torch.ones(7)


class OwnGradient(Scorer):
    def score(self, weight, statistic):
        own = weight.float().clone().requires_grad_()
        own.square().sum().backward()
        return own.grad.abs()


class EmptyMaximum(Saliency):
    def __call__(self, tokens):
        norms = tokens.hidden_out[tokens.visual].float().norm(dim=-1)
        return norms / norms.max()


WRONG = {
    PositiveSums: "PositiveSums.solve: changes `statistic`",
    NaNNotes: "NaNNotes.solve, notes: .* is no plain data",
    AllRowsScore: r"AllRowsScore.score: float32 of shape \(8, 24\), expected float32 of shape \(3, 24\)",
    VagueSolver: "VagueSolver.check: 'not with this pattern'; a refusal begins with the argument in backticks",
    TakesNothing: "TakesNothing.check: refuses all patterns",
    Refilling: "Refilling.solve: fills weights that were zero, but `keeps_zeros` is True",
    RectifyingSaliency: "RectifyingSaliency.__call__: changes `hidden_out`",
    RectifyingPool: "RectifyingPool.select: changes `hidden_in`",
    CountsElsewhere: "CountsElsewhere.select: `counted` is not where the weights are not zero",
    TwoMinds: "TwoMinds.select_each: another answer than `select`",
    ScalesTheModel: "ScalesTheModel.survey_block_start: changes `linears`",
    EmptiesShapes: "EmptiesShapes.allocate: changes `shapes`",
    Unplaced: "Unplaced.tensors: on cpu, whatever `device` says",
    Norms: "Norms.squared_norms: .* expected the sum of the squared weighted inputs",
    WrongEnergy: r"WrongEnergy.output_energy: .* \(`energy` is diagonal\)",
    NamedStatistic: "NamedStatistic.statistic: 'Gram', expected the class of a Statistic, or None",
    ColumnGroup: "ColumnGroup.group: 'column', expected row or layer",
    TextFlag: "TextFlag.by_row: 'no', expected bool",
    TextNeeds: "TextNeeds.needs: 'outputs', expected a set of some of",
    MisspeltNeeds: "MisspeltNeeds.survey_needs: .*attention_lst.*, expected a set of some of",
    Highest: "Highest.mask: a score goes that is higher than one that stays beside it",
    WrongProduct: "WrongProduct: fails on a small example .RuntimeError",
    OwnGradient: "OwnGradient: fails on a small example .RuntimeError",
    EmptyMaximum: "EmptyMaximum: fails on a small sample .RuntimeError",
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_is_wrong_is_said_in_one_line(kind):
    with pytest.raises(PluginFault) as fault:
        check_plugin(kind if kind in (Unplaced, Norms, WrongEnergy) else kind())
    assert re.match(WRONG[kind], str(fault.value))
    assert "\n" not in str(fault.value)
