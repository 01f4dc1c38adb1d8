"""The device-neutral form of a packed matrix: its non-zero values row after row, and one bit for each of its weights.

    dense (2, 5)            values              mask, uint8 (2, 1), lowest bit first, each row padded to whole bytes
    [[0, 3, 0, 0, 5],       [3, 5, 7]           [[0b10010],
     [0, 0, 7, 0, 0]]                            [0b00100]]

A weight is kept where its bit pattern is not zero: a negative zero survives, and unpacking gives back every byte.
What the C++ kernels do faster on the CPU is left to them; the rest is plain torch and runs on any device.
"""

import torch
from torch import Tensor

from lvlm_prune.packed.kernels import cpu

BIT_PATTERN = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The integer type that shows the bits of a weight, for each dtype that can be packed."""

AT_ONCE = 2**22
"""Weights whose bits are spread out at once."""


def pack_rows(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Values and mask of a dense matrix.

    Args:
        dense: Shape (rows, columns); bfloat16, float16 or float32.

    Returns:
        The values, of shape (n_kept,) in the dtype of `dense`, and the mask, uint8 of shape (rows, ceil(columns / 8)).

    Raises:
        ValueError: for another dtype or number of dimensions.

    Example:
        >>> pack_rows(torch.tensor([[0.0, 3, 0, 0, 5], [0, 0, 7, 0, 0]]))
        (tensor([3., 5., 7.]), tensor([[18],
                [ 4]], dtype=torch.uint8))
    """
    check_dense(dense)
    if cpu.usable(dense):
        return cpu.pack_rows(dense)
    kept = dense.view(BIT_PATTERN[dense.dtype]) != 0
    padded = torch.nn.functional.pad(kept, (0, -dense.shape[1] % 8)).view(len(dense), -1, 8)
    mask = (padded.to(torch.uint8) << _bits(dense.device)).sum(dim=2, dtype=torch.uint8)
    return dense[kept], mask


def unpack_rows(values: Tensor, mask: Tensor, columns: int) -> Tensor:
    """The dense matrix of shape (rows, columns) again, bit for bit; the inverse of `pack_rows`.

    Raises:
        ValueError: where the mask is not of as many values.
    """
    if cpu.usable(values) and cpu.usable(mask):
        return cpu.unpack_rows(values, mask, columns)
    check_counts(values, mask, columns)
    dense = values.new_zeros(len(mask), columns)
    begin = 0
    for rows, bits in zip(dense.split(max(AT_ONCE // columns, 1)), mask.split(max(AT_ONCE // columns, 1))):
        kept = spread(bits, columns)
        end = begin + int(kept.count_nonzero())
        rows[kept] = values[begin:end]
        begin = end
    return dense


def spread(mask: Tensor, columns: int) -> Tensor:
    """The bits of a mask as a bool tensor of shape (rows, columns), True where a value is kept."""
    bits = (mask[:, :, None] >> _bits(mask.device)) & 1
    return bits.view(len(mask), -1)[:, :columns].bool()


def count_kept(mask: Tensor) -> Tensor:
    """Bits that are set in each row of a mask, int64 of shape (rows,)."""
    return torch.stack([(mask >> bit & 1).sum(dim=1) for bit in range(8)]).sum(dim=0)


def check_dense(dense: Tensor) -> None:
    """Refuse what cannot be packed, with a ValueError."""
    if dense.dtype not in BIT_PATTERN:
        raise ValueError(f"`dense` has dtype {dense.dtype}; bfloat16, float16 and float32 can be packed")
    if dense.ndim != 2 or 0 in dense.shape:
        raise ValueError(f"`dense` has shape {tuple(dense.shape)}; a matrix with rows and columns is needed")


def check_form(values: Tensor, mask: Tensor, shape: tuple[int, int]) -> None:
    """Refuse dtypes and shapes that do not belong together, with a ValueError that names the argument."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"`shape` is {tuple(shape)}; a matrix with rows and columns is needed")
    if values.dtype not in BIT_PATTERN or values.ndim != 1:
        raise ValueError(f"`values` is {values.dtype} of shape {tuple(values.shape)}; a list of floats is needed")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-columns // 8)):
        raise ValueError(
            f"`mask` is {mask.dtype} of shape {tuple(mask.shape)}; a matrix of {rows} x {columns} has uint8 of shape "
            f"{(rows, -(-columns // 8))}"
        )
    if values.device != mask.device:
        raise ValueError(f"`values` is on {values.device}, `mask` on {mask.device}")


def check_counts(values: Tensor, mask: Tensor, columns: int) -> None:
    """Refuse bits past the last column, and a mask that is not of as many values, with a ValueError."""
    if columns % 8 and bool((mask[:, -1] >> (columns % 8)).any()):
        raise ValueError(f"`mask` has bits set past the last of {columns} columns")
    kept = int(count_kept(mask).sum())
    if kept != len(values):
        raise ValueError(f"`values` has {len(values)} elements, but `mask` has {kept} bits set")


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
