"""Random sparse matrices, and when two tensors are the same."""

import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (7, 63), (8, 64), (9, 65), (3, 200), (33, 129), (64, 512), (130, 8), (20, 1700)]


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian weights with about this share of zeros."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    dense[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return dense.to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit, whatever the bits mean."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
