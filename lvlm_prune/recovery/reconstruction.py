"""Block-wise reconstruction: the options, and the error that is made small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lvlm_prune.blocks import CaughtBatch
from lvlm_prune.errors import InputError


@dataclass
class Reconstruction:
    """Fitting each block's adapters to what the dense block puts out.

    Args:
        epochs: Passes over the samples at each block.
        inputs: What the dense block is run on: `dense`, what reaches it in the dense model, so that a block also makes
            up for what the blocks before it still lack; or `pruned`, the same as the pruned block, so that each block
            only mends itself (half the memory).

    Raises:
        InputError: An option is out of range.
    """

    epochs: int = 2
    inputs: Literal["dense", "pruned"] = "dense"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError("reconstruction.epochs", self.epochs, "must be at least 1")
        if self.inputs not in ("dense", "pruned"):
            raise InputError("reconstruction.inputs", self.inputs, "must be dense or pruned")


def squared_sums(output: Tensor, target: Tensor, batch: CaughtBatch) -> tuple[Tensor, Tensor]:
    """Squared error of a block's output and squared size of what it should be, summed over real tokens.

    Args:
        output: The block's output, shape (B, S, D), or with several residual streams beside B and S.
        target: What it should be, of the same shape.
        batch: The batch, which says where padding is.

    Returns:
        Two scalars, float32.
    """
    error, size = (output.float() - target.float()).square(), target.float().square()
    mask = batch.attention_mask
    if mask is not None and mask.ndim == 2:
        streams = (1,) * (output.ndim - 3)
        shape = (*mask.shape, *streams, 1) if output.shape[:2] == mask.shape else (*streams, *mask.shape, 1)
        real = mask.to(output.device, torch.float32).reshape(shape)
        error, size = error * real, size * real
    return error.sum(), size.sum()
