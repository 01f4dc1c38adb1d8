"""What a packed shard says of the shard that it was made from, and whether the shards of a folder belong together."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from lvlm_prune.output.manifest import read_run
from lvlm_prune.output.names import PACKING_RECORD

ORIGINAL_HEADER = "lvlm_prune_dense_header"
"""Entry of a packed shard's metadata: the header of the shard that it was made from, for unpacking byte by byte."""

DENSE_CHECKSUM = "lvlm_prune_dense_crc32"
"""Another entry: the CRC-32 of that whole file, eight hexadecimal digits; unpacking gives these bytes or an error."""


def read_header(path: Path) -> str:
    """The header of a safetensors file that was already found sound, as it is written there."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode()


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that was already found sound; empty where it has none."""
    found: dict[str, str] = json.loads(read_header(path)).get("__metadata__", {})
    return found


def dense_checksums(folder: Path, shards: Iterable[str]) -> dict[str, int]:
    """Name of each packed shard -> CRC-32 of the one that it was made from, where it says so."""
    found = {}
    for shard in shards:
        said = metadata_of(folder / shard).get(DENSE_CHECKSUM)
        if isinstance(said, str) and len(said) == 8 and all(digit in "0123456789abcdef" for digit in said):
            found[shard] = int(said, 16)
    return found


def foreign_shard(folder: Path, shards: Iterable[str]) -> str:
    """A shard that is of another packing than the folder's record; empty where none is known to be."""
    record = read_run(folder / PACKING_RECORD) or {}
    packed = record.get("shards", {})
    found = dense_checksums(folder, [shard for shard in shards if shard in packed])
    return next((shard for shard, checksum in found.items() if packed[shard] != checksum), "")
