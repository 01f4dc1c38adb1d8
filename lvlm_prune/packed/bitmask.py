"""A sparse matrix as one bit per weight and the non-zero weights, row after row.

    weights   0 a 0 0 b c 0 0 | d 0 ...        mask   0b00110010 0b...1 ...      values   a b c d ...
                                                      first weight = lowest bit

A weight counts as zero where all its bits are zero: -0.0 and every NaN are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lvlm_prune.packed.kernels import pack_rows, unpack_rows
from lvlm_prune.packed.kernels.bitmask import BIT_PATTERN

DTYPES = tuple(BIT_PATTERN)
"""What a packed tensor can hold."""

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)


def mask_bytes(columns: int) -> int:
    """Bytes of one row of a mask.

    Example:
        >>> mask_bytes(16), mask_bytes(17)
        (2, 3)
    """
    return -(-columns // 8)


def encode(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Take the zeros out of a tensor.

    Args:
        dense: Matrix (rows, columns) or stack of matrices, on the CPU, of one of `DTYPES`.

    Returns:
        The weights with any bit set, 1-D, in row-major order and the dtype of `dense`; and the mask, uint8 of shape
        (..., rows, ceil(columns / 8)), bit k of a byte for the k-th of its eight columns, unused bits zero.

    Example:
        >>> values, mask = encode(torch.tensor([[0.0, 1.5, 0.0], [-0.0, 0.0, 2.0]]))
        >>> values.tolist(), mask.tolist()
        ([1.5, -0.0, 2.0], [[2], [5]])
    """
    values, mask = pack_rows(dense.reshape(-1, dense.shape[-1]))
    return values, mask.reshape(*dense.shape[:-1], mask.shape[-1])


def decode(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Put the zeros back.

    Args:
        values: 1-D, as many as there are bits in `mask`.
        mask: uint8 of shape (..., rows, ceil(columns / 8)).
        shape: That of the result, (..., rows, columns).

    Raises:
        ValueError: The three do not fit together.
    """
    check(values, mask, shape)
    return unpack_rows(values, mask.reshape(-1, mask.shape[-1]), shape[-1]).reshape(tuple(shape))


def check(values: Tensor, mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse parts that do not fit together; nothing else in this package trusts a count that it did not check.

    Raises:
        ValueError: Says what does not fit.
    """
    expected = (*shape[:-1], mask_bytes(shape[-1]))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise ValueError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}, not uint8 of shape {expected}")
    if values.dtype not in DTYPES or values.ndim != 1:
        raise ValueError(f"the values are {values.dtype} of shape {tuple(values.shape)}, not a list of weights")
    check_count(len(values), mask, shape)


def check_count(count: int, mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask of another number of weights, or with bits beyond the last column.

    Raises:
        ValueError: It has other bits set than there are weights, or some past the last column.
    """
    beyond = shape[-1] % 8
    if beyond and mask.numel() and int((mask[..., -1] >> beyond).max()):
        raise ValueError(f"the mask has bits beyond its {shape[-1]} columns")
    ones = int(count_ones(mask).sum())
    if ones != count:
        raise ValueError(f"the mask keeps {ones} weights, {count} are there")


def count_ones(mask: Tensor) -> np.ndarray:
    """Bits set in each row of a mask, int64 of shape (rows of all matrices,)."""
    return _ones_of(mask.numpy().reshape(-1, mask.shape[-1])).sum(axis=1, dtype=np.int64)


def _ones_of(octets: np.ndarray) -> np.ndarray:
    """Bits set in each byte."""
    return np.bitwise_count(octets) if hasattr(np, "bitwise_count") else _ONES[octets]  # new in numpy 2


def as_bits(tensor: Tensor) -> np.ndarray:
    """The bits of a floating-point tensor, as unsigned integers of the same size; shares its memory where it can."""
    return tensor.detach().contiguous().view(BIT_PATTERN[tensor.dtype]).numpy().view(f"u{tensor.element_size()}")


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Weights of a dtype again from their bits, integers of the same width; shares memory with them."""
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)
