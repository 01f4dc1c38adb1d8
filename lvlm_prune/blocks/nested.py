"""Tensors inside nested arguments: tuples, lists, dictionaries and dataclasses, as blocks of a decoder take them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, one that occurs twice twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Any:
    """A copy of `value` with `function` applied to every tensor.

    What is shared in `value` is shared in the copy: a mask that all blocks use stays one tensor, and a dictionary
    through which blocks hand keys and values to later blocks stays one dictionary.

    Args:
        value: Any nesting; objects of other kinds are passed on as they are.
        function: Called once for each distinct tensor.
        memo: Copies made so far by `id`; pass one to share across several calls while the originals are alive.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    result: Any
    if isinstance(value, Tensor):
        result = function(value)
    elif isinstance(value, MutableMapping):  # transformers has one that is no `dict` on purpose
        result = copy.copy(value)
        memo[id(value)] = result
        for key, item in value.items():
            result[key] = map_tensors(item, function, memo)
    elif isinstance(value, list):
        result = [map_tensors(item, function, memo) for item in value]
    elif isinstance(value, tuple):
        items = [map_tensors(item, function, memo) for item in value]
        result = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        memo[id(value)] = result
        for field in dataclasses.fields(value):
            # A frozen dataclass refuses plain assignment to its own fresh copy.
            object.__setattr__(result, field.name, map_tensors(getattr(value, field.name), function, memo))
    else:
        return value
    memo[id(value)] = result
    return result


@contextmanager
def contents_restored(value: Any) -> Iterator[None]:
    """Afterwards, every dictionary and list in `value` holds again what it holds now.

    Example:
        >>> shared = {}
        >>> with contents_restored(("mask", shared)):
        ...     shared["keys"] = torch.zeros(2)
        >>> shared
        {}
    """
    saved = [(container, copy.copy(container)) for container in containers_in(value)]
    try:
        yield
    finally:
        for container, contents in saved:
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)


def containers_in(value: Any) -> Iterator[MutableMapping | list]:
    """Every dictionary and list in `value`, itself included."""
    if isinstance(value, (MutableMapping, list)):
        yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from containers_in(item)


def distinct_nbytes(value: Any) -> int:
    """Bytes behind all tensors of `value`; memory that several of them share counts once.

    Example:
        >>> mask = torch.zeros(3, 4)
        >>> distinct_nbytes({"first": mask, "second": (mask, mask[0])})
        48
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_in(value)
        if tensor.device.type != "meta"
    }
    return sum(storages.values())


def has_nan(value: Any) -> bool:
    """Whether any floating-point tensor in `value` holds a NaN."""
    return any(tensor.is_floating_point() and bool(torch.isnan(tensor).any()) for tensor in tensors_in(value))
