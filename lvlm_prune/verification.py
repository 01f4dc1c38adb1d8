"""Verification: the written checkpoint is read again and held against the dense one and the promised pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.blocks import CheckpointFolder, StreamedWeights
from lvlm_prune.errors import RunError
from lvlm_prune.patterns import ZeroCount

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Expectation:
    """What is promised of the weight of one pruned Linear.

    Args:
        pruned: Number of its weights that were set to zero.
        zeros: How they spread over the weights that were compared with each other.
        updated: Whether remaining weights may differ from the dense ones.
    """

    pruned: int
    zeros: Sequence[ZeroCount] = ()
    updated: bool = False


def verify_checkpoint(
    dense: CheckpointFolder,
    pruned: CheckpointFolder,
    weights: StreamedWeights,
    expectations: Mapping[str, Expectation],
) -> dict[str, Any]:
    """Read both checkpoints tensor by tensor and compare.

    Every pruned weight has as many zeros as were made, in all and in every comparison group (more only where the dense
    weight had zeros of its own); they are +0.0. All other tensors are byte-identical, and so are the other entries of a
    weight that was not to be updated.

    Args:
        dense: The input checkpoint.
        pruned: The output checkpoint.
        weights: Knows where on disk a weight of the model is, fused with others or not.
        expectations: Full name of each pruned Linear -> what is promised of it.

    Returns:
        Zeros per pruned Linear, their share of all, and the number of untouched tensors.

    Raises:
        RunError: A promise is broken; names the tensor.
    """
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    touched = {key for name in expectations for key in weights.keys_of(f"{name}.weight")}
    for key in dense:
        if key not in touched and not dense.same_bytes(key, pruned):
            raise RunError(f"verification failed: tensor {key} was to stay as it is, and differs")
    for name, expected in expectations.items():
        before, after = (weights.stored(f"{name}.weight", folder) for folder in (dense, pruned))
        _check(name, before, after, expected)
        zeros[name] = int((after == 0).sum())
        sizes[name] = after.numel()
    return {
        "zeros": zeros,
        "sparsity": sum(zeros.values()) / max(sum(sizes.values()), 1),
        "untouched_tensors": len(dense) - len(touched),
    }


def _check(name: str, before: Tensor, after: Tensor, expected: Expectation) -> None:
    bits_before, bits_after = (weight.view(_BITS[weight.element_size()]) for weight in (before, after))
    if not expected.updated and not ((bits_after == 0) | (bits_after == bits_before)).all():
        raise RunError(f"verification failed: remaining weights of {name} changed")
    if expected.updated and ((after == 0) & (bits_after != 0)).any():
        raise RunError(f"verification failed: {name} holds -0.0 where +0.0 was to be written")
    if expected.updated and not torch.isfinite(after).all():
        raise RunError(f"verification failed: {name} holds NaN or infinity")
    whole = ZeroCount(after.numel(), expected.pruned, expected.pruned)
    for count in (*expected.zeros, whole):
        zeros, own_zeros = count.of(after), count.of(before)
        wrong = zeros < count.least
        if count.most is not None:
            wrong |= zeros > count.most + own_zeros
        if wrong.any():
            where = "all" if count is whole else "a group"
            found = f"{int(zeros[wrong][0])} zeros in {where}, {count.least} were to be there"
            raise RunError(f"verification failed: {name} has {found}")
