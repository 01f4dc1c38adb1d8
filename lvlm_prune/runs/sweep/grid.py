"""The points of a grid: every recipe with every combination of the swept options that it takes.

recipes   atv.yaml  wanda.yaml  atv_2of4.yaml
grid      pruning.sparsity 0.5 0.6 ─┬─ pruning.pool.alpha 1 2 ─┬─ seeds 0 1
points    atv       2 sparsities    x  2 alphas                x  2 seeds  = 8
          wanda     2 sparsities         (has no alpha)        x  2 seeds  = 4
          atv_2of4   (2:4 is 50%)     x  2 alphas              x  2 seeds  = 4
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from glob import glob
from itertools import product
from os.path import exists, isfile
from pathlib import Path
from typing import Any, Protocol

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli_errors import explain, hint
from lvlm_prune.cli_help import options_of_classes
from lvlm_prune.data import CalibrationDataModule, CalibrationSource
from lvlm_prune.errors import InputError, meant
from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Solver
from lvlm_prune.methods.patterns import parse_pattern
from lvlm_prune.plugins import built_from, describe, refuse_values
from lvlm_prune.recipes import options_of_method, recipe_file, recipe_names

SPARSITY, PATTERN, SEED = "pruning.sparsity", "pruning.pattern", "data.seed"
_METHOD, _DATA = (f"{one.__module__}.{one.__qualname__}" for one in (BlockwisePruning, CalibrationDataModule))
_MOST_RUNS = 10_000
# What ends with `.help` is an option of the parser itself, which would print its help.
_OPTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+(?<!\.help)")
_DEFAULT_RECIPE = "default"
_IMPORT_PATH = re.compile(r"(\w+\.)+[A-Z]\w*")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        recipe: Name of the recipe: its file's without the suffix.
        options: Swept options that apply to it, dotted name -> value.
        seed: Seed of the calibration set; None for a method that needs no data.
        config: Everything that the run is made with, plain data under `pruning` and `data`.
    """

    recipe: str
    options: Mapping[str, Any]
    seed: int | None
    config: Mapping[str, Any]

    def instantiate(self) -> tuple[BlockwisePruning, CalibrationDataModule]:
        """Method and calibration set, new objects with each call."""
        made = _instantiate(self.config)
        return made.pruning, made.data

    def run_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What repeats this one run with `lvlm-prune prune --config`.

        Args:
            config: Of the command that does it among others, whose trainer and model it shares.
        """
        return {name: value for name, value in config.items() if name in ("trainer", "model")} | dict(self.config)

    @cached_property
    def data_key(self) -> str:
        """Equal for points that run on the same calibration set."""
        return json.dumps(self.config["data"], sort_keys=True)

    @cached_property
    def identity(self) -> str:
        """A digest of the configuration; the name of the method does not matter."""
        pruning = {name: value for name, value in self.config["pruning"].items() if name != "name"}
        text = json.dumps({"pruning": pruning, "data": self.config["data"]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """Recipe, options and seed in one line."""
        named = [f"{name.rpartition('.')[2]} {readable(value)}" for name, value in self.options.items()]
        return " · ".join([self.recipe, *named] + ([] if self.seed is None else [f"seed {self.seed}"]))


@dataclass(frozen=True)
class Grid:
    """Recipes, options and seeds, all combined.

    Args:
        recipes: Files like those in `configs/prune`, or patterns of such (`configs/prune/*.yaml`); only their
            `pruning` key is read. Empty: the default method.
        options: Dotted name of each swept option, under `pruning` or `data` -> its values.
        seeds: Calibration seeds.
        data: Options of the calibration set that all points share.
    """

    recipes: Sequence[str]
    options: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    data: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        recipes: Sequence[str] | str,
        grid: Mapping[str, Any],
        seeds: Sequence[int] | int | None,
        datamodule: CalibrationDataModule,
    ) -> Grid:
        """A grid as the command line gives it: one value is a list of one.

        Raises:
            InputError: An option cannot be swept, or a seed is given twice.
        """
        for name, values in grid.items():
            if not isinstance(name, str):
                problem = "is no option: write names of options and their values"
                raise InputError("grid", name, f"{problem}: --grid '{{{SPARSITY}: [0.5, 0.6]}}'")
            if name.split(".")[0] not in ("pruning", "data") or name == SEED:
                problem = f"a sweep varies options of `pruning` and `data`{_meant(name)}"
                raise InputError("grid", name, "choose it with --seeds" if name == SEED else problem)
            if "." in name and not _OPTION.fullmatch(name):
                raise InputError("grid", name, f"is an option of no recipe of this sweep{_meant(name)}")
            if "." not in name:
                example = f"--grid '{{{name}.{next(iter(values), 'option') if isinstance(values, dict) else 'option'}"
                raise InputError("grid", name, f"write the option's whole name and its values: {example}: [...]}}'")
        if seeds is None:
            seeds = datamodule.seed
        elif datamodule.seed:
            raise InputError("data.seed", datamodule.seed, "contradicts --seeds, which chooses the seeds of a sweep")
        return cls(
            [recipes] if isinstance(recipes, str) else list(recipes),
            {name: _plain(values if isinstance(values, list) else [values]) for name, values in grid.items()},
            checked_seeds(seeds),
            describe(datamodule)["init_args"],
        )

    def points(self) -> list[Point]:
        """All points, each once, checked; points on the same calibration set follow each other.

        An option that a recipe does not take is left out for it, and so are the sparsity of an N:M pattern, which is
        given by the pattern, and the seed of a method that needs no data.

        Raises:
            InputError: A recipe or a value cannot be used, or no recipe takes an option.
        """
        count = math.prod(map(len, self.options.values())) * len(self.seeds)
        if count > _MOST_RUNS:
            raise InputError("grid", f"of {count} runs for each recipe", f"is too large; at most {_MOST_RUNS}")
        points: dict[str, Point] = {}
        used: set[str] = set()
        for name, pruning in _methods(self.recipes):
            for values in product(*self.options.values()):
                # A class comes before its options.
                swept = dict(sorted(zip(self.options, values), key=lambda option: option[0].count(".")))
                for point in points_of(name, pruning, swept, self.data, self.seeds):
                    used |= set(point.options)
                    points.setdefault(point.identity, point)
        for name in self.options:
            if name not in used:
                raise InputError("grid", name, f"is an option of no recipe of this sweep{_meant(name)}")
        return by_data(points.values())


def checked_seeds(seeds: Sequence[int] | int) -> list[int]:
    """Calibration seeds as the command line gives them: one, or a list.

    Raises:
        InputError: There is none, one is negative, or one is given twice.
    """
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError("seeds", seeds, "must be one or more different seeds")
    if min(seeds) < 0:
        raise InputError("seeds", min(seeds), "must not be negative")
    return seeds


class Points(Protocol):
    """What a sweep does: a grid, or any other list of runs."""

    @property
    def options(self) -> Mapping[str, Sequence[Any]]:
        """Option that is varied -> its values."""

    def points(self) -> list[Point]:
        """All runs, each once, those on the same calibration set together."""


def by_data(points: Iterable[Point]) -> list[Point]:
    """Points in an order in which those on the same calibration set follow each other."""
    points = list(points)
    order = list(dict.fromkeys(point.data_key for point in points))
    return sorted(points, key=lambda point: order.index(point.data_key))


def points_of(
    recipe: str, pruning: Mapping[str, Any], options: Mapping[str, Any], data: Mapping[str, Any], seeds: Sequence[int]
) -> list[Point]:
    """A recipe with some options, once for each seed, or once where it needs no data.

    Args:
        recipe: Its name.
        pruning: Its options under `pruning`.
        options: Dotted name -> value that takes the place of the recipe's; one that it does not know is left out.
        data: Options of the calibration set.
        seeds: Calibration seeds.

    Raises:
        InputError: The recipe or a value cannot be used.
    """
    taken, config, needs_data = _options_of(recipe, pruning, options, data)
    return [
        Point(recipe, taken, seed if needs_data else None, {**config, "data": {**config["data"], "seed": seed}})
        for seed in (seeds if needs_data else [0])
    ]


def _options_of(
    recipe: str, pruning: Mapping[str, Any], options: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Options that a recipe takes, everything that its runs are made with (but the seed), and whether it needs data."""
    options = dict(options)
    if _gives_sparsity(options.get(PATTERN, pruning.get("pattern", "unstructured"))):
        options.pop(SPARSITY, None)
        pruning = {name: value for name, value in pruning.items() if name != "sparsity"}
    config = _parse(recipe, pruning, options, data)
    method = _instantiate(config).pruning
    if not method.wants_activations and any(map(_is_of_pool, options)):
        options = {name: value for name, value in options.items() if not _is_of_pool(name)}
        config = _parse(recipe, pruning, options, data)
    return options, config, method.wants_activations or method.allocation.wants_survey


def _plain(value: Any) -> Any:
    """A value of an option as plain data; the command line makes objects of what names a class."""
    if isinstance(value, Namespace):
        return value.as_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else describe(value)


def _is_of_pool(option: str) -> bool:
    return f"{option}.".startswith("pruning.pool.")


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BlockwisePruning, "pruning")
    parser.add_class_arguments(CalibrationDataModule, "data")
    return parser


def _meant(name: str) -> str:
    """What a name in a grid that is no option may be meant to be, as the end of a sentence."""
    known = [option.removeprefix("--") for option in _parser()._option_string_actions if option.startswith("--")]
    plugins = options_of_classes((Allocation, CalibrationSource, Pool, Saliency, Scorer, Solver))
    if name.split(".")[0] not in ("pruning", "data"):
        close = [one for one in known if one.endswith(f".{name}")] or get_close_matches(name, known, n=1, cutoff=0.75)
        return f"; is {' or '.join(close)} meant?" if close else ""
    told = hint(f"--{name}", [f"--{option}" for option in known], plugins)
    return told.replace("--", "").replace(" of the class in use;", ";")


def _instantiate(config: Mapping[str, Any]) -> Namespace:
    refuse_values(
        {
            "pruning": {"class_path": _METHOD, "init_args": config["pruning"]},
            "data": {"class_path": _DATA, "init_args": config["data"]},
        }
    )
    with built_from(config):
        return _parser().instantiate(_parser().parse_object(deepcopy(dict(config))))


def _parse(recipe: str, pruning: Mapping[str, Any], options: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Options of method and calibration set, defaults filled in; takes those out of `options` that the recipe lacks.

    Raises:
        InputError: The recipe or a value cannot be used.
    """
    parser = _parser()
    try:
        # Of lists of plugins the parser makes objects of its own in place.
        base = parser.parse_object(deepcopy({"pruning": dict(pruning), "data": dict(data)}))
    except ArgumentError as error:
        raise InputError("recipes", recipe, explain(str(error))) from None
    while options:
        arguments = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
        ]
        try:
            base = parser.parse_args(arguments, namespace=base.clone())
            break
        except ArgumentError as error:
            line = explain(str(error), arguments)
            option = line.partition(": ")[0].removeprefix("--").split(" ")[0]
            if not (line.endswith("unknown option") and option in options):
                raise InputError("grid", option, f"{recipe}: {line}") from None
            del options[option]
    return yaml.safe_load(parser.dump(base, skip_none=False))


def _methods(recipes: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `pruning` options of each recipe."""
    if not recipes:
        yield _DEFAULT_RECIPE, {}
    seen: dict[str, str] = {}
    for pattern in recipes:
        is_recipe = pattern in recipe_names() and not isfile(pattern)  # a folder may have the name too
        files = [str(recipe_file(pattern))] if is_recipe else sorted(glob(pattern)) or [pattern]
        for file in files:
            path = Path(file)
            if not exists(path):
                problem = f"no such file, and no recipe of that name{meant(pattern, recipe_names())}"
                raise InputError("recipes", pattern, problem)
            pruning = options_of_method(path, "recipes")
            if seen.setdefault(path.stem, file) != file:
                raise InputError("recipes", file, f"has the same name as {seen[path.stem]}")
            yield path.stem, pruning


def _gives_sparsity(pattern: Any) -> bool:
    try:
        return len(parse_pattern(pattern).levels) == 1
    except (ValueError, TypeError, AttributeError):
        return False  # refused where the method is made


def readable(value: Any) -> str:
    """A value of an option for people: a plugin by its class alone.

    Example:
        >>> [readable(value) for value in ("lvlm_prune.methods.scorers.WandaScorer", "share.json", 0.50)]
        ['WandaScorer', 'share.json', '0.5']
    """
    if isinstance(value, str):
        return value.rpartition(".")[2] if _IMPORT_PATH.fullmatch(value) else value
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


def told_apart(values: Iterable[Any]) -> dict[str, str]:
    """Each of several values of an option, as JSON -> what it is called: in full where short names are alike.

    Example:
        >>> scorers = [{"class_path": "RIAScorer", "init_args": {"exponent": exponent}} for exponent in (1, 2)]
        >>> list(told_apart([*scorers, 0.5]).values())[1:]
        ['{"class_path": "RIAScorer", "init_args": {"exponent": 2}}', '0.5']
    """
    texts = {json.dumps(value, sort_keys=True): readable(value) for value in values}
    counts = Counter(texts.values())
    return {text: text if counts[short] > 1 else short for text, short in texts.items()}
