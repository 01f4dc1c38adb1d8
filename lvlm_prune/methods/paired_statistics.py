"""Sums that know more of a token than its input: what the dense model feeds the same site, and whether it is visual.

site of the pruned model   x ──┬─► H = sum of x x^T           what a solver needs for the pruned model's own outputs
site of the dense model    y ──┴─► D = sum of (y - x) x^T     and for those of the dense one
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lvlm_prune.methods.products import HELD_PRODUCTS, stripes
from lvlm_prune.methods.statistics import Gram, Statistic, counted_tokens, weighted_tokens


class CrossGram(Gram):
    r"""Products of each two input channels, and products with what the pruning of earlier weights has changed.

    .. math:: H = \sum_t w_t^2 \, x_t x_t^T, \qquad D = \sum_t w_t^2 \, (y_t - x_t) \, x_t^T

    for inputs x of the pruned model and y of the dense one. A difference, so that nothing is lost to rounding where
    both are nearly the same; where they are the same it stays zero.

    Example:
        >>> sums = CrossGram(2)
        >>> sums.add(torch.tensor([[3.0, 1.0]]), torch.ones(1), dense=torch.tensor([[4.0, 1.0]]))
        >>> sums.drift
        tensor([[3., 1.],
                [0., 0.]], dtype=torch.float64)
    """

    takes_dense = True

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(channels, device)
        self.drift = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        """D, float64 of shape (channels, channels): the row is a channel of the difference, the column one of x."""

    def add(
        self,
        inputs: Tensor,
        weights: Tensor,
        counted: Tensor | slice | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Add one sample's tokens.

        Args:
            inputs: Input of the site, shape (T, channels), any float dtype.
            weights: Weight of each token, shape (T,), bool or float.
            counted: Where the weight is not zero, as indices or a slice; looked for by default.
            dense: What the dense model feeds the site, of the same shape; None where it is the same.
        """
        if counted is None:
            counted = counted_tokens(weights)
        super().add(inputs, weights, counted)
        if dense is None:
            return
        tokens = weighted_tokens(inputs, weights, counted)
        if len(tokens):
            change = weighted_tokens(dense, weights, counted) - tokens
            for rows in stripes(inputs.shape[1]):
                self.drift[rows] += change[:, rows].T @ tokens

    @classmethod
    def nbytes(cls, channels: int) -> int:
        """See `Statistic.nbytes`: those of `Gram`, and the products with the difference."""
        return Gram.nbytes(channels) + 8 * channels**2

    @staticmethod
    def adding_bytes(tokens: int, channels: int, itemsize: int) -> int:
        """See `Statistic.adding_bytes`: the tokens of both models, and products that are to be added."""
        return tokens * channels * 4 * (4 if itemsize < 4 else 3) + 4 * min(channels**2, HELD_PRODUCTS)

    def tensors(self) -> list[Tensor]:
        """Both sums, float64 of shape (channels, channels)."""
        return [*super().tensors(), self.drift]


class ByModality(Statistic):
    """Any sum over tokens, once over the visual ones and once over the others; they are put together afterwards.

    The sums have to be linear in the squares of the tokens' weights, as those of this package are.

    Args:
        channels: Number of input channels of the site.
        device: Where the sums live.
        kind: Class of the statistic that is kept twice.

    Example:
        >>> sums = ByModality.of(Gram)(1)
        >>> sums.add(torch.tensor([[1.0], [2.0]]), torch.ones(2), visual=torch.tensor([False, True]))
        >>> sums.weighted(0.5).value
        tensor([[3.]], dtype=torch.float64)
    """

    takes_visual: ClassVar[bool] = True
    energy: ClassVar[str] = Gram.energy

    def __init__(self, channels: int, device: torch.device | str = "cpu", kind: type[Statistic] = Gram) -> None:
        self._channels, self._device, self._kind = channels, device, kind
        self.others, self.visual = kind(channels, device), kind(channels, device)
        self._found: tuple[tuple[object, ...], Statistic] | None = None

    @classmethod
    @cache
    def of(cls, kind: type[Statistic]) -> type[ByModality]:
        """The class of such sums of a kind, the same one each time, which takes what that kind takes besides.

        Args:
            kind: Class of the statistic that is kept twice.
        """
        made = cls.with_options(kind=kind)
        made.takes_dense, made.energy = kind.takes_dense, kind.energy
        made.nbytes = classmethod(lambda _, channels: 3 * kind.nbytes(channels))  # type: ignore[method-assign,assignment]
        made.adding_bytes = staticmethod(kind.adding_bytes)  # type: ignore[method-assign]
        return made

    def add(self, inputs: Tensor, weights: Tensor, dense: Tensor | None = None, visual: Tensor | None = None) -> None:
        """Add one sample's tokens.

        Args:
            inputs: Input of the site, shape (T, channels), any float dtype.
            weights: Weight of each token, shape (T,), bool or float.
            dense: What the dense model feeds the site; only where the kind takes it.
            visual: Which tokens are visual, bool of shape (T,); none of them by default.
        """
        also = {"dense": dense} if self._kind.takes_dense else {}
        if visual is None:
            self.others.add(inputs, weights, **also)
            return
        self.others.add(inputs, weights * ~visual, **also)
        self.visual.add(inputs, weights * visual, **also)

    def tensors(self) -> list[Tensor]:
        """The sums over the others, then those over the visual tokens."""
        return [*self.others.tensors(), *self.visual.tensors()]

    def weighted(self, visual: float) -> Statistic:
        """Both together, a visual token counting as so many others.

        Args:
            visual: Weight of the visual tokens' sums, 0 or larger.
        """
        key = (visual, *(part._version for part in self.tensors()))
        if self._found is None or self._found[0] != key:
            together = self._kind(self._channels, self._device)
            for whole, other, seen in zip(together.tensors(), self.others.tensors(), self.visual.tensors()):
                whole.copy_(other).add_(seen, alpha=visual)
            self._found = (key, together)
        return self._found[1]

    def squared_norms(self) -> Tensor | None:
        """Squared norm of each channel over all tokens."""
        return _sum(self.others.squared_norms(), self.visual.squared_norms())

    def output_energy(self, weight: Tensor) -> Tensor | None:
        """Squared norm of what a weight makes of all tokens."""
        return _sum(self.others.output_energy(weight), self.visual.output_energy(weight))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second
