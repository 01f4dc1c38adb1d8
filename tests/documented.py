"""Whether records are as their types and the page on file formats say; held against each one that a test run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypedDict, Union

from safetensors import safe_open

from lvlm_prune.output import manifest
from lvlm_prune.output.names import COMPARISON_RECORD, EVALUATION_RECORD, STATISTICS_NAME
from lvlm_prune.output.reading import _hints, _taken_apart, conforms
from lvlm_prune.output.records import BlockRecord, RunRecord, TriedLine
from lvlm_prune.output.score_records import DenseRecord, EvaluationRecord, SweptRecord
from lvlm_prune.recovery.adapter_folder import MARKER_NAME, _Marker
from lvlm_prune.runs.pack.record import UNPACKING_RECORD
from lvlm_prune.runs.sweep.results import DENSE, Results

DOCS = Path(__file__).parents[1] / "docs"
KINDS: dict[str, Any] = {
    **manifest._KINDS,
    EVALUATION_RECORD: EvaluationRecord,
    UNPACKING_RECORD: RunRecord,
    MARKER_NAME: _Marker,
    COMPARISON_RECORD: dict[str, Any],  # which nothing reads again
    "sweep.jsonl": SweptRecord,
    "search.jsonl": TriedLine,
}
_held: set[tuple[str, ...]] = set()
_TAKES_MORE = (BlockRecord, EvaluationRecord)  # of plugins


def undocumented(record: Path) -> list[str]:
    """What is wrong with a record that was written; see `undeclared`."""
    return undeclared(record.name, json.loads(record.read_text(encoding="utf-8")))


def _is_new(record: Path) -> bool:
    """Whether no record of an unfinished run with these entries was written before; those of finished runs always.

    Not where a run copied what somebody had spoilt.
    """
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        status = found["status"] if record.name in manifest._KINDS else "complete"
        key = (record.name, status, *found)
    except (ValueError, TypeError, KeyError):
        return False
    return status == "complete" or not (key in _held or _held.add(key))


def unnamed_tensors(statistics: Path) -> set[str]:
    """Tensors of statistics that are not in the page; those of saliencies and pools are called after them."""
    with safe_open(statistics, "pt") as file:
        names = set(file.keys())
    documented = set(re.findall(r"`(\w+)\.\{", (DOCS / "file_formats.md").read_text(encoding="utf-8")))
    others = {name for name in names if name.partition(".")[0] not in documented and "_sel." not in name}
    return {name for name in others if f"sel.{name.partition('.')[2]}" not in names}


def undeclared(name: str, record: Mapping[str, Any]) -> list[str]:
    """Entries of a record, at every depth, that its type does not name or says to be something else.

    And keys that no section of the page which names the file has in backticks.
    """
    kind = DenseRecord if name == "sweep.jsonl" and record["identity"].startswith(DENSE) else KINDS[name]
    keys = set() if kind is not KINDS[COMPARISON_RECORD] else set(record)
    return [*_differences(record, kind, name, keys), *(f"{key} is not in the page" for key in keys - _words(name))]


@cache
def _words(name: str) -> set[str]:
    text = (DOCS / "file_formats.md").read_text(encoding="utf-8")
    sections = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if f"`{name}`" in part]
    return set(re.findall(r"`(\w+)`", "".join(sections)))


def _differences(value: Any, kind: Any, path: str, keys: set[str]) -> Iterator[str]:
    """See `undeclared`; `keys` takes the names of all entries."""
    origin, parts = _taken_apart(kind)
    if origin in (Union, UnionType):
        fitting = [part for part in parts if conforms(value, part)]
        whole = [part for part in fitting if not isinstance(value, dict) or value.keys() <= _hints(part).keys()]
        yield from _differences(value, (whole or fitting or [type(None)])[0], path, keys)
    elif origin is Annotated and conforms(value, kind):
        yield from _differences(value, parts[0], path, keys)
    elif origin is TypedDict and isinstance(value, dict):
        hints = _hints(kind)
        keys |= value.keys() & hints.keys()
        if missing := kind.__required_keys__ - value.keys():
            yield f"{path} lacks {missing}"
        if kind not in _TAKES_MORE and (more := value.keys() - hints.keys()):
            yield f"{path} has {more}, which {kind.__name__} has not"
        for key in value.keys() & hints.keys():
            yield from _differences(value[key], hints[key], f"{path}: {key}", keys)
    elif (origin is dict and isinstance(value, dict)) or (origin is list and isinstance(value, list)):
        for item in value.values() if origin is dict else value:
            yield from _differences(item, parts[-1], path, keys)
    elif not conforms(value, kind):
        yield f"{path} is {value!r:.60}"


def hold_records_against_types() -> None:
    """From here on a run that writes an entry which no type or no page names ends with an error."""
    replacing, add = manifest.replacing, Results.add

    @contextmanager
    def replacing_held(path: Path) -> Iterator[Any]:
        with replacing(path) as file:
            yield file
        if path.name == STATISTICS_NAME:
            assert not (more := unnamed_tensors(path)), more
        if path.name in KINDS and path.suffix != ".jsonl" and _is_new(path):  # lines of those are held one by one
            assert not (found := undocumented(path)), found

    def add_held(results: Results, record: Mapping[str, Any]) -> None:
        assert not (found := undeclared(f"{results.kind}.jsonl", {**record, "digest": ""})), found
        add(results, record)

    manifest.replacing, Results.add = replacing_held, add_held
