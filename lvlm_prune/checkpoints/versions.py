"""What versions of transformers do differently, as far as building, loading and calling a model goes.

Version 5 converts while it loads (one matrix per expert on disk, a stack of experts in the model) and lists what is
tied. Version 4 only renames, and ties one parameter to two places. Version 5.24 calls a cache of keys and values
`cache`, which had several names before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

VERSION_5 = int(transformers.__version__.partition(".")[0]) >= 5

_safe_operations: Any = nullcontext
if VERSION_5:
    from transformers import initialization
    from transformers.core_model_loading import build_glob_alternation
    from transformers.initialization import no_init_weights

    # Since 5.4: models ask for the numbers of a `linspace`.
    _safe_operations = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
else:
    from transformers.modeling_utils import no_init_weights

__all__ = [
    "CACHE_NAMES",
    "VERSION_5",
    "cache_argument",
    "names_on_disk",
    "names_pattern",
    "no_init_weights",
    "nothing_in_memory",
    "prepare",
    "tied_names",
]

# What a cache of keys and values is called, among arguments and outputs: the name since 5.24, then those before it.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past")


def cache_argument(output: Mapping[str, Any]) -> dict[str, Any]:
    """The cache in a model's output, under the name by which the model and its `generate` take it back.

    Args:
        output: What a transformers model returns for `use_cache=True`.

    Returns:
        The one keyword argument; none where the output has no cache.
    """
    # The new name first: asked for an old one, an output of version 5.24 warns and gives the same cache.
    name = next((name for name in CACHE_NAMES if name in output), None)
    return {} if name is None else {name: output[name]}


@contextmanager
def nothing_in_memory() -> Iterator[None]:
    """Tensors made within have shape and dtype only, as transformers' own loading builds a model."""
    with torch.device("meta"), no_init_weights(), _safe_operations():
        yield


def prepare(model: PreTrainedModel) -> None:
    """Finish a model that was built with its parameters on the meta device: buffers and ties as after loading."""
    if VERSION_5:
        for parameter in model.parameters():
            # Random numbers for tensors that hold none are drawn in Python, milliseconds each.
            parameter._is_hf_initialized = True
        model.initialize_weights()
    else:
        model.tie_weights()
        # As version 5 has them: which parameters are one is seen only as long as none of them is loaded.
        model.all_tied_weights_keys = _same_parameters(model)


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """What finds the tensors of modules of these names, as a family lists those that stay in float32."""
    if VERSION_5:
        return build_glob_alternation(sorted(names))[0]
    return re.compile("|".join(rf"((^|\.){name}($|\.))" for name in sorted(names)))


def tied_names(model: nn.Module) -> Mapping[str, list[str]]:
    """Name of a tied parameter to the names of the others that it is tied to."""
    partners: dict[str, list[str]] = defaultdict(list)
    ties = getattr(model, "all_tied_weights_keys", None)
    for first, second in (_same_parameters(model) if ties is None else ties).items():
        partners[first].append(second)
        partners[second].append(first)
    return partners


def _same_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that the model has under an earlier name too, and that name."""
    first: dict[int, str] = {}
    every = [(name, first.setdefault(id(one), name)) for name, one in model.named_parameters(remove_duplicate=False)]
    return {name: other for name, other in every if name != other}


def names_on_disk(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Key of a checkpoint to its name in the model, where nothing but names can differ (transformers 4)."""
    keys = list(keys)
    prefix: str = model.base_model_prefix
    in_keys = bool(prefix) and any(key.startswith(prefix) for key in keys)
    in_model = bool(prefix) and hasattr(model, prefix)
    mapping: Any = model._get_key_renaming_mapping(
        keys,
        model._checkpoint_conversion_mapping,
        loading_base_model_from_task_state_dict=in_keys and not in_model,
        loading_task_model_from_base_state_dict=in_model and not in_keys,
    )
    return mapping
