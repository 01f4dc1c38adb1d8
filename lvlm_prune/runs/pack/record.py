"""What a packed folder says of itself: where it came from, how much smaller it became, which shards are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.output.manifest import Manifest, read_run
from lvlm_prune.output.names import PACKING_RECORD
from lvlm_prune.packed.folder import PackedFolder, one_shard
from lvlm_prune.packed.format import METHOD, VERSION, Format

UNPACKING_RECORD = "unpacking.json"


def packed_config(text: str, form: Format) -> bytes:
    """The `config.json` of a packed checkpoint.

    Args:
        text: That of the sparse checkpoint.
        form: How it is packed.
    """
    quantization = {"quant_method": METHOD, "format_version": VERSION, "format": form}
    return _json({**json.loads(text), "quantization_config": quantization})


def dense_config(packed: CheckpointFolder, record: Manifest | None) -> bytes:
    """The `config.json` of an unpacked checkpoint: the original text, unless somebody changed it since.

    Args:
        packed: The packed checkpoint as it is stored.
        record: What the folder says of itself, where it does.
    """
    plain = {name: value for name, value in packed.config.items() if name != "quantization_config"}
    original = None if record is None else record.get("original_config")
    if isinstance(original, str) and _loaded(original) == plain:
        return original.encode()
    return _json(plain)


def packed_index(folder: Path, shards: list[str]) -> bytes:
    """The index of the packed shards in a folder."""
    views = {shard: one_shard(folder, shard) for shard in shards}
    total = sum(view[key].nbytes for view in views.values() for key in view)
    weight_map = {key: shard for shard, view in views.items() for key in view}
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def dense_index(packed: PackedFolder, record: Manifest | None) -> bytes:
    """The index of an unpacked checkpoint: the original text, where it is one of these tensors."""
    places = {key: packed[key].shard for key in packed}
    original = None if record is None else record.get("original_index")
    if isinstance(original, str) and (_loaded(original) or {}).get("weight_map") == places:
        return original.encode()
    total = sum(packed[key].nbytes for key in packed)
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def read_record(folder: Path) -> Manifest | None:
    """The record of a packed folder; None where it has none, or one that cannot be read."""
    found = read_run(folder / PACKING_RECORD)
    return None if found is None else Manifest(found)


def _loaded(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _json(content: Any) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, which only its number can stand for
        return (json.dumps(content, indent=2) + "\n").encode()
