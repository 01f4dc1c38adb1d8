"""Whether shares are about the same everywhere: then a sentence says it better than a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME = 0.02
"""Shares of zeros that differ by less are those of one target: rows of different widths round it to whole weights."""


EQUAL = 0.005
"""The same for means over blocks, in which roundings make up for each other, and for overlaps."""


def sparsity_range(sparsity: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The lowest and the highest share of zeros.

    Args:
        sparsity: Kind of Linear -> block -> share of zeros.

    Example:
        >>> sparsity_range({"q_proj": {0: 0.59, 1: 0.6}, "up_proj": {0: 0.61}})
        {'lowest': 0.59, 'highest': 0.61}
    """
    shares = [share for blocks in sparsity.values() for share in blocks.values()]
    return {"lowest": min(shares, default=0.0), "highest": max(shares, default=0.0)}


def is_uniform(sparsity: Mapping[str, Mapping[Any, float]], within: float = _SAME) -> bool:
    """Whether a heat map of it would be one colour.

    Args:
        sparsity: Kind of Linear -> block -> share of zeros, or another share.
        within: How far apart two of them may be.

    Example:
        >>> is_uniform({"q_proj": {0: 0.59, 1: 0.6}}), is_uniform({"q_proj": {0: 0.5, 1: 0.6}})
        (True, False)
    """
    found = sparsity_range(sparsity)
    return found["highest"] - found["lowest"] < within


def has_flat_sparsities(record: Mapping[str, Any]) -> bool:
    """Whether each folder of a comparison is about as sparse in all of its blocks: a chart would be of flat lines."""
    return all(is_uniform({"all": of["all"]}, EQUAL) for of in record["sparsity"])
