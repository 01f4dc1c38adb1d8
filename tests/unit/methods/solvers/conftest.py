"""Linears with the tokens that feed them, and the loss in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lvlm_prune.methods.paired_statistics import CrossGram
from lvlm_prune.methods.patterns import Pattern, SemiStructured, Unstructured, parse_pattern
from lvlm_prune.methods.solvers import LinearProblem

CASES = ["0.5", "0.7", "2:4"]


@pytest.fixture
def make_problem() -> Callable[..., LinearProblem]:
    """`make_problem("0.5")` has correlated channels of unequal strength, as the inputs of real Linears are.

    With `drift` the dense model's inputs are others, by so much of their strength.
    """

    def make(
        case: str = "0.5",
        rows: int = 12,
        columns: int = 32,
        tokens: int = 300,
        seed: int = 0,
        dead: int = 0,
        drift: float = 0.0,
    ) -> LinearProblem:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
        strengths = torch.logspace(-0.7, 0.7, columns)[torch.randperm(columns, generator=generator)]
        inputs = torch.randn(tokens, columns, generator=generator) @ mixing * strengths
        inputs[:, :dead] = 0
        gram = CrossGram(columns)
        change = torch.randn(columns, columns, generator=torch.Generator().manual_seed(9)) / columns**0.5
        dense = inputs + drift * (inputs / strengths) @ change * strengths
        gram.add(inputs, torch.ones(tokens, dtype=torch.bool), dense=dense if drift else None)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        pattern: Pattern = parse_pattern(case) if ":" in case else Unstructured()
        sparsity = pattern.sparsity if isinstance(pattern, SemiStructured) else float(case)
        return LinearProblem(weight, gram, sparsity, pattern, name="layers.0.mlp.up_proj")

    return make


def damped(problem: LinearProblem, damping: float = 0.01) -> Tensor:
    """The Gram matrix in float64 with a share of its mean diagonal on the diagonal."""
    gram = problem.gram.value
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(weight: Tensor, problem: LinearProblem, damping: float = 0.01) -> float:
    """Squared distance of the outputs from the dense ones, damping included, in float64."""
    error = weight.double() - problem.weight.double()
    return ((error @ damped(problem, damping)) * error).sum().item()


def best_on(mask: Tensor, problem: LinearProblem, damping: float = 0.01) -> Tensor:
    """The normal equations of each row, solved by themselves in float64."""
    gram, weight = damped(problem, damping), problem.weight.double()
    found = torch.zeros_like(weight)
    for row, gone in enumerate(mask):
        kept = (~gone).nonzero().flatten()
        found[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
    return found
