"""Whether the run that writes a checkpoint folder has ended: until then some of its weights are those of before.

`config.json` is held back so long, but people put one there, to have a look.
"""

import json
from pathlib import Path

from lvlm_prune.errors import InputError

# Name of a record -> what its `status` says as long as weights are missing or not yet verified.
_UNDER_WAY = {"pruning.json": ("copying", "pruning"), "recovery.json": ("training", "reconstructing", "writing")}
HELD_BACK = "config.json.unfinished"
"""What `config.json` is called until a checkpoint is whole."""


def refuse_unfinished(folder: Path, option: str) -> None:
    """Refuse a folder that a run has not finished.

    Args:
        folder: The folder, which exists.
        option: Name of the option that it came from.

    Raises:
        InputError: A record in it says so, or `config.json` is still held back.
    """
    if says := under_way(folder):
        raise _unfinished(folder, option, says)
    if (folder / HELD_BACK).is_file() and not (folder / "config.json").exists():
        raise _unfinished(folder, option, f"{HELD_BACK} is there and config.json is not")


def under_way(folder: Path) -> str:
    """What a record in a folder says of a run that has not ended; empty where none does."""
    states = {name: _status(folder / name) for name in _UNDER_WAY}
    return next((f"{name} says `{state}`" for name, state in states.items() if state in _UNDER_WAY[name]), "")


def _status(path: Path) -> str:
    """What a record says of its run; empty where there is none, or one of another tool."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return ""
    status = found.get("status") if isinstance(found, dict) else None
    return status if isinstance(status, str) else ""


def _unfinished(folder: Path, option: str, why: str) -> InputError:
    problem = f"its run is not finished ({why}); go on with it first, with --resume true"
    return InputError(option, folder, problem)
