"""Wanda: weights and activations (A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695)."""

from torch import Tensor

from lvlm_prune.scorers.base import Scorer
from lvlm_prune.statistics import ChannelNorm, Statistic


class WandaScorer(Scorer):
    r"""Absolute weight times the norm of its input channel over the pool (arXiv 2306.11695; arXiv 2603.16001, Eq. 1).

    .. math:: S_{ij} = |W_{ij}| \, \lVert X_j \rVert_2

    Example:
        >>> import torch
        >>> norm = ChannelNorm(2)
        >>> norm.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.ones(2))
        >>> WandaScorer().score(torch.tensor([[-1.0, 2.0]]), norm)
        tensor([[5., 2.]])
    """

    statistic = ChannelNorm

    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance, float32 of shape (C_out, C_in)."""
        assert isinstance(statistic, ChannelNorm)
        return weight.float().abs() * statistic.value.float().sqrt()
