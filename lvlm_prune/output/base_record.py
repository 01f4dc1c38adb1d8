"""What the run that made a checkpoint wrote about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_prune.output.names import PRUNING_RECORD, RECOVERY_RECORD


def record_of(base: Path) -> dict[str, Any]:
    """What the run that made the base wrote about it; empty where it was made by other tools.

    `dense` says from which checkpoint the base was pruned.
    """
    for name in (RECOVERY_RECORD, PRUNING_RECORD):
        if (base / name).is_file():
            try:
                record = dict(json.loads((base / name).read_text()))
            except ValueError:
                continue
            if name == PRUNING_RECORD:
                record["dense"] = {key: record.get("model", {}).get(key) for key in ("path", "folder", "fingerprint")}
            return record
    return {}
