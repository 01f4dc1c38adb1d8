"""From packed modules to the tensors that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lvlm_prune.checkpoints.sources import WeightSource
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
    for name, weight in weights.items():
        if name not in of_sources:
            state |= _entries(name, weight.dense(), form)
    for name in set(unpacked) & state.keys() - of_sources:
        state |= _entries(name, state[name], form)
    for source in converted:
        assert source.converter is not None
        dense = {name: weights[name].dense() if name in weights else state.pop(name) for name in source.shapes}
        for name, tensor in revert(model, source.converter, dense).items():
            state |= _entries(name, tensor, form)
    return state


def _entries(name: str, dense: Tensor, form: Format) -> dict[str, Tensor]:
    parts = encode(dense.detach().cpu().contiguous(), form)
    return {name: dense} if parts is None else {name + end: part for end, part in parts.items()}


def is_packed(model: nn.Module) -> bool:
    """Whether any weight of a model is packed."""
    return any(isinstance(module, PackedWeight) for module in model.modules())
