"""Verification: the written checkpoint is read again and held against the dense one and the promised pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.blocks import CheckpointFolder, StreamedWeights
from lvlm_prune.errors import RunError
from lvlm_prune.patterns import Group, Pattern

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Expectation:
    """What is promised of the weight of one pruned Linear.

    Args:
        sparsity: Its target sparsity.
        updated: Whether remaining weights may differ from the dense ones.
    """

    sparsity: float
    updated: bool = False


def verify_checkpoint(
    dense: CheckpointFolder,
    pruned: CheckpointFolder,
    weights: StreamedWeights,
    expectations: Mapping[str, Expectation],
    pattern: Pattern,
    group: Group = "row",
) -> dict[str, Any]:
    """Read both checkpoints tensor by tensor and compare.

    Every comparison group has exactly as many zeros as the pattern prunes (more only where the dense weight had zeros
    of its own), pruned entries are +0.0, other entries and all other tensors are byte-identical.

    Args:
        dense: The input checkpoint.
        pruned: The output checkpoint.
        weights: Knows where on disk a weight of the model is, fused with others or not.
        expectations: Full name of each pruned Linear -> what is promised of it.
        pattern: The sparsity pattern.
        group: Comparison group of the unstructured pattern.

    Returns:
        Zeros per pruned Linear, their share of all, and the number of untouched tensors.

    Raises:
        RunError: A promise is broken; names the tensor.
    """
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    touched = {key for name in expectations for key in weights.keys_of(f"{name}.weight")}
    for key in dense:
        if key not in touched and dense.read_bytes(key) != pruned.read_bytes(key):
            raise RunError(f"verification failed: tensor {key} was to stay as it is, and differs")
    for name, expected in expectations.items():
        before, after = (weights.stored(f"{name}.weight", folder) for folder in (dense, pruned))
        _check(name, before, after, expected, pattern, group)
        zeros[name] = int((after == 0).sum())
        sizes[name] = after.numel()
    return {
        "zeros": zeros,
        "sparsity": sum(zeros.values()) / max(sum(sizes.values()), 1),
        "untouched_tensors": len(dense) - len(touched),
    }


def _check(name: str, before: Tensor, after: Tensor, expected: Expectation, pattern: Pattern, group: Group) -> None:
    bits_before, bits_after = (weight.view(_BITS[weight.element_size()]) for weight in (before, after))
    if not expected.updated and not ((bits_after == 0) | (bits_after == bits_before)).all():
        raise RunError(f"verification failed: remaining weights of {name} changed")
    count = pattern.pruned_per_group((after.shape[0], after.shape[1]), expected.sparsity, group)
    zeros = (pattern.groups(after, group) == 0).sum(dim=1)
    own_zeros = (pattern.groups(before, group) == 0).sum(dim=1)
    if (zeros < count).any() or (zeros > count + own_zeros).any():
        worst = int(zeros[(zeros < count) | (zeros > count + own_zeros)][0])
        raise RunError(f"verification failed: {name} has {worst} zeros in a group, {count} were to be there")
