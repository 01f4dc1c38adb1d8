"""Which tensors of a checkpoint folder make which parameters of a model.

Names on disk and names in the model differ: families were renamed over the years, and some tensors are stored in
another form than they are used in (one matrix per expert on disk, one stack of experts in the model). transformers
knows both; this module asks it, and loads one parameter at a time where transformers loads all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.versions import VERSION_5, names_on_disk
from lvlm_prune.errors import InputError, RunError, first_line

if VERSION_5:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class WeightSource:
    """One or several tensors on disk that together make one or several tensors of the model.

    Attributes:
        keys: Name pattern to names on disk, as the converter groups them.
        converter: What makes the model's tensors from them; None where the one tensor is taken as it is.
        shapes: Name in the model to the shape that comes out.
    """

    keys: dict[str, list[str]]
    converter: WeightConverter | None
    shapes: dict[str, tuple[int, ...]]

    @property
    def key(self) -> str:
        """The first of its names on disk; the only one where there is no converter."""
        return next(iter(self.keys.values()))[0]

    def load(
        self, model: PreTrainedModel, folder: CheckpointFolder, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The model's tensors by name, on `device`; cast to `dtype` before they are converted, as transformers does."""
        if self.converter is None:
            (name,) = self.shapes
            return {name: folder.read(self.key).to(device, dtype)}
        tensors = {pattern: [folder.read(key).to(device, dtype) for key in keys] for pattern, keys in self.keys.items()}
        return _convert(model, self.converter, next(iter(self.shapes)), tensors)

    def store(self, model: PreTrainedModel, folder: CheckpointFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk, by name and in their dtype there, once `tensors` of the model replace the old ones.

        What else is stored in the same tensors on disk stays as it is, bit by bit.

        Raises:
            RunError: transformers does not know the way back to the form on disk.
        """
        dtype = folder[self.key].torch_dtype
        fresh = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
        if self.converter is None:
            (tensor,) = fresh.values()
            return {self.key: tensor}
        all_fresh = {**self.load(model, folder, "cpu", dtype), **fresh}
        return _match_to_keys(_revert(model, self.converter, all_fresh), self.keys, folder)


def find_sources(model: PreTrainedModel, folder: CheckpointFolder) -> dict[str, WeightSource]:
    """Name of each parameter or persistent buffer of `model` that `folder` provides, and what provides it.

    Tensors on disk that the model has no use for are left out.

    Raises:
        InputError: The checkpoint lacks a part of what is stored in several tensors.
    """
    if not VERSION_5:
        return _renamed_sources(model, folder)
    try:
        transforms = get_model_conversion_mapping(model)
    except Exception as error:  # of transformers, about names of types in the configuration
        problem = f"transformers cannot say what its tensors are called ({type(error).__name__}: {first_line(error)})"
        raise InputError("model.path", folder.path, problem) from error
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = model.state_dict()
    prefix = model.base_model_prefix

    sources: dict[str, WeightSource] = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # Stacks of experts are stacked in this order.
    for key in sorted(folder, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            # A key in the model's own spelling that a renaming for older checkpoints took for an old one.
            name, pattern = key, None
        if name not in names:
            continue
        if pattern is None:
            if name in sources:
                _refuse_second_name(folder, name, sources[name].key, key)
            sources[name] = WeightSource({key: [key]}, None, {name: folder[key].shape})
        else:
            collected[name][pattern].append(key)
    for name, keys in collected.items():
        source = _converted_source(model, folder, name, dict(keys), converter_of)
        sources.update(dict.fromkeys(source.shapes, source))
    return sources


def _refuse_second_name(folder: CheckpointFolder, name: str, first: str, second: str) -> None:
    """Of two tensors that are one in the model, only one would be pruned, and the other may be the one that is loaded.

    Copies of what is never pruned (tied embeddings) are no obstacle.

    Raises:
        InputError: They differ, or are of a block.
    """
    of_block = re.search(r"\.\d+\.", name) is not None
    if (
        of_block
        or folder[first].shape != folder[second].shape
        or not torch.equal(folder.read(first), folder.read(second))
    ):
        problem = f"holds {name} twice, as {first} and as {second}; save it anew with transformers"
        raise InputError("model.path", folder.path, problem)


def _renamed_sources(model: PreTrainedModel, folder: CheckpointFolder) -> dict[str, WeightSource]:
    """Sources of a model whose checkpoint names every parameter as the model does."""
    names = model.state_dict()
    found = {key: name if name in names else key for key, name in names_on_disk(model, folder).items()}
    return {
        name: WeightSource({key: [key]}, None, {name: folder[key].shape})
        for key, name in found.items()
        if name in names
    }


def _converted_source(
    model: PreTrainedModel,
    folder: CheckpointFolder,
    name: str,
    keys: dict[str, list[str]],
    converter_of: dict[str, WeightConverter],
) -> WeightSource:
    converter = converter_of[next(iter(keys))]
    # The conversion of meta tensors tells what comes out of the true ones.
    tensors = {
        pattern: [torch.empty(folder[key].shape, dtype=folder[key].torch_dtype, device="meta") for key in group]
        for pattern, group in keys.items()
    }
    try:
        converted = _convert(model, converter, name, tensors)
    except (ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        example = next(iter(keys.values()))[0]
        problem = f"{name} cannot be made from {example} and its like: {' '.join(str(error).split())}"
        raise InputError("model.path", folder.path, problem) from error
    return WeightSource(keys, converter, {target: tuple(tensor.shape) for target, tensor in converted.items()})


def _convert(
    model: PreTrainedModel, converter: WeightConverter, name: str, tensors: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """Run a converter of transformers on `tensors`; it empties them, so that no more than one copy lives at a time."""
    fresh: Any = deepcopy(converter)
    fresh.collected_tensors.update(tensors)
    tensors.clear()
    return _run(fresh, name, model)


def _revert(model: PreTrainedModel, converter: WeightConverter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a converter backwards; names come out as the converter spells them, before any renaming."""
    reverse: Any = deepcopy(converter).reverse_transform()
    names = []
    for name, tensor in tensors.items():
        renamed, pattern = reverse.rename_source_key(name)
        reverse.collected_tensors[pattern].append(tensor)
        names.append(renamed)
    return _run(reverse, names[0], model)


def _run(converter: Any, name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    converted = converter.convert(name, model=model, config=model.config)
    if isinstance(converted, tuple):
        # transformers 5.0 returns its errors beside the tensors.
        converted, _ = converted
    return {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}


def names_when_saved(model: PreTrainedModel) -> Callable[[str], str]:
    """What `save_pretrained` makes of a name in a state dict, where no converter has to do with it."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [renaming for renaming in renamings if isinstance(renaming, WeightRenaming)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return renamed


def without_converters(conversions: Any, sources: Iterable[WeightSource]) -> Any:
    """What `save_pretrained` still has to do with names and tensors where these sources were reverted already.

    Args:
        conversions: A model's own list; None where it has none.
        sources: What was reverted.
    """
    done = [source.converter.source_patterns for source in sources if source.converter is not None]
    return conversions and [one for one in conversions if one.source_patterns not in done]


class WithParameters:
    """A model as converters of transformers ask about it: with parameters where packed weights stand.

    Args:
        model: The model.
        shapes: Name of each packed weight to its shape as a parameter.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        """A parameter, or an empty tensor of the shape of a packed weight."""
        shape = self._shapes.get(name)
        return self._model.get_parameter(name) if shape is None else torch.empty(shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _match_to_keys(
    reverted: dict[str, Tensor], keys: dict[str, list[str]], folder: CheckpointFolder
) -> dict[str, Tensor]:
    """Give each tensor its name on disk: the one that has the most trailing parts in common with its own.

    The leading parts differ where a family was renamed; the trailing ones tell experts and projections apart.
    """
    all_keys = [key for group in keys.values() for key in group]
    matched = {max(all_keys, key=lambda key: _common_ending(key, name)): tensor for name, tensor in reverted.items()}
    for key in all_keys:
        if key not in matched or tuple(matched[key].shape) != folder[key].shape:
            raise RunError(f"{key} is stored in a form that this version of transformers cannot write")
    return matched


def _common_ending(first: str, second: str) -> int:
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
