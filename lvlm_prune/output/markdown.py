"""Tables in Markdown."""

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


def _shown(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(escaped.split("\n"))
