"""Sums over calibration tokens that a scorer needs of a Linear's input.

A statistic belongs to an input *site*: Linears that are fed by the same tensor (q/k/v, gate/up) share one.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Statistic(ABC):
    """A sum over calibration tokens: float32 inside one sample, float64 over samples.

    Args:
        channels: Number of input channels of the site.
        device: Where the sums live.
    """

    @abstractmethod
    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None: ...

    @abstractmethod
    def add(self, inputs: Tensor, weights: Tensor) -> None:
        """Add one sample's tokens.

        Args:
            inputs: Input of the site, shape (T, channels), any float dtype.
            weights: Weight of each token, shape (T,), bool or float.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The float64 sums themselves, to be summed over processes in place."""


class ChannelNorm(Statistic):
    r"""Squared norm of each input channel over the pool.

    .. math:: \sum_t w_t^2 x_{tj}^2

    Example:
        >>> norm = ChannelNorm(2)
        >>> norm.add(torch.tensor([[3.0, 1.0], [4.0, 1.0], [9.0, 9.0]]), torch.tensor([True, True, False]))
        >>> norm.value.sqrt()
        tensor([5.0000, 1.4142], dtype=torch.float64)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, weights: Tensor) -> None:
        """Add `w_t^2 x_tj^2` summed over the tokens of one sample."""
        self.value += weights.float().square() @ inputs.float().square()

    def tensors(self) -> list[Tensor]:
        """The squared norms, float64 of shape (channels,)."""
        return [self.value]
