"""Whether a checkpoint holds every tensor that a forward of its model needs.

transformers draws what is missing at random and goes on. Checkpoints on the hub do lack heads of vision towers that no
forward uses; whether one does, only the forward tells.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import PreTrainedModel

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.errors import InputError

_TOWER = re.compile(r"(^|[._])(vision|visual|image|video|audio)[^.]*\.")
# A block of a tower, or else what stands beside its blocks: `vision_model.encoder.layers.3.`, `vision_model.head.`
_PART = re.compile(r"((?:[^.]+\.)*?[^.]*(?:vision|visual|image|video|audio)[^.]*\.(?:[^.]+\.)*?\d+\.)")
# What stands between a tower and the decoder is run with every image, whatever the family calls it.
_ALWAYS_RUN = re.compile(r"embed|merger|projector|connector|resampler")
_NAMED = 3


def refuse_incomplete(model: PreTrainedModel, folder: CheckpointFolder, provided: Collection[str]) -> None:
    """Refuse a checkpoint that lacks tensors; parts of towers that are missing as a whole raise when they are run.

    Args:
        model: The model.
        folder: Its checkpoint.
        provided: Names in the model of what the checkpoint provides.

    Raises:
        InputError: Tensors are missing; names them.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in provided and not any(re.search(pattern, name) for pattern in ignored)
    ]
    there = {_part(name) for name in provided}
    in_towers = [name for name in missing if _TOWER.search(name) and not _ALWAYS_RUN.search(name)]
    whole = [name for name in in_towers if _part(name) not in there]
    needed = [name for name in missing if name not in whole]
    if needed:
        raise _lacks(folder, needed)
    for name in whole:
        module = model.get_submodule(name.rpartition(".")[0])
        module.register_forward_pre_hook(partial(_fail, _lacks(folder, [name])))


def _part(name: str) -> str:
    """The block that a tensor of a tower is in, or the module that holds it."""
    block = _PART.match(name)
    return block[1] if block else name.rpartition(".")[0]


def _lacks(folder: CheckpointFolder, names: list[str]) -> InputError:
    named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    plural = "s" if len(names) > 1 else ""
    cause = _other_names(folder.config.get("transformers_version"))
    return InputError("model.path", folder.path, f"the checkpoint lacks the tensor{plural} {named}{cause}")


def _other_names(written_by: Any) -> str:
    """Why tensors may only seem to be missing: releases of transformers name them differently."""
    here = transformers.__version__
    try:
        newer = Version(str(written_by)) > Version(here)
    except InvalidVersion:
        return ""
    return (
        f"; transformers {written_by} wrote it, which may name them differently: {here} is installed" if newer else ""
    )


def _fail(error: InputError, module: nn.Module, inputs: Any) -> None:
    raise error
