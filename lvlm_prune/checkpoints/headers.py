"""The header of a safetensors file: where each of its tensors lies."""

from __future__ import annotations

import json
import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvlm_prune.errors import InputError

SAFETENSORS = ".safetensors"
_POINTER = b"version https://git-lfs"  # what lies in the place of a large file that git did not fetch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit on the header.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shard: Name of the safetensors file.
        dtype: Its dtype as safetensors spells it, for example `BF16`.
        shape: Its shape.
        start: Position of its first byte in the file.
        nbytes: Its size.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch.

        Raises:
            InputError: torch has no such dtype.
        """
        if self.dtype not in _DTYPES:
            raise InputError("model.path", self.shard, f"holds tensors of dtype {self.dtype}, which is not supported")
        return _DTYPES[self.dtype]


def read_header(path: Path) -> list[tuple[str, TensorInfo]]:
    """Name and place of every tensor in a safetensors file, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no safetensors file, or its header does not fit it; says how.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("is no regular file")  # a pipe would be waited for
    size = found.st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == _POINTER[:8] and prefix + file.read(len(_POINTER) - 8) == _POINTER:
            raise ValueError("is only a pointer to the file; fetch it with `git lfs pull`")
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError("is truncated or not a safetensors file")
        content = file.read(length)
    try:
        header = json.loads(content.decode("utf-8"))
        if not all(isinstance(text, str) for text in (header.pop("__metadata__", None) or {}).values()):
            raise TypeError("metadata that safetensors does not take")
        tensors = sorted(
            ((key, _place(path.name, 8 + length, entry)) for key, entry in header.items()),
            key=lambda item: (item[1].start, item[1].nbytes),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ValueError("has a corrupt header") from None
    end = 8 + length
    for key, tensor in tensors:
        if tensor.start != end or not _fits(tensor):
            raise ValueError(f"has a corrupt header: the place of {key} does not fit its shape")
        end += tensor.nbytes
    if end > size:
        raise ValueError(f"is truncated: {size} bytes, its header says {end}")
    if end < size:
        raise ValueError(f"is corrupt: {size} bytes, its header says {end}")
    return tensors


def _place(shard: str, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    """As strict as safetensors: what it would not load would be written again, and called verified."""
    (first, last), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)) or not isinstance(dtype, str):
        raise TypeError("no whole number")
    return TensorInfo(shard, dtype, shape, data_start + first, last - first)


def _fits(tensor: TensorInfo) -> bool:
    dtype = _DTYPES.get(tensor.dtype)
    # The size of a dtype that torch lacks is not known; such a tensor is only ever copied.
    return tensor.nbytes >= 0 and (dtype is None or tensor.nbytes == math.prod(tensor.shape) * dtype.itemsize)
