"""What recovery gave back, on a few samples that it did not train on: perplexity and KL against the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.errors import InputError
from lvlm_prune.module import LVLMModule
from lvlm_prune.recovery.dense import open_dense
from lvlm_prune.runs.prune.quality import SampleQuality
from lvlm_prune.runs.session import prepare_source

_SAMPLES = 8


def recovered_quality(
    base: LVLMModule,
    recovered: Path,
    datamodule: RecoveryDataModule,
    given: str,
    record: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Measure both sparse checkpoints on samples that did not train, one block in memory at a time.

    Args:
        base: The pruned model, opened.
        recovered: What was written.
        datamodule: The training set: its validation samples are taken; without any, samples of the source that it left
            out, or, where it left none out, some of those that trained.
        given: The dense checkpoint, as the user named it; empty: what the record says.
        record: What the run that made the pruned model wrote.
        device: Where blocks run.

    Returns:
        What `SampleQuality` finds of the recovered checkpoint, and as `pruned_perplexity`, `pruned_kl` and
        `pruned_agreement` of the pruned one; only `not_measured`, the reason, where that cannot be.
    """
    assert base.folder is not None
    try:
        dense = open_dense(given, base, record)
        prepare_source(dense, datamodule.source)
    except InputError:
        return {"not_measured": "the dense model is not known, or not where it was; --dense says where"}
    all_samples = CalibrationDataModule(datamodule.source, seed=datamodule.seed)
    if kept := datamodule.validation_indices:
        samples, are_others = all_samples.of(kept[:: max(len(kept) // _SAMPLES, 1)][:_SAMPLES]), True
    else:
        samples, are_others = all_samples.of(datamodule.train_indices).held_back(_SAMPLES)
    measure = SampleQuality(dense, samples, are_others, device)
    found, before = (measure(CheckpointFolder(path)) for path in (recovered, base.folder.path))
    for one in (found, before):
        if "not_measured" in one:
            return one
    return found | {f"pruned_{name}": before[name] for name in ("perplexity", "kl", "agreement")}
