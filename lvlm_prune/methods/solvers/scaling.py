"""A Gram matrix with a diagonal of ones: the same problem in units in which all channels are equally strong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.statistics import Gram

_MOST_DAMPING = 1e6

# A least eigenvalue that float32 tells from zero in a matrix of any size, with a diagonal of ones.
_CERTAINLY_REGULAR = 1e-4


class UnitDiagonal:
    r"""The damped Gram matrix scaled to a diagonal of ones, and weights in the same units.

    .. math:: \bar H = D^{-1} (H + \lambda \, \overline{\mathrm{diag}(H)} \, I) D^{-1}, \quad \bar W = W D, \quad
              D = \mathrm{diag}(H + \ldots)^{1/2}

    so that :math:`\operatorname{tr} \bar W \bar H \bar W^\top = \operatorname{tr} W (H + \ldots) W^\top`. It
    preconditions (Jacobi), and it makes one threshold right for all weights of a Linear (ALPS, arXiv 2406.07831).

    Args:
        gram: Products of input channels over the pool, H.
        damping: Lambda, a share of the mean diagonal.

    Attributes:
        gram: float32 of shape (C_in, C_in); ones on its diagonal, but zeros for dead channels where nothing is added.
        dead: Channels that are zero in every token of the pool, bool of shape (C_in,).

    Raises:
        FloatingPointError: The sums are not finite, or all channels are zero.

    Example:
        >>> sums = Gram(2)
        >>> sums.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.ones(2))
        >>> UnitDiagonal(sums, 0.0).gram
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]])
    """

    def __init__(self, gram: Gram, damping: float) -> None:
        diagonal = gram.squared_norms()
        if not torch.isfinite(diagonal.sum()):
            raise FloatingPointError("NaN or infinity in the Gram matrix of the calibration tokens")
        mean = diagonal.mean()
        if mean == 0:
            raise FloatingPointError("the Gram matrix is zero: no calibration token has a value that is not zero")
        self.dead = diagonal == 0
        lengths = (diagonal + damping * mean).sqrt()
        self._lengths = torch.where(lengths > 0, lengths, 1.0)
        # No eigenvalue is smaller than what is added on the diagonal.
        self._least = (damping * mean / self._lengths.square().max()).item()
        self.gram = gram.scaled(1 / self._lengths)
        self.gram.diagonal().copy_(lengths > 0)
        self._lengths = self._lengths.float()

    def weight(self, weight: Tensor) -> Tensor:
        """A weight in the scaled units, float32."""
        return weight.float() * self._lengths

    def unscaled(self, weight: Tensor) -> Tensor:
        """A weight in its own units again, float32."""
        return weight / self._lengths

    def notes(self) -> dict[str, Any]:
        """For the manifest, where it is so: the number of `dead_columns`, and `singular`.

        Singular within float32, the Gram matrix leaves some values open: they stay as near the dense ones as they can.
        """
        notes: dict[str, Any] = {}
        if bool(self.dead.any()):
            notes["dead_columns"] = int(self.dead.sum())
        if self._least > _CERTAINLY_REGULAR:
            return notes
        factor, failed = torch.linalg.cholesky_ex(self.gram[~self.dead][:, ~self.dead] if notes else self.gram)
        if failed or factor.diagonal().square().min() < torch.finfo(torch.float32).eps:
            notes["singular"] = True
        return notes


def singular_line(notes: Mapping[str, Mapping[str, Any]]) -> str:
    """One line about the Linears whose notes call their Gram matrix singular; empty where there are none."""
    names = [name for name, note in notes.items() if "singular" in note]
    if not names:
        return ""
    return f"nearly singular Gram matrix at {len(names)} Linears (the first is {names[0]}): more tokens or damping help"


def checked_damping(damping: float) -> float:
    """A share of the mean diagonal of a Gram matrix.

    Raises:
        ValueError: It is negative or not finite, or so large that nothing of the matrix is left in float32.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"`damping` {damping}: must be a finite number, 0 or larger")
    if damping > _MOST_DAMPING:
        raise ValueError(f"`damping` {damping:g}: must be at most {_MOST_DAMPING:g}")
    return damping
