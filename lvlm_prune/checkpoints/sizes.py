"""Numbers of a configuration against the tensors on disk, before a model is built from them in memory.

A mistyped number of layers would be built for hours, a mistyped size would ask for more memory than there is. What
sizes make of each other (patches of an image, channels of a projector) only the model itself says, which is asked on
the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.sources import find_sources
from lvlm_prune.errors import InputError, shortened

# Modules that are built one by one: each has its number in the names of tensors.
_LAYERS = re.compile(r"(layer|block|stage)s$|^depths?$|^n layer$")
# These may have their part of one tensor that is a stack of them.
_PARTS = re.compile(r"(expert|head)s$|^n head$|experts? per")
_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
# Lengths of tensors.
_SIZES = re.compile(r"(size|dim|channels|features|width|rank|embed|positions|embeddings|length)s?$")
# Names that are made one by one, whatever lies on disk, and the most of them that anybody has.
_LABELS, _LABELS_THAT_FIT = re.compile(r"\blabels$"), 2**20
# Of answers, and of layers whether or not there are any: neither is a size of anything.
_NO_SIZE = re.compile(r"^(model )?(max|min)( new)? length$|^max window layers$")
# How far positions go: a size only where a table has a row for each, which the model itself says.
_POSITIONS = re.compile(r"\b(positions?|position embeddings|(seq|sequence|context) (len|length))$")
# Where positions turn by powers of it.
_BASES = re.compile(r"\btheta$")
# What a norm adds to a variance: with 1 or more little is left of it, and with less than 0 nothing is finite.
_EPSILONS = re.compile(r"\b(eps|epsilon)$")
# Not all counts are of modules that are there: Qwen2 names 80 layers with a window, however many layers it has.
_MODULES_THAT_FIT = 1024
# Tables of this many positions are small.
_ALWAYS_FITS = 2**27
# Elements of a buffer, which are real while the model is built: a causal mask of 16 thousand positions has as many.
_LARGEST_BUFFER = 2**28
# Of a tensor that is built whatever lies on disk.
_SMALL = 2**20
# Lengths up to this make no large tensor of what else lies on disk.
_SMALL_LENGTH = 64
_NO_LENGTH = re.compile(r"\b(ids?|index|theta|pinpoints)$|\bwindow\b")


def refuse_absurd_sizes(folder: CheckpointFolder) -> None:
    """Refuse a configuration that asks for more than a checkpoint of these tensors can hold, or for nothing but zeros.

    Raises:
        InputError: A number does not fit; names it.
    """
    shapes = [tensor.shape for tensor in folder.tensors.values()]
    numbers = (int(found) + 1 for key in folder.tensors for found in _NUMBER.findall(key))
    most_layers = max([_MODULES_THAT_FIT, *numbers])
    most_parts = max([_MODULES_THAT_FIT, len(shapes), *(length for shape in shapes for length in shape)])
    limits = [
        (_LAYERS, most_layers),
        (_PARTS, most_parts),
        (_SIZES, _most_elements(folder)),
        (_LABELS, _LABELS_THAT_FIT),
    ]
    for name, value in _numbers(folder.config):
        leaf = name.rpartition(".")[2].replace("_", " ")
        is_size = not (_NO_SIZE.search(leaf) or _POSITIONS.search(leaf))
        if is_size and any(pattern.search(leaf) and abs(value) > most for pattern, most in limits):
            problem = f"config.json says {name}: {shortened(value, 40)}, which does not fit the tensors on disk"
            raise InputError("model.path", folder.path, problem)
        if _EPSILONS.search(leaf) and not 0 <= value < 1:
            problem = f"config.json says {name}: {value:g}, with which its norms give nothing of use"
            raise InputError("model.path", folder.path, problem)
        if _BASES.search(leaf) and not 0 <= value < math.inf:  # 0 says that a layer has none
            problem = f"config.json says {name}: {value:g}, with which its positions give nothing of use"
            raise InputError("model.path", folder.path, problem)


def may_be_larger(folder: CheckpointFolder) -> bool:
    """Whether a number of `config.json` is no length of a tensor on disk, so that only the model says what it makes."""
    lengths = {length for tensor in folder.tensors.values() for length in tensor.shape}
    numbers = ((name.rpartition(".")[2].replace("_", " "), abs(value)) for name, value in _numbers(folder.config))
    return any(
        value > (_ALWAYS_FITS if _POSITIONS.search(leaf) else _SMALL_LENGTH)
        and value not in lengths
        and not _NO_LENGTH.search(leaf)
        for leaf, value in numbers
    )


def refuse_larger_tensors(model: PreTrainedModel, folder: CheckpointFolder) -> None:
    """Refuse a model with tensors that are larger than what lies on disk, of another shape, or of no use.

    Args:
        model: Built from the configuration, with parameters and buffers on the meta device.
        folder: The checkpoint.

    Raises:
        InputError: A tensor does not fit; names it.
    """
    buffers = dict(model.named_buffers())
    tensors = {**dict(model.named_parameters()), **buffers}
    largest = max([_SMALL, *(math.prod(tensor.shape) for tensor in folder.tensors.values())])
    larger = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.numel() > largest}
    if not larger:
        return
    sources, most_elements = find_sources(model, folder), _most_elements(folder)
    for name, shape in larger.items():
        if name in sources and (stored := sources[name].shapes[name]) != shape:
            raise shape_error(folder, sources[name].key, stored, shape)
        most = min(most_elements, _LARGEST_BUFFER) if name in buffers else most_elements
        if name not in sources and math.prod(shape) > most:
            problem = f"config.json asks for {name} of shape {list(shape)}, which does not fit the tensors on disk"
            raise InputError("model.path", folder.path, problem)


def shape_error(folder: CheckpointFolder, key: str, stored: Sequence[int], asked: Sequence[int]) -> InputError:
    """What is said of a tensor on disk that has another shape than the configuration asks for."""
    problem = f"{key} has shape {list(stored)}, the configuration asks for {list(asked)}"
    return InputError("model.path", folder.path, problem)


def _most_elements(folder: CheckpointFolder) -> int:
    """More than this no tensor has."""
    return max(sum(math.prod(tensor.shape) for tensor in folder.tensors.values()), _ALWAYS_FITS)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number in nested mappings and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
