"""Sums over calibration tokens that a scorer needs of a Linear's input.

A statistic belongs to an input *site*: Linears that are fed by the same tensor (q/k/v, gate/up) share one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partialmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lvlm_prune.methods.products import HELD_PRODUCTS, invert_lower_, stripes


class Statistic(ABC):
    """A sum over calibration tokens: float32 inside one sample, float64 over samples.

    Args:
        channels: Number of input channels of the site.
        device: Where the inputs come from, and the sums are kept.
    """

    energy: ClassVar[str] = "diagonal"
    """What `output_energy` is: `exact`, or `diagonal`, which takes channels for uncorrelated."""
    takes_counted: ClassVar[bool] = False
    """True where `add` also takes `counted`, see `Selection`: it leaves out tokens that do not count."""
    takes_dense: ClassVar[bool] = False
    """True where `add` also takes `dense`: what the dense model feeds the site for the same tokens, of the inputs'
    shape. The samples go through the dense model beside the pruned one then; None where both are fed the same."""
    takes_visual: ClassVar[bool] = False
    """True where `add` also takes `visual`: which tokens are visual, bool of shape (T,)."""

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
        """The float64 sums themselves, to be summed over processes in place; the first has an entry per channel."""

    @classmethod
    def with_options(cls, **options: Any) -> type[Self]:
        """The same statistic, whose constructor gets these options too; a solver says so in its `statistic`.

        Args:
            options: Of the constructor, besides channels and device.

        Example:
            >>> class Power(Statistic):
            ...     def __init__(self, channels, device="cpu", exponent=1.0):
            ...         self.value, self.exponent = torch.zeros(channels, dtype=torch.float64, device=device), exponent
            ...     def add(self, inputs, weights):
            ...         self.value += weights.float().square() @ inputs.float().abs() ** self.exponent
            ...     def tensors(self):
            ...         return [self.value]
            >>> Power.with_options(exponent=4.0)(2).exponent
            4.0
        """
        return type(cls.__name__, (cls,), {"__init__": partialmethod(cls.__init__, **options), "__doc__": cls.__doc__})

    @classmethod
    def nbytes(cls, channels: int) -> int:
        """Bytes of the sums over a site of so many channels, for the plan; not required."""
        return sum(part.nbytes for part in cls(channels, device="meta").tensors())

    @staticmethod
    def adding_bytes(tokens: int, channels: int, itemsize: int) -> int:
        """Bytes that `add` takes for a sample of so many tokens, for the plan.

        Args:
            tokens: Number of tokens that are added at once.
            channels: Number of input channels of the site.
            itemsize: Bytes of one activation.
        """
        return tokens * channels * (4 if itemsize == 4 else 8)

    def squared_norms(self) -> Tensor | None:
        """Squared norm of each channel over the pool, float64 of shape (channels,); None where it is not known."""
        return None

    def output_energy(self, weight: Tensor) -> Tensor | None:
        r"""Squared norm of what a weight makes of the pool, as far as the sums tell; float64 without dimension.

        .. math:: \sum_t w_t^2 \lVert W x_t \rVert^2 \approx \sum_{ij} W_{ij}^2 \sum_t w_t^2 x_{tj}^2

        Args:
            weight: float32 of shape (rows, channels).

        Returns:
            None where the squared norms are not known.
        """
        norms = self.squared_norms()
        return None if norms is None else weight.square().sum(dim=0).double() @ norms


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

    def squared_norms(self) -> Tensor:
        """Squared norm of each input channel, float64 of shape (channels,)."""
        return self.value


@dataclass(frozen=True)
class InverseFactor:
    """Cholesky factor of the inverse of a damped Gram matrix.

    Args:
        upper: Upper triangular U with U^T U = (H + damping)^-1, float32 of shape (channels, channels).
        dead: Channels that are zero in every token of the pool, bool of shape (channels,); U is diagonal there.
        dead_channels: Number of dead channels.
        damping: The share of the mean diagonal that was added, the asked one or the first larger one that sufficed.
    """

    upper: Tensor
    dead: Tensor
    dead_channels: int
    damping: float


class Gram(Statistic):
    r"""Products of each two input channels over the pool.

    .. math:: H = \sum_t w_t^2 \, x_t x_t^T

    Example:
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[3.0, 1.0], [4.0, 1.0], [9.0, 9.0]]), torch.tensor([True, True, False]))
        >>> gram.value
        tensor([[25.,  7.],
                [ 7.,  2.]], dtype=torch.float64)
    """

    energy = "exact"
    takes_counted = True

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        # Symmetric: only what is on and below the diagonal is summed up.
        self._lower = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._factors: dict[tuple[float, int], InverseFactor] = {}

    def add(self, inputs: Tensor, weights: Tensor, counted: Tensor | slice | None = None) -> None:
        """Add `w_t^2 x_t x_t^T` summed over the tokens of one sample.

        Args:
            inputs: Input of the site, shape (T, channels), any float dtype.
            weights: Weight of each token, shape (T,), bool or float.
            counted: Where the weight is not zero, as indices or a slice; looked for by default.
        """
        if counted is None:
            counted = counted_tokens(weights)
        tokens = weighted_tokens(inputs, weights, counted)
        if len(tokens):
            for rows in stripes(inputs.shape[1]):
                self._lower[rows, : rows.stop] += tokens[:, rows].T @ tokens[:, : rows.stop]

    @classmethod
    def nbytes(cls, channels: int) -> int:
        """See `Statistic.nbytes`: the products in float64, and the factor in float32."""
        return 12 * channels**2

    @staticmethod
    def adding_bytes(tokens: int, channels: int, itemsize: int) -> int:
        """See `Statistic.adding_bytes`: the tokens that count, in float32, and products that are to be added."""
        return tokens * channels * (itemsize if itemsize == 4 else itemsize + 4) + 4 * min(channels**2, HELD_PRODUCTS)

    @property
    def value(self) -> Tensor:
        """The products, float64 of shape (channels, channels)."""
        return self._lower.tril() + self._lower.tril(-1).T

    def tensors(self) -> list[Tensor]:
        """The products as they are summed up, float64 of shape (channels, channels): those below the diagonal count."""
        return [self._lower]

    def squared_norms(self) -> Tensor:
        """Squared norm of each input channel, the diagonal of H: float64 of shape (channels,)."""
        return self._lower.diagonal()

    def output_energy(self, weight: Tensor) -> Tensor:
        r"""Exactly :math:`\operatorname{tr} W H W^\top`."""
        diagonal = weight.square().sum(dim=0).double() @ self._lower.diagonal()
        below = diagonal.new_zeros(())
        for rows in stripes(weight.shape[1]):
            products = self._lower[rows, : rows.stop].float().tril(rows.start - 1)
            below += ((weight[:, rows] @ products) * weight[:, : rows.stop]).sum(dtype=torch.float64)
        return diagonal + 2 * below

    def scaled(self, factors: Tensor) -> Tensor:
        r"""The products between channels that are multiplied by a factor each, :math:`f_i H_{ij} f_j`.

        Args:
            factors: float64 of shape (channels,).

        Returns:
            Symmetric, float32 of shape (channels, channels).

        Example:
            >>> gram = Gram(2)
            >>> gram.add(torch.tensor([[3.0, 1.0]]), torch.ones(1))
            >>> gram.scaled(torch.tensor([1.0, 10.0]).double())
            tensor([[  9.,  30.],
                    [ 30., 100.]])
        """
        scaled = torch.empty_like(self._lower, dtype=torch.float32)
        for rows in stripes(len(factors)):
            products = self._lower[rows, : rows.stop] * factors[rows, None] * factors[: rows.stop]
            scaled[rows, : rows.stop] = products
            scaled[: rows.stop, rows] = products.T
            corner = products[:, rows.start :]
            scaled[rows, rows] = corner.tril() + corner.tril(-1).T
        return scaled

    def inverse_factor(self, damping: float) -> InverseFactor:
        r"""Upper Cholesky factor of the damped inverse, computed once for all Linears of the site.

        .. math:: U^T U = (H + \lambda \, \overline{\mathrm{diag}(H)} \, I)^{-1}

        Where the damped matrix is still singular within float32 (the precision of a sample's sums), lambda grows
        tenfold until it is not; the answer says so.

        Args:
            damping: Lambda, a share of the mean diagonal, 0 or larger.

        Raises:
            FloatingPointError: The sums are not finite, or all channels are zero, or damping takes them beyond float64.
        """
        # The version changes with every change of the sums, be it by `add` or by a sum over processes.
        key = (damping, self._lower._version)
        if key not in self._factors:
            self._factors = {key: self._factorise(damping)}
        return self._factors[key]

    def _factorise(self, damping: float) -> InverseFactor:
        diagonal = self._lower.diagonal()
        # One look at the device for all that is to be known, here and in the loop.
        dead = diagonal == 0
        mean, total, dead_channels = torch.stack([diagonal.mean(), self._lower.sum(), dead.sum().double()]).tolist()
        if not math.isfinite(total):
            raise FloatingPointError("NaN or infinity in the Gram matrix of the calibration tokens")
        if mean == 0:
            raise FloatingPointError("the Gram matrix is zero: no calibration token has a value that is not zero")
        share, failed = damping, torch.empty((), dtype=torch.int32, device=self._lower.device)
        while True:
            if not math.isfinite(share * mean):
                raise FloatingPointError(
                    f"a damping of {damping:g} makes the Gram matrix of the calibration tokens infinite"
                )
            # With rows and columns reversed, the lower factor L of H gives U at once: H = R R^T with R = L reversed,
            # so H^-1 = R^-T R^-1 and U = R^-1. One factorisation and one triangular inverse; H^-1 is never formed.
            # Reversed, what is below the diagonal comes to lie above it, and only what is below is looked at.
            # A wide matrix takes gigabytes: factor and inverse take its place.
            lower = self._lower.flip(0, 1).T
            damped = lower.diagonal().add_((share * mean + dead * mean).flip(0)).clone()
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
            smallest = (lower.diagonal().square() / damped).min()
            has_failed, smallest = torch.stack([failed.double(), smallest]).tolist()
            if not has_failed and smallest > torch.finfo(torch.float32).eps:
                break
            del lower
            share = max(10 * share, 1e-6)
        inverse = invert_lower_(lower)
        upper = torch.empty_like(inverse, dtype=torch.float32, memory_format=torch.contiguous_format)
        for rows in stripes(len(inverse)):
            upper[rows] = inverse[len(inverse) - rows.stop : len(inverse) - rows.start].flip(0, 1)
        return InverseFactor(upper, dead, int(dead_channels), share)


def counted_tokens(weights: Tensor) -> Tensor:
    """Which tokens have a weight, bool of shape (T,)."""
    return weights if weights.dtype == torch.bool else weights != 0


def weighted_tokens(inputs: Tensor, weights: Tensor, counted: Tensor | slice) -> Tensor:
    """The tokens that count, each times its weight, float32 of shape (n, channels).

    A product with them costs n * channels^2: what does not count is left out first.

    Args:
        inputs: Shape (T, channels), any float dtype.
        weights: Weight of each token, shape (T,), bool or float.
        counted: Where the weight is not zero, as mask, indices or slice.

    Returns:
        May be a view of the inputs: not to be changed.
    """
    tokens = inputs[counted].float()
    return tokens if weights.dtype == torch.bool else tokens * weights[counted].float()[:, None]
