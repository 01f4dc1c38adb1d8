"""A packed matrix in memory, laid out for the kernels of this machine."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from lvlm_prune.packed.kernels import bitmask, cpu, gpu


class PackedMatrix:
    """A sparse matrix that takes the memory of its non-zero values and one bit per weight.

    It is made by `from_bitmask` or `from_dense`, which check everything: a kernel trusts its fields.

    Attributes:
        values: The non-zero values, and after them what a kernel may read but never uses.
        mask: The bits that say where they stand: uint8 of shape (rows, ceil(columns / 8)) in the device-neutral form,
            int64 of shape (groups, words, 8) in tiles of 8 rows x 64 columns, for the CPU; int32 of shape (rows, words)
            in chunks of 256 columns, for a GPU.
        start: Where each group of 8 rows begins in `values`, int64 of shape (groups + 1,), or each chunk, int32 of
            shape (rows, chunks); None in the device-neutral form.
        rows: Output features.
        columns: Input features.

    Example:
        >>> matrix = PackedMatrix.from_dense(torch.tensor([[0.0, 3, 0, 0, 5], [0, 0, 7, 0, 0]]))
        >>> matrix.shape, matrix.n_kept
        (torch.Size([2, 5]), 3)
        >>> matrix.to_dense()
        tensor([[0., 3., 0., 0., 5.],
                [0., 0., 7., 0., 0.]])
    """

    def __init__(self, values: Tensor, mask: Tensor, start: Tensor | None, shape: tuple[int, int]) -> None:
        self.values = values
        self.mask = mask
        self.start = start
        self.rows, self.columns = shape
        self.n_kept = int(start[-1]) if _in_tiles(start) else values.numel()

    @classmethod
    def from_bitmask(cls, values: Tensor, mask: Tensor, shape: tuple[int, int]) -> PackedMatrix:
        """Check the device-neutral pieces and lay them out for this machine.

        Args:
            values: The non-zero values row after row, of shape (n_kept,); bfloat16, float16 or float32.
            mask: Uint8 of shape (rows, ceil(columns / 8)), the lowest bit of a byte first; bits past the last column
                are zero.
            shape: (rows, columns) of the dense matrix.

        Raises:
            ValueError: where the pieces do not belong together; nothing was read out of bounds.
        """
        bitmask.check_form(values, mask, shape)
        if not (cpu.usable(values) and cpu.usable(mask)):
            bitmask.check_counts(values, mask, shape[1])
            mask, start = gpu.lay_out(mask) if gpu.usable(values) else (mask.contiguous(), None)
            return cls(values.contiguous(), mask, start, shape)
        offset = cpu.check_counts(values, mask, shape[1])
        return cls(*cpu.tile(values, mask, offset, shape[1]), shape)

    @classmethod
    def from_dense(cls, dense: Tensor) -> PackedMatrix:
        """Pack a matrix of shape (rows, columns); bfloat16, float16 or float32, else ValueError."""
        values, mask = bitmask.pack_rows(dense)
        return cls.from_bitmask(values, mask, (dense.shape[0], dense.shape[1]))

    def to_bitmask(self) -> tuple[Tensor, Tensor]:
        """The device-neutral pieces again, `(values, mask)` as `from_bitmask` takes them."""
        if self.start is None:
            return self.values, self.mask
        if not _in_tiles(self.start):
            return self.values, gpu.row_mask(self.mask, self.columns)
        return cpu.untile(self.values, self.mask, self.start, self.rows, self.columns)

    def to_dense(self) -> Tensor:
        """The dense matrix, of shape (rows, columns), with the same bits as before packing."""
        return unpack(self.values, self.mask, self.start, self.rows, self.columns)

    def operands(
        self, x: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """The arguments of the operator `lvlm_prune::packed_linear`."""
        return x, self.values, self.mask, self.start, bias, self.rows

    def to(self, device: torch.device | str) -> PackedMatrix:
        """The same matrix on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        values, mask = self.to_bitmask()
        return type(self).from_bitmask(values.to(device), mask.to(device), (self.rows, self.columns))

    @property
    def shape(self) -> torch.Size:
        """(rows, columns) of the dense matrix."""
        return torch.Size((self.rows, self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed weights, on which products run."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes in memory."""
        return self.values.nbytes + self.mask.nbytes + (0 if self.start is None else self.start.nbytes)

    def __repr__(self) -> str:
        share = 1 - self.n_kept / (self.rows * self.columns)
        return f"PackedMatrix({self.rows} x {self.columns}, {self.dtype}, {share:.1%} zeros, {self.nbytes} bytes)"


def unpack(values: Tensor, mask: Tensor, start: Tensor | None, rows: int, columns: int) -> Tensor:
    """The dense matrix that the fields of a packed one stand for."""
    if start is None:
        return bitmask.unpack_rows(values, mask, columns)
    return (cpu if _in_tiles(start) else gpu).unpack(values, mask, start, rows, columns)


def _in_tiles(start: Tensor | None) -> TypeGuard[Tensor]:
    return start is not None and start.ndim == 1
