"""Wanda: weights and activations (A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695)."""

from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.masking import zeroed
from lvlm_prune.methods.patterns import Pattern, SemiStructured, ZeroCount
from lvlm_prune.methods.products import running_sums
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.statistics import ChannelNorm, Statistic


class WandaScorer(Scorer):
    r"""Absolute weight times the norm of its input channel over the pool (arXiv 2306.11695; arXiv 2603.16001, Eq. 1).

    .. math:: S_{ij} = |W_{ij}| \, \lVert X_j \rVert_2

    Over a pool of real token weights this is the aggregated score of MLLM-Pruner (its Eq. 12).

    Args:
        variant: Each row loses its lowest scores up to the same share alpha of the row's sum, instead of the same
            number; alpha is found by bisection so that the whole matrix comes within 0.001 of the target (the "variant"
            of the released code). Unstructured only.

    Example:
        >>> norm = ChannelNorm(2)
        >>> norm.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.ones(2))
        >>> WandaScorer().score(torch.tensor([[-1.0, 2.0]]), norm)
        tensor([[5., 2.]])
    """

    statistic = ChannelNorm
    by_row = True

    def __init__(self, variant: bool = False) -> None:
        self.variant = variant

    def check(self, pattern: Pattern) -> None:
        """Refuse the variant with N:M."""
        if self.variant and isinstance(pattern, SemiStructured):
            raise ValueError(f"`variant` True: cannot be used with {pattern}")

    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance, float32 of shape (C_out, C_in)."""
        assert statistic is not None
        norms = statistic.squared_norms()
        assert norms is not None
        return weight.float().abs() * norms.float().sqrt()

    def prune(
        self, weight: Tensor, statistic: Statistic | None, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `Scorer.prune`."""
        if not self.variant:
            return super().prune(weight, statistic, sparsity, pattern)
        mask = cumulative_mask(self.score(weight, statistic), sparsity)
        return zeroed(weight, mask), mask

    def expected_zeros(self, shape: tuple[int, int], sparsity: float, pattern: Pattern) -> list[ZeroCount]:
        """Of the variant nothing is known beforehand but the total, and that only as near as bisection came."""
        return [] if self.variant else super().expected_zeros(shape, sparsity, pattern)

    def notes(self, statistic: Statistic | None, mask: Tensor, sparsity: float) -> dict[str, Any]:
        """`missed_target` where bisection ended farther from the target than 0.001."""
        if not self.variant:
            return {}
        missed = mask.float().mean().item() - sparsity
        return {"missed_target": missed} if abs(missed) > 0.001 else {}


def cumulative_mask(score: Tensor, sparsity: float) -> Tensor:
    """Of each row the lowest scores that together make up at most a share alpha of its sum; True where pruned.

    Alpha is bisected from 0.4 in [0, 0.8] until the share of pruned weights is within 0.001 of `sparsity`, or the
    interval is narrower than 0.001.

    Args:
        score: Importance, float32 of shape (C_out, C_in).
        sparsity: Share of the whole matrix to prune.

    Example:
        >>> cumulative_mask(torch.tensor([[1.0, 1.0, 1.0, 7.0], [2.0, 2.0, 2.0, 2.0]]), 0.5)
        tensor([[ True,  True,  True, False],
                [ True, False, False, False]])
    """
    ordered, columns = score.sort(dim=1, stable=True)
    cumulative, total = running_sums(ordered, dim=1), score.sum(dim=1, keepdim=True)
    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        goes = cumulative <= total * alpha
        share = goes.float().mean().item()
        if abs(share - sparsity) <= 0.001 or high - low < 0.001:
            return torch.zeros_like(goes).scatter_(1, columns, goes)
        low, high = (low, alpha) if share > sparsity else (alpha, high)
        alpha = (low + high) / 2
