"""`torch.cuda` on the emulated device, once `turn_on` is called: for the whole process, and for good."""

from __future__ import annotations

import atexit
import json
import os
import types
from pathlib import Path
from typing import Any

import torch

from tests.emulated_cuda import collectives
from tests.emulated_cuda.building import load as extension

_CUDA = 1  # c10::DeviceType


def _index(device: Any = None) -> int:
    if device is None or (isinstance(device, int) and device < 0):
        return extension().current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return extension().current_device() if device.index is None else device.index


class Stream(torch.Stream):
    """`torch.cuda.Stream`."""

    def __new__(cls, device: Any = None, priority: int = 0, **existing: Any):
        if "stream_id" in existing:
            return super().__new__(cls, **existing)
        return super().__new__(cls, torch.device("cuda", _index(device)))

    @property
    def cuda_stream(self) -> int:
        """Its handle."""
        return self.stream_id


class Event(torch.Event):
    """`torch.cuda.Event`."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        return super().__new__(cls, "cuda", enable_timing=enable_timing)


class StreamContext:
    """`torch.cuda.stream`."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._device, self._before = extension().current_device(), current_stream(self.stream.device_index)
            set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            set_stream(self._before)
            extension().set_device(self._device)


class DeviceContext:
    """`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.idx = -1 if device is None else _index(device)

    def __enter__(self) -> None:
        self._before = exchange_device(self.idx)

    def __exit__(self, *_: object) -> None:
        extension().set_device(max(self._before, 0))


class DeviceOf(DeviceContext):
    """`torch.cuda.device_of`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.get_device() if tensor.is_cuda else None)


def current_stream(device: Any = None) -> Stream:
    """`torch.cuda.current_stream`."""
    return Stream(stream_id=extension().current_stream(_index(device)), device_index=_index(device), device_type=_CUDA)


def default_stream(device: Any = None) -> Stream:
    """`torch.cuda.default_stream`."""
    return Stream(stream_id=0, device_index=_index(device), device_type=_CUDA)


def set_stream(stream: Stream) -> None:
    """`torch.cuda.set_stream`."""
    extension().set_device(stream.device_index)
    extension().set_stream(stream.device_index, stream.stream_id)


def exchange_device(index: int) -> int:
    """Another current device; the one before."""
    before = extension().current_device()
    if index >= 0:
        extension().set_device(index)
    return before


def total_bytes() -> int:
    """What a device holds; a process is told before its first call, and after this module was imported."""
    return int(float(os.environ.get("EMULATED_CUDA_GB", 24)) * 2**30)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes, as the driver sees them: what torch holds in its cache counts as used."""
    total = total_bytes()
    # A process with a context takes some of a device before it holds anything.
    context = min(300 * 2**20, total // 10)
    return max(total - extension().reserved_bytes(_index(device)) - context, 0), total


def empty_cache() -> None:
    """`torch.cuda.empty_cache`."""
    for index in range(extension().device_count()):
        extension().empty_cache(index)


def _properties(device: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="NVIDIA Emulated", major=8, minor=0, total_memory=total_bytes(), multi_processor_count=100, uuid="0"
    )


def _memory() -> dict[str, Any]:
    def allocated(device: Any = None) -> int:
        return extension().allocated_bytes(_index(device))

    def peak(device: Any = None) -> int:
        return extension().peak_bytes(_index(device))

    def statistics(device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": allocated(device), "allocated_bytes.all.peak": peak(device)}

    def reserved(device: Any = None) -> int:
        return extension().reserved_bytes(_index(device))

    return {
        "mem_get_info": mem_get_info,
        "empty_cache": empty_cache,
        "ipc_collect": lambda: None,
        "memory_allocated": allocated,
        "max_memory_allocated": peak,
        "memory_reserved": reserved,
        "max_memory_reserved": reserved,
        "reset_peak_memory_stats": lambda device=None: extension().reset_peak(_index(device)),
        "memory_stats": statistics,
        "memory_stats_as_nested_dict": lambda device=None: {},
    }


def _streams_and_devices() -> dict[str, Any]:
    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "synchronize": lambda device=None: extension().synchronize(_index(device)),
        "is_current_stream_capturing": lambda: False,
        "is_available": lambda: extension().device_count() > 0,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": extension().device_count,
        "current_device": extension().current_device,
        "set_device": lambda device: extension().set_device(_index(device)),
        "device": DeviceContext,
        "_DeviceGuard": DeviceContext,
        "device_of": DeviceOf,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "_get_device_index": lambda device, optional=False, allow_cpu=False: _index(device),
        "can_device_access_peer": lambda one, other: True,
    }


def _what_it_can() -> dict[str, Any]:
    return {
        "get_device_name": lambda device=None: "NVIDIA Emulated",
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": _properties,
        "get_arch_list": lambda: ["sm_80"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: True,
        "manual_seed": extension().manual_seed,
        "manual_seed_all": extension().manual_seed,
        "initial_seed": lambda: 0,
        "seed_all": lambda: None,
        "get_rng_state": lambda device="cuda": torch.empty(0),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": lambda *_: None,
    }


def _clone_storage(original: Any) -> Any:
    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return original(storage)
        with torch.no_grad():
            return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()

    return clone


def turn_on() -> None:
    """Let `torch` see the device."""
    cuda: Any = torch.cuda
    if cuda.is_available():
        return
    for name, value in (_memory() | _streams_and_devices() | _what_it_can()).items():
        setattr(cuda, name, value)
    cuda.streams.Stream, cuda.streams.Event, cuda.memory.mem_get_info = Stream, Event, mem_get_info
    cuda.nccl.version = lambda: (2, 27, 0)
    inside: Any = torch._C
    inside._cuda_getCurrentRawStream = extension().current_stream
    inside._cuda_exchangeDevice = inside._cuda_maybeExchangeDevice = exchange_device
    inside._cuda_setDevice, inside._cuda_getDevice = extension().set_device, extension().current_device
    inside._cuda_getDeviceCount = extension().device_count
    torch.version.cuda = "12.8"
    torch.backends.cuda.is_built = lambda: True
    torch.UntypedStorage.clone = _clone_storage(torch.UntypedStorage.clone)  # type: ignore[method-assign]
    collectives.turn_on()
    if path := os.environ.get("EMULATED_CUDA_REPORT"):
        rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
        atexit.register(lambda: Path(f"{path}.{rank}").write_text(json.dumps(extension().report(), indent=1)))
