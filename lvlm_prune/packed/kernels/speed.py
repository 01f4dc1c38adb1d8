"""Whether a packed matrix is multiplied faster than the dense one, and that faster than by torch, on this machine."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from lvlm_prune.packed.kernels import cpu
from lvlm_prune.packed.kernels.linear import packed_linear
from lvlm_prune.packed.kernels.matrix import PackedMatrix
from lvlm_prune.packed.kernels.native import is_forced, level
from lvlm_prune.packed.kernels.timing import fastest_times

MARGIN = 1.05
"""The dense product must be faster by this much: what is packed takes less memory."""

ENOUGH = 2**24
"""Weights of a dense matrix that are multiplied to measure it."""

_measured: dict[tuple, bool] = {}


def is_faster_packed(matrix: PackedMatrix) -> bool:
    """Whether one token is multiplied at least as fast by a packed matrix as by the dense one of the same dtype.

    It is measured once in a process for each shape, dtype, tenth of zeros and number of threads, which takes about as
    long as twenty products. A matrix in the device-neutral form is unpacked for every product, which is never faster;
    on a GPU nothing is measured. Where `LVLM_PRUNE_KERNELS` asks for an instruction set, packed is what is wanted.

    Args:
        matrix: On the device where it will be used.
    """
    if is_forced():
        return True
    if matrix.start is None:
        return False
    if matrix.device.type != "cpu":
        return True
    zeros = round(10 * (1 - matrix.n_kept / (matrix.rows * matrix.columns)))
    key = (matrix.rows, matrix.columns, matrix.dtype, zeros, level(), torch.get_num_threads())
    if key not in _measured:
        _measured[key] = _measure(matrix)
    return _measured[key]


@torch.inference_mode()
def _measure(matrix: PackedMatrix) -> bool:
    dense, x = matrix.to_dense(), torch.ones(1, matrix.columns, dtype=matrix.dtype)
    products = (functools.partial(packed_linear, x, matrix), functools.partial(linear, x, dense))
    packed_seconds, dense_seconds = fastest_times(products)
    return packed_seconds <= MARGIN * dense_seconds


@torch.inference_mode()
def is_faster_than_torch(weight: Tensor) -> bool:
    """Whether one token is multiplied faster by the dense kernel than by torch.

    It is measured on the first rows, once in a process for each number of columns, dtype and number of threads.

    Args:
        weight: Shape (rows, columns), contiguous, on the CPU.
    """
    some = weight.detach()[: max(ENOUGH // weight.shape[1] // 4 * 4, 4)]
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    if len(weight) % 4 or cpu.dense_linear(x, some) is None:
        return False
    key = (*some.shape, weight.dtype, level(), torch.get_num_threads())
    if key not in _measured:
        products = (functools.partial(cpu.dense_linear, x, some), functools.partial(linear, x, some))
        own_seconds, torch_seconds = fastest_times(products)
        _measured[key] = MARGIN * own_seconds <= torch_seconds
    return _measured[key]
