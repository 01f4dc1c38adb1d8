"""A packed matrix in memory, laid out for the kernels of this machine."""

from typing import Self

import torch
from torch import Tensor

from lvlm_prune.packed.kernels import bitmask


class PackedMatrix:
    """A sparse matrix that takes the memory of its non-zero values and one bit per weight.

    It is made by `from_bitmask` or `from_dense`, which check everything: a kernel trusts its fields.

    Attributes:
        values: The non-zero values, of shape (n_kept,).
        mask: The bits that say where they stand.
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

    def __init__(self, values: Tensor, mask: Tensor, shape: tuple[int, int]) -> None:
        self.values = values
        self.mask = mask
        self.rows, self.columns = shape

    @classmethod
    def from_bitmask(cls, values: Tensor, mask: Tensor, shape: tuple[int, int]) -> Self:
        """Check the device-neutral pieces and lay them out for this machine.

        Args:
            values: The non-zero values row after row, of shape (n_kept,); bfloat16, float16 or float32.
            mask: Uint8 of shape (rows, ceil(columns / 8)), the lowest bit of a byte first; bits past the last column
                are zero.
            shape: (rows, columns) of the dense matrix.

        Raises:
            ValueError: where the pieces do not belong together; nothing was read out of bounds.
        """
        bitmask.check_packed(values, mask, shape)
        return cls(values.contiguous(), mask.contiguous(), shape)

    @classmethod
    def from_dense(cls, dense: Tensor) -> Self:
        """Pack a matrix of shape (rows, columns); bfloat16, float16 or float32, else ValueError."""
        values, mask = bitmask.pack_rows(dense)
        return cls.from_bitmask(values, mask, (dense.shape[0], dense.shape[1]))

    def to_bitmask(self) -> tuple[Tensor, Tensor]:
        """The device-neutral pieces again, `(values, mask)` as `from_bitmask` takes them."""
        return self.values, self.mask

    def to_dense(self) -> Tensor:
        """The dense matrix, of shape (rows, columns), with the same bits as before packing."""
        return bitmask.unpack_rows(self.values, self.mask, self.columns)

    def operands(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        """The arguments of the operator `lvlm_prune::packed_linear`."""
        return x, self.values, self.mask, bias, self.rows

    def to(self, device: torch.device | str) -> Self:
        """The same matrix on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        values, mask = self.to_bitmask()
        return type(self)(values.to(device), mask.to(device), (self.rows, self.columns))

    @property
    def shape(self) -> torch.Size:
        """(rows, columns) of the dense matrix."""
        return torch.Size((self.rows, self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def n_kept(self) -> int:
        """Number of values that are not zero."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes in memory."""
        return self.values.nbytes + self.mask.nbytes

    def __repr__(self) -> str:
        share = 1 - self.n_kept / (self.rows * self.columns)
        return f"PackedMatrix({self.rows} x {self.columns}, {self.dtype}, {share:.1%} zeros, {self.nbytes} bytes)"
