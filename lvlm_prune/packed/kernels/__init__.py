"""Packed sparse matrices, and the product of activations with them.

matrix = PackedMatrix.from_bitmask(values, mask, (rows, columns))    checks, and lays out for this machine
y = packed_linear(x, matrix, bias)                                   an operator of torch
is_faster_packed(matrix)                                             measured on this machine
kernel_report()                                                      which kernels this machine has
"""

from lvlm_prune.packed.kernels.bitmask import pack_rows, unpack_rows
from lvlm_prune.packed.kernels.linear import only_the_result_counts, packed_linear
from lvlm_prune.packed.kernels.matrix import PackedMatrix
from lvlm_prune.packed.kernels.native import check_with
from lvlm_prune.packed.kernels.report import kernel_report
from lvlm_prune.packed.kernels.self_check import agrees
from lvlm_prune.packed.kernels.speed import is_faster_packed, is_faster_than_torch

check_with(agrees)

__all__ = [
    "PackedMatrix",
    "is_faster_packed",
    "is_faster_than_torch",
    "kernel_report",
    "only_the_result_counts",
    "pack_rows",
    "packed_linear",
    "unpack_rows",
]
