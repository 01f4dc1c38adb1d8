"""Which of the places that the caught samples could wait in is taken.

    on the device ─► too large ─► host memory (pinned where the device is a GPU) ─► too large ─► memory-mapped files

What is caught is put into host memory, or into files once it fills half of that. When the last sample is caught their
size is known, and with it the place for the rest of the run. The result does not depend on it, bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import psutil
import torch

from lvlm_prune.blocks import PLACES, CaughtBatch, Place, Placement, place_batches
from lvlm_prune.errors import InputError

Wanted = Literal["auto", "device", "host", "disk"]

# Of what is free, others may want some meanwhile, and allocators waste some.
_USABLE = 0.9


def checked_place(wanted: str) -> Wanted:
    """The option `--trainer.hidden_states`.

    Raises:
        InputError: It is none of the places.
    """
    if wanted not in ("auto", *PLACES):
        raise InputError("trainer.hidden_states", wanted, "must be auto, device, host or disk")
    return wanted  # type: ignore[return-value]  # mypy does not narrow a string by `in`


def available_host_memory() -> int:
    """Bytes of host memory that this process could still take, within the limit of its control group."""
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        available = min(available, max(int(most) - int(used.read_text()), 0))
    return int(_USABLE * available)


def available_device_memory(device: torch.device) -> int:
    """Bytes of memory that could still be taken on the device: on a CPU those of the host."""
    if device.type != "cuda":
        return available_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps of freed memory is there to be taken, though the driver counts it as used.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_USABLE * (free + kept))


def choose_place(wanted: Wanted, held: int, on_device: int, in_host: int, catching: int) -> Place:
    """Where samples of `held` bytes wait.

    Args:
        wanted: What the user asked for.
        held: Bytes of all samples of this process.
        on_device: Bytes that are left for them on the device beside all else.
        in_host: Bytes that are left for them in host memory.
        catching: Bytes that they may take in host memory while they are caught.

    Example:
        >>> choose_place("auto", 30, on_device=40, in_host=20, catching=50)
        'device'
        >>> choose_place("auto", 30, on_device=20, in_host=40, catching=20)
        'disk'
    """
    if wanted != "auto":
        return wanted
    if held > catching:
        return "disk"
    if held <= on_device:
        return "device"
    return "host" if held <= in_host else "disk"


class HiddenStates:
    """The samples of this process, from when they are caught.

    Args:
        wanted: Where they are to wait, or `auto`.
        device: Where blocks run.
        folder: Any folder on the disk that takes memory-mapped files.
        catching: Bytes that they may take in host memory before it is known how many they are.
    """

    def __init__(self, wanted: Wanted, device: torch.device, folder: Path, catching: int) -> None:
        self.wanted, self._device, self._folder, self._catching = wanted, device, folder, catching
        first: Place = ("host" if device.type == "cuda" else "device") if wanted == "auto" else wanted
        self.placement = place_batches(first, device, folder)
        self.nbytes = 0
        self._batches: list[CaughtBatch] = []

    def add(self, batch: CaughtBatch) -> None:
        """Hold one more batch.

        Raises:
            RunError: A disk is full, or cannot be written.
        """
        self._batches.append(batch)
        self.nbytes += batch.nbytes
        self.placement.hold(batch)
        if self.wanted == "auto" and self.nbytes > self._catching and self.placement.place != "disk":
            self._move("disk")

    @property
    def peak_bytes(self) -> int:
        """The most bytes of memory-mapped files at once, so far."""
        return self.placement.peak_bytes

    def settle(self, place: Place) -> None:
        """All batches are caught, and their size is known: let them wait in `place`, unless they are in files already.

        Raises:
            RunError: A disk is full, or cannot be written.
        """
        if place != self.placement.place and self.placement.place != "disk":
            self._move(place)

    def _move(self, place: Place) -> None:
        before: Placement = self.placement
        self.placement = place_batches(place, self._device, self._folder)
        if self.placement.place == before.place:
            return
        for batch in self._batches:
            if place == "device":
                before.release(batch)
            else:
                self.placement.hold(batch)
        before.close()
