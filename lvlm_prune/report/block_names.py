"""What blocks are called on pages: by their number, and by their part of the model where a tower was pruned too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def numbers_in_parts(record: Mapping[str, Any]) -> dict[int, int]:
    """Number of a block in the record -> its number in its own part of the model, tower or decoder.

    Args:
        record: `pruning.json` or `recovery.json`.

    Example:
        >>> blocks = [{"index": 0, "target": "vision"}, {"index": 1}, {"index": 2}]
        >>> numbers_in_parts({"blocks": blocks}), block_names({"blocks": blocks}), block_names({"blocks": blocks[1:]})
        ({0: 0, 1: 0, 2: 1}, {0: 'vision 0', 1: 'language 0', 2: 'language 1'}, {1: '1', 2: '2'})
    """
    towers = {block["index"] for block in record.get("blocks", []) if block.get("target") == "vision"}
    indices = (block["index"] for block in record.get("blocks", []))
    return {index: index if index in towers else index - len(towers) for index in indices}


def block_names(record: Mapping[str, Any]) -> dict[int, str]:
    """Number of a block in the record -> what it is called: `3`, or `vision 3` and `language 0` where both were pruned.

    Args:
        record: As for `numbers_in_parts`.
    """
    numbers = numbers_in_parts(record)
    parts = {block["index"]: block.get("target", "language") for block in record.get("blocks", [])}
    if "vision" not in parts.values():
        return {index: str(number) for index, number in numbers.items()}
    return {index: f"{parts[index]} {number}" for index, number in numbers.items()}


def kind_of_blocks(sparsity: Iterable[Mapping[str, Any]]) -> str:
    """The blocks over whose Linears a comparison sums up: `block`, or `language block` where towers were pruned too.

    Args:
        sparsity: Of each folder, kind of Linear -> block -> share of zeros, with `all`.

    Example:
        >>> kind_of_blocks([{"q_proj": {}, "all": {}}]), kind_of_blocks([{"vision fc1": {}, "q_proj": {}, "all": {}}])
        ('block', 'language block')
        >>> kind_of_blocks([{"vision fc1": {}, "all": {}}])
        'vision block'
    """
    kinds = {kind for of in sparsity for kind in of if kind != "all"}
    towers = {kind for kind in kinds if kind.startswith("vision ")}
    return "block" if not towers else "language block" if kinds - towers else "vision block"
