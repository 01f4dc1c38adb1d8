"""What a run starts from, as its record tells it: configuration, checkpoint, data, versions, devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning
import torch
import transformers

import lvlm_prune
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
    source: dict[str, Any] = {"path": model.path, "class": type(model.model).__name__}
    if model.folder is not None:
        # Whole, so that the dense model is found from another working directory too.
        source |= {"folder": str(model.folder.path.absolute()), "fingerprint": model.folder.fingerprint()}
    return {
        "config": describe(config),
        "model": source | {"dtype": str(model.compute_dtype).removeprefix("torch.")},
        "calibration": {"source": describe(datamodule.source), "seed": datamodule.seed},
        "versions": {
            "lvlm_prune": lvlm_prune.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "transformers": transformers.__version__,
        },
        "processes": hardware.world_size,
        "device": str(hardware.device),
    }
