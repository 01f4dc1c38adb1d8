"""Numbers of a configuration against the tensors on disk, before anything is built from them.

A mistyped number of layers would be built for hours, a mistyped size would ask for more memory than there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.errors import InputError, shortened

# Modules that are built one by one: each has a tensor of its own, or its part of one that is a stack of them.
_COUNTS = re.compile(r"(layer|block|expert|head|stage)s$|^depth$|^n (layer|head)$|experts? per")
# Lengths of tensors.
_SIZES = re.compile(r"(size|dim|channels|features|width|rank|embed|positions|embeddings|length)s?$")
# What a norm adds to a variance: with 1 or more little is left of it, and with less than 0 nothing is finite.
_EPSILONS = re.compile(r"\b(eps|epsilon)$")
# Not all counts are of modules that are there: Qwen2 names 80 layers with a window, however many layers it has.
_MODULES_THAT_FIT = 1024
# Tables of this many positions are small, and configurations of rotary models name more than they have.
_ALWAYS_FITS = 2**27


def refuse_absurd_sizes(folder: CheckpointFolder) -> None:
    """Refuse a configuration that asks for more than a checkpoint of these tensors can hold, or for nothing but zeros.

    Raises:
        InputError: A number does not fit; names it.
    """
    shapes = [tensor.shape for tensor in folder.tensors.values()]
    most_modules = max([_MODULES_THAT_FIT, len(shapes), *(length for shape in shapes for length in shape)])
    most_elements = max(sum(math.prod(shape) for shape in shapes), _ALWAYS_FITS)
    for name, value in _numbers(folder.config):
        leaf = name.rpartition(".")[2].replace("_", " ")
        is_count, is_size = _COUNTS.search(leaf), _SIZES.search(leaf)
        if (is_count and abs(value) > most_modules) or (is_size and abs(value) > most_elements):
            problem = f"config.json says {name}: {shortened(value, 40)}, which does not fit the tensors on disk"
            raise InputError("model.path", folder.path, problem)
        if _EPSILONS.search(leaf) and not 0 <= value < 1:
            problem = f"config.json says {name}: {value:g}, with which its norms give nothing of use"
            raise InputError("model.path", folder.path, problem)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number in nested mappings and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield name, value
