"""The dtype in which this machine is fastest at dense products of many tokens."""

import functools

import torch
from torch.nn.functional import linear

from lvlm_prune.packed.kernels.timing import fastest_times
from lvlm_prune.processor import multiplies

TOKENS, ROWS, COLUMNS = 128, 256, 1024
"""The product that is timed: as large as takes a few milliseconds."""

MARGIN = 1.15
"""Float32 must be faster by this much: weights are unpacked to twice as many bytes for it."""


def fastest_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 where that is faster.

    That is so where a processor has no products in 16 bits, and on some that have: then it is measured, once in a
    process for each dtype and number of threads.

    Example:
        >>> fastest_dtype(torch.float32)
        torch.float32
    """
    if dtype == torch.float32 or not multiplies(dtype):
        return torch.float32
    return torch.float32 if _is_slower_than_float32(dtype, torch.get_num_threads()) else dtype


@functools.cache
@torch.inference_mode()
def _is_slower_than_float32(dtype: torch.dtype, threads: int) -> bool:
    x, weight = torch.ones(TOKENS, COLUMNS), torch.ones(ROWS, COLUMNS)
    products = [functools.partial(linear, x.to(kind), weight.to(kind)) for kind in (dtype, torch.float32)]
    own_seconds, float32_seconds = fastest_times(products)
    return own_seconds > MARGIN * float32_seconds
