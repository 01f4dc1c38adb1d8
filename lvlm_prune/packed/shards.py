"""Safetensors files written tensor by tensor, with the header known only at the end."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lvlm_prune.checkpoints import CheckpointFolder, TensorInfo
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output.manifest import replacing, sync_folder
from lvlm_prune.packed.folder import PackedFolder, one_shard
from lvlm_prune.packed.format import Format, encode
from lvlm_prune.packed.origin import DENSE_CHECKSUM, ORIGINAL_HEADER, metadata_of, read_header

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
UNVERIFIED = ".unverified"
"""What the name of a packed shard ends with until it was read again."""

_COPIED = 2**22


class ShardWriter:
    """Collects the tensors of one safetensors file, those of one element size together, so that all are aligned.

    Args:
        spool: Makes a temporary file.
    """

    def __init__(self, spool: Any) -> None:
        self._spool = spool
        self._files: dict[int, IO[bytes]] = {}
        self._tensors: dict[int, list[tuple[str, str, tuple[int, ...], int]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that lies on the CPU."""
        self.add_bytes(name, _NAMES[tensor.dtype], tuple(tensor.shape), [_bytes_of(tensor)])

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], content: Iterable[Any]) -> None:
        """Add a tensor as pieces of bytes.

        Args:
            name: Name of the tensor on disk.
            dtype: Its dtype as safetensors spells it.
            shape: Shape of the tensor, as its header has it.
            content: Its bytes, little-endian and row-major.
        """
        width = _element_size(dtype)
        file = self._files.setdefault(width, None) or self._spool()  # type: ignore[arg-type]
        self._files[width] = file
        size = sum(file.write(piece) for piece in content)
        self._tensors.setdefault(width, []).append((name, dtype, shape, size))

    def finish(self, file: IO[bytes], metadata: Mapping[str, str]) -> None:
        """Write the whole file: widest elements first, as safetensors itself does."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        widths = sorted(self._files, reverse=True)
        for width in widths:
            for name, dtype, shape, size in self._tensors[width]:
                header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
                end += size
        file.write(header_bytes(json.dumps(header, separators=(",", ":"), ensure_ascii=False)))
        for width in widths:
            self._files[width].seek(0)
            shutil.copyfileobj(self._files[width], file, _COPIED)


@contextmanager
def writing_shard(path: Path, metadata: Mapping[str, str]) -> Iterator[ShardWriter]:
    """A writer whose file takes its place, durably, when the context closes without an error.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    with ExitStack() as spools:
        writer = ShardWriter(lambda: spools.enter_context(tempfile.TemporaryFile(dir=path.parent)))
        yield writer
        with replacing(path) as file:
            writer.finish(file, metadata)


def header_bytes(text: str) -> bytes:
    """A header with its length in front, filled with spaces so that the tensors behind it are aligned to 8 bytes."""
    return header_of(text + " " * (-len(text.encode()) % 8))


def header_of(text: str) -> bytes:
    """A header as it is, with its length in front."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def is_packed_shard(path: Path) -> bool:
    """Whether a file that has this name is a packed shard; one that is there under its own name is whole."""
    return path.is_file() and ORIGINAL_HEADER in metadata_of(path)


def pack_shard(
    source: CheckpointFolder, shard: str, target: Path, packable: Collection[str], form: Format
) -> dict[str, int]:
    """Write the packed form of one shard, read it again, and only then give it its name.

    The target may be the source's own folder: the dense shard is there until the packed one takes its place.

    Args:
        source: The folder with the sparse weights.
        shard: Name of the file, kept.
        target: Folder to write to.
        packable: Names of tensors that are packed where that makes them smaller.
        form: Whether weights are stored as they are (`bitmask`), or their exponents in four bits (`coded`).

    Returns:
        Name of each packed tensor to the size of its parts in bytes.

    Raises:
        RunError: What was written is not what was read.
        OSError: The disk is full, or cannot be written.
    """
    view = one_shard(source.path, shard)
    text = read_header(source.path / shard)
    metadata = {"format": "pt", **json.loads(text).get("__metadata__", {}), ORIGINAL_HEADER: text}
    checksum = zlib.crc32(header_of(text))

    def summed(pieces: Iterable[bytearray]) -> Iterator[bytearray]:
        nonlocal checksum
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
            yield piece

    packed: dict[str, int] = {}
    unverified = target / f"{shard}{UNVERIFIED}"
    with writing_shard(unverified, metadata) as writer:
        for key, place in view.tensors.items():  # in the order of their bytes
            # Where two shards hold a tensor of the same name, the other one counts and this one is only kept.
            tensor = view.read(key) if key in packable and source[key] == place else None
            parts = None if tensor is None else encode(tensor, form)
            if tensor is None or parts is None:
                writer.add_bytes(key, place.dtype, place.shape, summed(view._parts(key, _COPIED)))
                continue
            checksum = zlib.crc32(_bytes_of(tensor), checksum)
            for end, part in parts.items():
                writer.add(key + end, part)
            packed[key] = sum(part.nbytes for part in parts.values())
        metadata[DENSE_CHECKSUM] = f"{checksum:08x}"
    _verify(view, PackedFolder(one_shard(target, unverified.name)))
    unverified.replace(target / shard)
    sync_folder(target)
    return packed


def _verify(dense: CheckpointFolder, packed: PackedFolder) -> None:
    """Hold every tensor of a packed shard, unpacked, against the one that it was made from.

    Raises:
        RunError: One differs.
    """
    same = dense.tensors.keys() == packed.tensors.keys()
    for key in dense:
        if not same or not dense.same_bytes(key, packed):
            raise RunError(f"verification failed: {key} does not come back from {packed.shards[0]}")


def verify_shard(source: CheckpointFolder, shard: str, target: Path) -> None:
    """Hold a packed shard that an earlier run wrote against the dense one.

    Raises:
        RunError: It is gone, or not as it was packed.
        InputError: It is broken.
    """
    if not (target / shard).is_file():
        raise RunError(f"verification failed: {shard} is missing in {target}")
    _verify(one_shard(source.path, shard), PackedFolder(one_shard(target, shard, "output")))
    metadata = metadata_of(target / shard)
    if metadata.get(ORIGINAL_HEADER) != read_header(source.path / shard):
        raise RunError(f"verification failed: {shard} in {target} is not as it was packed")


def unpack_shard(source: Path, shard: str, target: Path, name: str = "") -> None:
    """Write the dense form of one packed shard: the bytes that were packed, where the shard tells what they were.

    Args:
        source: The packed folder.
        shard: Name of the file.
        target: Folder to write to.
        name: Name to write under; default: that of the shard.

    Raises:
        InputError: The shard is broken, or was changed since it was packed.
        OSError: The disk is full, or cannot be written.
    """
    packed = PackedFolder(one_shard(source, shard))
    metadata = metadata_of(source / shard)
    original = metadata.get(ORIGINAL_HEADER)
    if original is None:
        text, order = _fresh_header(packed)
        content = header_bytes(text)
    else:
        content, order = header_of(original), _order(packed, original)
    with replacing(target / (name or shard)) as file:
        file.write(content)
        checksum = zlib.crc32(content)
        for key in order:
            for piece in packed._parts(key, _COPIED):
                file.write(piece)
                checksum = zlib.crc32(piece, checksum)
        # Where the original header is gone, so is the file that the checksum is of.
        if original is not None and metadata.get(DENSE_CHECKSUM) not in (None, f"{checksum:08x}"):
            raise InputError("model.path", source, f"{shard} was changed since it was packed: it has another CRC-32")


def refuse_changed_shard(source: Path, shard: str, checksum: int) -> None:
    """Hold a packed shard against what was packed, without writing what it unpacks to.

    Args:
        source: The packed folder.
        shard: Name of the file.
        checksum: CRC-32 of the shard that was packed, by the record of the packing.

    Raises:
        InputError: The shard is broken, or was changed since it was packed.
    """
    packed, original = PackedFolder(one_shard(source, shard)), metadata_of(source / shard).get(ORIGINAL_HEADER)
    found = None
    if original is not None:
        found = zlib.crc32(header_of(original))
        for key in _order(packed, original):
            for piece in packed._parts(key, _COPIED):
                found = zlib.crc32(piece, found)
    if found != checksum:
        raise InputError("output", source, f"{shard} was changed since it was packed: it has another CRC-32")


def _fresh_header(packed: PackedFolder) -> tuple[str, list[str]]:
    order = sorted(packed, key=lambda key: (-_element_size(packed[key].dtype), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        place = packed[key]
        header[key] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [end, end + place.nbytes]}
        end += place.nbytes
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False), order


def _order(packed: PackedFolder, original: str) -> list[str]:
    """Names in the order of their bytes in the original file.

    Raises:
        InputError: The original header is not one of these tensors.
    """
    try:
        entries = {key: entry for key, entry in json.loads(original).items() if key != "__metadata__"}
        order = sorted(entries, key=lambda key: entries[key]["data_offsets"])
        end, sound = 0, entries.keys() == packed.tensors.keys()
        for key in order if sound else ():
            place, entry = packed[key], entries[key]
            sound &= entry["dtype"] == place.dtype and tuple(entry["shape"]) == place.shape
            sound &= list(entry["data_offsets"]) == [end, end + place.nbytes]
            end += place.nbytes
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        shard = packed.shards[0]
        raise InputError("model.path", packed.path, f"{shard} says it was made from a file with other tensors")
    return order


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _element_size(dtype: str) -> int:
    place = TensorInfo("", dtype, (), 0, 0)
    try:
        return place.torch_dtype.itemsize
    except InputError:
        return 1
