"""What no parser should be given: checked before, and as one line that names option and value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

import yaml

from lvlm_prune.cli_classes import CLASS_KINDS, close_in_files
from lvlm_prune.errors import InputError
from lvlm_prune.option_files import as_options, loaded, read_yaml, refuse_endless

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

OF_TRAINING = {
    *("fast_dev_run", "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "reload_dataloaders_every_n_epochs", "enable_checkpointing"),
    *("use_distributed_sampler", "detect_anomaly", "sync_batchnorm", "enable_model_summary"),
}
"""Options of Lightning's Trainer that only a loop of training, validation or prediction heeds."""

_DIGITS = 200  # of a number that may be larger than any
_MOST_PROCESSES = 64
_DEVICES = re.compile(r"auto|-1|0*[1-9]\d{0,5}|\d{1,6}(,\d{1,6})+,?|\d{1,6},")


def refuse_devices(devices: Any) -> None:
    """Refuse what cannot be a choice of devices; whether the machine has them, Lightning knows.

    Raises:
        InputError: It is of another kind, or none, or many more than a machine has.

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
    # Processes on a CPU may be as many as anybody asks for, and each is a Python with torch of its own.
    count, most = str(devices).strip(), max(_MOST_PROCESSES, os.cpu_count() or 1)
    if count.isdecimal() and int(count) > most:
        raise InputError("trainer.devices", devices, f"more than {most} processes are never started on one machine")


def refuse_unreadable(arguments: Sequence[str], folder: Path) -> None:
    """Refuse what no parser should be given: files that are pipes or no text, YAML that holds itself or no options.

    Args:
        arguments: The command line.
        folder: Where it was given.

    Raises:
        InputError: One is of that kind.
    """
    for option, value in written_options(arguments):
        is_long_number = len(value) > _DIGITS and value.lstrip("+-")[:1].isdigit()
        if option.startswith("--") and (value[:1] in ("[", "{") or is_long_number):
            try:
                content = loaded(value, option.removeprefix("--"))
            except (RecursionError, OverflowError):
                raise InputError(option.removeprefix("--"), value, "is nested too deeply, or in itself") from None
            except (ValueError, yaml.YAMLError):
                continue  # said by the parser
            _refuse_no_classes(content, option.removeprefix("--"))
        elif value.endswith(".py") and (kind := option.rpartition(".")[2].lstrip("-")) in CLASS_KINDS:
            close = "".join(f"; is {one} meant?" for one in close_in_files(value, kind, folder)[:1])
            problem = f"is a file; name a class in it, {Path(value).stem}.CLASS{close}"
            raise InputError(option.removeprefix("--"), value, problem)
        elif option.startswith("--") and option != "--config":
            refuse_endless(value, option.removeprefix("--"), folder)
    for path in config_files(arguments):
        try:
            content = read_yaml(folder / path, "config", path)
        except (FileNotFoundError, yaml.YAMLError):
            continue  # said by the parser, with the place
        if not isinstance(content, dict) or all(value is None for value in content.values()):
            raise InputError("config", path, "holds no options; expected, for example, `pruning: {sparsity: 0.5}`")
        _refuse_no_names(content, path)
        _refuse_no_classes(content, "")
        refuse_endless(content, "", (folder / path).parent)


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


def options_of_values(arguments: Sequence[str]) -> Iterator[str]:
    """What stands inside values that are YAML themselves, as it would stand on the command line.

    Example:
        >>> list(options_of_values(["--data.source={class_path: TextSource, init_args: {path: a.txt}}"]))
        ['--data.source=TextSource', '--data.source.path=a.txt']
    """
    for option, value in written_options(arguments):
        if option.startswith("--") and value[:1] in ("[", "{"):
            with suppress(ValueError, RecursionError, yaml.YAMLError):
                yield from as_options(yaml.safe_load(value), option.removeprefix("--"))


def options_of_files(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """What stands in the configuration files, as it would stand on the command line."""
    for path in config_files(arguments):
        try:
            content = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
            yield from as_options(content, "")
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue


def refuse_null_options(parser: ArgumentParser, options: Namespace) -> None:
    """Refuse `null` from a file for an option whose type does not allow it; jsonargparse hands it on.

    Args:
        parser: Of the command.
        options: What was given, defaults filled in.

    Raises:
        InputError: One is null; names it.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint in (None, Any, object) or action.default is None or NoneType in get_args(hint):
            continue
        if action.dest in options and options[action.dest] is None:
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise InputError(action.dest, "null", f"expected {expected}")
