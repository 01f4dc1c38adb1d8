"""Magnitude: the oldest criterion, and the only one that needs no data."""

from torch import Tensor

from lvlm_prune.methods.patterns import Group
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.statistics import Statistic


class MagnitudeScorer(Scorer):
    r"""The absolute value of the weight.

    .. math:: S_{ij} = |W_{ij}|

    Args:
        group: `row` compares the weights of one output row, `layer` those of the whole matrix as Wanda's repository
            does. (Its released rule removes one weight too many; here it is exactly `floor(n * sparsity)`.)

    Example:
        >>> import torch
        >>> MagnitudeScorer().score(torch.tensor([[-3.0, 1.0]]), None)
        tensor([[3., 1.]])
    """

    by_row = True

    def __init__(self, group: Group = "row") -> None:
        if group not in ("row", "layer"):
            raise ValueError(f"`group` {group}: must be `row` or `layer`")
        self.group = group

    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Absolute value, float32 of shape (C_out, C_in)."""
        return weight.float().abs()
