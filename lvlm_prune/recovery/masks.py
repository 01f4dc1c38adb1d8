"""The zeros of a pruned model: which Linears have them, where, and whether they are all still there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lvlm_prune.checkpoints.bits import bits_of
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.methods.patterns import Pattern, SemiStructured

if TYPE_CHECKING:
    from lvlm_prune.blocks import StreamedWeights
    from lvlm_prune.module import LVLMModule

# A dense weight has a few zeros by chance, above all in low precision.
LEAST_SPARSITY = 0.01


def pruned_linears(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those Linears of which at least one weight in a hundred is zero.

    Example:
        >>> sparse, dense = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> _ = sparse.weight.data[:, :2].zero_()
        >>> list(pruned_linears({"sparse": sparse, "dense": dense}))
        ['sparse']
    """
    return {name: linear for name, linear in linears.items() if is_pruned(linear.weight)}


def load_pruned(module: LVLMModule) -> None:
    """Bring a whole model into memory, for training, and find its pruned Linears; a second time it does nothing.

    Raises:
        InputError: The checkpoint cannot be used, or nothing in it is pruned.
    """
    if module.pruned:
        return
    module.load_whole()
    pruned = pruned_linears(module.linears())
    refuse_unpruned(module.path, pruned)
    module.pruned = pruned
    for linear in pruned.values():
        # Tools that multiply with a mask leave -0.0 behind.
        linear.weight.data.masked_fill_(linear.weight == 0, 0.0)


def refuse_unpruned(path: str, pruned: Collection[str]) -> None:
    """Refuse a model of which no Linear is pruned.

    Raises:
        InputError: The names of the pruned ones are none.
    """
    if not pruned:
        problem = "no Linear of its decoder blocks is pruned; make it sparse with `lvlm-prune prune` first"
        raise InputError("model.path", path, problem)


def is_pruned(weight: Tensor) -> bool:
    """Whether at least one in a hundred of its entries is zero."""
    return (weight == 0).float().mean().item() >= LEAST_SPARSITY


class ZeroMask:
    """Where a weight was zero when this was made, one bit for each weight, in ordinary memory.

    Args:
        weight: The pruned weight, shape (out, in).

    Example:
        >>> weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> mask = ZeroMask(weight)
        >>> weight[1, 1] = 0.5
        >>> mask.violation(weight), mask.sparsity
        ((1, 1), 0.5)
    """

    def __init__(self, weight: Tensor) -> None:
        zero = (weight.detach() == 0).cpu()
        self.shape, self._packed = tuple(zero.shape), np.packbits(zero.numpy())
        self.zeros = int(zero.sum())
        self.sparsity = self.zeros / max(zero.numel(), 1)

    def tensor(self) -> Tensor:
        """Bool of shape (out, in) on the CPU, True where the weight was zero."""
        count = int(np.prod(self.shape))
        return torch.from_numpy(np.unpackbits(self._packed, count=count).astype(bool)).reshape(self.shape)

    def violation(self, weight: Tensor) -> tuple[int, int] | None:
        """Row and column of the first pruned weight that is not +0.0 any more; None where all are."""
        bits = bits_of(weight.detach())
        wrong = ((bits != 0) & self.tensor().to(weight.device)).nonzero()
        return (int(wrong[0, 0]), int(wrong[0, 1])) if len(wrong) else None


class StoredMasks(Mapping[str, ZeroMask]):
    """The zeros of pruned Linears in a checkpoint, read when they are asked for: one in memory at a time.

    Args:
        names: Full names of the pruned Linears.
        weights: Reads the pruned weights of the checkpoint.
    """

    def __init__(self, names: Sequence[str], weights: StreamedWeights) -> None:
        self._names, self._weights = list(names), weights

    def __getitem__(self, name: str) -> ZeroMask:
        if name not in self._names:
            raise KeyError(name)
        return ZeroMask(self._weights.stored(f"{name}.weight"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def verify_zeros(name: str, mask: ZeroMask, weight: Tensor, pattern: Pattern | None = None) -> None:
    """Hold a weight against the zeros that it is to have.

    Args:
        name: The Linear, for the message.
        mask: Its zeros before recovery.
        weight: The weight after recovery, shape (out, in).
        pattern: With an N:M pattern, every group is counted too.

    Raises:
        RunError: A pruned weight is not exactly +0.0, or a group of N:M has too few zeros; names the Linear.
    """
    place = mask.violation(weight)
    if place is not None:
        value = weight[place].item()
        raise RunError(f"frozen mask violated: weight {list(place)} of {name} was pruned and is {value} now")
    if pattern is not None:
        pattern = pattern.at(mask.sparsity)
    if isinstance(pattern, SemiStructured):
        zeros = (pattern.groups(weight) == 0).sum(dim=1)
        least = pattern.group_size - pattern.keep
        if (zeros < least).any():
            raise RunError(
                f"frozen mask violated: a group of {name} has {int(zeros.min())} zeros, {pattern} asks {least}"
            )
