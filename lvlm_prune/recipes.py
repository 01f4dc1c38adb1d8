"""What a command line stands for: recipes, the files of `configs`, written out by name; folders that loggers want.

The files lie beside the package in a checkout, and inside it where it is installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.errors import InputError, meant
from lvlm_prune.option_files import read_yaml

_BESIDE, _INSIDE = Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs"

CONFIGS = _BESIDE if (_BESIDE / "prune").is_dir() else _INSIDE
"""The folder."""


def recipe_file(name: str, verb: str = "prune") -> Path:
    """The file of a recipe in `configs/prune` or `configs/recover`.

    Args:
        name: Its name without the suffix.
        verb: Command that takes it.

    Raises:
        InputError: There is no such recipe.

    Example:
        >>> recipe_file("atv").name
        'atv.yaml'
    """
    known = recipe_names(verb)
    if name not in known:
        close = meant(name, [*known, AUTO] if verb == "prune" else known)
        listed = "`lvlm-prune methods` lists them" if verb == "prune" else "there are " + ", ".join(known)
        raise InputError("method", name, f"no such recipe{close} ({listed})")
    return CONFIGS / verb / f"{name}.yaml"


def options_of_method(file: Path, option: str) -> dict[str, Any]:
    """The options under `pruning` of a YAML file like those of `configs/prune`.

    Args:
        file: The file.
        option: Option that names it.

    Raises:
        InputError: It cannot be read, or has none.

    Example:
        >>> options_of_method(recipe_file("wanda"), "recipes")["name"]
        'Wanda'
    """
    try:
        content = read_yaml(file, option, file)
    except FileNotFoundError:
        raise InputError(option, file, "no such file") from None
    except yaml.YAMLError:
        raise InputError(option, file, "cannot be read as YAML") from None
    pruning = content.get("pruning") if isinstance(content, dict) else None
    if not isinstance(pruning, dict):
        raise InputError(option, file, "has no options under `pruning`")
    return pruning


def recipe_names(verb: str = "prune") -> list[str]:
    """Names of the recipes that a command takes, in alphabetical order."""
    return sorted(path.stem for path in (CONFIGS / verb).glob("*.yaml"))


def recipe_called(name: str) -> str:
    """The recipe whose method is called so in what is printed; empty where none is, or several are.

    Args:
        name: The method's name, as `pruning.name` has it.

    Example:
        >>> recipe_called("ALPS + KL (best)"), recipe_called("mixed Wanda")
        ('best', '')
    """
    line = re.compile(rf"^  name: {re.escape(name)}$", re.MULTILINE)
    found = [recipe for recipe in recipe_names() if line.search(recipe_file(recipe).read_text())]
    return found[0] if len(found) == 1 else ""


def recipes_table() -> str:
    """Name of each recipe and what it is, the first sentence at the head of its file; then where to begin."""
    width = max(map(len, recipe_names()))
    lines = [f"{name:{width}}  {_first_sentence(recipe_file(name).read_text())}" for name in recipe_names()]
    return "\n".join([*lines, "", *_WHERE_TO_BEGIN])


def recipe_text(name: str) -> str:
    """The file of a recipe of `prune` or `recover`: what it is and where it departs from its paper, and its options.

    Args:
        name: Of the recipe.

    Raises:
        InputError: There is no such recipe.

    Example:
        >>> print(recipe_text("wanda").partition(",")[0])
        # Wanda (arXiv 2306.11695)
    """
    of_recovery = name in recipe_names("recover")
    try:
        return recipe_file(name, "recover" if of_recovery else "prune").read_text().rstrip()
    except InputError as error:
        raise InputError("", f"methods {name}", error.problem) from None


_WHERE_TO_BEGIN = (
    "`atv` is the default. `best` keeps most of all, in several times the time; `fast` comes close to it in less.",
    "`--method auto --keep 0.99` finds recipe and sparsity for the share of next tokens that is to be kept.",
    "`lvlm-prune methods NAME` prints a recipe; `--pruning.OPTION VALUE` changes parts of it.",
)


def _first_sentence(text: str) -> str:
    comments = takewhile(lambda line: line.startswith("#"), text.splitlines())
    head = " ".join(line.removeprefix("#").strip() for line in comments) + " "
    # What is in brackets (`Fig. 5`, `arXiv 1234: ...`) ends no sentence.
    outside = re.sub(r"\([^)]*\)", lambda part: "_" * len(part[0]), head)
    return head[: re.search(r"[.:;] ", outside).start()]  # type: ignore[union-attr]  # `head` ends in one


_LOGGERS = ("CSVLogger", "TensorBoardLogger")
_LOGGER, _LOG_FOLDER = "--trainer.logger", "--trainer.logger.save_dir"


def with_log_folder(arguments: Sequence[str]) -> list[str]:
    """A command line in which a logger that wants a folder has one: the run's, or `runs` where that is not named.

    Example:
        >>> with_log_folder(["prune", "--output=out", "--trainer.logger", "CSVLogger"])[2:]
        ['--trainer.logger', 'CSVLogger', '--trainer.logger.save_dir', 'out']
    """
    given = dict(zip(arguments, [*arguments[1:], ""])) | dict(one.split("=", 1) for one in arguments if "=" in one)
    logger = given.get(_LOGGER, "").rpartition(".")[2]
    if _LOG_FOLDER in given or (logger not in _LOGGERS and not _logs_without_folder(given.get("--config"))):
        return list(arguments)
    return [*arguments, _LOG_FOLDER, given.get("--output") or "runs"]


def _logs_without_folder(file: str | None) -> bool:
    """Whether a configuration has such a logger as :func:`without_log_folder` leaves it."""
    try:
        content = read_yaml(Path(file), "config", file) if file and Path(file).is_file() else None
    except yaml.YAMLError:  # said by the parser, with the place
        return False
    section = content.get("trainer") if isinstance(content, dict) else None
    logger = section.get("logger") if isinstance(section, dict) else None
    if not isinstance(logger, dict) or str(logger.get("class_path")).rpartition(".")[2] not in _LOGGERS:
        return False
    return "save_dir" not in (logger.get("init_args") or {})


def without_log_folder(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose logger writes into the folder of the run that it repeats, which is another one."""
    logger = (config.get("trainer") or {}).get("logger")
    if isinstance(logger, dict) and (logger.get("init_args") or {}).get("save_dir") in (config.get("output"), "runs"):
        options = {name: value for name, value in logger["init_args"].items() if name != "save_dir"}
        return config | {"trainer": config["trainer"] | {"logger": logger | {"init_args": options}}}
    return config


AUTO = "auto"
"""In the place of a recipe's name: the one that gets sparsest of those that keep what `--keep` asks for."""


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """A command line in which `--method NAME` of prune or recover is written out as the recipe's file.

    What the command line says besides overrides it, another file too.

    Raises:
        InputError: There is no such recipe.

    Example:
        >>> with_recipe(["prune", "--method", "wanda", "--pruning.sparsity", "0.6"])[:2]
        ['prune', '--config']
    """
    written: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--method" or argument.startswith("--method="):
            name = next(rest, "") if argument == "--method" else argument.removeprefix("--method=")
            if arguments[0] == "recover":
                file = recipe_file(name, "recover")
                # Several recipes train in one way; that is an option, and stays said where it was said.
                written += ["--method", str(yaml.safe_load(file.read_text())["method"])]
                written[1:1] = ["--config", str(file)]
                continue
            is_sized = any(other.partition("=")[0] == "--packed_size" for other in arguments)
            search = ["--keep_recipes", "[fast]"] if name == AUTO and not is_sized else []
            written[1:1] = ["--config", str(recipe_file("best" if name == AUTO else name)), *search]
        else:
            written.append(argument)
    return written
