"""What a recovery notes of where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lvlm_prune.data import RecoveryDataModule
from lvlm_prune.methods.patterns import Pattern, parse_pattern
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import first_model, pruned_how
from lvlm_prune.output.provenance import origin_of, provenance
from lvlm_prune.run import Run


def recovery_provenance(
    run: Run,
    model: LVLMModule,
    data: RecoveryDataModule,
    method: str,
    base_record: Mapping[str, Any],
    dense: LVLMModule | None,
) -> dict[str, Any]:
    """Entries of `recovery.json` that are known before anything is trained.

    Args:
        run: With its configuration and hardware.
        model: The pruned model, opened.
        data: What trains, set up.
        method: Of recovery.
        base_record: The record in the pruned folder; empty where there is none.
        dense: The dense model, where the method needs it.
    """
    assert model.folder is not None
    # The embedded model was pruned on the way.
    config = {**run.config, "model": {**run.config["model"], "path": model.path}}
    found = provenance(config, run.hardware, model, data)
    record = {
        "config": found["config"],
        "model": found["model"],
        "data": found["calibration"] | {"samples": len(data.train_indices)},
        "method": method,
        "pruned": pruned_how(base_record),
        "versions": found["versions"] | {"peft": version("peft")},
        "processes": found["processes"],
        "device": found["device"],
    }
    if "first_fingerprint" in base_record:
        record |= first_model(base_record)
    if dense is not None:
        assert dense.folder is not None
        record["dense"] = origin_of(dense.path, dense.folder)
    elif "dense" in base_record:
        record["dense"] = base_record["dense"]
    return record


def pattern_of(base_record: Mapping[str, Any]) -> Pattern | None:
    """The pattern that the base was pruned to, where its record says so.

    Example:
        >>> str(pattern_of({"pattern": "2:4"})), pattern_of({"pattern": "any"})
        ('2:4', None)
    """
    text = base_record.get("pattern")
    try:
        return parse_pattern(text) if text else None
    except ValueError:
        return None
