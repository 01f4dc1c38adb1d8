"""Packed sparse matrices, and the product of activations with them.

matrix = PackedMatrix.from_bitmask(values, mask, (rows, columns))    checks, and lays out for this machine
y = packed_linear(x, matrix, bias)                                   an operator of torch
kernel_report()                                                      which kernels this machine has
"""

from lvlm_prune.packed.kernels.bitmask import pack_rows, unpack_rows
from lvlm_prune.packed.kernels.linear import packed_linear
from lvlm_prune.packed.kernels.matrix import PackedMatrix
from lvlm_prune.packed.kernels.report import kernel_report

__all__ = ["PackedMatrix", "kernel_report", "pack_rows", "packed_linear", "unpack_rows"]
