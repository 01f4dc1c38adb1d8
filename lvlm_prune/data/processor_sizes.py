"""Sizes in a processor's files that no sample can be made with: found before a picture is scaled to them.

    "size": {"height": 10000000, ...}       a picture of 10^14 pixels
    "image_seq_length": 1000000000          a prompt of a billion placeholders

Both would fill the memory until the process is killed. What a processor merely allows at most (`longest_edge` beside
`shortest_edge`, `max_pixels`) may be as large as it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_SIDE = 2**14
LARGEST_AREA = LARGEST_SIDE**2
LARGEST_COUNT = 2**20

_SIDES = {"height", "width", "shortest_edge", "longest_edge", "image_grid_pinpoints"}
_COUNTS = re.compile(r"num_\w*tokens|(image|video)_seq_len(gth)?|max_\w*(tiles|patches|crops)|\w*_token_num")


def absurd_size(entries: Mapping[str, Any], by_area: bool) -> str | None:
    """The first size that cannot be meant, as `name: value`; None where there is none.

    Args:
        entries: What a file of the processor says.
        by_area: The family counts the pixels of a picture (its inputs have `image_grid_thw`), not those of its sides.
    """
    for name, value, beside in _numbers(entries):
        if value > _largest(name, beside, by_area):
            return f"{name}: {value}"
    return None


def _largest(name: str, beside: Mapping[str, Any], by_area: bool) -> float:
    if name == "longest_edge" and (by_area or "shortest_edge" in beside):
        return float("inf")
    if name == "min_pixels" or (name == "shortest_edge" and by_area):
        return LARGEST_AREA
    if name in _SIDES:
        return LARGEST_SIDE
    return LARGEST_COUNT if _COUNTS.fullmatch(name) else float("inf")


def _numbers(
    content: Any, name: str = "", beside: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Every number at any depth, the key that it or its list is under, and the entries beside that key."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _numbers(value, key, content)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name, beside)
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield name, content, beside or {}
