"""What is worth a warning at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_prune.errors import one_line
from lvlm_prune.pruning.block import RareExperts


def rare_experts_line(linears: Mapping[str, Mapping[str, Any]], least_tokens: int, rare_experts: RareExperts) -> str:
    """How many matrices of experts too few tokens were sent to; empty where there are none.

    Args:
        linears: Entry of each matrix in the manifest.
        least_tokens: How many tokens would have been enough.
        rare_experts: What was done with them.
    """
    rare = [name for name, entry in linears.items() if "routed_tokens" in entry]
    if not rare:
        return ""
    done = "left dense" if rare_experts == "keep" else "pruned by magnitude"
    few = f"fewer than {least_tokens} calibration tokens"
    return f"{len(rare)} matrices of experts that {few} were sent to were {done} (the first is {rare[0]})"


def skipped_line(calibration: Mapping[str, Any]) -> str:
    """How many samples were left out; empty where none was.

    Args:
        calibration: What the manifest says of the calibration set.
    """
    skipped = calibration.get("skipped", [])
    if not skipped:
        return ""
    count, total = len(skipped), len(skipped) + calibration["num_samples"]
    line = f"{count} of {total} calibration samples could not be read and were left out"
    return (
        line
        if isinstance(skipped[0], str)
        else f"{line} (the first is {one_line(skipped[0][0])}: {one_line(skipped[0][1])})"
    )


def not_finite_line(keys: Sequence[str]) -> str:
    """Which tensors that are not pruned have NaN or infinity in them; empty where none has.

    Args:
        keys: Their names on disk.

    Example:
        >>> not_finite_line(["lm_head.weight"])
        'the input has NaN or infinity in lm_head.weight: what goes through it is broken, pruned or not'
    """
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more tensors" if len(keys) > 3 else ""
    named = f"{', '.join(keys[:3])}{more}: what goes through {'it' if len(keys) == 1 else 'them'}"
    return f"the input has NaN or infinity in {named} is broken, pruned or not"
