"""What a run starts from, as its record tells it: configuration, checkpoint, data, versions, devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning
import torch
import transformers

import lvlm_prune
from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.plugins import describe

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


def provenance(
    config: Mapping[str, Any],
    hardware: Hardware,
    model: LVLMModule,
    datamodule: CalibrationDataModule | RecoveryDataModule,
) -> dict[str, Any]:
    """What a run starts from, as plain data.

    Args:
        config: What repeats the run.
        hardware: Its devices.
        model: The opened model.
        datamodule: What the run calibrates or trains on.
    """
    source = {} if model.folder is None else origin_of(model.path, model.folder)
    kind = {"path": model.path, "class": type(model.model).__name__}
    return {
        "config": describe(config),
        "model": kind | source | {"dtype": str(model.compute_dtype).removeprefix("torch.")},
        "calibration": {"source": describe(datamodule.source), "seed": datamodule.seed},
        "versions": versions(),
        "processes": hardware.world_size,
        "device": str(hardware.device),
    }


def versions() -> dict[str, str]:
    """Version of this package and of those that decide what it computes."""
    return {package.__name__: package.__version__ for package in (lvlm_prune, torch, lightning, transformers)}


def origin_of(path: str, folder: CheckpointFolder) -> dict[str, Any]:
    """Which checkpoint something was made from: `path` as given, `folder`, `fingerprint`.

    The folder is whole, so that it is found from another working directory too.
    """
    return {"path": path, "folder": str(folder.path.absolute()), "fingerprint": folder.fingerprint()}
