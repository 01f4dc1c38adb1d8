"""Read what is needed next while the present is in work.

disk ──► host memory ──► pinned memory ──► GPU            on a thread and a stream of their own
the block before: ... computes on another stream ...      which waits for the copies only when its turn is over
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Thread

import torch
from torch import Tensor


class Prefetch:
    """Named tensors that are read in the background.

    Args:
        tensors: Reads and gives one (name, tensor) after the other.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = tensors
        self._found: list[tuple[str, Tensor]] = []
        self._error: BaseException | None = None
        self._dropped = False
        # A program that is interrupted does not wait for it.
        self._thread = Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for pair in self._tensors:
                if self._dropped:
                    return
                self._found.append(pair)
        except BaseException as error:
            self._error = error

    def take(self) -> list[tuple[str, Tensor]]:
        """Everything, once it is read.

        Raises:
            BaseException: What reading raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def drop(self) -> None:
        """Nobody wants it any more; returns when its memory is free."""
        self._dropped = True
        self._thread.join()
        self._found.clear()


class PrefetchToGpu(Prefetch):
    """Named tensors that are read, and copied to a GPU, in the background.

    Args:
        tensors: Reads and gives one (name, tensor) after the other, on the CPU.
        device: The GPU.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)
        super().__init__(self._copied(tensors))

    @torch.no_grad()
    def _copied(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            # A copy from pageable memory would hold up this thread, and with it the interpreter.
            pinned = tensor.pin_memory()
            with torch.cuda.stream(self._copies):
                copy = pinned.to(self._device, non_blocking=True)
            yield name, copy

    def take(self) -> list[tuple[str, Tensor]]:
        """Everything, on the GPU; the stream that computes waits for the copies, the host does not."""
        tensors = super().take()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        for _, tensor in tensors:
            tensor.record_stream(computing)
        return tensors


def prefetch(tensors: Iterable[tuple[str, Tensor]], device: torch.device | str) -> Prefetch:
    """Begin to read tensors; on their way to the device, too, where that is a GPU.

    Args:
        tensors: Reads and gives one (name, tensor) after the other, on the CPU.
        device: Where they are needed.
    """
    device = torch.device(device)
    return PrefetchToGpu(tensors, device) if device.type == "cuda" else Prefetch(tensors)
