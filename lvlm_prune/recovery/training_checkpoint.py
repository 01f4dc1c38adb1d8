"""Training checkpoints that a crash or a full disk leaves whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from lvlm_prune.errors import InputError
from lvlm_prune.output.manifest import replacing

# What a run goes on from; without one of them Lightning would begin that part anew, and say nothing.
_PARTS: dict[str, type] = {
    "state_dict": dict,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the earlier one, which it replaces once it is on the disk.

    Lightning's own way holds a second copy in memory, writes it to the disk of temporary files, and copies it from
    there over the earlier one, which can stop half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: The disk is full, or cannot be written for another reason; the earlier checkpoint is still there.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # of torch, which cannot end its archive where a write failed
            raise _cause(error) from None


def refuse_unreadable(path: Path) -> None:
    """Refuse a training checkpoint that no run of this project wrote whole.

    Raises:
        InputError: It cannot be read, or lacks what a run goes on from.
    """
    try:
        with ZipFile(path) as archive:
            whole = archive.testzip() is None  # torch does not look at the checksums that it writes
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = whole and all(isinstance(content.get(name), kind) for name, kind in _PARTS.items())
        whole = whole and all(isinstance(weight, Tensor) for weight in content["state_dict"].values())
    except Exception:  # of pickle, zip archives and torch, about bytes of any kind
        whole = False
    if not whole:
        problem = f"{path} is no training checkpoint, or broken; remove it to train from the beginning"
        raise InputError("resume", "true", problem)


def _cause(error: BaseException) -> BaseException:
    """What the disk said, where an error came up while another of the disk was handled."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error
