"""What the run that made a checkpoint wrote about it, and what is passed on to the checkpoints made from that one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_prune.output.manifest import read_beside, read_run
from lvlm_prune.output.names import PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.private import is_left_out

NOTICED_ZEROS = 0.01
"""Share of zeros from which on a checkpoint is said to have been pruned; trained weights have next to none."""


def zeros_before(record: Mapping[str, Any]) -> float:
    """Share of zeros in the model that a run pruned, or whose pruning a run recovered from, before it was pruned.

    Example:
        >>> zeros_before({"input_zeros": 0.5}), zeros_before({"pruned": {"input_zeros": 0.5}}), zeros_before({})
        (0.5, 0.5, 0.0)
    """
    return float(record.get("input_zeros", record.get("pruned", {}).get("input_zeros", 0.0)))


def was_pruned_before(record: Mapping[str, Any]) -> bool:
    """Whether the model that a run pruned had been pruned before, by the run's record."""
    return zeros_before(record) >= NOTICED_ZEROS


def name_of_input(record: Mapping[str, Any]) -> str:
    """What the model that a run pruned is called where it stands beside the pruned one: `dense`, or `input`."""
    return "input" if was_pruned_before(record) else "dense"


def record_of(base: Path) -> dict[str, Any]:
    """What the run that made the base wrote about it; empty where it was made by other tools.

    `dense` says from which checkpoint the base was pruned.
    """
    for name in (RECOVERY_RECORD, PRUNING_RECORD):
        record = read_run(base / name)
        if record:
            if is_left_out(record):  # where the dense model is stands beside the folder
                record = read_beside(base, name) or record
            if name == PRUNING_RECORD:
                record["dense"] = {key: record.get("model", {}).get(key) for key in ("path", "folder", "fingerprint")}
            return record
    return {}


def first_model(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run passes on of the model that was pruned first, where its input is not that one.

    Args:
        record: Of the run that made the input; empty where it was made by other tools.

    Returns:
        `first_fingerprint`, of that model's shards; empty where nothing says it.

    Example:
        >>> first_model({"model": {"fingerprint": "5c1b"}}), first_model({"first_fingerprint": "9a0f"}), first_model({})
        ({'first_fingerprint': '5c1b'}, {'first_fingerprint': '9a0f'}, {})
    """
    found = fingerprint_of_first(record)
    return {} if found is None else {"first_fingerprint": found}


def fingerprint_of_first(record: Mapping[str, Any]) -> str | None:
    """Fingerprint of the model that was pruned first, before the one that a run wrote; None where nothing says it.

    Args:
        record: Of the run.
    """
    if "first_fingerprint" in record:
        return str(record["first_fingerprint"])
    # A recovery without a dense model may have had any.
    named = record.get("dense") or ({} if "pruned" in record else record.get("model"))
    return (named or {}).get("fingerprint")


def pruned_how(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint that was made from a pruned one keeps of how that was pruned.

    Args:
        record: Of the run that pruned it, or of one that recovered it; empty where it was made by other tools.

    Returns:
        `method` with its plugins, `calibration` (`counted`: tokens that the pool took at a block of the decoder, the
        mean), `sparsity`, `pattern`, `updates_weights` and `input_zeros`, as far as
        the record has them; empty where it does not say.
    """
    if "pruned" in record:
        return dict(record["pruned"])
    if not isinstance(record.get("method"), dict):
        return {}
    names = ("method", "sparsity", "pattern", "updates_weights", "input_zeros")
    kept = {name: record[name] for name in names if name in record}
    calibration = {**record.get("calibration", {}), **_counted(record)}
    of_samples = ("source", "seed", "num_samples", "tokens", "counted")
    return kept | {"calibration": {name: calibration[name] for name in of_samples if name in calibration}}


def _counted(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`counted`: modality -> tokens that counted at a block of the decoder, the mean; empty where there was no pool.

    Example:
        >>> _counted({"blocks": [{"pool": {"text": 4.0}}, {"pool": {"text": 4.0, "image": 1.0}}]})
        {'counted': {'text': 4.0, 'image': 0.5}}
    """
    blocks = (block for block in record.get("blocks", []) if block.get("target", "language") == "language")
    pools = [block["pool"] for block in blocks if "pool" in block]
    names = dict.fromkeys(name for pool in pools for name in pool)
    return (
        {"counted": {name: sum(pool.get(name, 0.0) for pool in pools) / len(pools) for name in names}} if pools else {}
    )
