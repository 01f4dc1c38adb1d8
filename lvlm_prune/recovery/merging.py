"""Merging: the recovered weights over the pruned ones, in a copy of the base, one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.errors import RunError
from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.output.verification import digest_of, refuse_same_files, verify_untouched
from lvlm_prune.recovery.masked_lora import masked_weight
from lvlm_prune.recovery.masks import ZeroMask, verify_zeros

# Times the norm of a weight before training.
_BURST = 1000

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


def merged_weight(model: LVLMModule, name: str, stored: Tensor, mask: ZeroMask) -> Tensor:
    """The recovered weight of a pruned Linear.

    Args:
        model: The trained model, with adapters or trained weights.
        name: Full name of the Linear.
        stored: Its pruned weight as the base stores it, shape (out, in), on the CPU.
        mask: Which weights are pruned and stay zero.

    Returns:
        Shape and dtype of `stored`; +0.0 wherever the mask says so.
    """
    layer: Any = model.adapted.get(name)
    if layer is not None:
        lora_a, lora_b = (part["default"].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
        merged = masked_weight(stored, lora_a, lora_b, layer.scaling["default"])
    elif model.pruned[name].weight.requires_grad:
        merged = model.pruned[name].weight.detach().to("cpu", stored.dtype)
    else:
        merged = stored
    return merged.masked_fill(mask.tensor(), 0.0)


def refuse_burst(name: str, stored: Tensor, merged: Tensor) -> None:
    """Refuse a weight that training has burst: a thousand times what it was is of no use, whatever the loss is.

    Behind a norm a loss stays finite however large weights are.

    Raises:
        RunError: It has NaN or infinity, or is that much larger.
    """
    before, after = (vector_norm(tensor, dtype=torch.float64).item() for tensor in (stored, merged))
    times = after / max(before, 1e-30)
    if not times <= _BURST:
        grown = f"{times:.0e} times as large as before" if math.isfinite(times) else "NaN or infinite"
        raise RunError(f"{name} is {grown} after training; lower --optimization.learning_rate")


def write_merged(
    model: LVLMModule,
    base: CheckpointFolder,
    written: CheckpointFolder,
    weights: StreamedWeights,
    masks: Mapping[str, ZeroMask],
) -> None:
    """Overwrite the pruned Linears in a copy of the base.

    Args:
        model: The trained model.
        base: The pruned checkpoint.
        written: The copy, of the same layout.
        weights: Knows where on disk a weight of the model is.
        masks: Zeros of every pruned Linear.

    Raises:
        OSError: The copy cannot be written.
        RunError: Training has burst a weight.
    """
    blocks = [model.runner.name(index) for index in range(len(model.runner))]
    block_of = {name: next(block for block in blocks if name.startswith(f"{block}.")) for name in masks}
    for _, group in groupby(masks, key=block_of.__getitem__):
        merged = {}
        for name in group:
            stored = weights.stored(f"{name}.weight", base)
            merged[f"{name}.weight"] = merged_weight(model, name, stored, masks[name])
            refuse_burst(name, stored, merged[f"{name}.weight"])
        for key, tensor in weights.to_disk(merged, written).items():
            written.write(key, tensor)
    written.sync()


def verify_merged(
    base: CheckpointFolder,
    written: CheckpointFolder,
    weights: StreamedWeights,
    masks: Mapping[str, ZeroMask],
    pattern: Pattern | None,
) -> dict[str, Any]:
    """Read the written checkpoint again and hold it against its base.

    Every entry that was zero is exactly +0.0, N:M holds in every group, all other tensors are byte-identical.

    Returns:
        Zeros and digest of each Linear, their share of all, and the number of untouched tensors.

    Raises:
        RunError: A promise is broken; names the tensor.
    """
    refuse_same_files(base, written)
    touched = {key for name in masks for key in weights.keys_of(f"{name}.weight")}
    untouched = verify_untouched(base, written, touched)
    zeros, digests, size = {}, {}, 0
    for name, mask in masks.items():
        weight = weights.stored(f"{name}.weight", written)
        verify_zeros(name, mask, weight, pattern)
        if not weight.isfinite().all():
            raise RunError(f"verification failed: {name} has NaN or infinity after recovery")
        zeros[name] = int((weight == 0).sum())
        digests[name] = digest_of(weight)
        size += weight.numel()
    return {
        "zeros": zeros,
        "digests": digests,
        "sparsity": sum(zeros.values()) / size,
        "untouched_tensors": untouched,
    }
