"""Packed matrices on a GPU: laid out for the Triton kernels, and multiplied by them.

Without Triton, packed matrices on a GPU stay in the device-neutral form and are unpacked for every product.
"""

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

VECTOR_TOKENS = 4
"""Tokens up to which no tensor cores are used."""

MATRIX_TOKENS = 64
"""Tokens up to which a packed matrix is multiplied packed; with more it is unpacked first."""

ROWS = {"vector": 16, "matrix": 32, "unpack": 16}
"""Rows of one program of each kernel."""


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor here."""
    return tensor.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def lay_out(mask: Tensor) -> tuple[Tensor, Tensor]:
    """From rows to chunks of columns.

    Args:
        mask: Uint8 of shape (rows, ceil(columns / 8)).

    Returns:
        The mask as int32 of shape (rows, words), and where each chunk begins, int32 of shape (rows, chunks).

    Raises:
        ValueError: where there are more than 2^31 - 1 values.
    """
    chunk_bytes = _kernels().CHUNK // 8
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[1] % chunk_bytes))
    bits = mask.view(len(mask), -1, chunk_bytes)
    count = torch.stack([(bits >> bit & 1).sum(dim=2) for bit in range(8)]).sum(dim=0)
    end = count.flatten().cumsum(dim=0)
    if end[-1] >= 2**31:
        raise ValueError(f"`mask` has {int(end[-1])} bits set; a GPU takes matrices of fewer than 2^31 values")
    return mask.view(torch.int32), (end.view_as(count) - count).int()


def row_mask(mask: Tensor, columns: int) -> Tensor:
    """The mask row by row, as `lay_out` was given it: uint8 of shape (rows, ceil(columns / 8))."""
    return mask.view(torch.uint8)[:, : -(-columns // 8)].contiguous()


def linear(x: Tensor, values: Tensor, mask: Tensor, start: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product with a matrix in chunks, for x of shape (tokens, columns); the result has shape (tokens, rows)."""
    tokens, columns = x.shape
    x, y = x.contiguous(), x.new_empty(tokens, rows)
    pointers = (x, values, mask, start, values if bias is None else bias.contiguous(), y)
    sizes = (rows, columns, tokens, start.shape[1])
    kernels = _kernels()
    options = {"CHUNK": kernels.CHUNK, "HAS_BIAS": bias is not None}
    if tokens <= VECTOR_TOKENS:
        height = ROWS["vector"]
        width = 1 if tokens == 1 else 2 if tokens == 2 else 4
        kernels.vector_kernel[(-(-rows // height),)](*pointers, *sizes, TOKENS=width, ROWS=height, **options)
        return y
    in_float = x.dtype != values.dtype or x.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    height, width = ROWS["matrix"], 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    grid = (-(-rows // height), -(-tokens // width))
    kernels.matrix_kernel[grid](*pointers, *sizes, TOKENS=width, ROWS=height, FLOAT=in_float, **options)
    return y


def unpack(values: Tensor, mask: Tensor, start: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix, of shape (rows, columns)."""
    dense = values.new_empty(rows, columns)
    kernels, height = _kernels(), ROWS["unpack"]
    grid = (-(-rows // height), start.shape[1])
    sizes = (rows, columns, start.shape[1])
    kernels.unpack_kernel[grid](values, mask, start, dense, *sizes, ROWS=height, CHUNK=kernels.CHUNK)
    return dense


def _kernels() -> ModuleType:
    from lvlm_prune.packed.kernels import triton_kernels

    return triton_kernels
