"""Whether two records are about the same questions, by what they say was asked."""

from __future__ import annotations

from typing import Any

OF_CONTENT = "content:"
"""How a fingerprint begins that covers what pictures hold; without it, an older version noted only their names."""


def is_of_names(asked: Any) -> bool:
    """Whether an older version noted what was asked.

    Example:
        >>> is_of_names("9a0f"), is_of_names("content:9a0f"), is_of_names(None)
        (True, False, False)
    """
    return isinstance(asked, str) and not asked.startswith(OF_CONTENT)
