"""The few things that processes tell each other."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lvlm_prune.errors import LVLMPruneError


class Processes:
    """All processes of a run; with one, every method is the identity.

    Args:
        fabric: A launched Fabric, or None for a single process.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank = fabric.global_rank if fabric else 0
        self.count = fabric.world_size if fabric else 1

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes; the same bits on every process."""
        if self.count == 1 or self._fabric is None:
            return values
        device = values.device
        # Fabric's all_reduce works in place on tensors of its own device and averages unless told otherwise.
        summed = self._fabric.all_reduce(values.to(self._fabric.device, copy=True), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.to(device)

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Sum many float64 tensors over all processes with one message."""
        if self.count == 1 or not tensors:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """Every process's (picklable) value, in the order of ranks, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group of processes."""
        if self.count > 1:
            torch.distributed.destroy_process_group()

    def agree(self, error: BaseException | None) -> None:
        """Fail everywhere when one process failed, with the first process's error.

        Raises:
            BaseException: `error` itself where it arose; its message as `LVLMPruneError` on the other processes.
        """
        first = next((text for text in self.gather(None if error is None else str(error)) if text is not None), None)
        if error is not None:
            raise error
        if first is not None:
            raise LVLMPruneError(first)
