"""Where caught batches wait for their turn: on the device, in host memory, or in memory-mapped files.

    waiting   batch 0   batch 1   batch 2   batch 3 ...        hidden states and what the blocks are called with
                 ▲         │         │
          put back      on the     on its way
          meanwhile     device     meanwhile

The files have no name: they lie on the disk of a folder without being seen there, and are gone when the process ends,
however it ends. Where a batch waits changes neither its bits nor their layout.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from lvlm_prune.blocks.capture import CaughtBatch
from lvlm_prune.blocks.nested import containers_in, map_tensors, tensors_in
from lvlm_prune.errors import RunError

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = get_args(Place)

# Smaller ones are not worth a copy of their own.
_SMALLEST = 2**16

# Token ids and their mask stay where they are: they are looked at between the blocks.
_STAYS = ("input_ids", "attention_mask")


class Placement:
    """Batches wait on the device, where they were caught: nothing moves.

    Attributes:
        place: Where batches wait.
        peak_bytes: The most bytes that waited elsewhere at once, so far.
    """

    place: Place = "device"
    peak_bytes: int = 0

    def hold(self, batch: CaughtBatch) -> None:
        """Let a batch wait from now on."""

    def release(self, batch: CaughtBatch) -> None:
        """Let a batch wait on the device again."""

    def close(self) -> None:
        """No batch waits here any more."""

    def stream(self, batches: Sequence[CaughtBatch], block: int) -> Iterator[tuple[CaughtBatch, CaughtBatch]]:
        """Each batch in turn: (the batch as it waits, the same on the device, to run block `block` on).

        When the next one is asked for, the batch has moved on to where the one on the device is then. The next batch is
        fetched while the one handed out is in work.
        """
        for batch in batches:
            yield batch, batch

    def fetched(self, batch: CaughtBatch) -> CaughtBatch:
        """A copy of a batch on the device, for all blocks."""
        return batch.fork()


@dataclass
class _Fetched:
    """A batch on the device, and what its tensors there are copies of: `id` -> (copy, its version, original)."""

    batch: CaughtBatch
    originals: dict[int, tuple[Tensor, int, Tensor]]
    ready: Any = None

    def original(self, tensor: Tensor) -> Tensor | None:
        """What waits already as `tensor`; None for a tensor that is new or was changed."""
        copy, version, original = self.originals.get(id(tensor), (None, 0, tensor))
        return original if copy is tensor and tensor._version == version else None


class WaitingElsewhere(Placement):
    """Batches wait off the device, each is fetched for its turn.

    Args:
        place: `host`, which is pinned memory where the device is a GPU, or `disk`.
        device: Where blocks run.
        folder: Any folder on the disk that holds the files.
    """

    def __init__(self, place: Place, device: torch.device | str, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.peak_bytes = 0
        self._device = torch.device(device)
        self._bytes = 0
        self._files: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="placement")
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def hold(self, batch: CaughtBatch) -> None:
        """See `Placement.hold`.

        Raises:
            RunError: The disk is full, or cannot be written.
        """
        if self._copies is not None:
            torch.cuda.synchronize(self._device)  # it may be on its way to where it waits now
        self._put(batch, _Fetched(batch, {}), _fields(batch), self._event())

    def release(self, batch: CaughtBatch) -> None:
        """See `Placement.release`."""
        if self._copies is not None:
            for name, value in vars(self.fetched(batch)).items():
                setattr(batch, name, value)

    def close(self) -> None:
        """See `Placement.close`."""
        self._worker.shutdown()

    def stream(self, batches: Sequence[CaughtBatch], block: int) -> Iterator[tuple[CaughtBatch, CaughtBatch]]:
        """See `Placement.stream`.

        Raises:
            RunError: The disk is full, or cannot be written or read.
        """
        coming: Future[_Fetched] | None = self._worker.submit(self._fetch, batches[0], block) if batches else None
        going: Future[None] | None = None
        for position, batch in enumerate(batches):
            assert coming is not None
            fetched = self._arrived(coming.result())
            is_last = position + 1 == len(batches)
            coming = None if is_last else self._worker.submit(self._fetch, batches[position + 1], block)
            yield batch, fetched.batch
            if going is not None:
                going.result()
            going = self._worker.submit(self._put, batch, fetched, _moving_fields(batch), self._event())
            del fetched
        if going is not None:
            going.result()

    def fetched(self, batch: CaughtBatch) -> CaughtBatch:
        """See `Placement.fetched`."""
        return self._arrived(self._worker.submit(self._fetch, batch, None).result()).batch.fork()

    # ---- on their way ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _fetch(self, batch: CaughtBatch, block: int | None) -> _Fetched:
        if block is None or not _is_plain(batch):
            wanted = _fields(batch)
        else:
            wanted = {"hidden": batch.hidden, "carried": batch.carried, "now": batch.arguments.get(block, {})}
        waiting = [tensor for tensor in tensors_in(wanted) if tensor.device.type == "cpu"]
        if self._copies is None:
            self._read_ahead(waiting)
            return _Fetched(replace(batch), {id(tensor): (tensor, tensor._version, tensor) for tensor in waiting})
        with torch.cuda.stream(self._copies):
            moved = relocate(waiting, lambda span: span.to(self._device, non_blocking=True))
        copies = map_tensors(wanted, lambda tensor: moved.get(id(tensor), tensor))
        pairs = [(moved[id(tensor)], tensor) for tensor in waiting if id(tensor) in moved]
        originals = {id(copy): (copy, copy._version, original) for copy, original in pairs}
        if "now" in copies:
            assert block is not None
            copies["arguments"] = batch.arguments | {block: copies.pop("now")} if block in batch.arguments else {}
        return _Fetched(replace(batch, **copies), originals, self._copies.record_event())

    def _arrived(self, fetched: _Fetched) -> _Fetched:
        if self._copies is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(fetched.ready)
            for copy, _, _ in fetched.originals.values():
                copy.record_stream(computing)
        return fetched

    def _event(self) -> Any:
        return None if self._copies is None else torch.cuda.current_stream(self._device).record_event()

    @torch.no_grad()
    def _put(self, batch: CaughtBatch, fetched: _Fetched, fields: Iterable[str], computed: Any) -> None:
        """Let `batch` wait as the one that was fetched is now."""
        values = {name: getattr(fetched.batch, name) for name in fields}
        distinct = {id(tensor): tensor for tensor in tensors_in(values)}
        fresh = [tensor for tensor in distinct.values() if fetched.original(tensor) is None]
        context: AbstractContextManager[Any] = nullcontext()
        if self._copies is not None:
            self._copies.wait_event(computed)
            context = torch.cuda.stream(self._copies)
        with context:
            moved = relocate(fresh, self._keep)

        def waiting(tensor: Tensor) -> Tensor:
            original = fetched.original(tensor)
            return moved.get(id(tensor), tensor) if original is None else original

        for name, value in map_tensors(values, waiting).items():
            setattr(batch, name, value)

    def _keep(self, span: Tensor) -> Tensor:
        """A copy of some bytes where they wait."""
        if self._copies is not None and span.is_cuda:
            span.record_stream(self._copies)
        if self.place == "host":
            kept = torch.empty_like(span, device="cpu", pin_memory=self._copies is not None)
            return kept.copy_(span, non_blocking=True)
        return self._file(span.cpu())

    # ---- files -------------------------------------------------------------------------------------------------------
    def _file(self, span: Tensor) -> Tensor:
        content = memoryview(span.numpy().data)
        try:
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                # A private mapping: a block that changes its input in place changes its own copy.
                mapped = mmap.mmap(file.fileno(), len(content), access=mmap.ACCESS_COPY)
        except OSError as error:
            problem = f"cannot hold hidden states in files: {error.strerror or error}"
            raise RunError(f"--trainer.scratch {self.folder}: {problem}") from error
        kept = torch.frombuffer(mapped, dtype=torch.uint8)
        self._files[kept.data_ptr()] = mapped
        self._bytes += len(mapped)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        finalize(mapped, self._forget, len(mapped))
        return kept

    def _forget(self, count: int) -> None:
        self._bytes -= count

    def _read_ahead(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            file = self._files.get(tensor.untyped_storage().data_ptr())
            if file is not None and hasattr(mmap, "MADV_WILLNEED"):
                file.madvise(mmap.MADV_WILLNEED)


def place_batches(place: Place, device: torch.device | str, folder: Path | None = None) -> Placement:
    """Where batches wait.

    Args:
        place: `device`, `host` (pinned memory; the device itself where that is the CPU) or `disk`.
        device: Where blocks run.
        folder: Any folder on the disk that takes the files; default: the system's folder for temporary files.
    """
    if place == "device" or (place == "host" and torch.device(device).type == "cpu"):
        return Placement()
    return WaitingElsewhere(place, device, folder or Path(tempfile.gettempdir()))


def relocate(tensors: Sequence[Tensor], move: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Copies of tensors elsewhere, by `id`; strides stay, and what shares memory still does.

    Args:
        tensors: The tensors; those in less than 64 KiB of memory are left out.
        move: Makes a copy of a one-dimensional uint8 tensor.
    """
    together: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        together.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    moved: dict[int, Tensor] = {}
    for group in together.values():
        extents = [_extent(tensor) for tensor in group]
        # Aligned, so that a tensor of any dtype can begin where it did.
        first, last = min(start for start, _ in extents) & ~15, max(end for _, end in extents)
        if last - first < _SMALLEST:
            continue
        device, storage = group[0].device, group[0].untyped_storage()
        span = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, first, (last - first,), (1,))
        copy = move(span)
        for tensor, (start, _) in zip(group, extents):
            offset = (start - first) // tensor.element_size()
            empty = torch.empty(0, dtype=tensor.dtype, device=copy.device)
            moved[id(tensor)] = empty.set_(copy.untyped_storage(), offset, tensor.shape, tensor.stride())
    return moved


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of a tensor in its storage."""
    size, start = tensor.element_size(), int(tensor.storage_offset())
    if not tensor.numel():
        return start * size, start * size
    last = start + sum((length - 1) * int(stride) for length, stride in zip(tensor.shape, tensor.stride()))
    return start * size, (last + 1) * size


def _fields(batch: CaughtBatch) -> dict[str, Any]:
    return {name: value for name, value in vars(batch).items() if name not in _STAYS}


def _is_plain(batch: CaughtBatch) -> bool:
    """Whether running a block looks at nothing but its own arguments, and changes nothing but the hidden states."""
    shared = any(True for arguments in batch.arguments.values() for _ in containers_in(tuple(arguments.values())))
    return not (batch.glue or batch.history is not None or shared)


def _moving_fields(batch: CaughtBatch) -> Sequence[str]:
    """What may be another tensor once a block has run."""
    return ("hidden", "carried") if _is_plain(batch) else tuple(_fields(batch))
