"""Reading records and configurations of a folder: a file may be of another tool or version, or cut short."""

import json
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Required, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

# libyaml's, where it is installed: ten times as fast.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_record(path: Path, kind: type) -> dict[str, Any] | None:
    """A JSON file that is of a kind of record, or None where it is not: of another tool or version, or cut short.

    Args:
        path: The file; there may be none.
        kind: A `TypedDict`.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if conforms(found, kind) else None


def load_yaml(text: str) -> Any:
    """What a YAML document says, in plain data.

    Args:
        text: The document.

    Raises:
        yaml.YAMLError: It is none, or nested too deeply.
    """
    return yaml.load(text, _YAML_LOADER)


def conforms(value: Any, kind: Any) -> bool:
    """Whether what was read from JSON is of a type: keys that a `TypedDict` does not name may be anything.

    Args:
        value: Mappings, lists, strings, numbers, null.
        kind: A type, as in `lvlm_prune.output.records`; `Annotated[number, (low, high)]` for a range.

    Example:
        >>> from lvlm_prune.output.records import FileRecord
        >>> conforms({"bytes": 3, "sha256": "ab", "more": None}, FileRecord), conforms({"bytes": -3}, FileRecord)
        (True, False)
    """
    if kind is Any:
        return True
    origin, parts = _taken_apart(kind)
    if origin is TypedDict:
        hints = _hints(kind)
        return (
            isinstance(value, dict)
            and kind.__required_keys__ <= value.keys()
            and all(conforms(value[key], hints[key]) for key in hints.keys() & value.keys())
        )
    if origin is Annotated:
        low, high = parts[1]
        return conforms(value, parts[0]) and low <= value <= high
    if origin in (Union, UnionType):
        return any(conforms(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(item, parts[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(conforms(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(conforms, value, parts))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@cache
def _taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a type is made of, and its parts."""
    return (TypedDict, ()) if is_typeddict(kind) else (get_origin(kind), get_args(kind))


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[0] if get_origin(hint) is Required else hint for name, hint in hints.items()}
