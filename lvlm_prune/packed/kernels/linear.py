"""The product with a packed matrix as an operator of torch: `torch.ops.lvlm_prune.packed_linear`."""

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_prune.packed.kernels import bitmask
from lvlm_prune.packed.kernels.matrix import PackedMatrix

_LIBRARY = torch.library.Library("lvlm_prune", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor values, Tensor mask, Tensor? bias, int rows) -> Tensor")
_LIBRARY.define("unpack(Tensor values, Tensor mask, int rows, int columns) -> Tensor")


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """`x @ matrix.T + bias`, as `torch.nn.functional.linear` computes it.

    Works under `torch.compile` and with fake tensors. The gradient goes to `x` and `bias`; a packed matrix has none.

    Args:
        x: Shape (..., columns); float32, bfloat16 or float16.
        matrix: Of shape (rows, columns), on the device of `x`.
        bias: Shape (rows,).

    Returns:
        Shape (..., rows), in the dtype of `x`.

    Raises:
        ValueError: where the last dimension of `x` is not the number of columns, or the devices differ.
    """
    if x.shape[-1] != matrix.columns:
        raise ValueError(f"`x` has {x.shape[-1]} features, but the packed matrix has {matrix.columns} columns")
    if x.device != matrix.device:
        raise ValueError(f"`x` is on {x.device}, but the packed matrix is on {matrix.device}")
    return torch.ops.lvlm_prune.packed_linear(*matrix.operands(x, bias))


def _unpack(values: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    return bitmask.unpack_rows(values, mask, columns)


def _linear(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    dense = _unpack(values, mask, rows, x.shape[-1])
    if dense.dtype == x.dtype:
        return functional.linear(x, dense, bias)
    precise = torch.promote_types(x.dtype, dense.dtype)
    bias = None if bias is None else bias.to(precise)
    return functional.linear(x.to(precise), dense.to(precise), bias).to(x.dtype)


def _fake_linear(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _fake_unpack(values: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, values, mask, _, rows = inputs
    ctx.save_for_backward(values, mask)
    ctx.rows, ctx.columns = rows, x.shape[-1]


def _backward(ctx, gradient: Tensor):
    values, mask = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.lvlm_prune.unpack(values, mask, ctx.rows, ctx.columns)
        of_x = gradient @ dense.to(gradient.dtype)
    if ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, ctx.rows).sum(dim=0)
    return of_x, None, None, of_bias, None


_LIBRARY.impl("packed_linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("unpack", _unpack, "CompositeExplicitAutograd")
torch.library.register_fake("lvlm_prune::packed_linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("lvlm_prune::unpack", _fake_unpack, lib=_LIBRARY)
torch.library.register_autograd("lvlm_prune::packed_linear", _backward, setup_context=_keep_for_backward, lib=_LIBRARY)
