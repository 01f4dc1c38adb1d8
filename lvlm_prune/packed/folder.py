"""A packed checkpoint folder, seen as the dense one that it was made from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.checkpoints import CheckpointFolder, TensorInfo
from lvlm_prune.errors import InputError
from lvlm_prune.packed import bitmask
from lvlm_prune.packed.format import (
    METHOD,
    SHAPE,
    VERSION,
    bitmask_parts,
    is_coded,
    parts_of,
    read_shape,
    refuse_misfit,
)
from lvlm_prune.packed.origin import foreign_shard

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class PackedFolder(CheckpointFolder):
    """The dense tensors of packed ones, under the same names; each is unpacked when it is read.

    Opening one reads headers and shapes and refuses parts whose shapes do not fit together; what the parts contain is
    checked when a tensor is read. Nothing can be written through it.

    Args:
        stored: The folder as it is on disk, or one shard of it.

    Attributes:
        stored: The folder, or the shard, with the parts of packed tensors as they are on disk.
        packed: Name of each packed tensor to the names of its parts, by extension.

    Raises:
        InputError: A packed tensor lacks a part, or has one of a wrong shape or dtype.
    """

    def __init__(self, stored: CheckpointFolder) -> None:
        self.stored = stored
        self.path, self._option = stored.path, stored._option
        self.config = {name: value for name, value in stored.config.items() if name != "quantization_config"}
        self.shards = stored.shards
        self.packed = {key: parts for key in stored if (parts := self._names_of_parts(key))}
        hidden = {name for parts in self.packed.values() for name in parts.values()}
        self.tensors = {
            key: self._dense_info(key) if key in self.packed else place
            for key, place in stored.tensors.items()
            if key in self.packed or key not in hidden
        }

    @classmethod
    def open(cls, path: Path | str, option: str = "model.path") -> PackedFolder:
        """Open a folder that `config.json` calls packed.

        Raises:
            InputError: It is none, of another version, or broken.
        """
        stored = CheckpointFolder(path, option)
        refuse_other_format(stored)
        return cls(stored)

    def parts(self, key: str) -> dict[str, Tensor]:
        """The parts of a packed tensor as they are stored, by extension; on the CPU.

        Raises:
            RunError: The file has become shorter than its header says, or cannot be read.
        """
        return {end: self.stored.read(name) for end, name in self.packed[key].items()}

    def bitmask(self, key: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Kept weights (n,), mask (..., rows, ceil(columns / 8)) and shape of a packed tensor, checked.

        Raises:
            InputError: What is stored contradicts itself.
        """
        try:
            return bitmask_parts(self.parts(key))
        except ValueError as error:
            raise self._broken(key, error) from None

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        if key not in self.packed:
            return self.stored.read(key, device)
        return bitmask.decode(*self.bitmask(key)).to(device)

    def write(self, key: str, tensor: Tensor) -> None:
        raise TypeError("nothing can be written into a packed checkpoint")

    def at(self, path: Path | str) -> CheckpointFolder:
        raise TypeError("a packed checkpoint has another layout than a copy of its dense tensors")

    def fingerprint(self) -> str:
        return self.stored.fingerprint()

    def _parts(self, key: str, size: int) -> Iterator[bytearray]:
        if key not in self.packed:
            yield from self.stored._parts(key, size)
            return
        content = memoryview(self.read(key).reshape(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(content), size):
            yield bytearray(content[start : start + size])

    def _names_of_parts(self, key: str) -> dict[str, str]:
        try:
            return parts_of(key, self.stored.__contains__)
        except ValueError as error:
            raise self._broken(key, error) from None

    def _dense_info(self, key: str) -> TensorInfo:
        parts = {end: self.stored[name] for end, name in self.packed[key].items()}
        expected = {"": "U8" if is_coded(parts) else parts[""].dtype, SHAPE: "I64"}
        for end, part in parts.items():
            if part.dtype != expected.get(end, "U8"):
                raise self._broken(key + end, f"is {part.dtype}, not {expected.get(end, 'U8')}")
        dtype = "BF16" if is_coded(parts) else parts[""].dtype
        if dtype not in _DTYPES:
            raise self._broken(key, f"holds values of dtype {dtype}, which is never packed")
        try:
            shape = read_shape(self.stored.read(key + SHAPE))
            refuse_misfit({end: part.shape for end, part in parts.items()}, shape)
        except ValueError as error:
            raise self._broken(key, error) from None
        return TensorInfo(parts[""].shard, dtype, shape, -1, math.prod(shape) * _DTYPES[dtype].itemsize)

    def _broken(self, key: str, problem: object) -> InputError:
        return self._error(f"is no packed checkpoint that can be read: {key}: {problem}")


def open_checkpoint(path: Path | str, option: str = "model.path") -> CheckpointFolder:
    """A checkpoint folder as a dense one, whether it is packed or not; for reading.

    Raises:
        InputError: The folder cannot be used.
    """
    stored = CheckpointFolder(path, option)
    if packing_of(stored.config) is None:
        return stored
    refuse_other_format(stored)
    return PackedFolder(stored)


def packing_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the contents of a `config.json` say about packing; None for a checkpoint that is not packed."""
    said = config.get("quantization_config")
    return said if isinstance(said, dict) and said.get("quant_method") == METHOD else None


def refuse_other_format(folder: CheckpointFolder) -> None:
    """Refuse what is not packed, packed in a version that is not known, or put together from several packings.

    Raises:
        InputError: It is so.
    """
    said = packing_of(folder.config)
    if said is None:
        raise InputError(folder._option, folder.path, "is not a packed checkpoint")
    version = said.get("format_version")
    if version != VERSION:
        problem = f"is packed in format version {version}, only version {VERSION} is known; update lvlm-prune"
        raise InputError(folder._option, folder.path, problem)
    if shard := foreign_shard(folder.path, folder.shards):
        problem = f"{shard} is of another packing than packing.json; without that file it is taken as it is"
        raise InputError(folder._option, folder.path, problem)


def one_shard(folder: Path, shard: str, option: str = "model.path") -> CheckpointFolder:
    """One safetensors file of a folder by itself, with every tensor in it; `config.json` and index need not exist.

    Raises:
        InputError: It is broken.
    """
    view = copy.copy(_EMPTY)
    view.path, view._option, view.config, view.shards = folder, option, {}, [shard]
    view.tensors = dict(view._read_header(shard))
    return view


_EMPTY = CheckpointFolder.__new__(CheckpointFolder)
