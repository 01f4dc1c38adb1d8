"""Masked LoRA: a low-rank update that cannot touch a pruned weight.

          W (out x in)                 B (out x r)   A (r x in)            effective weight

      0.3  .   .  0.8                    b             a a a a            0.3+  .    .  0.8+
       .  0.1  .  0.5    +  mask  *  (   b    x                ) * s  =    .   0.1+  .  0.5+
      0.7  .  0.2  .                     b                                0.7+  .   0.2+ .

    mask = (W != 0), never stored          . = +0.0, before and after, in training and once merged

Plain LoRA adds B A everywhere, so that merging it gives a dense matrix. Here the product is masked before it is added.
Autograd would keep the product, the mask and the sum, three matrices of size out x in for each Linear; this function
keeps none of them and computes them again in backward.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

Gradient = Literal["exact", "straight_through"]


def masked_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    r""":math:`M \odot (B A) s`, in the dtype of the adapter, shape (out, in)."""
    return torch.mm(lora_b, lora_a).mul_(scale).mul_(weight != 0)


def effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """As `masked_weight`, but pruned entries may be -0.0, which no product notices; on a CPU half the time."""
    return torch.mm(lora_b, lora_a).mul_(scale).add_(weight).mul_(weight != 0).to(weight.dtype)


def masked_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    r"""The effective weight :math:`W + M \odot (B A) s` with :math:`M = [W \neq 0]`.

    The sum is taken in the adapter's dtype and rounded once, as merging does: what is trained is what is shipped.

    Args:
        weight: Pruned weight W, shape (out, in).
        lora_a: A, shape (rank, in).
        lora_b: B, shape (out, rank).
        scale: s, for LoRA alpha / rank.

    Returns:
        Shape (out, in), in the dtype of `weight`.

    Example:
        >>> masked_weight(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]]), scale=0.5)
        tensor([[2., 0.]])
    """
    return torch.mm(lora_b, lora_a).mul_(scale).add_(weight).to(weight.dtype).masked_fill_(weight == 0, 0)


def masked_lora_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    gradient: Gradient = "exact",
) -> Tensor:
    r"""A Linear with a masked low-rank update.

    .. math:: y = x W^T + \tilde x (M \odot (B A) s)^T + b, \qquad M = [W \neq 0]

    With :math:`G = \partial L / \partial y`, the gradients are :math:`\partial B = s (M \odot G^T \tilde x) A^T` and
    :math:`\partial A = s B^T (M \odot G^T \tilde x)`. `straight_through` leaves the mask out of both (LoRS,
    arXiv 2501.08582): nothing of size out x in is computed for them, and they are approximate.

    Args:
        inputs: x, shape (..., in).
        weight: Pruned weight W, frozen, shape (out, in), in the dtype of `inputs`.
        bias: b, shape (out,), or None.
        lora_a: A, shape (rank, in), in float32 or the dtype of `inputs`.
        lora_b: B, shape (out, rank), in the dtype of A.
        scale: s, for LoRA alpha / rank.
        dropped: The inputs after LoRA's dropout; None without dropout, which saves one of two products.
        gradient: `exact` or `straight_through`.

    Returns:
        y, shape (..., out).
    """
    exact = gradient == "exact"
    return _MaskedLoraLinear.apply(inputs, dropped, weight, bias, lora_a, lora_b, scale, exact)


class _MaskedLoraLinear(torch.autograd.Function):
    """Keeps its inputs, which live elsewhere anyway, and computes the effective weight anew in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        exact: bool,
    ) -> Tensor:
        # The base product needs no inputs for its gradient, since the base is frozen.
        ctx.save_for_backward(inputs if dropped is None else dropped, weight, lora_a, lora_b)
        ctx.has_dropout, ctx.scale, ctx.exact = dropped is not None, scale, exact
        if dropped is None:
            return linear(inputs, effective_weight(weight, lora_a, lora_b, scale), bias)
        update = masked_update(weight, lora_a, lora_b, scale).to(weight.dtype)
        return linear(inputs, weight, bias) + linear(dropped, update)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (output,) = gradients
        seen, weight, lora_a, lora_b = ctx.saved_tensors
        inputs = dropped = bias = d_a = d_b = None
        if ctx.has_dropout:
            if ctx.needs_input_grad[0]:
                inputs = output @ weight
            if ctx.needs_input_grad[1]:
                dropped = output @ masked_update(weight, lora_a, lora_b, ctx.scale).to(weight.dtype)
        elif ctx.needs_input_grad[0]:
            inputs = output @ effective_weight(weight, lora_a, lora_b, ctx.scale)
        rows, columns = output.reshape(-1, output.shape[-1]), seen.reshape(-1, seen.shape[-1])
        if ctx.needs_input_grad[3]:
            bias = rows.sum(0)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            if ctx.exact:
                whole = torch.mm(rows.t(), columns).to(lora_a.dtype).mul_(weight != 0)
                d_b, d_a = torch.mm(whole, lora_a.t()).mul_(ctx.scale), torch.mm(lora_b.t(), whole).mul_(ctx.scale)
            else:
                rows, columns = rows.to(lora_a.dtype), columns.to(lora_a.dtype)
                d_b = torch.mm(rows.t(), columns @ lora_a.t()).mul_(ctx.scale)
                d_a = torch.mm((rows @ lora_b).t(), columns).mul_(ctx.scale)
        return inputs, dropped, None, bias, d_a, d_b, None, None
