"""`prune --packed_size`: the sparsity at which the packed checkpoint takes no more than it is to take.

Nothing is tried: a packed Linear is one bit per weight and its non-zero weights, so its size follows from its zeros,
and the sum over Linears from their mean, however an allocation deals the zeros out.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.units import readable_size
from lvlm_prune.packed.bitmask import mask_bytes
from lvlm_prune.packed.folder import open_checkpoint
from lvlm_prune.packed.selection import find_packable
from lvlm_prune.run import RunTrainer
from lvlm_prune.runs.prune.participants import Participants

_OPTION = "packed_size"
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# Sparsity is not computed beyond it: what is left of a Linear is nothing to rely on.
_MOST = 0.98

# Bytes of a shard's header for a packed tensor: names, dtypes, shapes and places of its parts, and its old entry.
_HEADER = 600


class PackedSize:
    """A size that the shards of a packed checkpoint are not to exceed; gives the method the sparsity for it.

    Args:
        size: Of the shards together: bytes with a unit (`4.5GB`, `800 MiB`), or a share of the dense ones (`0.6`).
        model: A checkpoint folder.
        trainer: Whose callback prunes; its sparsity is replaced.

    Attributes:
        config: The trainer's configuration with that sparsity; None where it has none.

    Raises:
        InputError: The size cannot be read, is that of the dense checkpoint or above, or too small to be reached; or
            the method's sparsity is not free.
    """

    def __init__(self, size: str, model: LVLMModule, trainer: RunTrainer) -> None:
        pruning = Participants(trainer.callbacks).pruning
        if pruning is None:
            raise InputError(_OPTION, size, "needs a pruning method")
        if not isinstance(pruning.pattern, Unstructured) or pruning.vision_sparsity is not None:
            problem = "needs a sparsity that is free: no N:M pattern, and no --pruning.vision_sparsity"
            raise InputError(_OPTION, size, problem)
        model.open()
        if model.folder is None:
            raise InputError(_OPTION, size, "needs a checkpoint folder; a model in memory is not packed")
        dense = model.folder.weight_bytes
        self.size, self.wanted = size, wanted_bytes(size, dense)
        pruning.plan(model)
        pruning.sparsity = self._sparsity(model, pruning, dense)
        self.config: dict[str, Any] | None = None
        if trainer.config:
            self.config = {**trainer.config, "pruning": {**trainer.config["pruning"], "sparsity": pruning.sparsity}}

    def _sparsity(self, model: LVLMModule, pruning: BlockwisePruning, dense: int) -> float:
        assert model.folder is not None
        packable = find_packable(model.model, model.runner.decoder, model.folder)
        if not packable:
            raise InputError(_OPTION, self.size, "the checkpoint has no Linear that can be packed")
        width, shapes = min(tensor.dtype.itemsize for tensor in packable.values()), pruning.shapes.values()
        weights = sum(rows * columns for rows, columns in shapes)
        # Where rows are compared, each may keep a part of a weight more than its share.
        more = sum(rows * (mask_bytes(columns) + width) for rows, columns in shapes) + _HEADER * len(packable)
        sparsity = math.ceil(1e4 * (dense + more - self.wanted) / (width * weights)) / 1e4
        if sparsity > _MOST:
            least = dense + more - _MOST * width * weights
            said = f"{readable_size(least)}, {least / dense:.2f} of the dense shards"
            problem = f"the smallest that {_MOST:.0%} zeros in its {len(pruning.shapes)} Linears give is {said}"
            raise InputError(_OPTION, self.size, problem)
        return sparsity

    def refuse_missed(self, folder: Path) -> None:
        """Say so if what a run packed is larger than it was to be.

        Raises:
            RunError: It is; the folder stays as it is.
        """
        if (found := open_checkpoint(folder, "output").weight_bytes) > self.wanted:
            raise RunError(f"--{_OPTION} {self.size}: {folder} takes {readable_size(found)}, and is whole otherwise")


def wanted_bytes(size: str, dense: int) -> float:
    """Bytes that a size stands for.

    Args:
        size: With a unit, or a share.
        dense: Bytes of the dense shards.

    Raises:
        InputError: It cannot be read, or is not below the dense shards'.

    Example:
        >>> wanted_bytes("0.5", 1000), wanted_bytes("4.5 kB", 10_000)
        (500.0, 4500.0)
    """
    found = re.fullmatch(rf"(\d+\.?\d*|\.\d+)(?: ?({'|'.join(_UNITS)}))?", size.strip())
    if found is None:
        problem = f"must be a size with a unit ({', '.join(_UNITS)}), for example 4.5GB, or a share, for example 0.6"
        raise InputError(_OPTION, size, problem)
    number, unit = float(found[1]), found[2]
    if not unit and not 0 < number < 1:
        raise InputError(_OPTION, size, "without a unit it is a share of the dense shards: above 0 and below 1")
    wanted = number * (_UNITS[unit] if unit else dense)
    if wanted >= dense:
        raise InputError(_OPTION, size, f"the dense shards take no more than that: {readable_size(dense)}")
    return wanted
