"""Memory of one process of a run: what there is, where its samples wait, what the run will need, what it took.

catching ─► sizes of the batches ─► footprint ─► place for the samples ─► pruning ─► measured peak
                                    (prediction)                          (sampled all along)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lvlm_prune.blocks import CaughtBatch, Part, Place, Placement
from lvlm_prune.memory.footprint import Footprint
from lvlm_prune.memory.hidden_states import HiddenStates, Wanted, available_device_memory, available_host_memory
from lvlm_prune.memory.measuring import MemorySampler
from lvlm_prune.memory.sizes import BatchSize, MemoryDemand, Peak, larger_phases
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.folder import copied_bytes, existing_folder, folder_bytes


class RunMemory:
    """A context: memory is sampled, and samples are held, while it is open.

    Args:
        wanted: Where the samples are to wait, or `auto`.
        device: Where blocks run.
        scratch: Folder for memory-mapped files; empty: the disk of the output folder.
        output_folder: What is written; need not exist. None for a model that is pruned in memory.
        sharing: Processes on this machine, which share its memory.

    Attributes:
        sizes: Sizes of the calibration batches of this process.
    """

    def __init__(
        self, wanted: Wanted, device: torch.device, scratch: str, output_folder: Path | None, sharing: int
    ) -> None:
        self._wanted, self._device, self._output_folder = wanted, device, output_folder
        self._on_device = available_device_memory(device) // (sharing if device.type == "cpu" else 1)
        self._in_host = available_host_memory() // sharing
        if not scratch:
            scratch = tempfile.gettempdir() if output_folder is None else str(existing_folder(output_folder))
        self._scratch = Path(scratch)
        self._mapped = 0
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        self._held = HiddenStates(self._wanted, self._device, self._scratch, self._in_host // 2)
        self.sizes: list[BatchSize] = []

    def forget(self) -> None:
        """Let go of the samples that are held; others will come."""
        self._held.placement.close()
        self._mapped = max(self._mapped, self._held.peak_bytes)
        self._hold_nothing()

    def __enter__(self) -> RunMemory:
        self._sampler = MemorySampler()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._sampler.close()
        self._held.placement.close()

    @property
    def placement(self) -> Placement:
        """What holds the samples between blocks: on the device, in host memory or on disk."""
        return self._held.placement

    def hold(self, batch: CaughtBatch, size: BatchSize) -> None:
        """Hold a batch that was caught.

        Raises:
            RunError: A disk is full, or cannot be written.
        """
        self._held.add(batch)
        self.sizes.append(size)

    def predict(self, model: LVLMModule, part: Part, method: MemoryDemand) -> tuple[Footprint, Place]:
        """What these blocks will need, and where the samples can wait then, by the sizes of their batches."""
        output_bytes = 0 if model.folder is None else copied_bytes(model.folder)
        footprint = Footprint(model, part, method, self.sizes, self._device, self._sampler.start, output_bytes)
        return footprint, footprint.place(self._wanted, self._on_device, self._in_host)

    def settle(
        self, model: LVLMModule, part: Part, method: MemoryDemand, earlier: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """All samples are caught: let them wait where there is room.

        Args:
            model: The opened model.
            part: The blocks that come next.
            method: What prunes them.
            earlier: What was returned about blocks before them.

        Returns:
            What the manifest says about it: place, and bytes as predicted.

        Raises:
            RunError: A disk is full, or cannot be written.
        """
        footprint, place = self.predict(model, part, method)
        self._held.settle(place)
        place = self.placement.place
        peak = footprint.peak(place)
        return {
            "hidden_states": place,
            "baseline": footprint.baseline,
            "samples": max(footprint.waiting_bytes(), earlier.get("samples", 0)),
            "phases": larger_phases(earlier.get("phases", {}), footprint.phases()),
            "predicted": asdict(peak.or_more(Peak(**earlier["predicted"])) if earlier else peak),
        }

    def measured(self) -> dict[str, int | None]:
        """The largest memory of this process so far, beside what `settle` predicted of it."""
        on_gpu = self._device.type == "cuda"
        device = torch.cuda.max_memory_allocated(self._device) if on_gpu else None
        disk = 0 if self._output_folder is None else folder_bytes(self._output_folder)
        return asdict(Peak(device, self._sampler.peak, disk + max(self._mapped, self._held.peak_bytes)))
