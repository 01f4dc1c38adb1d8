"""Attention that is fast on CPUs: batched matrix products in the model's dtype, and a cheap backward pass.

transformers' "sdpa" is 3 to 6 times slower here, and PyTorch's backward of softmax in bfloat16 takes as long as all
other parts of attention together. Registered as "matmul" in transformers' attention interface; used in training only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface


class MatmulAttention(torch.autograd.Function):
    r"""``softmax(Q K' + M) V``.

    With :math:`P` the attention map and :math:`O = P V`, backward uses
    :math:`\partial S = P \circ (\partial O\, V' - \mathrm{rowsum}(\partial O \circ O))`
    (FlashAttention, arXiv 2205.14135, Eq. 5).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """All of shape (B, heads, L, D), the mask (B, 1, L, L) and additive; no gradient flows to the mask."""
        scores = torch.matmul(query, key.transpose(2, 3))
        if mask is not None:
            scores += mask
        attention = torch.softmax(scores, dim=-1)
        output = torch.matmul(attention, value)
        ctx.save_for_backward(query, key, value, attention, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, attention, output = ctx.saved_tensors  # type: ignore[attr-defined]
        scores = torch.matmul(gradient, value.transpose(2, 3))
        scores -= (gradient.float() * output.float()).sum(-1, keepdim=True).to(scores.dtype)
        scores *= attention
        return (
            torch.matmul(scores, key),
            torch.matmul(scores.transpose(2, 3), query),
            torch.matmul(attention.transpose(2, 3), gradient),
            None,
        )


def matmul_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value (B, heads, L, D), result (B, L, heads, D)."""
    output = MatmulAttention.apply(query * scaling, key, value, attention_mask)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("matmul", matmul_attention)
