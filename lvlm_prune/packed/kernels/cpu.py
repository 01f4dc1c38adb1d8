"""The C++ kernels as functions of tensors on the CPU. Each trusts its arguments except where it says `Raises`."""

import ctypes
import sys

import torch
from torch import Tensor

from lvlm_prune.packed.kernels.native import KINDS, Level, level, library, pointer

WIDTH = 64
"""Columns of a tile."""

HEIGHT = 8
"""Rows of a tile: the group whose values stand together."""

SMALL = 2**16
"""Products of fewer weights and tokens are done by one thread: waking the others takes longer."""

_HUGE_PAGE, _MADV_HUGEPAGE = 2**21, 14


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor here."""
    return level() > Level.TORCH and tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def pack_rows(dense: Tensor) -> tuple[Tensor, Tensor]:
    """See `bitmask.pack_rows`."""
    dense = dense.contiguous()
    mask = torch.empty(len(dense), _bytes(dense.shape[1]), dtype=torch.uint8)
    sizes = (*dense.shape, dense.element_size(), level(), torch.get_num_threads())
    _library().lvlm_pack(pointer(dense), pointer(mask), None, None, *sizes)
    offset = _offsets(mask, dense.shape[1])
    values = dense.new_empty(int(offset[-1]))
    _library().lvlm_pack(pointer(dense), None, pointer(offset), pointer(values), *sizes)
    return values, mask


def unpack_rows(values: Tensor, mask: Tensor, columns: int) -> Tensor:
    """See `bitmask.unpack_rows`.

    Raises:
        ValueError: where the mask is not of as many values.
    """
    values, mask = values.contiguous(), mask.contiguous()
    offset = check_counts(values, mask, columns)
    dense = values.new_empty(len(mask), columns)
    pointers = [pointer(tensor) for tensor in (values, mask, offset, dense)]
    _library().lvlm_unpack_rows(*pointers, *dense.shape, values.element_size(), level(), torch.get_num_threads())
    return dense


def check_counts(values: Tensor, mask: Tensor, columns: int) -> Tensor:
    """Where the values of each row begin, int64 of shape (rows + 1,).

    Raises:
        ValueError: where a bit is set past the last column, or there are not as many values as bits.
    """
    offset = _offsets(mask.contiguous(), columns)
    if int(offset[-1]) != len(values):
        raise ValueError(f"`values` has {len(values)} elements, but `mask` has {int(offset[-1])} bits set")
    return offset


def tile(values: Tensor, mask: Tensor, offset: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """From rows to tiles.

    Args:
        values: The weights that are kept, row by row, shape (n_kept,).
        mask: Uint8 of shape (rows, ceil(columns / 8)).
        offset: As `check_counts` gives it.
        columns: Number of columns of the dense matrix.

    Returns:
        Values of shape (n_kept + slack,) in the order of the tiles, mask as int64 of shape (groups, words, 8), and
        where each group begins, int64 of shape (groups + 1,).
    """
    values, mask, rows = values.contiguous(), mask.contiguous(), len(mask)
    groups, words = -(-rows // HEIGHT), -(-columns // WIDTH)
    tile_values = _in_huge_pages(values.new_empty(len(values) + _library().lvlm_slack()))
    tile_values[len(values) :].zero_()
    tile_mask = _in_huge_pages(torch.empty(groups, words, HEIGHT, dtype=torch.int64))
    start = torch.empty(groups + 1, dtype=torch.int64)
    pointers = [pointer(tensor) for tensor in (values, mask, offset, tile_mask, tile_values, start)]
    _library().lvlm_tile(*pointers, rows, columns, values.element_size(), torch.get_num_threads())
    return tile_values, tile_mask, start


def untile(values: Tensor, mask: Tensor, start: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """From tiles to rows: the values and the mask that `tile` was given."""
    row_mask = torch.empty(rows, _bytes(columns), dtype=torch.uint8)
    row_values = values.new_empty(int(start[-1]))
    tiles = [pointer(tensor) for tensor in (mask, values, start)]
    sizes = (rows, columns, values.element_size(), torch.get_num_threads())
    _library().lvlm_untile(*tiles, pointer(row_mask), None, None, *sizes)
    offset = _offsets(row_mask, columns)
    _library().lvlm_untile(*tiles, None, pointer(offset), pointer(row_values), *sizes)
    return row_values, row_mask


def unpack(
    values: Tensor,
    mask: Tensor,
    start: Tensor,
    rows: int,
    columns: int,
    *,
    groups: range | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The dense rows of some groups of a matrix in tiles.

    Args:
        values: The weights that are kept, in the order of the tiles, as `tile` gives them.
        mask: Which weights these are, int64 of shape (groups, words, 8).
        start: Where the values of each group begin, int64 of shape (groups + 1,).
        rows: Number of rows of the dense matrix.
        columns: Number of columns of the dense matrix.
        groups: Which groups of 8 rows; None for all.
        dtype: That of the values (None) or float32.
        out: Where to write to, contiguous and large enough.

    Returns:
        Shape (rows of these groups, columns).
    """
    groups = groups or range(len(mask))
    n_rows = min(groups.stop * HEIGHT, rows) - groups.start * HEIGHT
    dtype = dtype or values.dtype
    dense = torch.empty(n_rows, columns, dtype=dtype) if out is None else out[:n_rows]
    tiles = [pointer(tensor) for tensor in (mask, values, start)]
    where = (groups.start, groups.stop, pointer(dense), dtype == torch.float32)
    _library().lvlm_unpack(*tiles, rows, columns, KINDS[values.dtype], *where, level(), torch.get_num_threads())
    return dense


def linear(x: Tensor, values: Tensor, mask: Tensor, start: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product with a matrix in tiles, for x of shape (tokens, columns); the result has shape (tokens, rows)."""
    tokens, columns = x.shape
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in KINDS else bias.float()).contiguous()
    y = x.new_empty(tokens, rows)
    threads = torch.get_num_threads() if tokens * rows * columns > SMALL else 1
    _library().lvlm_linear(
        *(mask.data_ptr(), values.data_ptr(), start.data_ptr(), rows, columns, KINDS[values.dtype]),
        *(x.data_ptr(), KINDS[x.dtype], tokens),
        *(pointer(bias), 0 if bias is None else KINDS[bias.dtype]),
        *(y.data_ptr(), level(), threads),
    )
    return y


def dense_linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """One token times a dense matrix, written with the same care as the packed product.

    Args:
        x: Shape (1, columns); columns a multiple of 64.
        weight: Shape (rows, columns); rows a multiple of 4.

    Returns:
        Shape (1, rows); None where there is none for this instruction set or shape.
    """
    y = x.new_empty(1, len(weight))
    sizes = (*weight.shape, KINDS[weight.dtype])
    where = (pointer(x), KINDS[x.dtype], pointer(y), level(), torch.get_num_threads())
    return y if _library().lvlm_dense(pointer(weight), *sizes, *where) else None


def _library():
    native = library()
    assert native is not None, "callers ask `usable` first"
    return native


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, not yet written to, in pages of 2 MiB as far as it fills them, where Linux has some.

    A product reads a matrix once from end to end: in pages of 4 KiB the processor waits for their addresses, a seventh
    of the time.
    """
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a wish only
    return tensor


def _bytes(columns: int) -> int:
    return -(-columns // 8)


def _offsets(mask: Tensor, columns: int) -> Tensor:
    offset = torch.empty(len(mask) + 1, dtype=torch.int64)
    if not _library().lvlm_offsets(pointer(mask), len(mask), columns, pointer(offset), torch.get_num_threads()):
        raise ValueError(f"`mask` has bits set past the last of {columns} columns")
    return offset
