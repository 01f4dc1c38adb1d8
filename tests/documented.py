"""Which entries of a record the page on file formats says nothing about."""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def undocumented(record: Path) -> set[str]:
    """Keys of a record, those of its entries of blocks and Linears too, that no section on this file has in backticks.

    Args:
        record: A JSON file that a run wrote.
    """
    found = json.loads(record.read_text(encoding="utf-8"))
    entries = [*found.get("blocks", []), *found.get("linears", {}).values()]
    keys = set(found) | {key for entry in entries for key in entry}
    text = (DOCS / "file_formats.md").read_text(encoding="utf-8")
    sections = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if f"`{record.name}`" in part]
    return keys - set(re.findall(r"`(\w+)`", "".join(sections)))
