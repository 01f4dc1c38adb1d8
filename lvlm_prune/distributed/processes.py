"""The few things that processes tell each other, and how all of them end when one fails.

    rank 0   ... work ... ─► sum ─► work ... ─► sum ─► ends with the error of rank 1, silently
    rank 1   ... work ... ─► sum ─► error! ─► agree

Every message begins with the same short one, "has anybody failed?". So a process that fails anywhere says so there, the
others learn of it at their next message wherever that is, and nobody waits for a message that never comes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor

from lvlm_prune.errors import LVLMPruneError, OtherProcessFailed, ProcessLost, exit_status

Value = TypeVar("Value")

# Tensors that are smaller travel together.
_MESSAGE_BYTES = 2**26
# One process may verify a checkpoint or survey alone for hours while the others wait.
_PATIENCE = timedelta(days=30)


class Processes:
    """All processes of a run; with one, every method is the identity.

    Args:
        fabric: A launched Fabric, or None for a single process.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.rank = fabric.global_rank if fabric else 0
        self.count = fabric.world_size if fabric else 1
        self._ended = self.count == 1
        self._device = fabric.device if fabric else torch.device("cpu")
        # Gloo notices at once that a process is gone, which NCCL does not.
        self._control = None if self._ended else dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0

    # ---- sums and copies of tensors ----------------------------------------------------------------------------------
    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes; the same bits on every process."""
        if self.count == 1:
            return values
        summed = values.clone()
        self.sum_in_place([summed])
        return summed

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype over all processes; the same bits on every process."""
        if self.count > 1:
            self._send(tensors, lambda message: dist.all_reduce(message))

    def copy_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of process `source`; shapes and dtypes are the same on every process."""
        if self.count > 1:
            # As bytes: not every backend knows every dtype.
            parts = [tensor.contiguous() for tensor in tensors]
            self._send(
                [part.view(-1).view(torch.uint8) for part in parts if part.numel()],
                lambda message: dist.broadcast(message, source),
            )
            for tensor, part in zip(tensors, parts, strict=True):
                if tensor.data_ptr() != part.data_ptr():
                    tensor.copy_(part)

    def _send(self, tensors: Sequence[Tensor], send: Callable[[Tensor], Any]) -> None:
        """Send tensors with few messages; a large one is its own message and is not copied."""
        self.agree()
        for group in _messages(tensors):
            alone = len(group) == 1 and group[0].is_contiguous() and group[0].device == self._device
            message = group[0].view(-1) if alone else torch.cat([part.flatten() for part in group]).to(self._device)
            with self._connection():
                send(message)
            if not alone:
                for tensor, part in zip(group, message.split([part.numel() for part in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    # ---- plain values ------------------------------------------------------------------------------------------------
    def gather(self, value: Value) -> list[Value]:
        """Every process's (picklable) value, in the order of ranks, on every process."""
        if self.count == 1:
            return [value]
        self.agree()
        return self._gather(value)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Do what only the process that writes does.

        Returns:
            What it (picklable) returned, on every process.
        """
        if self.count == 1:
            return work()
        values = [work() if self.is_main else None]
        self.agree()
        with self._connection():
            dist.broadcast_object_list(values, 0, group=self._control)
        return values[0]  # type: ignore[return-value]  # filled in by the broadcast

    def _gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.count
        with self._connection():
            dist.all_gather_object(values, value, group=self._control)
        return values

    # ---- failing together --------------------------------------------------------------------------------------------
    def agree(self, error: BaseException | None = None) -> None:
        """Fail everywhere when one process failed. The first of those that failed shows its error, the others end.

        Raises:
            BaseException: `error` itself on the first process that has one.
            OtherProcessFailed: On all other processes.
            ProcessLost: A process is gone without a word.
        """
        if self._ended:
            if error is not None:
                raise error
            return
        failed = torch.tensor([int(error is not None)])
        try:
            with self._connection():
                dist.all_reduce(failed, group=self._control)
            if not failed.item():
                return
            reports = self._gather(None if error is None else (str(error) or type(error).__name__, exit_status(error)))
        except ProcessLost:
            if error is not None:
                raise error from None
            raise
        self._ended = True
        rank, (text, status) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        if rank != self.rank or error is None:
            raise OtherProcessFailed(rank, text, status)
        if isinstance(error, LVLMPruneError):
            error.agreed = True
        raise error

    def error_to_show(self, error: BaseException) -> BaseException:
        """The error to end with, once all processes know of `error`.

        An interruption is not discussed: it comes to all processes, in the middle of messages too.
        """
        if not self._ended and isinstance(error, Exception):
            try:
                self.agree(error)
            except BaseException as agreed:
                return agreed
        self._ended = True
        return error

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """While messages are sent: nothing can be agreed on any more once one has failed, for whatever reason."""
        try:
            yield
        except RuntimeError as error:
            self._ended = True
            if is_lost_connection(error):
                raise ProcessLost from error
            raise


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def deal(costs: Mapping[str, float], count: int) -> dict[str, int]:
    """Deal work out: the largest piece first, each to the process that has least; the same on every process.

    Args:
        costs: What each piece of work costs, in any unit.
        count: Number of processes.

    Returns:
        Name of each piece -> rank of the process that does it.

    Example:
        >>> deal({"q_proj": 2.0, "up_proj": 5.0, "down_proj": 4.0}, 2)
        {'up_proj': 0, 'down_proj': 1, 'q_proj': 1}
    """
    loads = [0.0] * count
    owners = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += cost
    return owners


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > _MESSAGE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group
