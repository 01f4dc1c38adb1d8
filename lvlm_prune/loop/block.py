"""A block while it is being worked on: what the loop hands to callbacks, and what they note in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lvlm_prune.blocks import ExpertMatrix, ExpertStack, Target


@dataclass
class Block:
    """A block while it is being worked on.

    Args:
        index: Its number among all blocks of the run; those of a vision tower come before those of the decoder.
        place: Its number in its own decoder or tower.
        target: `language` or `vision`: what it belongs to.
        name: Its full module path.
        module: The module itself; its weights are loaded.
        linears: Name relative to the block -> every Linear that could be pruned.
        stacks: Stacks of routed experts, whose matrices could be pruned.
        masks: Name relative to the block -> mask of each Linear or expert matrix that was pruned (True where pruned);
            filled by the pruning callback in `on_block_calibrated`.
        updated: Names of pruned Linears whose remaining weights changed too.
        record: Numbers about this block for the manifest, filled by callbacks and by the loop.
        forwards: Forwards of the block on this process, one per calibration batch and pass; known when the block ends.
        solve_seconds: Time in which remaining weights were updated, noted by the pruning callback.
        sites: Number of a sample -> Linears of each input site in the order in which a forward of it calls them; noted
            where sites come one after the other, for the first of all samples with an order.
        open_sites: Linears that are to be gathered for and pruned next, and those after them; filled by the pruning
            callback in `on_block_calibrated`, where sites come one after the other.
        dense: Dense weights of what is pruned already, kept as long as `keeps_dense` says that they are needed.
        keeps_dense: Whether the dense block is needed after its weights are overwritten.
    """

    index: int
    place: int
    target: Target
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    stacks: list[ExpertStack] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    record: dict[str, Any] = field(default_factory=dict)
    forwards: int = 0
    solve_seconds: float = 0.0
    sites: dict[int, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    open_sites: list[list[str]] = field(default_factory=list)
    dense: dict[str, Tensor] = field(default_factory=dict)
    keeps_dense: bool = False

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Inside, the block is as it was before anything of it was pruned; `keeps_dense` must have been set."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, other in self.dense.items():
            if name in self.linears:
                parameter = self.linears[name].weight
                parameter.data, self.dense[name] = other, parameter.data
            else:  # part of a stack
                matrix = self.matrices()[name].weight
                self.dense[name] = matrix.clone()
                matrix.copy_(other)

    def matrices(self) -> dict[str, nn.Linear | ExpertMatrix]:
        """Name relative to the block -> every Linear and every matrix of a routed expert."""
        return {**self.linears, **{matrix.name: matrix for stack in self.stacks for matrix in stack.matrices()}}
