"""What of a record is private: where files of the user are, and which of them a run had trouble with.

A model may be published, what it was made from often not. Names on the hub, classes, numbers and seeds stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lvlm_prune.checkpoints.hub import hub_name
from lvlm_prune.demo import NAMES
from lvlm_prune.errors import InputError
from lvlm_prune.output.names import EVALUATION_RECORD, PACKING_RECORD, PRIVATE_SUFFIX, PRUNING_RECORD, RECOVERY_RECORD

LEFT_OUT = "(left out)"
"""What stands in a record in place of something private."""

PRIVATE = "private_data"
"""Key of a record that says what became of private data."""

RECORDS = PRUNING_RECORD, RECOVERY_RECORD, PACKING_RECORD, EVALUATION_RECORD
"""Records that hold private data; the private folder has one at least."""

OWN_QUESTIONS = "own questions"
"""What a task is called that has its name from a file of the user's."""

CONFIG_HEAD = "# Local paths are left out. Where the folder was written they lie beside it, and --config finds them.\n"
"""First line of a configuration without private data."""

# Options and entries that hold places, by a part of their name; what stands there is private unless it is a hub name.
_PLACES = re.compile(r"path|folder|file|dir$|output|scratch|^dense$|^baseline$|^origin$|recipes", re.IGNORECASE)
_NOT_PLACES = ("class_path", "files", "fingerprint")
_PATH = re.compile(r"^(~|\.{1,2})?/|^[A-Za-z]:[\\/]|^\\\\|^~")
_MODELS = ("model", "dense", "baseline")


def private_folder(folder: Path) -> Path:
    """Where the private part of an output folder lies: beside it.

    Example:
        >>> private_folder(Path("runs/sparse")).name
        'sparse.private'
    """
    folder = folder.resolve() if folder.name in ("", "..") else folder.absolute()
    return folder.with_name(folder.name + PRIVATE_SUFFIX)


def public_folder(folder: Path) -> Path:
    """The output folder whose private part a folder is; any other folder is its own.

    Example:
        >>> public_folder(Path("runs/sparse.private")).name, public_folder(Path("runs/sparse")).name
        ('sparse', 'sparse')
    """
    folder = folder.absolute()
    return folder.with_name(folder.name.removesuffix(PRIVATE_SUFFIX) or folder.name)


def has_private(folder: Path) -> bool:
    """Whether a run has put what is private beside a folder."""
    return any((private_folder(folder) / name).is_file() for name in RECORDS)


def refuse_foreign(folder: Path) -> None:
    """Refuse an output folder where something that no run wrote is in the way of its private part.

    Raises:
        InputError: There is; names it.
    """
    beside = private_folder(folder)
    if not beside.exists() and not beside.is_symlink():
        return
    ours = beside.is_dir() and (not any(beside.iterdir()) or has_private(folder))
    if not ours:
        problem = f"what is private would go to {beside}, which no run wrote; move that away, or choose another folder"
        raise InputError("output", folder, problem)


def without_private(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or a configuration, without paths of this machine, ids of samples and which sample was drawn.

    Folders of models keep their last name; a task that has its name from a file does not.

    Example:
        >>> without_private({"model": {"path": "/home/me/llava"}, "data": {"path": "/me/p.json", "seed": 0}})
        {'model': {'path': 'llava'}, 'data': {'path': '(left out)', 'seed': 0}, 'private_data': '(left out)'}
    """
    kept = {name: value for name, value in record.items() if name != "picture"}
    if isinstance(tasks := kept.get("tasks"), Mapping):
        kept["tasks"] = public_tasks(tasks, record.get("engine"))
    return {**{name: _cleaned(value, name, "") for name, value in kept.items()}, PRIVATE: LEFT_OUT}


def without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or a configuration, of embedded model and data: without paths of this machine, and else as it is.

    Example:
        >>> without_places({"config": {"output": "/home/me/out"}, "picture": {"sample": 3}})
        {'config': {'output': '(left out)'}, 'private_data': '(left out)', 'picture': {'sample': 3}}
    """
    return without_private(record) | ({"picture": record["picture"]} if "picture" in record else {})


def public_tasks(tasks: Mapping[str, Any], engine: Any) -> dict[str, Any]:
    """What stands under the names of tasks, of which one that is named after a file gets a neutral name.

    Args:
        tasks: Name of a task -> anything.
        engine: What scored them, as `describe` has it.
    """
    files = {Path(text).stem for text in _files_of_questions(engine)}
    return {OWN_QUESTIONS if name in files else name: task for name, task in tasks.items()}


def whole_config(path: Path) -> Path:
    """The configuration with its private data, beside a folder whose own is without; else the one that is named."""
    beside = private_folder(path.parent) / path.name
    try:
        with path.open(encoding="utf-8") as file:
            left_out = file.readline() == CONFIG_HEAD
    except (OSError, ValueError):
        return path
    return beside if left_out and beside.is_file() else path


def with_whole_configs(arguments: Sequence[str]) -> list[str]:
    """A command line, where configurations whose private data lie beside their folder are named there."""
    told, follows = [], False
    for argument in arguments:
        option, equals, path = argument.partition("=")
        if follows:
            argument = str(whole_config(Path(argument)))
        elif option == "--config" and equals:
            argument = f"--config={whole_config(Path(path))}"
        follows = argument == "--config"
        told.append(argument)
    return told


def names_only_embedded(record: Mapping[str, Any]) -> bool:
    """Whether a run had the embedded model and embedded data only, so that there is nothing private about it.

    Args:
        record: Of a run that pruned or recovered.
    """
    model, data = record.get("model") or {}, (record.get("config") or {}).get("data") or {}
    sources = [value["class_path"] for value in data.values() if isinstance(value, Mapping) and "class_path" in value]
    embedded = all(str(source).startswith("lvlm_prune.data.Embedded") for source in sources)
    return embedded and bool({model.get("path"), record.get("origin")} & set(NAMES))


def keeps_private(publishable: bool | None, record: Mapping[str, Any]) -> bool:
    """Whether a command puts what is private beside its folder.

    Args:
        publishable: As its user said; None: unless there is nothing private.
        record: `model` and `config` of its run, `origin` where it has one.

    Example:
        >>> keeps_private(None, {"model": {"path": "demo"}}), keeps_private(None, {"model": {"path": "/mine"}})
        (False, True)
    """
    return not names_only_embedded(record) if publishable is None else publishable


def is_left_out(record: Mapping[str, Any]) -> bool:
    """Whether a record is one without private data.

    Example:
        >>> is_left_out({}), is_left_out(without_private({}))
        (False, True)
    """
    return record.get(PRIVATE) == LEFT_OUT


def left_out_options(config: Any, place: str = "") -> Iterator[str]:
    """Options of a configuration whose values were left out, by their names on the command line.

    Args:
        config: Options, as nested plain data; plugins as `{"class_path": ..., "init_args": ...}`.
        place: Their section.

    Example:
        >>> list(left_out_options({"data": {"source": {"class_path": "S", "init_args": {"path": "(left out)"}}}}))
        ['data.source.path']
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            inner = f"{place}.{name}" if place else str(name)
            yield from left_out_options(value, place if name == "init_args" else inner)
    elif config == LEFT_OUT or (isinstance(config, list) and LEFT_OUT in config):
        yield place


def _cleaned(value: Any, key: str, section: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _cleaned(item, str(name), key) for name, item in value.items()}
    if key == "skipped" and isinstance(value, list):  # names of samples, and what was wrong with them
        return [LEFT_OUT] * len(value)
    if key == "warnings" and isinstance(value, list):
        return [_without_names(str(item)) for item in value]
    if isinstance(value, list):
        return [_cleaned(item, key, section) for item in value]
    if isinstance(value, str) and _is_private(value, key):
        return _last_name(value) if section in _MODELS else LEFT_OUT
    return value


def _files_of_questions(engine: Any, of_benchmark: bool = False) -> Iterator[str]:
    """Private paths under the benchmark of an engine, as `describe` has it."""
    if isinstance(engine, Mapping):
        for name, value in engine.items():
            if of_benchmark and isinstance(value, str) and _is_private(value, str(name)):
                yield value
            yield from _files_of_questions(value, of_benchmark or name == "benchmark")


def _without_names(warning: str) -> str:
    """A warning without the sample, or whatever it names first.

    Example:
        >>> _without_names("2 samples could not be read (the first is patient-7: no such file)")
        '2 samples could not be read'
    """
    text = re.sub(r" \(the first is .*", "", warning)
    return LEFT_OUT if re.search(r"[\\/]", text) else text


def _is_private(text: str, key: str) -> bool:
    if not text or text in NAMES or "\n" in text:
        return False
    if _PATH.match(text):
        return True
    if key.endswith("recipes"):  # those of the package go by their names
        return re.search(r"[\\/.]", text) is not None
    return key not in _NOT_PLACES and _PLACES.search(key) is not None and hub_name(text) is None


def _last_name(path: str) -> str:
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
