"""Plugins: finding installed ones, and saying what an object was made with.

An installed package registers its classes under the entry point group `lvlm_prune.plugins`; their short class names
then work in YAML and on the command line. A class in a user's own file needs no registration: it is named by its path,
`my_module.MySaliency`.
"""

import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lvlm_prune.methods.patterns import Pattern

ENTRY_POINT_GROUP = "lvlm_prune.plugins"


def load_installed_plugins() -> list[type]:
    """Import every class registered under the entry point group `lvlm_prune.plugins`."""
    return [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]


def plugin_class(plugin: Any) -> type:
    """The class that its author wrote; jsonargparse wraps default values in subclasses of its own."""
    written = (base for base in type(plugin).__mro__ if not base.__name__.startswith(("LazyInstance_", "_LazyInit")))
    return next(written)


def own_instance(plugin: Any) -> Any:
    """A plugin to keep: a lazy default value, which all who leave the argument out share, as an object of its own."""
    if not hasattr(plugin, "lazy_get_init_args"):
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
    if isinstance(value, (Path, Pattern)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(item) for item in value]
    written = plugin_class(value)
    arguments = [name for name in inspect.signature(written).parameters if name not in ("args", "kwargs")]
    return {
        "class_path": f"{written.__module__}.{written.__qualname__}",
        "init_args": {name: describe(getattr(value, name)) for name in arguments if hasattr(value, name)},
    }
