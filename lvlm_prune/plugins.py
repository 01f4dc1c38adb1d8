"""Plugins: finding installed ones, saying what an object was made with, and which option a plugin's error is about.

An installed package registers its classes under the entry point group `lvlm_prune.plugins`; their short class names
then work in YAML and on the command line. A class in a user's own file needs no registration: it is named by its path,
`my_module.MySaliency`.

A plugin does not know where it is mounted. It raises `ValueError` and begins with the argument in backticks,

    `damping` -1: must be a finite number, 0 or larger

and whoever holds it adds the path: `--pruning.scorer.damping`, `--probing.scorer.damping`, or what it is in a mixture,
`--data.source.sources[1].max_tokens`. `mounted` does so for objects, `built_from` while they are being made.
"""

import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType, NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse.typing import _LazyInitBaseClass

from lvlm_prune.errors import InputError, LVLMPruneError, RunError, first_line
from lvlm_prune.option_files import refuse_immense

Plugin = TypeVar("Plugin")

ENTRY_POINT_GROUP = "lvlm_prune.plugins"

_REFUSED = re.compile(r"`(?P<argument>[^`]+)` (?P<value>.*?): (?P<problem>.*)", re.DOTALL)


def load_installed_plugins() -> list[type]:
    """Import every class registered under the entry point group `lvlm_prune.plugins`."""
    return [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]


def plugin_class(plugin: Any) -> type:
    """The class that its author wrote; jsonargparse wraps default values in subclasses of its own."""
    written = (base for base in type(plugin).__mro__ if not base.__name__.startswith(("LazyInstance_", "_LazyInit")))
    return next(written)


def lazy_default(plugin: type[Plugin]) -> Plugin:
    """A default value of an argument that takes a plugin: made when it is used, and written in configurations.

    What `jsonargparse.lazy_instance` returns, without its search for the calling module, which reads the sources of all
    frames on the stack: half a second of every start for each default value.
    """
    name = f"LazyInstance_{plugin.__name__}"
    attributes = {"__doc__": f"A {plugin.__name__} that is made when it is used.", "__module__": __name__}
    return type(name, (_LazyInitBaseClass, plugin), attributes)(plugin, {})


def own_instance(plugin: Any) -> Any:
    """A plugin to keep: a lazy default value, which all who leave the argument out share, as an object of its own."""
    if not isinstance(plugin, _LazyInitBaseClass):
        return plugin
    return plugin_class(plugin)(**plugin.lazy_get_init_args().as_dict())


def describe(value: Any) -> Any:
    """A plugin as YAML would name it, `{"class_path": ..., "init_args": ...}`; other values as plain data.

    Constructor arguments are looked up as attributes of the same name; one that is not kept is left out.

    Example:
        >>> from lvlm_prune.methods.pools import AsymmetricPool
        >>> described = describe(AsymmetricPool(alpha=2.0))
        >>> described["class_path"], described["init_args"]["alpha"], described["init_args"]["saliency"]["class_path"]
        ('lvlm_prune.methods.pools.asymmetric.AsymmetricPool', 2.0, 'lvlm_prune.methods.saliency.drift.DriftSaliency')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path) or getattr(type(value), "written_as_text", False):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(item) for item in value]
    written = plugin_class(value)
    return {
        "class_path": f"{written.__module__}.{written.__qualname__}",
        "init_args": {name: describe(getattr(value, name)) for name in arguments_of(value) if hasattr(value, name)},
    }


def arguments_of(plugin: Any) -> list[str]:
    """Names of the arguments of a plugin's constructor."""
    return [name for name in inspect.signature(plugin_class(plugin)).parameters if name not in ("args", "kwargs")]


def _whole(text: str) -> str:
    """A whole number without its decimal point, as `InputError` shows one; other text as it is."""
    return re.sub(r"^(-?\d+)\.0$", r"\1", text)


# ---- which option an error is about ----------------------------------------------------------------------------------
@contextmanager
def mounted(**holders: Any) -> Iterator[None]:
    """Within, what plugins say against their arguments becomes an `InputError` that names the option.

    So does any error of an attribute (a property, `__getattr__`), which nobody expects to work. Also a
    `FloatingPointError`, which plugins raise where the numbers of the run are broken, becomes a `RunError`. Everything
    else that a plugin raises stays as it is.

    Args:
        holders: Key of the configuration -> the object under it, whose constructor arguments are plugins, which may
            have plugins of their own; None is left out.

    Example:
        >>> from lvlm_prune.methods.patterns import SemiStructured
        >>> from lvlm_prune.methods.scorers import WandaScorer
        >>> scorer = WandaScorer(variant=True)
        >>> with mounted(scorer=scorer):
        ...     scorer.check(SemiStructured(2, 4))
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --scorer.variant True: cannot be used with 2:4
    """
    try:
        yield
    except FloatingPointError as error:
        raise RunError(str(error)) from None
    except LVLMPruneError:
        raise
    except Exception as error:
        refused = _REFUSED.fullmatch(str(error)) if isinstance(error, ValueError) else None
        if refused and (option := _option_of(error, refused["argument"], holders)):
            raise InputError(option, _whole(refused["value"]), refused["problem"]) from None
        _refuse_attribute(error, (part for key, holder in holders.items() for part in _parts(key, holder)))
        raise


@contextmanager
def built_from(config: Mapping[str, Any]) -> Iterator[None]:
    """Within, plugins are made from this configuration; what they say against it names the option.

    Args:
        config: Nested plain data, plugins as `{"class_path": ..., "init_args": ...}`.

    Example:
        >>> from lvlm_prune.methods.scorers import RIAScorer
        >>> with built_from({"probing": {"scorer": {"class_path": "RIAScorer", "init_args": {"exponent": -1}}}}):
        ...     RIAScorer(exponent=-1)
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --probing.scorer.exponent -1: must be a finite number, 0 or larger
    """
    try:
        yield
    except LVLMPruneError:
        raise
    except Exception as raised:
        _refuse_attribute(raised, ((path, class_path) for path, class_path, _ in _parts_of_config(config)))
        if not isinstance(raised, ValueError):
            raise
        logger = (config.get("trainer") or {}).get("logger")
        if isinstance(logger, Mapping) and (missing := _missing_module(raised)):
            raise InputError("trainer.logger", logger.get("class_path"), missing) from None
        # Of a plugin that may be left out jsonargparse reports a choice between it and nothing, and this as its cause;
        # of one inside another such one twice.
        error: BaseException | None = raised
        while isinstance(error, ValueError) and not (refused := _REFUSED.fullmatch(str(error))):
            error = error.__cause__
        if not isinstance(error, ValueError) or refused is None:
            raise
        argument, said = refused["argument"], f"{refused['value']}: {refused['problem']}"
        made = {plugin_class(owner).__name__ for owner in _owners(error)}
        places = [
            (f"{path}.{argument}" if path else argument, values)
            for path, class_path, values in _parts_of_config(config)
            if class_path.rpartition(".")[2] in made and argument in values
        ]
        # Of several parts of one class it is the first one that was given this value.
        exact = [option for option, values in places if said.startswith(f"{values[argument]}: ")]
        option = next(iter([*exact, *(option for option, _ in places)]), argument)
        raise InputError(option, _whole(refused["value"]), refused["problem"]) from None


def refuse_lost_arguments(**holders: Any) -> None:
    """Refuse plugins that do not keep what they were made with: no record would tell it, and no resume would miss it.

    Args:
        holders: Key of the configuration -> the object under it, as for `mounted`.

    Raises:
        InputError: One does not; names its option.

    Example:
        >>> class PowerScorer:
        ...     def __init__(self, power):
        ...         self.exponent = power
        >>> refuse_lost_arguments(scorer=PowerScorer(2))
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --scorer PowerScorer: does not keep its argument `power`, so that no record ...
    """
    for key, holder in holders.items():
        for path, part in _parts(key, holder):
            if lost := [name for name in arguments_of(part) if not hasattr(part, name)]:
                problem = f"does not keep its argument `{lost[0]}`, so that no record would tell it"
                raise InputError(path, plugin_class(part).__name__, f"{problem}; write self.{lost[0]} = {lost[0]}")


def _missing_module(error: BaseException | None) -> str:
    """What a class said of a library that it wants when it is made, as loggers do; empty where none did."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return "" if error is None else first_line(error)


def refuse_values(config: Mapping[str, Any]) -> None:
    """Refuse what a parser hands on though nothing can be made of it: immense numbers, `null` for arguments of plugins.

    Args:
        config: Nested plain data, plugins as `{"class_path": ..., "init_args": ...}`.

    Raises:
        InputError: One is of that kind; names its option.
    """
    refuse_immense(config)
    refuse_nulls(config)


def refuse_nulls(config: Mapping[str, Any]) -> None:
    """Refuse `null` for arguments of plugins whose annotations do not allow it; jsonargparse hands it on.

    Args:
        config: Nested plain data, plugins as `{"class_path": ..., "init_args": ...}`.

    Raises:
        InputError: One is null; names its option.

    Example:
        >>> scorer = {"class_path": "lvlm_prune.methods.scorers.RIAScorer", "init_args": {"exponent": None}}
        >>> refuse_nulls({"pruning": {"scorer": scorer}})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --pruning.scorer.exponent null: expected float
    """
    for path, class_path, arguments in _parts_of_config(config):
        nulls = [name for name, value in arguments.items() if value is None]
        if nulls:
            module, _, name = class_path.rpartition(".")
            expected = _annotations(getattr(import_module(module), name))
            for argument in nulls:
                hint = expected.get(argument, Any)
                if hint not in (Any, object, NoneType) and NoneType not in get_args(hint):
                    raise InputError(f"{path}.{argument}", "null", f"expected {getattr(hint, '__name__', hint)}")


def _annotations(written: Any) -> dict[str, Any]:
    try:
        return get_type_hints(written.__init__)
    except NameError:  # of types that its author imports for checkers only
        return {}


def _refuse_attribute(error: Exception, parts: Iterable[tuple[str, Any]]) -> None:
    """Refuse a plugin of which an attribute cannot be read, where that is what an error comes from.

    Args:
        error: What was raised.
        parts: Path of each plugin, and itself or the import path of its class.

    Raises:
        InputError: It comes from there; names the option, and the line to mend.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner, code = frame.f_locals.get("self"), frame.f_code
        name = _attribute_read(type(owner), frame)
        if owner is None or name is None or str(frame.f_globals.get("__name__")).startswith("lvlm_prune."):
            continue
        written = plugin_class(owner)
        names = (f"{written.__module__}.{written.__qualname__}", written.__name__)
        option = next((path for path, part in parts if part is owner or (isinstance(part, str) and part in names)), "")
        place = f"{Path(code.co_filename).name}, line {line}"
        said = f"{type(error).__name__}: {first_line(error)}"
        if option:
            raise InputError(option, written.__name__, f"its attribute `{name}` raises {said} ({place})") from None
        return


def _attribute_read(written: type, frame: FrameType) -> str | None:
    """Name of the attribute of an object of this class that a frame finds; None where it does something else."""
    for base in written.__mro__:
        for name, value in vars(base).items():
            getter = getattr(value, "fget", None) or getattr(value, "func", None)  # `property`, `cached_property`
            if getattr(getter, "__code__", None) is frame.f_code:
                return name
            if name in ("__getattr__", "__getattribute__") and getattr(value, "__code__", None) is frame.f_code:
                return str(frame.f_locals.get(frame.f_code.co_varnames[1]))
    return None


def _owners(error: BaseException) -> list[Any]:
    """The objects whose methods the error went through, innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [frame.f_locals["self"] for frame in reversed(frames) if "self" in frame.f_locals]


def _option_of(error: BaseException, argument: str, holders: Mapping[str, Any]) -> str | None:
    """Path of an argument: of the plugin that raised, or of the nearest one around it that has an argument so named."""
    parts = [part for key, holder in holders.items() if holder is not None for part in _parts(key, holder)]
    raised_by = next((path for owner in _owners(error) for path, part in parts if part is owner), None)
    name = argument.split(".")[0].split("[")[0]
    options = {path: f"{path}.{argument}" for path, part in parts if name in arguments_of(part)}
    if raised_by is not None:
        around = [
            path for path in options if f"{raised_by}.".startswith(f"{path}.") or raised_by.startswith(f"{path}[")
        ]
        return options[max(around, key=len)] if around else None
    return next(iter(options.values()), None)


def _parts(path: str, plugin: Any) -> Iterator[tuple[str, Any]]:
    """A plugin and the plugins among its arguments, each with its path."""
    yield path, plugin
    for name in arguments_of(plugin):
        value = getattr(plugin, name, None)
        for place, item in _items(f"{path}.{name}", value):
            if type(item).__module__ != "builtins" and not isinstance(item, (Path, type)) and hasattr(item, "__dict__"):
                yield from _parts(place, item)


def _parts_of_config(value: Any, path: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Path, import path of the class and arguments of each plugin in a configuration."""
    if isinstance(value, Mapping):
        inner = value
        if isinstance(value.get("class_path"), str):
            inner = value.get("init_args") or {}
            yield path, value["class_path"], inner
        for name, item in inner.items():
            yield from _parts_of_config(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for place, item in _items(path, value):
            yield from _parts_of_config(item, place)


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield f"{path}[{number}]", item
    else:
        yield path, value
