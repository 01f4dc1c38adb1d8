"""Files of options, read as what people may have written into them, and values that no option takes."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.errors import LARGEST_COUNT, LONGEST_FILE_NAME, InputError, first_line, refuse_huge

_TIME = re.compile(r"[-+]?[\d_]+(:[0-5]?\d)+")
_MOST_VALUES = 100_000
_DEEPEST = 50
_LONGEST_PATH = 4095
_OF_PATHS = re.compile(r"(path|folders?|output|baseline|scratch|dir|files?)$")


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
        content = loaded(file.read_text(encoding="utf-8"))
    except _Twice as error:
        raise InputError(option, shown, f"has {error}; the first would be lost") from None
    except UnicodeDecodeError:
        raise InputError(option, shown, "is no text in UTF-8") from None
    except OSError as error:
        raise InputError(option, shown, f"cannot be read ({error.strerror})") from None
    except (RecursionError, OverflowError):
        raise InputError(option, shown, "is nested too deeply, or in itself") from None
    except ValueError as error:  # of dates and numbers that there are not
        raise InputError(option, shown, f"holds a value that cannot be read ({first_line(error)})") from None
    return content


def loaded(text: str, option: str = "") -> Any:
    """What YAML says.

    Args:
        text: The YAML.
        option: The option that it is the value of; empty for a file of options.

    Raises:
        InputError: A number that is none for people (YAML reads 1:30 as 90), or larger than any.
        RecursionError, OverflowError: It has no end.
        ValueError, yaml.YAMLError: It cannot be read.
    """
    content = yaml.load(text, _Loader)
    count_values(content)
    for name, value in values_of(content, option):
        if isinstance(value, _Time):
            raise InputError(name, value.text, f'YAML reads this as the number {value.number}; write "{value.text}"')
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise InputError(name, value, "is larger than any number can be")
    return content


def values_of(options: Any, option: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested options that is no mapping and no list, behind the option that it belongs to.

    Args:
        options: Plain data; plugins as `{"class_path": ..., "init_args": ...}`, which stand at the place of the class.
        option: Their place.

    Example:
        >>> list(values_of({"pool": {"class_path": "MixedPool", "init_args": {"alpha": 1}}, "grid": [2, 3]}))
        [('pool', 'MixedPool'), ('pool.alpha', 1), ('grid', 2), ('grid', 3)]
    """
    if isinstance(options, Mapping):
        for name, item in options.items():
            inside = option and name in ("class_path", "init_args")
            yield from values_of(item, option if inside else f"{option}.{name}" if option else str(name))
    elif isinstance(options, (list, tuple)):
        for item in options:
            yield from values_of(item, option)
    else:
        yield option, options


def refuse_times(options: Any, written: Mapping[str, str]) -> None:
    """Refuse whole numbers that were written as 1:30, which the parser takes for 90.

    Args:
        options: What it made of them, as nested plain data.
        written: Option -> what stands on the command line.

    Raises:
        InputError: One is of that form; names its option.

    Example:
        >>> refuse_times({"pattern": "2:4", "data": {"seed": 90}}, {"pattern": "2:4", "data.seed": "1:30"})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --data.seed 1:30: YAML reads this as the number 90; expected a whole number
    """
    for option, value in values_of(options):
        if type(value) is int and _TIME.fullmatch(text := written.get(option, "")):
            raise InputError(option, text, f"YAML reads this as the number {value}; expected a whole number")


def refuse_endless(value: Any, option: str, folder: Path) -> None:
    """Refuse values that name a file of options which has no end; any other value is another's matter.

    A section of options, or a class with its own, may be a file as well, which the parser opens whatever it is.

    Args:
        value: Of an option, or options as nested plain data.
        option: Their place.
        folder: Where names of files begin.

    Raises:
        InputError: One is a pipe, or YAML that holds itself.
    """
    for name, written in values_of(value, option):
        if isinstance(written, str) and written and not _OF_PATHS.search(name):
            _refuse_endless_file(folder / written, name, written)


def _refuse_endless_file(file: Path, option: str, value: str) -> None:
    try:
        mode = os.stat(file).st_mode
        if stat.S_ISREG(mode):
            count_values(yaml.safe_load(file.read_text(encoding="utf-8")))
        elif not stat.S_ISDIR(mode):
            raise InputError(option, value, "is no file")
    except (RecursionError, OverflowError):
        raise InputError(option, value, "is nested too deeply, or in itself") from None
    except (OSError, ValueError, yaml.YAMLError):
        return


class _Twice(ValueError):
    """An option stands twice in a section."""


class _Loader(yaml.SafeLoader):
    """Takes no section in which an option stands twice, of which YAML drops the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise _Twice(f"`{key.value}` twice, the second time in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return node


class _Time:
    """A whole number with colons: YAML counts in sixties, as clocks do."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number = text, number


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int | _Time:
    number: int = loader.construct_yaml_int(node)
    return _Time(node.value, number) if _TIME.fullmatch(node.value) else number


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def count_values(value: Any, path: tuple[int, ...] = (), count: int = 0) -> int:
    """Number of values in nested mappings and lists, with those that an anchor repeats.

    Raises:
        OverflowError: They hold themselves, or are more or nested more deeply than any configuration has them.
    """
    count += 1
    if isinstance(value, (dict, list)):
        if id(value) in path or len(path) > _DEEPEST or count > _MOST_VALUES:
            raise OverflowError
        for item in value.values() if isinstance(value, dict) else value:
            count = count_values(item, (*path, id(value)), count)
    return count


def refuse_immense(value: Any) -> None:
    """Refuse whole numbers that nothing in the world counts, and names that no file can have.

    Loops over the numbers would not end, and to look for such a file is an error of its own.

    Args:
        value: Options, as nested plain data; plugins as `{"class_path": ..., "init_args": ...}`.

    Raises:
        InputError: One does not fit 32 bits, or is too long; names its option.

    Example:
        >>> refuse_immense({"engine": {"class_path": "BuiltinEngine", "init_args": {"batch_size": 10**20}}})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --engine.batch_size 100000000000000000000: must be at most 2147483647
    """
    for name, one in values_of(value):
        if isinstance(one, str):
            _refuse_no_path(name, one)
        elif isinstance(one, int):
            refuse_huge(name, one)
            if one < -LARGEST_COUNT:
                raise InputError(name, one, f"must be at least {-LARGEST_COUNT}")


def _refuse_no_path(option: str, value: str) -> None:
    if "\0" in value:
        raise InputError(option, value, "holds a zero byte")
    if not _OF_PATHS.search(option):
        return
    content = value.encode("utf-8", "surrogatepass")
    if len(content) > _LONGEST_PATH or any(len(name) > LONGEST_FILE_NAME for name in content.split(b"/")):
        raise InputError("" if option == "folders" else option, value, "is longer than any name of a file")


def as_options(value: Any, place: str) -> Iterator[str]:
    """Options of nested plain data, those of a class at the place of the class.

    Example:
        >>> list(as_options({"pool": {"class_path": "MixedPool", "init_args": {"alpha": 1}}}, ""))
        ['--pool=MixedPool', '--pool.alpha=1']
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            inside = name in ("class_path", "init_args") and place
            if place and not inside and isinstance(item, Mapping) and "class_path" not in item:
                yield f"--{place}.{name}"
            yield from as_options(item, place if inside else f"{place}.{name}" if place else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from as_options(item, place)
    elif place:
        yield f"--{place}={value}"
