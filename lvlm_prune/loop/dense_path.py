"""The calibration samples on their way through the dense model, beside the ones that go through the pruned one.

samples at block 0 ─┬─► dense block 0  ─► dense block 1  ─► ...     what the dense model feeds each block
                    └─► pruned block 0 ─► pruned block 1 ─► ...     what the pruned model feeds it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from lvlm_prune.blocks import BlockRunner, CaughtBatch, Placement


class DensePath:
    """Copies of batches, which go through dense blocks only; the given ones stay where they are.

    Args:
        runner: Runs the blocks; whoever asks for a step has the dense weights of its block in memory.
        batches: The batches at the input of the first block.
        placement: Where batches wait; the copies wait there too.
    """

    def __init__(self, runner: BlockRunner, batches: Sequence[CaughtBatch], placement: Placement | None = None) -> None:
        self.runner, self._placement = runner, placement or Placement()
        self._copies = {id(batch): (batch, batch.fork()) for batch in batches}

    def beside(
        self, batches: Sequence[CaughtBatch], place: int
    ) -> Iterator[tuple[CaughtBatch, CaughtBatch, CaughtBatch]]:
        """Each batch in turn, its turn at block `place`: (as it waits, on the device, its copy on the device)."""
        copies = [self._copies[id(batch)][1] for batch in batches]
        streams = self._placement.stream(batches, place), self._placement.stream(copies, place)
        # To the very end of both: what was on the device last goes back to where it waits.
        for (batch, here), (_, copy) in zip(*streams, strict=True):
            yield batch, here, copy

    def advance(self, place: int, seen: Callable[[CaughtBatch, Tensor], None] | None = None) -> None:
        """Take all copies through block `place`.

        Args:
            place: Number of the block in the runner.
            seen: Called with each batch and the dense block's output for its copy.
        """
        waiting = self._placement.stream([copy for _, copy in self._copies.values()], place)
        for (batch, _), (_, here) in zip(self._copies.values(), waiting, strict=True):
            output = self.runner.advance(place, here)
            if seen is not None:
                seen(batch, output)
