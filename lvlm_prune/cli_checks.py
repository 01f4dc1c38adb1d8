"""What no parser should be given: checked before, and as one line that names option and value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.errors import LARGEST_COUNT, LONGEST_FILE_NAME, InputError, first_line, refuse_huge

_MOST_VALUES = 100_000
_DEEPEST = 50
_LONGEST_PATH = 4095
_OF_PATHS = re.compile(r"(path|folders?|output|baseline|scratch|dir|files?)$")
_DEVICES = re.compile(r"auto|-1|0*[1-9]\d{0,5}|\d{1,6}(,\d{1,6})+,?|\d{1,6},")


def refuse_devices(devices: Any) -> None:
    """Refuse what cannot be a choice of devices; whether the machine has them, Lightning knows.

    Raises:
        InputError: It is of another kind, or none.

    Example:
        >>> refuse_devices("0,1")
        >>> refuse_devices(0)
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --trainer.devices 0: expected `auto`, how many, or a list of their numbers
    """
    if isinstance(devices, str):
        understood = bool(_DEVICES.fullmatch(devices.replace(" ", "")))
    elif isinstance(devices, list):
        numbers = [number for number in devices if isinstance(number, int) and not isinstance(number, bool)]
        understood = bool(numbers) and len(set(numbers)) == len(devices) and all(number >= 0 for number in numbers)
    else:
        counts = isinstance(devices, int) and not isinstance(devices, bool)
        understood = devices is None or (counts and (devices == -1 or 0 < devices < 10**6))
    if not understood:
        raise InputError("trainer.devices", devices, "expected `auto`, how many, or a list of their numbers")


def refuse_immense(value: Any, option: str = "") -> None:
    """Refuse whole numbers that nothing in the world counts, and names that no file can have.

    Loops over the numbers would not end, and to look for such a file is an error of its own.

    Args:
        value: Options, as nested plain data; plugins as `{"class_path": ..., "init_args": ...}`.
        option: Their place.

    Raises:
        InputError: One does not fit 32 bits, or is too long; names its option.

    Example:
        >>> refuse_immense({"engine": {"class_path": "BuiltinEngine", "init_args": {"batch_size": 10**20}}})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --engine.batch_size 100000000000000000000: must be at most 2147483647
    """
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_immense(item, option if name == "init_args" else f"{option}.{name}" if option else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_immense(item, option)
    elif isinstance(value, str):
        _refuse_no_path(option, value)
    elif isinstance(value, int):
        refuse_huge(option, value)
        if value < -LARGEST_COUNT:
            raise InputError(option, value, f"must be at least {-LARGEST_COUNT}")


def _refuse_no_path(option: str, value: str) -> None:
    if "\0" in value:
        raise InputError(option, value, "holds a zero byte")
    if not _OF_PATHS.search(option):
        return
    content = value.encode("utf-8", "surrogatepass")
    if len(content) > _LONGEST_PATH or any(len(name) > LONGEST_FILE_NAME for name in content.split(b"/")):
        raise InputError("" if option == "folders" else option, value, "is longer than any name of a file")


def refuse_unreadable(arguments: Sequence[str], folder: Path) -> None:
    """Refuse what no parser should be given: files that are pipes or no text, YAML that holds itself or no options.

    Args:
        arguments: The command line.
        folder: Where it was given.

    Raises:
        InputError: One is of that kind.
    """
    for option, value in written_options(arguments):
        if option.startswith("--") and value[:1] in ("[", "{"):
            try:
                content = yaml.safe_load(value)
                _count(content)
            except (RecursionError, OverflowError):
                raise InputError(option.removeprefix("--"), value, "is nested too deeply, or in itself") from None
            except (ValueError, yaml.YAMLError):
                continue  # said by the parser
            _refuse_no_classes(content, option.removeprefix("--"))
    for path in config_files(arguments):
        try:
            content = read_yaml(folder / path, "config", path)
        except (FileNotFoundError, yaml.YAMLError):
            continue  # said by the parser, with the place
        if not isinstance(content, dict) or all(value is None for value in content.values()):
            raise InputError("config", path, "holds no options; expected, for example, `pruning: {sparsity: 0.5}`")
        _refuse_no_names(content, path)
        _refuse_no_classes(content, "")


def read_yaml(file: Path, option: str, shown: Any) -> Any:
    """What a YAML file holds.

    Args:
        file: The file.
        option: Option that names it.
        shown: The file as it was given.

    Raises:
        InputError: It is no file, no text, or holds what cannot be read or has no end.
        FileNotFoundError: There is none.
        yaml.YAMLError: It is no YAML.
    """
    try:
        os.stat(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError):  # too long a name, or none that can be one
        raise InputError(option, shown, "no such YAML file") from None
    if not file.is_file():  # a pipe would be waited for
        raise InputError(option, shown, "is no file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        _count(content)
    except UnicodeDecodeError:
        raise InputError(option, shown, "is no text in UTF-8") from None
    except OSError as error:
        raise InputError(option, shown, f"cannot be read ({error.strerror})") from None
    except (RecursionError, OverflowError):
        raise InputError(option, shown, "is nested too deeply, or in itself") from None
    except ValueError as error:  # of dates and numbers that there are not
        raise InputError(option, shown, f"holds a value that cannot be read ({first_line(error)})") from None
    return content


def _refuse_no_names(content: dict[Any, Any], file: Path, place: str = "") -> None:
    """Refuse keys that are no words where options are, and classes that are none."""
    for key, value in content.items():
        if not isinstance(key, str):
            raise InputError("config", file, f"the key {key} is no name of an option{f' of {place}' if place else ''}")
        option = f"{place}.{key}" if place else key
        if isinstance(value, dict) and "class_path" in value:
            own = value.get("init_args", {})
            _refuse_no_names(own if isinstance(own, dict) else {}, file, option)
        elif isinstance(value, dict) and not place:
            _refuse_no_names(value, file, option)


def _refuse_no_classes(content: Any, place: str) -> None:
    """Refuse values that name a class and are none, wherever they stand.

    Example:
        >>> _refuse_no_classes([{"class_path": "WandaScorer", "init_args": 5}], "grid")
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --grid.init_args 5: expected options of WandaScorer, for example `alpha: 2`
    """
    if isinstance(content, list):
        for item in content:
            _refuse_no_classes(item, place)
    if not isinstance(content, dict):
        return
    inside = content
    if "class_path" in content:
        name, inside = content["class_path"], content.get("init_args", {})
        if not isinstance(name, str):
            raise InputError(place, name, "is no name of a class")
        if not isinstance(inside, dict):
            raise InputError(f"{place}.init_args", inside, f"expected options of {name}, for example `alpha: 2`")
        if beside := [key for key in content if key not in ("class_path", "init_args", "dict_kwargs")]:
            problem = f"stands beside class_path; options of {name} stand under init_args"
            raise InputError(f"{place}.{beside[0]}", content[beside[0]], problem)
    for key, value in inside.items():
        _refuse_no_classes(value, f"{place}.{key}" if place else str(key))


def _count(value: Any, path: tuple[int, ...] = (), count: int = 0) -> int:
    """Number of values in nested mappings and lists, with those that an anchor repeats.

    Raises:
        OverflowError: They hold themselves, or are more or nested more deeply than any configuration has them.
    """
    count += 1
    if isinstance(value, (dict, list)):
        if id(value) in path or len(path) > _DEEPEST or count > _MOST_VALUES:
            raise OverflowError
        for item in value.values() if isinstance(value, dict) else value:
            count = _count(item, (*path, id(value)), count)
    return count


def config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """Configuration files of a command line, in their order."""
    return (Path(value) for option, value in written_options(arguments) if option == "--config")


def written_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word of a command line as an option, with the value behind its `=`, or else the word that follows.

    Example:
        >>> list(written_options(["prune", "--a=1", "--b", "2"]))
        [('prune', '--a=1'), ('--a', '1'), ('--b', '2'), ('2', '')]
    """
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        option, given, value = argument.partition("=")
        yield option, value if given else following
