"""Exponents of bfloat16 weights in four bits instead of eight, without loss.

    bfloat16   s eeeeeeee mmmmmmm        one byte     s mmmmmmm
                                         four bits    base of the row - e, from 0 to 14; 15: the next exception

Weights of one row have exponents close to each other: nearly all lie in a window of fifteen. The window of a row is
the one that holds most of its exponents; those outside it are written out, one byte each, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lvlm_prune.packed.bitmask import as_bits, from_bits

_WINDOW = 15
_EXCEPTION = 15
# Weights in work at once, in whole rows.
_PIECE = 2**20


@dataclass(frozen=True)
class CodedValues:
    """The kept weights of a matrix or a stack, coded.

    Attributes:
        mantissas: Sign (highest bit) and mantissa of each, uint8 of shape (n,).
        exponents: Two four-bit codes a byte, the first in the low bits, uint8 of shape (ceil(n / 2),).
        bases: Largest exponent of the window of each row, uint8 of shape (rows of all matrices,).
        exceptions: Exponents that are outside their row's window, uint8.
    """

    mantissas: Tensor
    exponents: Tensor
    bases: Tensor
    exceptions: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together, as they are stored."""
        return sum(part.nbytes for part in (self.mantissas, self.exponents, self.bases, self.exceptions))


def encode(values: Tensor, counts: np.ndarray) -> CodedValues:
    """Code the kept weights of a matrix.

    Args:
        values: bfloat16 of shape (n,), row after row; any bit patterns.
        counts: Kept weights of each row, int64; they add up to n.
    """
    bits = as_bits(values)
    exponents = (bits >> 7).astype(np.uint8)  # the sign, bit 8, is cut off
    mantissas = ((bits >> 8) & 0x80 | bits & 0x7F).astype(np.uint8)
    bases = np.empty(len(counts), dtype=np.uint8)
    codes = np.empty(len(bits) + len(bits) % 2, dtype=np.uint8)
    codes[len(bits) :] = 0
    exceptions = [np.empty(0, dtype=np.uint8)]
    for rows, piece in _row_pieces(counts):
        own, lengths = exponents[piece], counts[rows]
        bases[rows] = _best_bases(own, lengths)
        # Unsigned: an exponent above the base wraps to more than the window holds.
        distance = np.repeat(bases[rows], lengths) - own
        outside = distance >= _WINDOW
        distance[outside] = _EXCEPTION
        codes[piece] = distance
        exceptions.append(own[outside])
    return CodedValues(
        torch.from_numpy(mantissas),
        torch.from_numpy(codes[0::2] | codes[1::2] << 4),
        torch.from_numpy(bases),
        torch.from_numpy(np.concatenate(exceptions)),
    )


def decode(coded: CodedValues, counts: np.ndarray) -> Tensor:
    """The kept weights again, bfloat16 of shape (n,).

    Args:
        coded: What `encode` made.
        counts: Kept weights of each row, int64, as the mask has them.

    Raises:
        ValueError: The parts do not fit together.
    """
    size = int(counts.sum())
    _check(coded, size, len(counts))
    pairs = coded.exponents.numpy()
    codes = np.stack((pairs & 15, pairs >> 4), axis=1).reshape(-1)
    if size % 2 and codes[size]:
        raise ValueError("a code behind the last weight is not zero")
    codes = codes[:size]
    exceptional = np.flatnonzero(codes == _EXCEPTION)
    exceptions = coded.exceptions.numpy()
    if len(exceptional) != len(exceptions):
        raise ValueError(f"the codes name {len(exceptional)} exceptions, {len(exceptions)} are there")
    bases = np.repeat(coded.bases.numpy(), counts)
    if (codes > bases)[codes != _EXCEPTION].any():
        raise ValueError("a code leads to an exponent below zero")
    exponents = bases - codes
    exponents[exceptional] = exceptions
    mantissas = coded.mantissas.numpy().astype(np.uint16)
    bits = (mantissas & 0x80) << 8 | exponents.astype(np.uint16) << 7 | mantissas & 0x7F
    return from_bits(bits, torch.bfloat16)


def _check(coded: CodedValues, size: int, rows: int) -> None:
    expected = {"mantissas": size, "exponents": -(-size // 2), "bases": rows}
    for name, length in expected.items():
        part = getattr(coded, name)
        if part.dtype != torch.uint8 or tuple(part.shape) != (length,):
            raise ValueError(
                f"the {name} are {part.dtype} of shape {tuple(part.shape)}, not uint8 of shape ({length},)"
            )
    if coded.exceptions.dtype != torch.uint8 or coded.exceptions.ndim != 1:
        raise ValueError(f"the exceptions are {coded.exceptions.dtype}, not a list of uint8")


def _best_bases(exponents: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each row the largest exponent of the window that holds most of its exponents; the highest such window."""
    row = np.repeat(np.arange(len(counts)) * 256, counts)
    histogram = np.bincount(row + exponents, minlength=256 * len(counts)).reshape(-1, 256)
    until = np.cumsum(histogram, axis=1)
    until = np.concatenate((np.zeros((len(counts), 1), until.dtype), until), axis=1)
    held = until[:, _WINDOW:] - until[:, :-_WINDOW]  # window i holds the exponents i to i + 14
    return (255 - np.argmax(held[:, ::-1], axis=1)).astype(np.uint8)


def _row_pieces(counts: np.ndarray) -> list[tuple[slice, slice]]:
    """Whole rows of about `_PIECE` weights, and the places of their weights."""
    ends = np.concatenate(([0], np.cumsum(counts)))
    pieces, first = [], 0
    while first < len(counts):
        last = max(int(np.searchsorted(ends, ends[first] + _PIECE, side="right")) - 1, first + 1)
        pieces.append((slice(first, last), slice(int(ends[first]), int(ends[last]))))
        first = last
    return pieces
