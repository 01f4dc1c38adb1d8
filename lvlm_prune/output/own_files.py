"""What a run needs from its own folder later: size and digest are kept in the manifest, and held against the file.

Weights are verified tensor by tensor. This is for everything beside them: an output without its tokenizer, or with half
of its `config.json`, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME
from lvlm_prune.checkpoints.unfinished import HELD_BACK, under_way
from lvlm_prune.errors import InputError
from lvlm_prune.output.names import MODEL_CARD
from lvlm_prune.output.private import without_private
from lvlm_prune.output.reading import load_yaml
from lvlm_prune.output.records import FileRecord

# What is private in them may be taken out later, which changes nothing that is held against anything.
_CLEANED = ("config.yaml", "adapter_config.json")
# Beside weights they say that these are to be changed, or are not what they seem.
_CHANGES_WHAT_IS_LOADED = ("adapter_config.json", "hf_quant_config.json", "quantization_config.json")


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file; of one that may be without what is private later, of what stays in it."""
    stays = public_content(path) if path.name in _CLEANED else None
    return _record_of_file(path) if stays is None else record_of_content(stays)


def _record_of_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def public_content(path: Path) -> bytes | None:
    """What a record or configuration says that is not private, in one order; None where the file is none.

    Args:
        path: A file of JSON by its suffix, or else of YAML.
    """
    load = json.loads if path.suffix == ".json" else load_yaml
    try:
        found = load(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return json.dumps(without_private(found), sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError, yaml.YAMLError):
        pass
    return None


def record_of_content(content: bytes) -> FileRecord:
    """The same of what is going to be written."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def digest_of_json(value: Any) -> str:
    """SHA-256 of plain data as JSON; the same before it is written and when it is read again.

    Example:
        >>> digest_of_json({2: (1, 0.5), 10: None}) == digest_of_json({"10": None, "2": [1, 0.5]})
        True
    """
    as_read = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def records_of(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Path in a folder -> size and digest, of files and of what is in folders; cards may be written again."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in files if file.name != MODEL_CARD]
    return {file.relative_to(folder).as_posix(): record_of(file) for file in files if file.is_file()}


def refuse_changed(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Hold files of an output folder against what was written there.

    Args:
        folder: The output folder.
        records: Path in the folder -> what the run knows of the file. `config.json` may still be held back.

    Raises:
        InputError: A file is missing, is not the one that was written, or came beside them and changes what is loaded;
            names it.
    """
    for name, record in records.items():
        path = folder / name
        if name == "config.json" and not path.is_file() and ((folder / HELD_BACK).is_file() or under_way(folder)):
            path = folder / HELD_BACK
        problem = ""
        if not path.is_file():
            problem = "is missing"
        elif record_of(path) != record and _record_of_file(path) != record:  # the whole file, of an older version
            problem = "is not the file that was written"
        if problem:
            way_out = "put it back, or write elsewhere"
            raise InputError("output", folder, f"{path.relative_to(folder)} {problem}; {way_out}")
    if (added := _added(folder, records)) is not None:
        problem = f"{added} came after the run, and changes what is loaded from the folder"
        raise InputError("output", folder, f"{problem}; take it away, or write elsewhere")


def _added(folder: Path, records: Mapping[str, FileRecord]) -> str | None:
    """A file that no run writes, with which transformers loads something else than was written."""
    for name in _CHANGES_WHAT_IS_LOADED:
        if name not in records and os.path.lexists(folder / name):
            return name
    if not os.path.lexists(folder / SINGLE_NAME):
        return None
    try:
        shards = set(json.loads((folder / INDEX_NAME).read_bytes())["weight_map"].values())
        beside = all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return SINGLE_NAME if beside and SINGLE_NAME not in shards else None  # the single file comes first
