"""Tables in Markdown."""

import re
from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what a cell holds is shown as it is, whatever it means in Markdown or HTML.

    Example:
        >>> print(markdown_table(["method", "60%"], [["a|b", "61.0"]]))
        | method | 60% |
        |---|---|
        | a\\|b | 61.0 |
    """
    lines = [f"| {' | '.join(map(_shown, line))} |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def short_digest(text: str) -> str:
    """The beginning of a digest, which tells it from another; other text as it is.

    Example:
        >>> short_digest("0f" * 32), short_digest("uniform")
        ('0f0f0f0f0f…', 'uniform')
    """
    return f"{text[:10]}…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _shown(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(escaped.split("\n"))
