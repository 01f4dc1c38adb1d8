"""The product with a packed matrix as an operator of torch: `torch.ops.lvlm_prune.packed_linear`.

Few tokens are multiplied packed: reading the weights takes the time, and there are fewer bytes of them. With more
tokens the arithmetic does, and a dense product is best at that: rows are unpacked into a piece that stays in the
caches, multiplied, and unpacked over by the next ones.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_prune.packed.kernels import cpu, gpu
from lvlm_prune.packed.kernels.matrix import PackedMatrix, unpack
from lvlm_prune.packed.kernels.native import Level, level
from lvlm_prune.packed.kernels.products import fastest_dtype

PACKED_TOKENS = {Level.PLAIN: 2, Level.AVX2: 16, Level.AVX512: 64}
"""Tokens up to which the packed kernel is faster than unpacking and a dense product, measured at 50% to 70% zeros."""

PIECE_BYTES, PIECE_ROWS = 2**22, 256
"""What is unpacked at once: dense rows of so many bytes, and as many rows as a product needs to be fast."""

_OF_THREAD = threading.local()

_LIBRARY = torch.library.Library("lvlm_prune", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor values, Tensor mask, Tensor? start, Tensor? bias, int rows) -> Tensor")
_LIBRARY.define("unpack(Tensor values, Tensor mask, Tensor? start, int rows, int columns) -> Tensor")


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """`x @ matrix.T + bias`, as `torch.nn.functional.linear` computes it.

    Works under `torch.compile` and with fake tensors. The gradient goes to `x` and `bias`; a packed matrix has none.

    Args:
        x: Shape (..., columns); float32, bfloat16 or float16.
        matrix: Of shape (rows, columns), on the device of `x`.
        bias: What is added to each output feature, shape (rows,); None for nothing.

    Returns:
        Shape (..., rows), in the dtype of `x`.

    Raises:
        ValueError: where the last dimension of `x` is not the number of columns, or the devices differ.
    """
    if x.shape[-1] != matrix.columns:
        raise ValueError(f"`x` has {x.shape[-1]} features, but the packed matrix has {matrix.columns} columns")
    if x.device != matrix.device:
        raise ValueError(f"`x` is on {x.device}, but the packed matrix is on {matrix.device}")
    if only_the_result_counts(x) and (bias is None or only_the_result_counts(bias)):
        return _linear(*matrix.operands(x, bias))
    return torch.ops.lvlm_prune.packed_linear(*matrix.operands(x, bias))


def only_the_result_counts(tensor: Tensor) -> bool:
    """Whether only the result is wanted: going through the dispatcher of torch takes longer than a small product."""
    no_gradient = not (tensor.requires_grad and torch.is_grad_enabled())
    return no_gradient and type(tensor) in (Tensor, torch.nn.Parameter) and not _is_watched()


def _is_watched() -> bool:
    """Whether torch traces, transforms or intercepts operators here."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _linear(x: Tensor, values: Tensor, mask: Tensor, start: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if start is not None and start.ndim == 2 and 0 < len(flat) <= gpu.MATRIX_TOKENS:
        y = gpu.linear(flat, values, mask, start, bias, rows)
    elif start is None or start.ndim == 2:
        y = _product(flat, unpack(values, mask, start, rows, x.shape[-1]), bias)
    elif len(flat) <= PACKED_TOKENS[max(level(), Level.PLAIN)]:
        y = cpu.linear(flat, values, mask, start, bias, rows)
    else:
        y = _by_pieces(flat, values, mask, start, bias, rows)
    return y.view(*x.shape[:-1], rows)


def _by_pieces(x: Tensor, values: Tensor, mask: Tensor, start: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    dtype = fastest_dtype(x.dtype) if x.dtype == values.dtype else torch.float32
    columns = x.shape[-1]
    at_once = max(PIECE_BYTES // (columns * dtype.itemsize), PIECE_ROWS) // cpu.HEIGHT
    piece = _workspace(at_once * cpu.HEIGHT * columns * dtype.itemsize).view(dtype).view(-1, columns)
    y, factor = x.new_empty(len(x), rows), x.to(dtype)
    for first in range(0, len(mask), at_once):
        groups = range(first, min(first + at_once, len(mask)))
        dense = cpu.unpack(values, mask, start, rows, columns, groups=groups, dtype=dtype, out=piece)
        begin = first * cpu.HEIGHT
        part = None if bias is None else bias[begin : begin + len(dense)].to(dtype)
        y[:, begin : begin + len(dense)] = functional.linear(factor, dense, part)
    return y


def _workspace(nbytes: int) -> Tensor:
    """Memory of this thread that is written over with every call: fresh memory costs more than unpacking to it."""
    kept = getattr(_OF_THREAD, "workspace", None)
    if kept is None or len(kept) < nbytes:
        kept = _OF_THREAD.workspace = torch.empty(max(nbytes, PIECE_BYTES), dtype=torch.uint8)
    return kept[:nbytes]


def _product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    if dense.dtype == x.dtype:
        return functional.linear(x, dense, bias)
    precise = torch.promote_types(x.dtype, dense.dtype)
    return functional.linear(x.to(precise), dense.to(precise), None if bias is None else bias.to(precise)).to(x.dtype)


def _fake_linear(x, values, mask, start, bias, rows) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _fake_unpack(values, mask, start, rows, columns) -> Tensor:
    return values.new_empty(rows, columns)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, values, mask, start, _, rows = inputs
    ctx.save_for_backward(values, mask, start)
    ctx.rows, ctx.columns = rows, x.shape[-1]


def _backward(ctx, gradient: Tensor):
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.lvlm_prune.unpack(*ctx.saved_tensors, ctx.rows, ctx.columns)
        of_x = gradient @ dense.to(gradient.dtype)
    if ctx.needs_input_grad[4]:
        of_bias = gradient.reshape(-1, ctx.rows).sum(dim=0)
    return of_x, None, None, None, of_bias, None


_LIBRARY.impl("packed_linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("unpack", unpack, "CompositeExplicitAutograd")
torch.library.register_fake("lvlm_prune::packed_linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("lvlm_prune::unpack", _fake_unpack, lib=_LIBRARY)
torch.library.register_autograd("lvlm_prune::packed_linear", _backward, setup_context=_keep_for_backward, lib=_LIBRARY)
