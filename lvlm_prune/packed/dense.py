"""Linears of a packed model that stay dense: above all its head, which takes a third of a token's time.

One token is multiplied by the kernel that packed products are measured against, where it is faster than torch's own;
everything else is torch's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from lvlm_prune.packed.kernels import cpu, is_faster_than_torch, only_the_result_counts

SMALLEST = 2**20
"""Weights of a matrix from which on it is worth measuring."""


class DenseLinear(nn.Linear):
    """A Linear as any other; one token goes through the kernel of `cpu.dense_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Args: x of shape (..., in). Returns: shape (..., out)."""
        weight = self.weight
        one_token = x.numel() == x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
        if one_token and only_the_result_counts(x) and only_the_result_counts(weight) and cpu.usable(weight):
            y = cpu.dense_linear(x.reshape(1, -1).contiguous(), weight)
            if y is not None:
                return y.view(*x.shape[:-1], -1)
        return linear(x, weight, self.bias)


def use_dense_kernels(model: nn.Module) -> None:
    """Let the large Linears of a model without bias use the kernel where that is faster, in place."""
    for module in model.modules():
        if type(module) is not nn.Linear or module.bias is not None or module.weight.numel() < SMALLEST:
            continue
        if cpu.usable(module.weight) and module.weight.is_contiguous() and is_faster_than_torch(module.weight):
            module.__class__ = DenseLinear


def use_torch(model: nn.Module) -> None:
    """Make ordinary Linears of them again."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
