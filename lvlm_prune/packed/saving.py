"""From packed modules to the tensors that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lvlm_prune.checkpoints.sources import WeightSource, WithParameters, names_when_saved
from lvlm_prune.checkpoints.sources import _revert as revert
from lvlm_prune.packed.format import Format, encode
from lvlm_prune.packed.weight import PackedWeight


def state_dict_to_save(
    model: Any, form: Format, converted: Sequence[WeightSource], unpacked: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The state dict of a model, its packed weights in the form on disk.

    Weights that are used in another form than they are stored in go back to that form first, one source at a time;
    transformers then gives all of them their names on disk.

    Args:
        model: With packed weights, all on real devices.
        form: What is written.
        converted: Sources of the weights that were converted when the model was loaded.
        unpacked: Names of weights that are packed on disk but dense in memory.
    """
    weights = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    hidden = {name + end for name in weights for end in ("", "_mask", "_shape")}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in hidden}
    of_sources = {name for source in converted for name in source.shapes}
    renamed = names_when_saved(model)
    for name, weight in weights.items():
        if name not in of_sources:
            state |= _entries(name, weight.dense(), form, renamed)
    for name in set(unpacked) & state.keys() - of_sources:
        state |= _entries(name, state[name], form, renamed)
    for source in converted:
        assert source.converter is not None
        dense = {name: weights[name].dense() if name in weights else state.pop(name) for name in source.shapes}
        asked: Any = WithParameters(model, source.shapes)
        for name, tensor in revert(asked, source.converter, dense).items():
            state |= _entries(name, tensor, form, renamed)
    return state


def _entries(name: str, dense: Tensor, form: Format, renamed: Callable[[str], str]) -> dict[str, Tensor]:
    parts = encode(dense.detach().cpu().contiguous(), form)
    if parts is None:
        return {name: dense}
    return {_name_of_part(name, end, renamed): part for end, part in parts.items()}


def _name_of_part(name: str, end: str, renamed: Callable[[str], str]) -> str:
    """A name that transformers renames to that of the packed tensor and this ending.

    Its rules are about names of parameters: one that is about the end of a name (`experts.down_proj`, on disk
    `experts.fc2.weight`) passes over `experts.down_proj_mask`, whose end must be as on disk before.

    Example:
        >>> import re
        >>> disk_name = lambda name: re.sub("^model", "lm.model", re.sub("down$", "fc2.weight", name))
        >>> _name_of_part("model.0.up.weight", "_mask", disk_name), _name_of_part("model.0.down", "_mask", disk_name)
        ('model.0.up.weight_mask', 'model.0.fc2.weight_mask')
    """
    wanted = renamed(name) + end
    own, stored = name.split("."), renamed(name).split(".")
    for kept in range(len(own), -1, -1):
        for taken in range(len(stored) + 1):
            candidate = ".".join([*own[:kept], *stored[len(stored) - taken :]]) + end
            if renamed(candidate) == wanted:
                return candidate
    raise ValueError(f"{name} cannot be saved packed, since transformers renames it; dequantize the model first")


def is_packed(model: nn.Module) -> bool:
    """Whether any weight of a model is packed."""
    return any(isinstance(module, PackedWeight) for module in model.modules())
