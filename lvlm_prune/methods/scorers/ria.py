"""RIA: relative importance and activations (Plug-and-Play: An Efficient Post-training Pruning Method for LLMs)."""

import math

import torch
from torch import Tensor

from lvlm_prune.methods.patterns import Group
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.statistics import ChannelNorm, Statistic


class RIAScorer(Scorer):
    r"""Share of a weight in its row and in its column, times a power of the input norm (ICLR 2024, Plug-and-Play).

    .. math:: S_{ij} = \left( \frac{|W_{ij}|}{\sum_k |W_{ik}|} + \frac{|W_{ij}|}{\sum_k |W_{kj}|} \right)
              \lVert X_j \rVert_2^a

    No row and no column loses all of its weights, which Wanda's score allows.

    Args:
        exponent: a, 0.5 in the paper; 0 leaves the activations out.
        group: `row` compares the weights of one output row, as every other method here; `layer` those of the whole
            matrix, as the released code does.

    Raises:
        ValueError: `exponent` is negative or not finite, or `group` is unknown.

    Example:
        >>> norm = ChannelNorm(2)
        >>> norm.add(torch.tensor([[4.0, 1.0]]), torch.ones(1))
        >>> RIAScorer().score(torch.tensor([[-1.0, 3.0], [1.0, 1.0]]), norm)
        tensor([[1.5000, 1.5000],
                [2.0000, 0.7500]])
    """

    statistic = ChannelNorm

    def __init__(self, exponent: float = 0.5, group: Group = "row") -> None:
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"`exponent` {exponent}: must be a finite number, 0 or larger")
        if group not in ("row", "layer"):
            raise ValueError(f"`group` {group}: must be `row` or `layer`")
        self.exponent, self.group = exponent, group

    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance, float32 of shape (C_out, C_in)."""
        assert statistic is not None
        norms = statistic.squared_norms()
        assert norms is not None
        magnitude = weight.float().abs()
        # A row or column of zeros has no shares to give: its weights score 0, not NaN.
        tiny = torch.finfo(torch.float32).tiny
        of_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
        of_column = magnitude / magnitude.sum(dim=0).clamp(min=tiny)
        return (of_row + of_column) * norms.sqrt().pow(self.exponent).float()
